"""What a machine runs out of, in words: which disk, which limit, and what to type."""

from __future__ import annotations

import errno
import os
import resource
import shutil
from contextlib import suppress
from pathlib import Path

from gstds_cache.errors import GstdsError, IncompleteError, UsageError, text_of
from gstds_cache.files import mapped
from gstds_cache.files.atomic import DISK_FULL

DISK = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "permission denied",
    errno.EPERM: "the system does not permit it",
    errno.EIO: "the disk reported an error",
    errno.EFBIG: "the file may not grow that large here",
}
PATH = {errno.ENOENT, errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTEMPTY}
FILES = {errno.EMFILE, errno.ENFILE}
OURS = FILES | {errno.ENOMEM, errno.EAGAIN}
"""Errors of reading a file that say nothing about the file: the process or the machine has too little of something."""

GO_ON = "then run the same command again"


def about_us(error: BaseException) -> bool:
    """Whether an error of reading or decoding tells of too little memory, too few files, and not of what was read."""
    return isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno in OURS)


def explain(error: BaseException) -> GstdsError | None:
    """The error to show for one of the system's, or None for one that is no lack of anything.

    Args:
        error: What was raised.

    Returns:
        :class:`IncompleteError` for what the same command survives once it is mended; :class:`UsageError` for a path.
    """
    looks = (_memory, _files, _processes, _temporary_folder, _path, _disk)
    return next((told for look in looks if (told := look(error)) is not None), None)


def _memory(error: BaseException) -> GstdsError | None:
    if not out_of_memory(error):
        return None
    return IncompleteError(
        f"memory ran out: {str(error).strip().partition(chr(10))[0][:200] or type(error).__name__}",
        hint="end what else uses memory, or use less of it with a smaller `workers`, `batch_size`, `memory_budget` or "
        f"`image_size`; {GO_ON}",
    )


def _files(error: BaseException) -> GstdsError | None:
    # PyTorch's error, where its workers met the limit.
    in_worker = isinstance(error, RuntimeError) and "Too many open files" in str(error)
    if getattr(error, "errno", None) not in FILES and not in_worker:
        return None
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    more = max(4096, 4 * soft) if hard == resource.RLIM_INFINITY else min(max(4096, 4 * soft), hard)
    raised = f"raise the limit: ulimit -n {more}, " if more > soft else "raise the hard limit, as root: ulimit -Hn, "
    got = f"too many open files: this process may open {soft:,}{_of(error)}"
    return IncompleteError(got, hint=f"{raised}or use fewer `workers`; {GO_ON}")


def _processes(error: BaseException) -> GstdsError | None:
    # A pipe that is full and does not wait has the same number and other words.
    refused = getattr(error, "strerror", None) == os.strerror(errno.EAGAIN)
    if not refused and not (isinstance(error, RuntimeError) and "can't start new thread" in str(error)):
        return None
    return IncompleteError(
        "the system starts no more processes or threads for this user",
        hint=f"end some, raise the limit (ulimit -u), or use fewer `workers`; {GO_ON}",
    )


def _temporary_folder(error: BaseException) -> GstdsError | None:
    if not isinstance(error, OSError) or "No usable temporary directory" not in str(error):
        return None
    return IncompleteError(
        f"no temporary folder can be written ({error.strerror})", hint=f"set TMPDIR to a folder with room, {GO_ON}"
    )


def _path(error: BaseException) -> GstdsError | None:
    if not isinstance(error, OSError) or error.errno not in PATH:
        return None
    return UsageError(f"{error.strerror}{_of(error)}", hint="check the path")


def _disk(error: BaseException) -> GstdsError | None:
    if not isinstance(error, OSError) or error.errno not in DISK:
        return None
    return IncompleteError(f"{DISK[error.errno]}{_of(error)}", hint=_mend(error))


MEMORY = ("out of memory", "OUT_OF_MEMORY", "can't allocate memory", "Cannot allocate memory", "bad_alloc")
"""How torch, the C++ library and the CUDA driver (``CUDA_ERROR_OUT_OF_MEMORY``) say that memory ran out."""


def out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` is a way to say that memory ran out: Python's, the system's, or that of a library or device."""
    if isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM:
        return True
    text = text_of(error)
    # Told by its text, so that torch is not imported to look for torch.OutOfMemoryError, which is a RuntimeError.
    return isinstance(error, RuntimeError) and any(words in text for words in MEMORY)


def full_disk(path: str | Path) -> str:
    """The file system that ``path`` is, or would be, on, and what is free there, in words."""
    here = Path(os.path.abspath(path))  # noqa: PTH100 - resolves no links on a disk that may not answer
    existing = next((folder for folder in (here, *here.parents) if os.path.isdir(folder)), Path("/"))  # noqa: PTH112
    mount = next((folder for folder in (existing, *existing.parents) if os.path.ismount(folder)), Path("/"))
    with suppress(OSError):
        disk = shutil.disk_usage(existing)
        return f"the file system at {mount} has {disk.free / 1e6:,.1f} of {disk.total / 1e6:,.1f} MB free"
    return f"the file system at {mount}"


def _of(error: BaseException) -> str:
    names = [os.fsdecode(name) for name in (getattr(error, "filename", None),) if isinstance(name, str | bytes)]
    if not names:
        return ""
    about = f" ({full_disk(names[0])})" if getattr(error, "errno", None) in DISK_FULL else ""
    return f": {names[0]}{about}"


def _mend(error: OSError) -> str:
    name = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else ""
    temporary = mapped.folder()
    if temporary is not None and (name == temporary or name.startswith(f"{temporary}/pymp-")):
        return f"make room there, or set TMPDIR to a folder with room; {GO_ON}"
    if error.errno in DISK_FULL:
        return f"make room there, or name a place on another disk; {GO_ON}"
    if error.errno in {errno.EROFS, errno.EACCES, errno.EPERM}:
        return f"name a place that can be written, or mend that; {GO_ON}"
    return f"mend that, {GO_ON}"
