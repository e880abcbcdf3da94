"""Named objects in a local directory, written so that a name is either absent or whole.

An object is written to a temporary file beside it, flushed to the disk, renamed, and the directory flushed: after
``put`` returns, the object survives a crash of the machine; before, its name does not exist. (zarr's own LocalStore
renames but does not flush.)
"""

from __future__ import annotations

import os
import re
from contextlib import AbstractContextManager
from pathlib import Path

from gstds_cache.errors import UsageError
from gstds_cache.locking import exclusive

NAME = re.compile(r"(?!\.)[A-Za-z0-9._-]{1,64}")
LOCK = ".lock"
TEMPORARY = re.compile(r"\.[A-Za-z0-9._-]+\.(\d+)\.tmp")


class LocalTransport:
    """Objects under one directory. Keys are ``/``-separated names of ``[A-Za-z0-9._-]{1,64}``, no leading dot."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def path(self, key: str) -> Path:
        """Path of an object.

        Raises:
            UsageError: The key has a part that is no plain name, and might lead out of the store.
        """
        if not all(NAME.fullmatch(part) for part in key.split("/")):
            raise UsageError(f"object name {key!r}: expected parts of [A-Za-z0-9._-]{{1,64}} with no leading dot")
        return self.root / key

    def exists(self, key: str) -> bool:
        """Whether the object is there."""
        return self.path(key).is_file()

    def get(self, key: str) -> bytes:
        """All bytes of an object; FileNotFoundError where there is none."""
        return self.path(key).read_bytes()

    def size(self, key: str) -> int:
        """Bytes of an object; FileNotFoundError where there is none."""
        return self.path(key).stat().st_size

    def put(self, key: str, data: bytes) -> None:
        """Write an object durably, replacing one that is there."""
        temporary = self._write_temporary(key, data)
        temporary.replace(self.path(key))
        _flush_directory(temporary.parent)

    def put_if_absent(self, key: str, data: bytes) -> bool:
        """Write an object durably unless one is there; returns whether this call wrote it."""
        temporary = self._write_temporary(key, data)
        try:
            os.link(temporary, self.path(key))
        except FileExistsError:
            return False
        finally:
            temporary.unlink()
        _flush_directory(temporary.parent)
        return True

    def delete(self, key: str) -> None:
        """Delete an object; FileNotFoundError where there is none."""
        self.path(key).unlink()
        _flush_directory(self.path(key).parent)

    def collect_temporaries(self) -> int:
        """Delete what killed writers left behind; returns how many files that were."""
        count = 0
        for path in self.root.rglob(".*.tmp"):
            match = TEMPORARY.fullmatch(path.name)
            if match and (int(match[1]) == os.getpid() or not _alive(int(match[1]))):
                path.unlink(missing_ok=True)
                count += 1
        return count

    def lock(self) -> AbstractContextManager[None]:
        """The store's writer lock (:func:`gstds_cache.locking.exclusive`)."""
        return exclusive(self.root / LOCK, of=self.root)

    def _write_temporary(self, key: str, data: bytes) -> Path:
        path = self.path(key)
        if not path.parent.is_dir():
            path.parent.mkdir(parents=True, exist_ok=True)
            _flush_directory(path.parent.parent)
        temporary = path.parent / f".{path.name}.{os.getpid()}.tmp"
        try:
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
        return temporary


def _flush_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
