"""One writer at a time, or several that share, for as long as a process lives."""

from __future__ import annotations

import errno
import fcntl
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gstds_cache.errors import IncompleteError

# A record lock belongs to a process and an inode: a second one taken by the same process succeeds, and closing any
# descriptor of the file gives up the lock. So a process remembers which lock files it holds, and opens none of them.
_guard = threading.Lock()
_held: set[tuple[int, int]] = set()
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL}


def _forget() -> None:
    """In a forked child: the locks are the parent's, and so is whatever the guard was doing."""
    global _guard  # noqa: PLW0603 - a lock that another thread held at the fork is never released in the child
    _guard = threading.Lock()
    _held.clear()


os.register_at_fork(after_in_child=_forget)


@contextmanager
def exclusive(lock: Path, *, of: Path) -> Iterator[None]:
    """Hold the lock file ``lock``; it is released with the process, however that ends. The file stays.

    It keeps out other processes and other threads of this one; whoever holds it may delete the file.

    A POSIX record lock, neither flock() nor a lock of an open file description: both are inherited by forked decode
    workers, which outlive a killed parent for some seconds and would lock out the run that finishes its work.

    Args:
        lock: The lock file, made if need be.
        of: What it protects, for the error.

    Yields:
        Nothing.

    Raises:
        IncompleteError: Another process or thread holds it, or the file system has no locks.
    """
    with _holding(lock, of, fcntl.LOCK_EX):
        yield


@contextmanager
def shared(lock: Path, *, of: Path) -> Iterator[None]:
    """Hold the lock file ``lock`` beside other processes that share it; :func:`exclusive` keeps them out, and they it.

    Args:
        lock: The lock file, made if need be; never deleted by who shares it.
        of: What it protects, for the error.

    Yields:
        Nothing.

    Raises:
        IncompleteError: A process holds it alone, another thread of this one holds it, or the file system has no locks.
    """
    with _holding(lock, of, fcntl.LOCK_SH):
        yield


@contextmanager
def _holding(lock: Path, of: Path, kind: int) -> Iterator[None]:
    file, identity = _acquire(lock, of, kind)
    try:
        yield
    finally:
        with _guard:
            os.close(file)
            _held.discard(identity)


def _acquire(lock: Path, of: Path, kind: int) -> tuple[int, tuple[int, int]]:
    """Open and lock the file that has the name ``lock`` once it is locked; returns its descriptor and identity."""  # noqa: DOC501
    while True:
        with _guard:
            if _identity_at(lock) in _held:
                raise _taken(of, "another thread of this process")
            file = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                fcntl.lockf(file, kind | fcntl.LOCK_NB)
                identity = _identity(os.fstat(file))
                if _identity_at(lock) == identity:
                    _held.add(identity)
                    return file, identity
            except (BlockingIOError, PermissionError) as error:
                os.close(file)
                raise _taken(of, "another process") from error
            except OSError as error:
                os.close(file)
                if error.errno not in _NO_LOCKS:
                    raise
                raise IncompleteError(
                    f"{of}: the file system of {lock.parent} has no file locks ({error.strerror}), expected some: "
                    "without them two processes could write at once",
                    hint="write to a local folder, or have the network file system mounted with "
                    "locks; then run the same command again",
                ) from error
            os.close(file)  # deleted between open and lock, by whoever held it: it keeps nobody out any more


def _taken(of: Path, by: str) -> IncompleteError:
    return IncompleteError(
        f"{of} is being written by {by}", hint="wait for it, or stop it; then run the same command again"
    )


def _identity(stat: os.stat_result) -> tuple[int, int]:
    return stat.st_dev, stat.st_ino


def _identity_at(path: Path) -> tuple[int, int] | None:
    try:
        return _identity(path.stat())
    except FileNotFoundError:
        return None
