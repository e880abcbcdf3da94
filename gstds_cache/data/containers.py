"""Files and objects that hold many images each: Parquet and Arrow files, tar shards."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from gstds_cache.data.hash_cache import signature_of

Signature = tuple[int, int, int, int]
"""Size, times of the last change of content and of inode in nanoseconds, and inode or what else tells versions apart.
All of them -1 where nobody can tell."""


@dataclass(frozen=True)
class Container:
    """Items that lie in one file or object: while its signature stays, none of them is read again.

    A source of such items has an attribute ``containers``, a sequence of them that covers its rows in order.

    Attributes:
        name: Whose digests these are: an absolute path or URL, and what is read there, e.g. a column.
        rows: The items' rows, one after the other.
        signature: Asks for the signature that it has now. Digests are kept where it was the same before and after
            reading, and the times in it at least two seconds old (:mod:`gstds_cache.data.hash_cache`).
    """

    name: str
    rows: range
    signature: Callable[[], Signature]

    @classmethod
    def of_file(cls, path: Path, rows: range, what: str, opened: Signature) -> Container:
        """Items in a local file.

        Args:
            path: The file.
            rows: Their rows.
            what: What is read there, where the same file may give other items; no path.
            opened: The signature that it had before it was opened.

        Returns:
            The container.
        """
        absolute = str(path.absolute())
        return cls(f"{absolute}\0{what}", rows, partial(if_same, opened, partial(signature_of, absolute)))


def if_same(opened: Signature, now: Callable[[], Signature]) -> Signature:
    """The signature of what is read, which may have been opened before another took its place.

    Args:
        opened: What it was before it was opened.
        now: Asks for the one that it has now.

    Returns:
        It, if it is the same still; else one that vouches for nothing: no digest is recalled or kept by it.
    """
    return seen if (seen := now()) == opened else (-1, -1, -1, -1)
