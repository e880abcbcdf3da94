"""Digests of files, remembered from run to run, so that a file that has not changed is not opened again.

What is trusted is a signature: size, time of last change of the content (mtime) and of the inode (ctime), and inode
number. It only spares reading; a data set's identity is made of digests alone, and is the same with and without a hash
cache.

As in git's index, a signature counts only if it was at least ``RACY_NS`` old when the file was read: a file that is
changed twice within one tick of the file system's clock has the same signature both times. So a file written just now
is read again by the next run. What no signature can tell is a change made with the system's clock set back to the
nanosecond of the change before, or on a file system that keeps no ctime by someone who sets mtime back.
"""

from __future__ import annotations

import hashlib
import os
import re
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import IO

import numpy as np
from jaxtyping import Bool, Int64, UInt8

from gstds_cache.data.files import Files
from gstds_cache.data.names import Names, find
from gstds_cache.files import mapped
from gstds_cache.files.atomic import atomic_write

RACY_NS = 2_000_000_000
"""The coarsest clock of a file system in use (FAT) ticks every two seconds."""

_FORMAT = b"gstds-cache hashes 2\n"
_COUNTS = 3 * 8  # of the folder's bytes, the files, and the names' bytes
_PIECE = 1 << 20
_ROWS = 1 << 14
_NO_SIGNATURE = (-1, -1, -1, -1)
_INT64 = np.iinfo(np.int64)

Signatures = Int64[np.ndarray, "N 4"]
Digests = UInt8[np.ndarray, "N 32"]


@dataclass(frozen=True)
class _Shelf:
    """What is known of the files below one folder.

    Attributes:
        names: Their names.
        signatures: [N, 4]; a row of -1 is a file whose digest is not known.
        digests: [N, 32].
    """

    names: Names
    signatures: Signatures
    digests: Digests

    @classmethod
    def empty(cls, files: int, names: Names) -> _Shelf:
        """Nothing known of as many files."""
        return cls(names, mapped.zeros((files, 4), np.int64), mapped.zeros((files, 32), np.uint8))

    def parts(self) -> list[np.ndarray]:
        """All arrays, as bytes."""
        return [part.reshape(-1).view(np.uint8) for part in (self.signatures, self.digests, *self.names.parts())]


class HashCache:
    """Signature and SHA-256 of files, by path.

    Kept in memory, and in one file per folder of a data set if there is a place for them. The files are a
    convenience: one that is missing, damaged or cannot be written makes a run slower and nothing else. Each replaces
    the one before at once; of two processes that write, the later stays.

    Attributes:
        notes: What the user should be told about files of digests that could not be read or written.
    """

    def __init__(self, place: Path | None = None) -> None:
        """Start with what is remembered at ``place``.

        Args:
            place: The folder for the files of digests; None remembers for as long as this object lives.
        """
        self.place = place
        self.notes: tuple[str, ...] = ()
        self._shelves: dict[str, _Shelf] = {}

    def recall(self, files: Files) -> tuple[Signatures, Digests]:
        """Look up files; none of them is touched.

        Args:
            files: The files.

        Returns:
            [N, 4] the signature each had and [N, 32] the digest that goes with it; -1 and 0 for unknown ones. Both
            writable, and mapped.
        """
        shelf, names = self._shelf(_absolute(files.folder)), _lasting(files.names)
        found = _Shelf.empty(len(files), names)
        # A file that is taken for another by ``find`` has another signature, and is read again.
        rows = None if names == shelf.names else find(shelf.names, names)
        for start in range(0, len(files), _ROWS):
            part = slice(start, start + _ROWS)
            if rows is None:
                found.signatures[part], found.digests[part] = shelf.signatures[part], shelf.digests[part]
            else:
                known = rows[part] >= 0
                found.signatures[part] = -1
                found.signatures[part][known] = shelf.signatures[rows[part][known]]
                found.digests[part][known] = shelf.digests[rows[part][known]]
            mapped.release(*found.parts(), *shelf.parts())
        return found.signatures, found.digests

    def record(self, files: Files, signatures: Signatures, digests: Digests) -> None:
        """Remember digests, in place of what was known of the same files. Other files' stay while they exist.

        Args:
            files: The files.
            signatures: What :func:`signatures_of` gave for files that :func:`settled` vouches for; -1 for all others.
            digests: SHA-256 of each.
        """
        folder, names = _absolute(files.folder), _lasting(files.names)
        old = self._shelf(folder)
        others = _others(old, names, os.path.join(folder, "")) if names != old.names else []  # noqa: PTH118 - no Path
        both = Names.of(chain(names, (old.names[row] for row in others))) if others else names
        shelf = _Shelf.empty(len(both), both)
        for start in range(0, len(names), _ROWS):
            part = slice(start, min(start + _ROWS, len(names)))
            shelf.signatures[part], shelf.digests[part] = signatures[part], digests[part]
            mapped.release(signatures, digests, *shelf.parts())
        for row, other in enumerate(others, len(names)):
            shelf.signatures[row], shelf.digests[row] = old.signatures[other], old.digests[other]
        self._shelves[folder] = shelf
        if self.place is not None:
            self._write(self.place / _file_name(folder), folder, shelf)

    def _shelf(self, folder: str) -> _Shelf:
        if folder not in self._shelves:
            found = self._read(self.place / _file_name(folder), folder) if self.place is not None else None
            self._shelves[folder] = found or _Shelf.empty(0, Names.of(()))
        return self._shelves[folder]

    def _read(self, path: Path, folder: str) -> _Shelf | None:
        try:
            with path.open("rb") as file:
                there, shelf = _parse(file)
        except FileNotFoundError:
            return None
        except OSError as error:
            self._note(f"every file is hashed again: cannot read {path}: {error.strerror}")
            return None
        except ValueError:
            self._note(f"every file is hashed again: {path} is damaged, or of another version")
            return None
        # Two folders whose digests begin alike share one name; the last one has it.
        return shelf if there == os.fsencode(folder) else None

    def _write(self, path: Path, folder: str, shelf: _Shelf) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # Not flushed to the disk: what a power cut leaves does not match its digest.
            with atomic_write(path, durable=False) as file:
                _serialise(file, os.fsencode(folder), shelf)
        except OSError as error:
            self._note(f"the next run hashes every file again: cannot write {path}: {error.strerror}")

    def _note(self, text: str) -> None:
        self.notes = (*self.notes, text) if text not in self.notes else self.notes


def signatures_of(paths: Iterable[str]) -> Int64[np.ndarray, "N 4"]:
    """Size, mtime and ctime in nanoseconds, and inode of files, links followed.

    Args:
        paths: The files.

    Returns:
        [N, 4]; a row of -1 for a file that is not there or cannot be asked about.
    """
    rows = [_signature(path) for path in paths]
    try:
        return np.array(rows, np.int64).reshape(-1, 4)
    except OverflowError:  # An inode above 2**63, or a file dated after the year 2262.
        clipped = [[min(max(value, _INT64.min), _INT64.max) for value in row] for row in rows]
        return np.array(clipped, np.int64).reshape(-1, 4)


def settled(signatures: Int64[np.ndarray, "N 4"], now_ns: int) -> Bool[np.ndarray, " N"]:
    """Whether a later change must show in the signature.

    Args:
        signatures: As from :func:`signatures_of`.
        now_ns: The time at which they were taken, before the files were read.

    Returns:
        [N] False where there is no signature, or where one of its times is less than ``RACY_NS`` ago, or to come.
    """
    limit = now_ns - RACY_NS
    return np.asarray((signatures[:, 0] >= 0) & (signatures[:, 1] < limit) & (signatures[:, 2] < limit))


def _signature(path: str) -> tuple[int, int, int, int]:
    try:
        stat = os.stat(path)  # noqa: PTH116 - for a million paths
    except (OSError, ValueError):
        return _NO_SIGNATURE
    return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino


def _absolute(folder: str) -> str:
    return os.path.abspath(folder or ".")  # noqa: PTH100 - resolves no links, as the paths do not


def _file_name(folder: str) -> str:
    words = re.sub(r"[^A-Za-z0-9]+", "-", os.path.basename(folder)).strip("-")[:40]  # noqa: PTH119
    return f"{words or 'files'}-{hashlib.sha256(os.fsencode(folder)).hexdigest()[:16]}.hashes"


def _lasting(names: Sequence[str]) -> Names:
    return names if isinstance(names, Names) else Names.of(names)


def _others(old: _Shelf, names: Names, prefix: str) -> array[int]:
    """Rows of ``old`` that are not in ``names``, are known, and whose files exist."""
    found, there = array("q"), find(names, old.names)
    for start in range(0, len(old.names), _ROWS):
        part = slice(start, start + _ROWS)
        rows = np.flatnonzero((there[part] < 0) & (old.signatures[part, 0] >= 0)) + start
        found.extend(row for row in rows.tolist() if os.path.lexists(prefix + old.names[row]))
        mapped.release(*old.parts(), there)
    return found


def _serialise(file: IO[bytes], folder: bytes, shelf: _Shelf) -> None:
    """Write the format's name, the SHA-256 of all that follows, three counts, the folder, and the shelf's arrays."""
    start, digest = len(_FORMAT) + 32, hashlib.sha256()
    file.seek(start)
    head = np.array([len(folder), len(shelf.names), len(shelf.names.text)], "<i8").tobytes() + folder
    digest.update(head)
    file.write(head)
    for whole in shelf.parts():
        for at in range(0, len(whole), _PIECE):
            piece = whole[at : at + _PIECE].data
            digest.update(piece)
            file.write(piece)
        mapped.release(whole)
    file.seek(0)
    file.write(_FORMAT + digest.digest())


def _parse(file: IO[bytes]) -> tuple[bytes, _Shelf]:
    """Read what :func:`_serialise` wrote.

    Raises:
        ValueError: It is something else.
    """
    size, head = os.fstat(file.fileno()).st_size, file.read(len(_FORMAT) + 32)
    counts = file.read(_COUNTS)
    folder, files, text = np.frombuffer(counts, "<i8").tolist() if len(counts) == _COUNTS else (0, 0, 0)
    expected = len(_FORMAT) + 32 + _COUNTS + folder + files * (32 + 32 + 8) + 8 + text
    if not head.startswith(_FORMAT) or min(folder, files, text) < 0 or size != expected:
        raise ValueError(f"{size} bytes")
    digest, name = hashlib.sha256(counts), file.read(folder)
    digest.update(name)
    ends, names = mapped.zeros((files + 1,), np.int64), mapped.zeros((text,), np.uint8)
    shelf = _Shelf.empty(files, Names(names.data, ends))
    for whole in (shelf.signatures, shelf.digests, ends, names):
        flat = whole.reshape(-1).view(np.uint8)
        for at in range(0, len(flat), _PIECE):
            piece = flat[at : at + _PIECE]
            piece[:] = np.frombuffer(file.read(len(piece)), np.uint8)
            digest.update(piece.data)
        mapped.release(whole)
    if head[len(_FORMAT) :] != digest.digest():
        raise ValueError("another digest")
    return name, shelf
