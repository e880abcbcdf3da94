"""What stands for recording a step in a CUDA graph on a CPU: replaying it is to take it again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

Told = Callable[[int], object]
Step = Callable[[Tensor], tuple[Tensor, ...]]


def on_cpu(replayed: Told, recorded: Told = lambda _size: None) -> Callable[..., Step]:
    """In the place of ``step_graphs.recording``; both are told the rows of a step that is replayed, or recorded."""

    def recording(step: Step, packed: Tensor, *_: Any, **_where: Any) -> Step:
        recorded(packed.shape[1])

        def replay(rows: Tensor) -> tuple[Tensor, ...]:
            replayed(packed.shape[1])
            packed.copy_(rows)
            return tuple(output.clone() for output in step(packed))

        return replay

    return recording
