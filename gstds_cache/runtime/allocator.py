"""Memory: the C allocator, told to keep what it has."""

from __future__ import annotations

import ctypes

# From glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
_KEEP = (1 << 31) - 1  # bytes; mallopt takes an int
_PAD = 64 << 20


def keep_freed_memory() -> bool:
    """Let this process reuse freed blocks instead of giving them back to the kernel at once.

    A forward pass frees and asks for blocks of many megabytes in every layer. By default glibc maps each anew, and the
    kernel clears every page of it: half of the time of the default model on two cores (benchmarks/bench_embed.py
    measures it). Peak memory stays what it was; it is held until the process ends. Called by the commands, never on
    import: it is a setting of the whole process.

    Returns:
        Whether the allocator understood; False on systems without glibc.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return all(mallopt(*setting) == 1 for setting in ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, _KEEP), (_M_TOP_PAD, _PAD)))
