"""What grows with the number of items: mapped from nameless temporary files, and so page cache, no memory of ours.

The kernel writes such pages to the disk and takes them back when memory is short, which it cannot do with memory of a
process where there is no swap. Processes that are forked share them.

The files lie in ``$TMPDIR``, else in ``/var/tmp``: ``/tmp`` is memory itself on many systems. Where there is neither,
they lie where Python puts temporary files, and without such a place in memory. They have no name, and are gone with the
process however it ends.
"""

from __future__ import annotations

import errno
import io
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
        with suppress(OSError), temporary_file() as file:
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
        OSError: The disk is full; it names the folder.
    """
    where = folder()
    if where is None:
        memory = io.BytesIO()
        write(memory)
        return memoryview(memory.getvalue())
    with tempfile.SpooledTemporaryFile(SMALL, dir=where) as file:
        try:
            write(file)
            file.flush()
        except OSError as error:
            if error.errno in {errno.ENOSPC, errno.EDQUOT} and error.filename is None:
                error.filename = where  # a file without a name says nothing of where it is
            raise
        size = file.tell()
        if size <= SMALL:
            file.seek(0)
            return memoryview(file.read())
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
        release(whole)


def release(*arrays: np.ndarray | memoryview) -> None:
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


def temporary_file() -> IO[bytes]:
    """A temporary file without a name, unbuffered.

    Returns:
        The file, open for reading and writing.

    Raises:
        FileNotFoundError: There is no folder for it.
    """
    where = folder()
    if where is None:
        raise FileNotFoundError(errno.ENOENT, "no temporary folder can be written")
    return tempfile.TemporaryFile(dir=where, buffering=0)


def folder() -> str | None:
    """Where temporary files lie: the first of ``$TMPDIR``, ``/var/tmp`` and Python's own places that can be written."""
    for path in (os.environ.get("TMPDIR"), "/var/tmp"):
        if path and os.path.isdir(path) and os.access(path, os.W_OK | os.X_OK):  # noqa: PTH112 - Path's may raise
            return path
    try:
        return tempfile.gettempdir()
    except OSError:
        return None
