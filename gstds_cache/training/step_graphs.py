"""Steps recorded in CUDA graphs: a step is one launch instead of some hundred, which take the host longer than the GPU.

A step of a batch size that comes again is recorded once and replayed from then on, with the rows and the learning rate
of each step. Where a step cannot be recorded because the host waits for the GPU in it, or the memory does not do, it is
taken as without, and a line says so. A recording that was begun and fails ends the run: that there is memory is made
sure of before.
"""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Int64
from torch import Tensor

from gstds_cache.errors import UsageError
from gstds_cache.runtime.devices import to_device
from gstds_cache.runtime.notify import log
from gstds_cache.runtime.recording import MARGIN, Outputs, Step, can_allocate, place, recording, watched, why_it_failed

EAGER = 3
"""Steps of each size that are taken without: the first ones load kernels and make the optimiser's state."""
MOST = 4
"""Sizes that are recorded."""


class StepGraphs:
    """Takes steps by replaying them.

    A step is ``len(rows)`` images, whose ``packed`` are their rows and how they are augmented, int64 [4, m]; a subclass
    of the trainer may add to that. The graphs are of one stream and share their memory: none is replayed before the one
    before has been queued.
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
        self._recorded: dict[int, Callable[[Int64[Tensor, "_ m"]], Outputs]] = {}
        self._eager: Counter[int] = Counter()  # steps of each size that were taken without
        self._refused: set[int] = set()  # sizes for which there is no room
        self._takes: dict[int, int] = {}  # bytes that a step of each size allocates
        self._held = 0  # bytes of the recordings
        self._possible, self._told = True, False
        self._rate = torch.zeros((), device=device)
        self._where = place(device)

    def ready(self, rows: int) -> bool:
        """Whether a step of so many rows is replayed; it is recorded if it was not."""
        due = self._possible and self._eager[rows] >= EAGER and rows not in self._refused
        return rows in self._recorded or (due and len(self._recorded) < MOST)

    def records(self, rows: int) -> bool:
        """Whether the next step of so many rows is recorded first, which takes a while."""
        return rows not in self._recorded and self.ready(rows)

    def take(self, packed: Int64[Tensor, "_ m"], rate: float) -> Outputs:
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
        size, rows = packed.shape[1], to_device(packed, self._device)
        if size not in self._recorded and self._has_room(size):
            self._recorded[size] = self._record(rows)
        return self._recorded[size](rows) if size in self._recorded else self._step(rows)

    def _has_room(self, rows: int) -> bool:
        """Whether a recording fits beside the others and any step that is taken without; its memory counts if so."""
        takes = self._takes.get(rows, 0)
        largest = max((took for size, took in self._takes.items() if size not in self._recorded), default=0)
        # A recording has memory of its own, which other recordings share; what is not replayed needs its own as well,
        # and a larger size may be among that.
        more = max(0, takes - self._held)
        if not can_allocate(int((largest + more) * MARGIN[0]) + MARGIN[1], self._device):
            self._refused.add(rows)
            self._tell(f"{rows:,} rows take {takes >> 20:,} MiB, and there is no room to record them as well")
            return False
        self._held += more
        return True

    @contextmanager
    def eager(self, rows: int) -> Iterator[None]:
        """A step is taken without, and the last one before a size is recorded is watched.

        If the host waits for the GPU in it, as in a network that looks at its own values, nothing more is recorded.

        Args:
            rows: Its rows.

        Yields:
            Nothing.
        """
        self._eager[rows] += 1
        if not self._possible or self._eager[rows] != EAGER or len(self._recorded) >= MOST:
            yield
            return
        with watched(self._device) as seen:
            yield
        if seen.waits:
            self._possible = False
            self._tell(f"the host waits for the GPU in them: {seen.waits[0]:.200}")
            return
        self._takes[rows] = seen.allocated
        if any(seen.allocated >= self._takes[size] for size in self._refused):
            self._refused.add(rows)

    def _tell(self, why: str) -> None:
        if not self._told:
            log(f"note: steps are not recorded in CUDA graphs: {why}")
        self._told = True

    def _record(self, packed: Int64[Tensor, "_ m"]) -> Callable[[Int64[Tensor, "_ m"]], Outputs]:
        """Record a step; none is taken.

        Raises:
            UsageError: It cannot be recorded. This process can take no more steps on that GPU.
        """
        groups = self._optimizer.param_groups
        before = [group["lr"] for group in groups]
        for group in groups:
            group["lr"] = self._rate  # read when the step is replayed
        # What is left of an earlier step's autograd graph would have gradients added on that step's stream.
        gc.collect()
        try:
            return recording(self._step, packed.clone(), self._device, **self._where)
        except RuntimeError as error:
            raise UsageError(
                f"a step cannot be recorded in a CUDA graph here: {why_it_failed(error)}",
                hint="pass `cuda_graphs=False`, in a new process; it goes on from the last checkpoint",
            ) from error
        finally:
            for group, rate in zip(groups, before, strict=True):
                group["lr"] = rate
