"""What a run is resumed from: a typed state, validated when it is read."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch

from gstds_cache.errors import IntegrityError

OPTIONAL = frozenset({"joules", "forward_samples", "feedback"})  # not in the checkpoints of the first versions


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A run after a step. Tensors, numbers and text only, so that loading one runs no code.

    Attributes:
        network: ``state_dict`` of the network.
        optimizer: ``state_dict`` of the optimiser.
        step: Steps taken.
        samples: Samples whose gradient was computed.
        loss_sum: Sum of the losses of this epoch's steps.
        loss: Mean loss of the last whole epoch; NaN in the first.
        sha: Running hash over the selection's records up to this step, hexadecimal.
        seconds: Seconds by phase, over all sessions.
        joules: Joules by phase, over all sessions; None where one had no counter.
        forward_samples: Samples that only passed forward, over all ranks. Above 0 once the running statistics of batch
            normalisation in ``network`` are re-estimated, which is after the last step; until then they are those of
            training, from which it goes on.
        feedback: The losses that candidates are drawn by (``Feedback.state``); None where rows are kept ones.
    """

    network: dict[str, torch.Tensor]
    optimizer: dict[str, Any]
    step: int
    samples: int
    loss_sum: float
    loss: float
    sha: str
    seconds: dict[str, float]
    joules: dict[str, float] | None = None
    forward_samples: int = 0
    feedback: dict[str, Any] | None = None

    def to_state(self) -> dict[str, Any]:
        """What ``torch.save`` writes: one entry a field."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @classmethod
    def from_state(cls, state: object) -> Checkpoint:
        """Check and take over what :meth:`to_state` gave, of this version or an earlier one.

        Raises:
            IntegrityError: A field is missing or of another type.
        """
        if not isinstance(state, dict):
            raise IntegrityError(f"checkpoint: got {type(state).__name__}, expected a dict")
        missing = {field.name for field in fields(cls)} - OPTIONAL - state.keys()
        if missing:
            raise IntegrityError(f"checkpoint: {', '.join(sorted(missing))} is missing, got {sorted(map(str, state))}")
        for name, kind in _KINDS.items():
            if name in state and not isinstance(state[name], kind):
                raise IntegrityError(f"checkpoint: `{name}` is {state[name]!r:.60}, expected {kind}")
        if state["step"] < 0 or state["samples"] < 0:
            raise IntegrityError(f"checkpoint: {state['step']} steps, {state['samples']} samples, expected 0 or more")
        return cls(**{field.name: state[field.name] for field in fields(cls) if field.name in state})


_KINDS: dict[str, type | tuple[type, ...]] = {
    "network": dict,
    "optimizer": dict,
    "step": int,
    "samples": int,
    "loss_sum": float,
    "loss": float,
    "sha": str,
    "seconds": dict,
    "joules": (dict, type(None)),
    "forward_samples": int,
    "feedback": (dict, type(None)),
}
