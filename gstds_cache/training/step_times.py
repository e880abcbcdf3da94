"""How long a step takes: warm-up apart, and on a GPU by its own clock, as the host runs ahead of it."""

from __future__ import annotations

import statistics
import time
from array import array

import torch

EVERY = 8  # steps between those that a GPU's clock times
MOST = 256  # steps that it times


class StepTimes:
    """Times the steps of one session.

    The first step loads and compiles kernels. Where ``torch.compile`` compiles the network, so do the first of each of
    the first two batch sizes: from the second on it compiles for any size. Steps that are recorded in a CUDA graph
    before they are taken last longer too. These steps are ``warm-up``; the host waits for them, so that nothing of
    theirs is counted to the next.

    Attributes:
        phase: ``warm-up`` or ``step``: what the step under way counts as.
    """

    phase = "step"

    def __init__(self, device: torch.device, *, compiled: bool) -> None:
        """No step was taken yet.

        Args:
            device: Where steps are computed.
            compiled: Whether the network is compiled.
        """
        self._device, self._sizes_compiled = device, 2 if compiled else 0
        self._sizes: set[int] = set()
        self._steps = 0
        self._per_sample = array("d")  # seconds, of warm steps
        self._first = 0.0  # the same of the first step
        self._timed: list[tuple[torch.cuda.Event, torch.cuda.Event, int]] = []

    def begin(self, rows: int, *, records: bool = False) -> None:
        """A step begins.

        Args:
            rows: Rows that this process takes.
            records: Whether it is recorded before it is taken.
        """
        new = rows not in self._sizes and len(self._sizes) < max(1, self._sizes_compiled)
        if new:
            self._sizes.add(rows)
        new |= records
        self.phase = "warm-up" if new else "step"
        self._events = None
        if self._device.type == "cuda" and not new and self._steps % EVERY == 1 and len(self._timed) < MOST:
            self._events = _timer(), _timer()
            self._events[0].record(torch.cuda.current_stream(self._device))
        self._begun = time.perf_counter()

    def end(self, samples: int) -> float:
        """The step was taken, or, on a GPU, everything for it was asked for.

        Args:
            samples: Samples it counts.

        Returns:
            The host's seconds, to be added to ``phase``.
        """
        if self._device.type == "cuda" and self.phase == "warm-up":
            torch.cuda.synchronize(self._device)
        seconds = time.perf_counter() - self._begun
        if self._events is not None:
            self._events[1].record(torch.cuda.current_stream(self._device))
            self._timed.append((*self._events, samples))
        if self.phase == "step" and self._device.type != "cuda":
            self._per_sample.append(seconds / samples)
        if not self._steps:
            self._first = seconds / samples
        self._steps += 1
        return seconds

    def seconds_per_sample(self) -> float | None:
        """Median over the warm steps, or the first step's where there is no other; None where none was taken."""
        for begun, ended, samples in self._timed:
            ended.synchronize()
            self._per_sample.append(begun.elapsed_time(ended) / 1e3 / samples)
        self._timed = []
        if self._per_sample:
            return statistics.median(self._per_sample)
        return self._first if self._steps else None

    _begun = 0.0
    _events: tuple[torch.cuda.Event, torch.cuda.Event] | None = None


def _timer() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
