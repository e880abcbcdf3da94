"""Steps recorded in CUDA graphs: a step is one launch instead of some hundred, which take the host longer than the GPU.

A step of a batch size that comes again is recorded once and replayed from then on, with the rows and the learning rate
of each step. What a replay computes is what was recorded, kernel for kernel. Where a step cannot be recorded, it is
taken as without: every condition is asked before, as a recording that fails leaves the GPU's random numbers unusable.

PyTorch's rules for what may be recorded: https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeAlias

import torch
from jaxtyping import Int64
from torch import Tensor

from gstds_cache.errors import UsageError
from gstds_cache.runtime.devices import free_memory, to_device
from gstds_cache.runtime.notify import log

EAGER = 3
"""Steps of each size that are taken without: the first ones load kernels and make the optimiser's state."""
MOST = 4
"""Sizes that are recorded; each has activations of its own in the GPU's memory."""

Outputs: TypeAlias = tuple[Tensor, ...]
Step: TypeAlias = Callable[[Tensor], Outputs]


def recordable(device: torch.device) -> bool:
    """Whether steps can be recorded on that device."""
    return device.type == "cuda"


class StepGraphs:
    """Takes steps by replaying them.

    A step is ``len(rows)`` images, whose ``packed`` are their rows and how they are augmented, int64 [4, m].
    """

    def __init__(self, step: Step, optimizer: torch.optim.Optimizer, device: torch.device) -> None:
        """Nothing is recorded yet.

        Args:
            step: Takes a whole step on the device: forward, backward and the optimiser, for ``packed`` there. It reads
                nothing of the host's that changes from step to step but the optimiser's learning rate.
            optimizer: The optimiser, whose groups all have one learning rate; fused, so that this may be a tensor.
            device: A GPU.
        """
        self._step, self._optimizer, self._device = step, optimizer, device
        self._recorded: dict[int, Callable[[Int64[Tensor, "4 m"]], Outputs]] = {}
        self._eager: Counter[int] = Counter()  # steps of each size that were taken without
        self._rate = torch.zeros((), device=device)
        self._possible = True

    def ready(self, rows: int) -> bool:
        """Whether a step of so many rows is to be replayed; it is recorded if it was not."""
        if rows in self._recorded:
            return True
        enough = self._possible and self._eager[rows] >= EAGER and len(self._recorded) < MOST
        return enough and self._fits()

    def records(self, rows: int) -> bool:
        """Whether the next step of so many rows is recorded first, which takes a while."""
        return rows not in self._recorded and self.ready(rows)

    def take(self, packed: Int64[Tensor, "4 m"], rate: float) -> Outputs:
        """Take a step that is :meth:`ready`.

        Args:
            packed: On the host.
            rate: The step's learning rate.

        Returns:
            What the step returns, in memory that the next one leaves alone.

        Raises:
            UsageError: It cannot be recorded. This process can take no more steps on that GPU.
        """
        self._rate.fill_(rate)
        replay, rows = self._recorded.get(packed.shape[1]), to_device(packed, self._device)
        if replay is None:
            replay = self._recorded[packed.shape[1]] = self._record(rows)
        return replay(rows)

    @contextmanager
    def eager(self, rows: int) -> Iterator[None]:
        """A step is taken without. The last one before recording is watched: if the host waits for the GPU in it, as in
        a network that looks at its own values, none is recorded.
        """  # noqa: D205
        self._eager[rows] += 1
        if not self._possible or self._eager[rows] != EAGER:
            yield
            return
        with waits(self._device) as found:
            yield
        if found:
            self._possible = False
            log(f"note: steps are not recorded in CUDA graphs, as the network waits for the GPU: {found[0]:.200}")

    def _fits(self) -> bool:
        """Whether there is room for as much again as steps have taken: replays have memory of their own."""
        if self._device.type != "cuda":
            return True
        return free_memory(self._device) > torch.cuda.max_memory_allocated(self._device)

    def _record(self, packed: Int64[Tensor, "4 m"]) -> Callable[[Int64[Tensor, "4 m"]], Outputs]:
        """Record a step; none is taken.

        Raises:
            UsageError: It cannot be recorded. This process can take no more steps on that GPU.
        """
        groups = self._optimizer.param_groups
        before = [group["lr"] for group in groups]
        for group in groups:
            group["lr"] = self._rate  # read when the step is replayed
        try:
            return recording(self._step, packed.clone(), self._device)
        except RuntimeError as error:
            raise UsageError(
                f"`cuda_graphs`: a step cannot be recorded in a CUDA graph here: {str(error).partition(chr(10))[0]}",
                hint="pass `cuda_graphs=False`, in a new process; it goes on from the last checkpoint",
            ) from error
        finally:
            for group, rate in zip(groups, before, strict=True):
                group["lr"] = rate


def recording(step: Step, packed: Tensor, device: torch.device) -> Callable[[Tensor], Outputs]:
    """Record ``step``.

    Args:
        step: What is recorded.
        packed: Its input, which every replay overwrites.
        device: The GPU.

    Returns:
        Replays it with another input.
    """
    graph = torch.cuda.CUDAGraph()
    # Other threads may ask the driver for memory meanwhile: they are not recorded, and not forbidden.
    with torch.cuda.device(device), torch.cuda.graph(graph, capture_error_mode="thread_local"):
        outputs = step(packed)

    def replay(rows: Tensor) -> Outputs:
        packed.copy_(rows)
        graph.replay()
        return tuple(output.clone() for output in outputs)

    return replay


@contextmanager
def waits(device: torch.device) -> Iterator[list[str]]:
    """Where the host waits for the GPU in what is done meanwhile; known at its end.

    Yields:
        Warnings of PyTorch, one for each place.
    """
    found: list[str] = []
    if device.type != "cuda":
        yield found
        return
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode(before)
    for warning in caught:
        if "synchronizing CUDA operation" in str(warning.message):
            found.append(f"{warning.filename}:{warning.lineno}")
        elif "prototype" not in str(warning.message):
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
