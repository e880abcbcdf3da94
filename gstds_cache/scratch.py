"""What grows with the number of items: mapped from nameless temporary files, and so page cache, no memory of ours.

The kernel writes such pages to the disk and takes them back when memory is short, which it cannot do with memory of a
process where there is no swap. Processes that are forked share them.

The files lie in ``$TMPDIR``, else in ``/var/tmp``: ``/tmp`` is memory itself on many systems. They have no name, and
are gone with the process however it ends.
"""

from __future__ import annotations

import math
import mmap
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import IO, Any

import numpy as np

SMALL = 1 << 16
"""Bytes up to which memory is taken: a map is four kilobytes at least, and a file descriptor."""


PIECE = 1 << 20


def zeros(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An array of zeros, writable.

    Args:
        shape: Its shape.
        dtype: Its dtype.

    Returns:
        A mapped array; one in memory where it is small, or where the disk has no room.
    """
    size = math.prod(shape) * np.dtype(dtype).itemsize
    if size > SMALL:
        with suppress(OSError), tempfile.TemporaryFile(dir=_folder()) as file:
            # Blocks are set aside first: a write to a map that the disk has no room for would end the process.
            os.posix_fallocate(file.fileno(), 0, size)
            return np.frombuffer(mmap.mmap(file.fileno(), size), dtype).reshape(shape)
    return np.zeros(shape, dtype)


def written(write: Callable[[IO[bytes]], None]) -> memoryview:
    """What ``write`` writes to the file that it is given.

    Args:
        write: Writes from the beginning to the end.

    Returns:
        All of it, read-only, mapped; from memory where it is small.

    Raises:
        OSError: The disk is full.
    """
    with tempfile.SpooledTemporaryFile(SMALL, dir=_folder()) as file:
        write(file)
        size = file.tell()
        if size <= SMALL:
            file.seek(0)
            return memoryview(file.read())
        file.flush()
        return memoryview(mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ))


def pieces(data: bytes | memoryview) -> Iterator[bytes | memoryview]:
    """Cut ``data``, so that no more than a piece of a map is in memory at a time.

    Yields:
        A megabyte after the other; what is no more than that, empty or not, as it is.
    """
    if len(data) <= PIECE:
        yield data
        return
    whole = memoryview(data)
    for start in range(0, len(whole), PIECE):
        yield whole[start : start + PIECE]
        let_go(whole)


def let_go(*arrays: np.ndarray | memoryview) -> None:
    """Take mapped pages out of this process; they are there again when they are touched. Others are left alone.

    The kernel would do it by itself, but only when memory is short, and until then they look like the process's.

    Args:
        arrays: What :func:`zeros` or :func:`written` gave, or views of it.
    """
    for array in arrays:
        base: Any = array
        while isinstance(base, np.ndarray):
            base = base.base
        base = base.obj if isinstance(base, memoryview) else base
        if isinstance(base, mmap.mmap):
            base.madvise(mmap.MADV_DONTNEED)


def _folder() -> str:
    return os.environ.get("TMPDIR") or ("/var/tmp" if os.access("/var/tmp", os.W_OK) else tempfile.gettempdir())
