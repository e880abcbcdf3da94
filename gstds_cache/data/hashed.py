"""What is decoded is what was hashed: items that were hashed are compared with that whenever they are read again.

A row stands under its item's hash. Hashing what was read once more takes 40 microseconds for 45 kB, next to the 3.6 ms
in which such a JPEG is decoded and resized.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Protocol, TypeVar, runtime_checkable

import numpy as np
from jaxtyping import UInt8

from gstds_cache.errors import IncompleteError, IntegrityError

S = TypeVar("S")
_CHANGED = (
    "nothing committed is lost: leave a data set as it is while it is read, and run the same command again. With "
    "another image it is another data set, and needs another store"
)


@runtime_checkable
class Hashed(Protocol):
    """A source of which it may be known what its items were when they were hashed."""

    @property
    def uri(self) -> str:
        """The data set as the user named it."""
        ...

    @property
    def ids(self) -> Sequence[str]:
        """Name of every item."""
        ...

    @property
    def hashed(self) -> UInt8[np.ndarray, "N 32"] | None:
        """SHA-256 of every item, zeros for those that could not be read; None where nothing is known."""
        ...


def as_hashed(source: S, sha256: UInt8[np.ndarray, "N 32"] | None) -> S:
    """The same data set, whose items are compared with their hashes when they are read.

    Args:
        source: The data set. One whose kind compares items by itself, or has them in memory, is returned as it is.
        sha256: Of every item's bytes; zeros for those that could not be read. None compares none.

    Returns:
        The data set. Its items raise :class:`IntegrityError` where they are others than those that were hashed, or
        could not be read then and can be now; and :class:`IncompleteError` where they could be read then and cannot
        now.
    """
    make = getattr(source, "as_hashed", None)
    same: S = source if make is None else make(sha256)
    return same


def require_same(source: Hashed, row: int, data: bytes) -> None:
    """Refuse an item's bytes that are not those that were hashed.

    Raises:
        IntegrityError: They are others, or the item could not be read when it was hashed.
    """
    if source.hashed is not None:
        require_same_digest(source, row, hashlib.sha256(data).digest())


def require_same_digest(source: Hashed, row: int, got: bytes) -> None:
    """Refuse an item by the SHA-256 of its bytes, as :func:`require_same` does by its bytes.

    Raises:
        IntegrityError: It is another, or the item could not be read when it was hashed.
    """
    if source.hashed is None:
        return
    expected = source.hashed[row].tobytes()
    if not any(expected):
        raise IntegrityError(
            f"{_item(source, row)} could not be read when it was hashed, and can be now: got SHA-256 "
            f"{got.hex()[:12]}, expected an item that cannot be read",
            hint="nothing committed is lost: run the same command again; it is hashed again then. With an image more "
            "it is another data set, and a store that was begun without it needs another place",
        )
    if got != expected:
        raise IntegrityError(
            f"{_item(source, row)} changed since it was hashed: got SHA-256 {got.hex()[:12]}, expected "
            f"{expected.hex()[:12]}",
            hint=_CHANGED,
        )


def require_same_in(source: object, row: int, data: bytes) -> None:
    """The same of an item of any data set, which may be a part of another; one that compares nothing takes any bytes.

    Raises:
        IntegrityError: They are others than those that were hashed.
    """
    while (base := getattr(source, "base", None)) is not None:
        row, source = int(source.rows[row]), base  # type: ignore[attr-defined]
    if isinstance(source, Hashed):
        require_same(source, row, data)


def require_large_before(source: Hashed, row: int, size: int) -> None:
    """Refuse to take an item for one that is too large to be read, where it was read when it was hashed.

    Raises:
        IntegrityError: It was.
    """
    if expected := _digest(source, row):
        raise IntegrityError(
            f"{_item(source, row)} changed since it was hashed: got {size} bytes, more than are read, expected SHA-256 "
            f"{expected.hex()[:12]}",
            hint=_CHANGED,
        )


def require_unread_before(source: Hashed, row: int, error: OSError) -> None:
    """Refuse to take an item for one that cannot be read, where it could be when it was hashed.

    Raises:
        IncompleteError: It could.
    """
    if _digest(source, row):
        raise IncompleteError(
            f"{_item(source, row)} could be read when it was hashed, and cannot now: "
            f"{error.strerror or str(error) or type(error).__name__}",
            hint="nothing committed is lost: see that the data set is where it was (a disk or a network folder that "
            "went away?), then run the same command again",
        ) from error


def _item(source: Hashed, row: int) -> str:
    return f"data set {source.uri!r}: item {source.ids[row]} (row {row})"


def _digest(source: Hashed, row: int) -> bytes:
    """The SHA-256 of an item; empty where it is not known, or where the item could not be read."""
    digest = b"" if source.hashed is None else source.hashed[row].tobytes()
    return digest if any(digest) else b""
