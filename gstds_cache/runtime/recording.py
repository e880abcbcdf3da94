"""CUDA graphs: what a device was asked to do is recorded once, and asked for again by one launch.

What a replay computes is what was recorded, kernel for kernel, in the same memory. Nothing can be recorded in which the
host waits for the GPU; a recording that was begun and fails leaves PyTorch's allocator and the GPU's random numbers
unusable.

PyTorch's rules for what may be recorded: https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs
"""

from __future__ import annotations

import ctypes
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, TypeAlias

import torch
from torch import Tensor

from gstds_cache.runtime.devices import with_index

MARGIN = (1.25, 64 << 20)
"""What a recording may take more than its tensors: its memory comes in blocks of its own; cuBLAS's workspace."""

Outputs: TypeAlias = tuple[Tensor, ...]
Step: TypeAlias = Callable[[Tensor], Outputs]


def recordable(device: torch.device) -> bool:
    """Whether work can be recorded on that device."""
    return device.type == "cuda"


def place(device: torch.device) -> dict[str, Any]:
    """A stream and a pool of memory for a device's graphs: torch's own stream is that of the first device it used."""
    if device.type != "cuda":
        return {}
    return {"stream": _stream_of(with_index(device)), "pool": torch.cuda.graph_pool_handle()}


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


def why_it_failed(error: Exception) -> str:
    """What went wrong in a recording, in a line. The error is kept for ever.

    What is left of the recording is in the frames of the error, and torch 2.11 ended the process where that was freed,
    after a recording that had found no memory.
    """
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(error))
    cause = error.__context__ or error  # the first one; the recording's end tells only that there was one
    return str(cause).partition("\n")[0]


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
