"""Named objects in a local directory, each either absent or whole, and durable once written.

(zarr's own LocalStore renames, and does not flush to the disk.)
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

from gstds_cache.errors import UsageError
from gstds_cache.files import mapped
from gstds_cache.files.atomic import STALE, atomic_create, atomic_write, flush_directory, make_folder
from gstds_cache.files.digest import sha256_file
from gstds_cache.files.location import Location
from gstds_cache.files.lock import exclusive, shared
from gstds_cache.store.transport import PIECE, check_key

LOCK = ".lock"
# Of this version, and of those before it, whose names end with the process number.
TEMPORARY = re.compile(r"\.[A-Za-z0-9._-]+\.(\d+)(-[0-9a-f]{8})?\.tmp")


class LocalTransport:
    """Objects under one directory (:class:`gstds_cache.store.transport.Transport`).

    Attributes:
        exclusive: Whether :meth:`lock` keeps every other writer out. Where it is shared, creating a file only if there
            is none (link) decides between several writers, as conditional writes do in a bucket.
    """

    def __init__(self, root: Path, *, shared: bool = False) -> None:
        """Take the directory.

        Args:
            root: The directory.
            shared: Whether :meth:`lock` lets other processes in that share it, on this machine or on others.
        """
        self.root, self.exclusive = root, not shared

    @property
    def location(self) -> Location:
        """The directory."""
        return Location(self.root)

    def path(self, key: str) -> Path:
        """Path of an object.

        Raises:
            UsageError: ``key`` is none, or a symbolic link on the way leads out of the store.
        """
        path = self.root / check_key(key)
        if path.parent != self.root and not path.parent.resolve().is_relative_to(self.root.resolve()):
            raise UsageError(f"object {key!r} of {self.root}: a symbolic link leads out of the store")
        return path

    def exists(self, key: str) -> bool:
        """Whether the object is there."""
        return self.path(key).is_file()

    def get(self, key: str) -> bytes:
        """All bytes of an object.

        Raises:
            FileNotFoundError: There is none.
        """
        with _no_folder(path := self.path(key)):
            return path.read_bytes()

    def pieces(self, key: str) -> Iterator[bytes]:
        """All bytes of an object, some at a time.

        Yields:
            Up to a MiB.

        Raises:
            FileNotFoundError: There is none.
        """
        with _no_folder(path := self.path(key)), path.open("rb") as file:
            while data := file.read(PIECE):
                yield data

    def sha256(self, key: str) -> str:
        """SHA-256 of an object's bytes, in memory that does not grow with it.

        Raises:
            FileNotFoundError: There is none.
        """
        with _no_folder(path := self.path(key)):
            return sha256_file(path)

    def get_many(self, keys: Sequence[str]) -> list[bytes]:
        """All bytes of several objects, in order."""
        return [self.get(key) for key in keys]

    def sizes(self, prefix: str = "") -> dict[str, int]:
        """Bytes of every object under the folder ``prefix``; names with a leading dot are no objects."""
        found = {}
        for folder, folders, files in os.walk(self.path(prefix.rstrip("/")) if prefix else self.root):
            folders[:] = [name for name in folders if not name.startswith(".")]
            for name in files:
                if not name.startswith("."):
                    path = Path(folder, name)
                    with suppress(FileNotFoundError):
                        found[path.relative_to(self.root).as_posix()] = path.stat().st_size
        return found

    def put(self, key: str, data: bytes | memoryview) -> None:
        """Write an object durably, replacing one that is there."""
        with atomic_write(self._to_write(key), durable=True, leftovers="keep") as file:
            file.writelines(mapped.pieces(data))

    def put_if_absent(self, key: str, data: bytes | memoryview) -> bool:
        """Write an object durably unless one is there; returns whether this call wrote it."""
        return atomic_create(self._to_write(key), data)

    def delete(self, key: str) -> None:
        """Delete an object; one that is not there is no error."""
        path = self.path(key)
        if path.is_dir() and not path.is_symlink():
            _remove_empty(path)
        else:
            with suppress(FileNotFoundError, NotADirectoryError):
                path.unlink()
        if path.parent.is_dir():
            flush_directory(path.parent)

    def collect_temporaries(self) -> int:
        """Delete what killed writers left behind; returns how many files that were.

        Where the lock is shared a process number may be that of a process on another machine: what was written to
        within the hour stays, until a writer that is alone comes.
        """
        count = 0
        for path in self.root.rglob(".*.tmp"):
            match = TEMPORARY.fullmatch(path.name)
            if match and (_ended(int(match[1])) if self.exclusive else _stale(path)):
                path.unlink(missing_ok=True)
                count += 1
        return count

    def lock(self) -> AbstractContextManager[None]:
        """The store's writer lock, held alone or shared (:mod:`gstds_cache.files.lock`)."""
        make_folder(self.root)
        return (exclusive if self.exclusive else shared)(self.root / LOCK, of=self.root)

    def mark_used(self) -> None:
        """Set the time of the lock file, whose content is nothing; a store that may only be read stays as it is."""
        with suppress(OSError):
            os.utime(self.root / LOCK)

    def last_used(self) -> float | None:
        """The time of the lock file: the last writer's or :meth:`mark_used`."""
        try:
            return (self.root / LOCK).stat().st_mtime
        except OSError:
            return None

    def free_bytes(self) -> int | None:
        """What the file system says is free for this user."""
        existing = next(path for path in (self.root.absolute(), *self.root.absolute().parents) if path.is_dir())
        return shutil.disk_usage(existing).free

    def _to_write(self, key: str) -> Path:
        """Path of an object that is about to be written, in a folder that exists."""
        path = self.path(key)
        make_folder(path.parent)
        if path.is_dir():
            _remove_empty(path)
        return path


@contextmanager
def _no_folder(path: Path) -> Iterator[None]:
    """A folder in the place of an object is no object.

    Yields:
        Nothing.

    Raises:
        FileNotFoundError: There is one.
    """
    try:
        yield
    except (IsADirectoryError, NotADirectoryError) as error:
        raise FileNotFoundError(errno.ENOENT, "no such object", str(path)) from error


def _remove_empty(folder: Path) -> None:
    try:
        folder.rmdir()
    except OSError as error:
        raise UsageError(
            f"{folder}: a folder with something in it is in the place of an object", hint="move it away"
        ) from error


def _stale(path: Path) -> bool:
    with suppress(FileNotFoundError):
        return time.time() - path.stat().st_mtime > STALE
    return False


def _ended(pid: int) -> bool:
    """Whether a temporary file of process ``pid`` is nobody's: that process is gone, or it is this one."""
    if pid == os.getpid():
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False
