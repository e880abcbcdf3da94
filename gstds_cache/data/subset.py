"""Some rows of another data set."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial

import numpy as np
from jaxtyping import Int64, UInt8
from PIL import Image

from gstds_cache.data.ahead import expect_rows
from gstds_cache.data.files import Files
from gstds_cache.data.hashed import as_hashed
from gstds_cache.data.names import AT_ONCE
from gstds_cache.data.source import ImageSource
from gstds_cache.files import mapped


@dataclass(frozen=True, eq=False, kw_only=True)
class Subset:
    """Some rows of another source, in their order there.

    Attributes:
        base: The whole.
        uri: The part as the user named it.
        rows: [M] row of each item in the whole.
        ids: Name of each item.
        labels: [M] class index of each item, -1 where it has none.
        notes: What the user should be told.
        estimated: Whether ``rows`` are about as many as, but not exactly those that the user named.
    """

    base: ImageSource
    uri: str
    rows: Int64[np.ndarray, " M"] = field(repr=False)
    ids: Sequence[str] = field(repr=False)
    labels: Int64[np.ndarray, " M"] = field(repr=False)
    notes: Sequence[str] = ()
    estimated: bool = False

    @property
    def kind(self) -> str:
        """The kind of the whole."""
        return self.base.kind

    @property
    def classes(self) -> Sequence[str]:
        """The classes of the whole: a part that lacks one keeps its index."""
        return self.base.classes

    @property
    def mirror_safe(self) -> bool:
        """As for the whole."""
        return self.base.mirror_safe

    @cached_property
    def files(self) -> Files | None:
        """The part's files, if the whole has files."""
        files = self.base.files
        return files and files.part(map(int, self.rows))

    def __repr__(self) -> str:
        return f"Subset({self.uri!r}, {len(self)} items)"

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def objects(self) -> Files | None:
        """The part's objects, if the whole is objects of a bucket; else its files."""
        objects = getattr(self.base, "objects", None)
        return self.files if objects is None else objects.part(map(int, self.rows))

    def expect(self, rows: Sequence[int]) -> None:
        """Tell the whole what will be read next."""
        expect_rows(self.base, [int(self.rows[row]) for row in rows])

    def payload(self, row: int) -> bytes:
        """The bytes of the part's item ``row``."""
        return self.base.payload(int(self.rows[row]))

    def image(self, row: int) -> Image.Image:
        """The part's item ``row`` in RGB."""
        return self.base.image(int(self.rows[row]))

    def as_hashed(self, sha256: UInt8[np.ndarray, "M 32"] | None) -> Subset:
        """The same part of a whole whose items are compared with their hashes, as far as they are in the part."""
        digests = None if sha256 is None else mapped.zeros((len(self.base), 32), np.uint8)
        if digests is not None:
            digests[self.rows] = sha256
        return _on(self, as_hashed(self.base, digests))

    def for_workers(self) -> Callable[[], Subset]:
        """Called in a process that is forked from this one, what this returns gives the same part of its own whole."""
        make = getattr(self.base, "for_workers", None)
        return (lambda: self) if make is None else partial(_part_of, self, make())


def _part_of(part: Subset, make: Callable[[], ImageSource]) -> Subset:
    return _on(part, make())


def _on(part: Subset, base: ImageSource) -> Subset:
    """The same part of the same whole, opened in another way; names of files that were put together are kept."""
    same = replace(part, base=base)
    if "files" in vars(part):
        vars(same)["files"] = part.files
    return same


def taken(array: np.ndarray, rows: Int64[np.ndarray, " M"]) -> np.ndarray:
    """``array[rows]``, mapped.

    Args:
        array: Any array.
        rows: Rows of it.

    Returns:
        A new array.
    """
    some = mapped.zeros((len(rows), *array.shape[1:]), array.dtype)
    for start in range(0, len(rows), AT_ONCE):
        some[start : start + AT_ONCE] = array[rows[start : start + AT_ONCE]]
        mapped.release(some, array, rows)
    return some
