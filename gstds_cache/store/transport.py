"""Named objects, wherever a store is: the one interface that everything above it is written against.

Keys are ``/``-separated names of ``[A-Za-z0-9._-]{1,64}`` with no leading dot, so that no key leads out of the store.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import IO, Protocol, runtime_checkable

from gstds_cache.errors import UsageError
from gstds_cache.files import mapped
from gstds_cache.files.location import Location

NAME = re.compile(r"(?!\.)[A-Za-z0-9._-]{1,64}")
PIECE = 1 << 20  # bytes that are read at a time where an object is not to be held whole


@runtime_checkable
class Transport(Protocol):
    """Objects of one store.

    An object is either absent or whole; once a write has returned it is durable and every later read of any process
    sees it. Reads raise FileNotFoundError for what is not there, and StoreUnavailableError where the place itself does
    not answer.
    """

    @property
    def location(self) -> Location:
        """Where the objects are."""
        ...

    @property
    def exclusive(self) -> bool:
        """Whether :meth:`lock` keeps every other writer out; where not, several may write the same shards at once."""
        ...

    def exists(self, key: str) -> bool:
        """Whether the object is there."""
        ...

    def get(self, key: str) -> bytes:
        """All bytes of an object."""
        ...

    def pieces(self, key: str) -> Iterator[bytes]:
        """All bytes of an object, some at a time, for what is not to be held whole."""
        ...

    def sha256(self, key: str) -> str:
        """SHA-256 of an object's bytes, as 64 hexadecimal digits."""
        ...

    def get_many(self, keys: Sequence[str]) -> list[bytes]:
        """All bytes of several objects, in the order of ``keys``."""
        ...

    def sizes(self, prefix: str = "") -> dict[str, int]:
        """Bytes of every object whose key begins with ``prefix`` (a folder: empty, or with a ``/`` at its end)."""
        ...

    def put(self, key: str, data: bytes | memoryview) -> None:
        """Write an object durably, replacing one that is there."""
        ...

    def put_if_absent(self, key: str, data: bytes | memoryview) -> bool:
        """Write an object durably unless one is there.

        Returns:
            Whether the object is this call's. False means that another object was there, and still is. If one with the
            same bytes was there, it may be either: a service may not know whose they are.
        """
        ...

    def delete(self, key: str) -> None:
        """Delete an object; one that is not there is no error."""
        ...

    def collect_temporaries(self) -> int:
        """Delete what killed writers left behind; returns how many leftovers that were."""
        ...

    def lock(self) -> AbstractContextManager[None]:
        """The right to write, until the block ends or the process does."""
        ...

    def mark_used(self) -> None:
        """Note that the store was used now, where that can be noted; never fails."""
        ...

    def last_used(self) -> float | None:
        """When the store was last used, in seconds since 1970, or None where nobody knows."""
        ...

    def free_bytes(self) -> int | None:
        """Bytes that still fit, or None where nobody knows."""
        ...


def check_key(key: str) -> str:
    """Return ``key`` if it is one.

    Raises:
        UsageError: A part is no plain name, and might lead out of the store.
    """
    if not all(NAME.fullmatch(part) for part in key.split("/")):
        raise UsageError(f"object name {key!r}: expected parts of [A-Za-z0-9._-]{{1,64}} with no leading dot")
    return key


def map_object(transport: Transport, key: str) -> memoryview:
    """All bytes of an object, in a temporary copy that is mapped: large ones take no memory of the process.

    Args:
        transport: Where the object is.
        key: Its name.

    Returns:
        The bytes, which stay as they are whatever becomes of the object.

    Raises:
        FileNotFoundError: There is none.
    """

    def write(file: IO[bytes]) -> None:
        for piece in transport.pieces(key):
            file.write(piece)

    return mapped.written(write)
