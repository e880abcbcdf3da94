"""SHA-256 of files, kept from run to run in an SQLite file, so that a file that has not changed is not opened again.

What is trusted is a signature: size, time of last change of the content (mtime) and of the inode (ctime), and inode
number. It only spares reading: a data set's identity is made of digests alone, and is the same with and without a
cache.

As in git's index, a signature counts only if it was at least ``RACY_NS`` old when the file was read: a file that is
changed twice within one tick of the file system's clock has the same signature both times. So a file written just now
is read again by the next run. What no signature can tell is a change made with the system's clock set back to the
nanosecond of the change before, or on a file system that keeps no ctime by someone who sets mtime back.
"""

from __future__ import annotations

import os
import sqlite3
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from itertools import chain
from pathlib import Path
from urllib.parse import quote

import numpy as np
from jaxtyping import Bool, Int64, UInt8

from gstds_cache.data.files import Files
from gstds_cache.data.names import Names
from gstds_cache.data.source import ImageSource
from gstds_cache.files import mapped

RACY_NS = 2_000_000_000
"""The coarsest clock of a file system in use (FAT) ticks every two seconds."""
FILE = "hashes.sqlite"

_FORMAT = 3
"""SQLite's ``user_version``; formats 1 and 2 were files of another kind, NAME.hashes."""
_SCHEMA = "CREATE TABLE IF NOT EXISTS files (path BLOB PRIMARY KEY, entry BLOB, crc32 INTEGER) WITHOUT ROWID"
_CONTAINED = (
    "CREATE TABLE IF NOT EXISTS contained (name BLOB, part INTEGER, entry BLOB, crc32 INTEGER, "
    "PRIMARY KEY (name, part))"
)
_SELECT = "SELECT path, entry, crc32 FROM files WHERE path"
_ENTRY = np.dtype([("signature", "<i8", 4), ("sha256", "u1", 32)])
_ROWS = 1 << 14
"""Rows that are read at a time, and written in one transaction: others wait for no longer than that takes."""
_WAIT = 60.0
"""Seconds to wait for another process that is writing."""
_NO_SIGNATURE = (-1, -1, -1, -1)
_INT64 = np.iinfo(np.int64)
# Errors of access; any other says that the file is damaged.
_NO_ACCESS = {
    getattr(sqlite3, f"SQLITE_{name}")
    for name in ("BUSY", "LOCKED", "CANTOPEN", "READONLY", "FULL", "IOERR", "PERM", "NOMEM", "PROTOCOL", "NOLFS")
}

Signatures = Int64[np.ndarray, "N 4"]
Digests = UInt8[np.ndarray, "N 32"]


class HashCache:
    """SHA-256 of files by path and signature, in a file; and of whole data sets for as long as this object lives.

    The file is a convenience: one that is missing, damaged or cannot be written makes a run slower and nothing else.
    Several processes may use it at once.

    Attributes:
        notes: What the user should be told: why the file could not be read or written.
        folder: Where the file lies, and what else is kept of data sets; None keeps nothing on disk.
    """

    def __init__(self, folder: Path | None = None) -> None:
        """Use the file in ``folder``, which need not exist; None keeps nothing on disk."""
        self.notes: tuple[str, ...] = ()
        self.folder = folder
        self._path = None if folder is None else (folder / FILE).absolute()
        self._hashed: list[tuple[ImageSource, Digests]] = []

    def hashed(self, source: ImageSource) -> Digests | None:
        """The digests given to :meth:`keep` for this very object, or None."""
        return next((digests for other, digests in self._hashed if other is source), None)

    def keep(self, source: ImageSource, digests: Digests) -> None:
        """Keep the digests of a data set's items while this object lives: its files are not asked about again."""
        self._hashed.append((source, digests))

    def recall(self, files: Files) -> tuple[Signatures, Digests]:
        """Look up files; none of them is touched.

        Args:
            files: The files.

        Returns:
            [N, 4] the signature each had and [N, 32] the digest that goes with it; -1 and 0 for unknown ones. Both
            writable, and mapped.
        """
        signatures, digests = mapped.zeros((len(files), 4), np.int64), mapped.zeros((len(files), 32), np.uint8)
        signatures[:] = -1
        if self._path is None or not os.path.lexists(self._path):
            return signatures, digests
        try:
            with _opened(self._path) as database:
                for start, paths in _paths(files):
                    rows, entries = _look_up(database, paths)
                    signatures[start + rows], digests[start + rows] = entries["signature"], entries["sha256"]
                    mapped.release(signatures, digests)
        except (OSError, sqlite3.Error) as error:
            signatures[:] = -1  # nothing in a damaged file is relied on
            self._note("every file is hashed again", error, "read")
        return signatures, digests

    def record(self, files: Files, signatures: Signatures, digests: Digests, changed: Bool[np.ndarray, " N"]) -> None:
        """Keep the digests of files in place of what was known of them.

        Args:
            files: The files.
            signatures: What :func:`signatures_of` gave for files that :func:`old_enough` vouches for; -1 for all
                others, which are forgotten.
            digests: SHA-256 of each.
            changed: Which files these are news of; of the others nothing is written.
        """
        self._write_by(lambda path: _write(path, files, signatures, digests, changed))

    def recall_contained(self, name: str, signature: tuple[int, int, int, int], digests: Digests) -> bool:
        """Look up the digests of all items of a container (:class:`gstds_cache.data.containers.Container`).

        Args:
            name: The container's.
            signature: What it is now.
            digests: [n, 32] filled in where they are known.

        Returns:
            Whether they are: for this signature and this number of items.
        """  # noqa: DOC501 - a damaged file is noted
        if self._path is None or signature[0] < 0 or not os.path.lexists(self._path):
            return False
        head = _head(signature, len(digests))
        try:
            with _opened(self._path) as database:
                database.execute(_CONTAINED)
                for part, start in enumerate(range(0, len(digests), _ROWS)):
                    asked = (os.fsencode(name), part)
                    query = "SELECT entry, crc32 FROM contained WHERE name = ? AND part = ?"
                    entry, crc32 = database.execute(query, asked).fetchone() or (head, zlib.crc32(head))
                    some = digests[start : start + _ROWS]
                    if zlib.crc32(entry) != crc32:
                        raise sqlite3.DatabaseError("another crc32")
                    if entry[: len(head)] != head or len(entry) != len(head) + some.nbytes:
                        return False
                    some[:] = np.frombuffer(entry, np.uint8, offset=len(head)).reshape(some.shape)
                    mapped.release(digests)
        except (OSError, sqlite3.Error) as error:
            self._note("every file is hashed again", error, "read")
            return False
        return True

    def record_contained(self, name: str, signature: tuple[int, int, int, int], digests: Digests) -> None:
        """Keep the digests of all items of a container in place of what was known of it.

        Args:
            name: The container's.
            signature: What it was before and after its items were read; ``old_enough`` vouches for it.
            digests: [n, 32] of its items, in order.
        """
        head, named = _head(signature, len(digests)), os.fsencode(name)

        def write(path: Path) -> None:
            path.touch()
            with _opened(path) as database:
                database.execute(_CONTAINED)
                database.execute("BEGIN IMMEDIATE")
                database.execute("DELETE FROM contained WHERE name = ?", (named,))
                for part, start in enumerate(range(0, len(digests), _ROWS)):
                    entry = head + digests[start : start + _ROWS].tobytes()
                    row = (named, part, entry, zlib.crc32(entry))
                    database.execute("INSERT INTO contained VALUES (?, ?, ?, ?)", row)
                database.execute("COMMIT")

        self._write_by(write)

    def _write_by(self, write: Callable[[Path], None]) -> None:
        """Have ``write`` write to the file; one that is damaged is begun anew."""
        if self._path is None:
            return
        for may_mend in (True, False):
            try:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                for old in self._path.parent.glob("*.hashes"):  # formats 1 and 2
                    old.unlink(missing_ok=True)
                write(self._path)
                return
            except (OSError, sqlite3.Error) as error:
                if not (may_mend and _is_damage(error)):
                    self._note("the next run hashes every file again", error, "write")
                    return
            for name in (f"{FILE}-journal", FILE):
                with suppress(OSError):
                    self._path.with_name(name).unlink()

    def _note(self, what: str, error: Exception, verb: str) -> None:
        if _is_damage(error):
            note = f"{what}: {self._path} is damaged, or of another version"
        else:
            note = f"{what}: cannot {verb} {self._path}: {getattr(error, 'strerror', None) or error}"
        self.notes = (*self.notes, note) if note not in self.notes else self.notes


@contextmanager
def _opened(path: Path) -> Iterator[sqlite3.Connection]:
    """Open the database for the length of a ``with`` block: connections must not outlive a fork.

    Yields:
        The connection; each statement is a transaction.

    Raises:
        DatabaseError: It cannot be opened, or is of another version.
    """
    address = f"file:{quote(os.fsencode(path))}?mode=rw"
    with closing(sqlite3.connect(address, uri=True, timeout=_WAIT, isolation_level=None)) as database:
        database.execute("PRAGMA synchronous = OFF")  # what a power cut leaves does not match its crc32
        (version,) = database.execute("PRAGMA user_version").fetchone()
        if version not in {0, _FORMAT}:
            raise sqlite3.DatabaseError("another version")
        if version == 0:  # an empty file
            database.execute(_SCHEMA)
            database.execute(f"PRAGMA user_version = {_FORMAT}")
        database.execute(f"{_SELECT} = x''")  # fails where the schema is damaged
        yield database


def _look_up(database: sqlite3.Connection, paths: list[bytes]) -> tuple[Int64[np.ndarray, " n"], np.ndarray]:
    """Positions of those of ``paths`` that are known, and the ``_ENTRY`` of each.

    Raises:
        DatabaseError: An entry is damaged: SQLite itself has no checksums.
    """
    positions = {path: position for position, path in enumerate(paths)}
    if paths == sorted(paths):  # as those of an image folder are
        rows: Iterable[tuple[bytes, bytes, int]] = database.execute(f"{_SELECT} BETWEEN ? AND ?", (paths[0], paths[-1]))
    else:
        rows = chain.from_iterable(database.execute(f"{_SELECT} = ?", (path,)) for path in paths)
    known, entries, sums = list[int](), list[bytes](), list[int]()
    for path, entry, crc32 in rows:
        if path in positions:
            known.append(positions[path])
            entries.append(entry)
            sums.append(crc32)
    if not set(map(type, entries)) <= {bytes} or list(map(zlib.crc32, entries)) != sums:
        raise sqlite3.DatabaseError("another crc32")
    return np.array(known, np.int64), np.frombuffer(b"".join(entries), _ENTRY)


def _write(path: Path, files: Files, signatures: Signatures, digests: Digests, changed: Bool[np.ndarray, " N"]) -> None:
    path.touch()  # A file that SQLite makes could be written by its owner alone, whatever the umask.
    with _opened(path) as database:
        for start, paths in _paths(files):
            rows = np.flatnonzero(changed[start : start + len(paths)]) + start
            entries = np.empty(len(rows), _ENTRY)
            entries["signature"], entries["sha256"] = signatures[rows], digests[rows]
            known, gone = list[tuple[bytes, bytes, int]](), list[tuple[bytes]]()
            for row, entry in zip(rows.tolist(), entries, strict=True):
                if signatures[row, 0] < 0:
                    gone.append((paths[row - start],))
                else:
                    data = entry.tobytes()
                    known.append((paths[row - start], data, zlib.crc32(data)))
            database.execute("BEGIN IMMEDIATE")
            database.executemany("DELETE FROM files WHERE path = ?", gone)
            database.executemany("INSERT OR REPLACE INTO files VALUES (?, ?, ?)", known)
            database.execute("COMMIT")
            mapped.release(signatures, digests, changed)
        if _is_local(files):
            _forget_deleted(database, _prefix(files), len(files))


def _forget_deleted(database: sqlite3.Connection, folder: bytes, files: int) -> None:
    """Delete the rows of files that no longer exist, where a folder has far more rows than files were asked for."""
    where, ends = "WHERE path > ? AND path < ?", (folder, folder[:-1] + b"0")  # "0" comes after "/"
    (rows,) = database.execute(f"SELECT count(*) FROM files {where}", ends).fetchone()
    if rows > 2 * files:
        database.create_function("lexists", 1, os.path.lexists)
        database.execute(f"DELETE FROM files {where} AND NOT lexists(path)", ends)


def _paths(files: Files) -> Iterator[tuple[int, list[bytes]]]:
    """Absolute paths, some at a time.

    Yields:
        The row of the first of them, and the paths.
    """
    prefix, names = _prefix(files), Names.of(files.names)
    for start in range(0, len(names), _ROWS):
        yield start, [prefix + name for name in names.encoded(start, start + _ROWS)]
        mapped.release(names.file)


def _prefix(files: Files) -> bytes:
    """The files' folder with a slash at its end; links are not resolved, as those in the paths are not."""
    if not _is_local(files):
        return files.folder.encode()
    return os.fsencode(os.path.join(os.path.abspath(files.folder or "."), ""))  # noqa: PTH100, PTH118


def _is_local(files: Files) -> bool:
    return not files.folder.startswith("s3://")


def _head(signature: tuple[int, int, int, int], rows: int) -> bytes:
    """What the digests of a container are kept under."""
    return np.array([*signature, rows], np.int64).tobytes()


def _is_damage(error: Exception) -> bool:
    return isinstance(error, sqlite3.Error) and getattr(error, "sqlite_errorcode", 0) & 0xFF not in _NO_ACCESS


def signatures_of(paths: Iterable[str]) -> Int64[np.ndarray, "N 4"]:
    """Size, mtime and ctime in nanoseconds, and inode of files, links followed.

    Args:
        paths: The files.

    Returns:
        [N, 4]; a row of -1 for a file that does not exist or cannot be asked about.
    """
    rows = [signature_of(path) for path in paths]
    try:
        return np.array(rows, np.int64).reshape(-1, 4)
    except OverflowError:  # An inode above 2**63, or a file dated after the year 2262.
        clipped = [[min(max(value, _INT64.min), _INT64.max) for value in row] for row in rows]
        return np.array(clipped, np.int64).reshape(-1, 4)


def old_enough(signatures: Int64[np.ndarray, "N 4"], now_ns: int) -> Bool[np.ndarray, " N"]:
    """Whether a later change must show in the signature.

    Args:
        signatures: As from :func:`signatures_of`.
        now_ns: The time at which they were taken, before the files were read.

    Returns:
        [N] False where there is no signature, or where one of its times is less than ``RACY_NS`` ago, or to come.
    """
    limit = now_ns - RACY_NS
    return np.asarray((signatures[:, 0] >= 0) & (signatures[:, 1] < limit) & (signatures[:, 2] < limit))


def signature_of(path: str) -> tuple[int, int, int, int]:
    """Size, mtime and ctime in nanoseconds, and inode of a file; -1 where it cannot be asked about."""
    try:
        stat = os.stat(path)  # noqa: PTH116 - for a million paths
    except (OSError, ValueError):
        return _NO_SIGNATURE
    return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino
