"""Steps recorded in CUDA graphs: a step is one launch instead of some hundred, which take the host longer than the GPU.

A step of a batch size that comes again is recorded once and replayed from then on, with the rows and the learning rate
of each step. What a replay computes is what was recorded, kernel for kernel. Where a step cannot be recorded because
the host waits for the GPU in it, or the memory does not do, it is taken as without, and a line says so. A recording
that was begun and fails leaves PyTorch's allocator and the GPU's random numbers unusable, and ends the run: that there
is memory is made sure of before.

PyTorch's rules for what may be recorded: https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs
"""

from __future__ import annotations

import ctypes
import gc
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, TypeAlias

import torch
from jaxtyping import Int64
from torch import Tensor

from gstds_cache.errors import UsageError
from gstds_cache.runtime.devices import to_device
from gstds_cache.runtime.notify import log

EAGER = 3
"""Steps of each size that are taken without: the first ones load kernels and make the optimiser's state."""
MOST = 4
"""Sizes that are recorded."""
MARGIN = (1.25, 64 << 20)
"""What a recording may take more than the step's tensors: its memory comes in blocks of its own; cuBLAS's workspace."""

Outputs: TypeAlias = tuple[Tensor, ...]
Step: TypeAlias = Callable[[Tensor], Outputs]


def recordable(device: torch.device) -> bool:
    """Whether steps can be recorded on that device."""
    return device.type == "cuda"


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
            # For ever: what is left of the recording is in the frames of this error, and torch 2.11 ended the process
            # where that was freed, after a recording that had found no memory.
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(error))
            cause = error.__context__ or error  # the first one; the recording's end tells only that there was one
            raise UsageError(
                f"a step cannot be recorded in a CUDA graph here: {str(cause).partition(chr(10))[0]}",
                hint="pass `cuda_graphs=False`, in a new process; it goes on from the last checkpoint",
            ) from error
        finally:
            for group, rate in zip(groups, before, strict=True):
                group["lr"] = rate


def place(device: torch.device) -> dict[str, Any]:
    """A stream and a pool of memory for a device's graphs: torch's own stream is that of the first device it used."""
    if device.type != "cuda":
        return {}
    return {"stream": _stream_of(device), "pool": torch.cuda.graph_pool_handle()}


@cache
def _stream_of(device: torch.device) -> Any:
    """One for all runs of a process: cuBLAS keeps a workspace for each stream that it was used on."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def recording(step: Step, packed: Tensor, device: torch.device, **where: Any) -> Callable[[Tensor], Outputs]:
    """Record ``step``.

    Args:
        step: What is recorded.
        packed: Its input, which every replay overwrites.
        device: The GPU.
        where: Of :func:`place`.

    Returns:
        Replays it with another input.
    """
    graph, here = torch.cuda.CUDAGraph(), torch.cuda.current_stream(device)
    # The caller's stream is the current one again also where the recording fails. Other threads may ask the driver for
    # memory meanwhile: they are not recorded, and not forbidden.
    with torch.cuda.stream(here), torch.cuda.graph(graph, capture_error_mode="thread_local", **where):
        outputs = step(packed)

    def replay(rows: Tensor) -> Outputs:
        packed.copy_(rows)
        graph.replay()
        return tuple(output.clone() for output in outputs)

    return replay


class Seen:
    """What a step did: where the host waited for the GPU, and bytes that it allocated there at most."""

    def __init__(self) -> None:
        """Nothing was seen yet."""
        self.waits: list[str] = []
        self.allocated = 0


@contextmanager
def watched(device: torch.device) -> Iterator[Seen]:
    """Watch what is done meanwhile; all is known at the end. PyTorch's peak of allocated memory begins anew.

    Yields:
        What was seen.
    """
    seen = Seen()
    if device.type != "cuda":
        yield seen
        return
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.reset_peak_memory_stats(device)
    held = torch.cuda.memory_allocated(device)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield seen
        finally:
            torch.cuda.set_sync_debug_mode(before)
    seen.allocated = torch.cuda.max_memory_allocated(device) - held
    for warning in caught:
        if "synchronizing CUDA operation" in str(warning.message):
            seen.waits.append(f"{warning.filename}:{warning.lineno}")
        elif "debug mode is a prototype" not in str(warning.message):
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)


def can_allocate(nbytes: int, device: torch.device) -> bool:
    """Whether a GPU has so many bytes for torch now: asked by taking them for a moment. A CPU is not asked."""
    if device.type != "cuda":
        return True
    torch.cuda.empty_cache()
    try:
        torch.empty(nbytes, dtype=torch.uint8, device=device)
    except torch.OutOfMemoryError:
        return False
    torch.cuda.empty_cache()
    return True
