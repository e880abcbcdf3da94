"""Digests of files, remembered from run to run, so that a file that has not changed is not opened again.

What is trusted is a signature: size, time of last change of the content (mtime) and of the inode (ctime), and inode
number. It only spares reading; a data set's identity is made of digests alone, and is the same with and without a memo.

As in git's index, a signature counts only if it was at least ``RACY_NS`` old when the file was read: a file that is
changed twice within one tick of the file system's clock has the same signature both times. So a file written just now
is read again by the next run. What no signature can tell is a change made with the system's clock set back to the
nanosecond of the change before, or on a file system that keeps no ctime by someone who sets mtime back.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Int64, UInt8

from gstds_cache.data.files import Files

RACY_NS = 2_000_000_000
"""The coarsest clock of a file system in use (FAT) ticks every two seconds."""

_FORMAT = b"gstds-cache hashes 1\n"
_NO_SIGNATURE = (-1, -1, -1, -1)
_INT64 = np.iinfo(np.int64)


@dataclass(frozen=True)
class _Shelf:
    """What is known of the files below one folder.

    Attributes:
        names: Their names, separated by zero bytes: compared whole, and split only where they differ.
        signatures: [N, 4]; a row of -1 is a file whose digest is not known.
        digests: [N, 32].
    """

    names: bytes
    signatures: Int64[np.ndarray, "N 4"]
    digests: UInt8[np.ndarray, "N 32"]


class HashMemo:
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

    def recall(self, files: Files) -> tuple[Int64[np.ndarray, "N 4"], UInt8[np.ndarray, "N 32"]]:
        """Look up files; none of them is touched.

        Args:
            files: The files.

        Returns:
            [N, 4] the signature each had and [N, 32] the digest that goes with it; -1 and 0 for unknown ones. Both
            writable.
        """
        shelf = self._shelf(_absolute(files.folder))
        if _joined(files.names) == shelf.names and len(files) == len(shelf.signatures):
            return shelf.signatures.copy(), shelf.digests.copy()
        at = {name: row for row, name in enumerate(_split(shelf.names))}
        rows = np.array([at.get(name, -1) for name in files.names], np.int64)
        signatures = np.full((len(files), 4), -1, np.int64)
        digests = np.zeros((len(files), 32), np.uint8)
        known = rows >= 0
        signatures[known], digests[known] = shelf.signatures[rows[known]], shelf.digests[rows[known]]
        return signatures, digests

    def record(self, files: Files, signatures: Int64[np.ndarray, "N 4"], digests: UInt8[np.ndarray, "N 32"]) -> None:
        """Remember digests, in place of what was known of the same files. Other files' stay while they exist.

        Args:
            files: The files.
            signatures: What :func:`signatures_of` gave for files that :func:`settled` vouches for; -1 for all others.
            digests: SHA-256 of each.
        """
        folder = _absolute(files.folder)
        old, names = self._shelf(folder), _joined(files.names)
        if names != old.names:
            asked = set(files.names)
            prefix = os.path.join(folder, "")  # noqa: PTH118 - for a million names
            kept = [
                (row, name)
                for row, name in enumerate(_split(old.names))
                if name not in asked and old.signatures[row, 0] >= 0 and os.path.lexists(prefix + name)
            ]
            if kept:
                rows = [row for row, _ in kept]
                names = _joined([*files.names, *(name for _, name in kept)])
                signatures = np.concatenate([signatures, old.signatures[rows]])
                digests = np.concatenate([digests, old.digests[rows]])
        shelf = _Shelf(names, signatures.copy(), digests.copy())
        self._shelves[folder] = shelf
        if self.place is not None:
            self._write(self.place / _file_name(folder), folder, shelf)

    def _shelf(self, folder: str) -> _Shelf:
        if folder not in self._shelves:
            empty = _Shelf(b"", np.empty((0, 4), np.int64), np.empty((0, 32), np.uint8))
            found = self._read(self.place / _file_name(folder), folder) if self.place is not None else None
            self._shelves[folder] = found or empty
        return self._shelves[folder]

    def _read(self, path: Path, folder: str) -> _Shelf | None:
        try:
            data = memoryview(path.read_bytes())
        except FileNotFoundError:
            return None
        except OSError as error:
            self._note(f"every file is hashed again: cannot read {path}: {error.strerror}")
            return None
        start = len(_FORMAT) + 32
        if data[: len(_FORMAT)] != _FORMAT or data[len(_FORMAT) : start] != hashlib.sha256(data[start:]).digest():
            self._note(f"every file is hashed again: {path} is damaged, or of another version")
            return None
        with np.load(io.BytesIO(data[start:]), allow_pickle=False) as arrays:
            if arrays["folder"].tobytes() != os.fsencode(folder):
                return None  # Two folders whose digests begin alike share one name; the last one has it.
            return _Shelf(arrays["names"].tobytes(), arrays["signatures"], arrays["digests"])

    def _write(self, path: Path, folder: str, shelf: _Shelf) -> None:
        buffer = io.BytesIO()
        np.savez(
            buffer,
            folder=np.frombuffer(os.fsencode(folder), np.uint8),
            names=np.frombuffer(shelf.names, np.uint8),
            signatures=shelf.signatures,
            digests=shelf.digests,
        )
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                file.writelines([_FORMAT, hashlib.sha256(buffer.getbuffer()).digest(), buffer.getbuffer()])
            temporary.replace(path)  # Not flushed to the disk: what a power cut leaves does not match its digest.
        except OSError as error:
            with suppress(OSError):
                temporary.unlink()
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


def _joined(names: Iterable[str]) -> bytes:
    return os.fsencode("\0".join(names))


def _split(names: bytes) -> list[str]:
    return os.fsdecode(names).split("\0") if names else []
