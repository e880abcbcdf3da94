"""A GPU that is nearly full: torch hands out no more than it has, and so many bytes."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def left(more: int) -> Iterator[None]:
    """This process may take ``more`` bytes of the first GPU's memory than its tensors have now; others as before."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    most = (torch.cuda.memory_reserved(0) + more) / torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(most, 0)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, 0)
