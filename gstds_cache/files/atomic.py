"""Writing a file so that its name has the old content or the new one, whole, however many processes write it at once.

The content goes to a temporary file beside it, which takes the name at the end. With ``durable=True`` the bytes, and
then the name, are flushed to the disk before the call returns: the file survives a crash of the machine. Without it a
crash of the machine may leave an old or empty file; the end of a process, however it comes, never does.
"""

from __future__ import annotations

import errno
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, Literal
from uuid import uuid4

from gstds_cache.files import mapped

DISK_FULL = {errno.ENOSPC, errno.EDQUOT}
STALE = 3600.0  # seconds within which whoever writes a file writes something

_TEMPORARY = re.compile(r"\.(?P<name>.+)\.\d+-[0-9a-f]{8}\.tmp", re.DOTALL)
_LENGTH = 50  # characters of the name: a file name may have 255 bytes in all

Leftovers = Literal["stale", "all", "keep"]
"""Which temporary files of killed processes to delete first: those untouched for an hour; all, where a lock keeps other
writers out; none, where the caller deletes them elsewhere."""


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Name the file in the error of a write: a disk that is full does not say which.

    Args:
        path: What is written to.

    Yields:
        Nothing.

    Raises:
        OSError: What the block raised.
    """
    try:
        yield
    except OSError as error:
        if (
            error.errno in DISK_FULL | {errno.EFBIG} and error.filename is None
        ):  # others may be of what was read meanwhile
            error.filename = os.fspath(path)
        raise


@contextmanager
def atomic_write(path: Path, *, durable: bool, leftovers: Leftovers = "stale") -> Iterator[BinaryIO]:
    """Open a new file that takes the place of ``path`` at the end of the block.

    A block left by an exception leaves ``path`` as it was. Two that write ``path`` at once write two files, and the
    last one that is whole stays. The umask decides the file's mode.

    Args:
        path: The file; its folder exists.
        durable: Whether bytes and name are flushed to the disk before this returns.
        leftovers: Which temporary files of ``path`` to delete first.

    Yields:
        The file, open for writing and reading back.

    Raises:
        OSError: It cannot be written; where the disk is full the error names ``path``.
    """
    if leftovers != "keep":
        discard_leftovers(path, alone=leftovers == "all")
    temporary = _temporary_path(path)
    try:
        with writing(path), temporary.open("w+b") as file:
            yield file
            if durable:
                file.flush()
                os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if durable:
        flush_directory(path.parent)


def atomic_create(path: Path, data: bytes | memoryview) -> bool:
    """Write a durable file unless ``path`` exists.

    Args:
        path: The file; its folder exists.
        data: Its bytes.

    Returns:
        Whether this call made the file.
    """
    temporary = _temporary_path(path)
    try:
        with writing(path), temporary.open("w+b") as file:
            file.writelines(mapped.pieces(data))
            file.flush()
            os.fsync(file.fileno())
        os.link(temporary, path)
    except FileExistsError:
        return False
    finally:
        temporary.unlink(missing_ok=True)
    flush_directory(path.parent)
    return True


def make_folder(path: Path) -> None:
    """Make a folder and those it lies in, durably: a file in a folder whose name is lost is lost."""
    for folder in reversed([folder for folder in (path, *path.parents) if not folder.is_dir()]):
        folder.mkdir(exist_ok=True)
        flush_directory(folder.parent)


def flush_directory(path: Path) -> None:
    """Flush the names in a folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def written_name(temporary: str) -> str | None:
    """The first characters of the name that a temporary file of this name was to get, or None if it is no such file."""
    match = _TEMPORARY.fullmatch(temporary)
    return match["name"] if match else None


def discard_leftovers(path: Path, *, alone: bool = False) -> None:
    """Delete temporary files of ``path`` that a killed process left.

    Args:
        path: The file.
        alone: Whether a lock keeps all others out. Else one that was written to within the hour may be another's.
    """
    now = time.time()
    with suppress(OSError), os.scandir(path.parent) as entries:
        for entry in entries:
            if written_name(entry.name) == path.name[:_LENGTH]:
                with suppress(OSError):
                    if alone or now - entry.stat().st_mtime > STALE:
                        os.unlink(entry.path)  # noqa: PTH108


def _temporary_path(path: Path) -> Path:
    # The process number tells people whose it is. It is not enough: threads share one, and containers a folder.
    return path.with_name(f".{path.name[:_LENGTH]}.{os.getpid()}-{uuid4().hex[:8]}.tmp")
