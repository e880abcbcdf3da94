"""One writer at a time, for as long as a process lives."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gstds_cache.errors import IncompleteError


@contextmanager
def exclusive(lock: Path, *, of: Path) -> Iterator[None]:
    """Hold the lock file ``lock``; it is released with the process, however that ends. The file stays.

    A POSIX record lock, not flock(): flock() is inherited by forked decode workers, which outlive a killed parent for
    some seconds and would lock out the run that finishes its work.

    Args:
        lock: The lock file, made if need be.
        of: What it protects, for the error.

    Yields:
        Nothing.

    Raises:
        IncompleteError: Another process holds it.
    """
    with lock.open("w") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            raise IncompleteError(
                f"{of} is being written by another process",
                hint="wait for it, or stop it; then run the same command again",
            ) from error
        yield
