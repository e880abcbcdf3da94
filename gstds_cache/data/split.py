"""A held-out part of any data set, decided by each item's content alone."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial

import numpy as np
from jaxtyping import Bool, Int64, UInt8
from PIL import Image

from gstds_cache.data.files import Files
from gstds_cache.data.hash_cache import HashCache
from gstds_cache.data.manifest import UNREADABLE, hash_items
from gstds_cache.data.names import Names
from gstds_cache.data.source import ImageSource
from gstds_cache.errors import DatasetError, UsageError, unknown_name

SPLITS = ("train", "test")
DEFAULT_HOLDOUT = 0.2


@dataclass(frozen=True, eq=False, kw_only=True)
class Subset:
    """Some rows of another source, in their order there."""

    base: ImageSource
    uri: str
    rows: Int64[np.ndarray, " M"] = field(repr=False)
    ids: Sequence[str] = field(repr=False)
    labels: Int64[np.ndarray, " M"] = field(repr=False)
    notes: Sequence[str] = ()

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

    def __len__(self) -> int:
        return len(self.ids)

    def payload(self, row: int) -> bytes:
        """The bytes of the part's item ``row``."""
        return self.base.payload(int(self.rows[row]))

    def image(self, row: int) -> Image.Image:
        """The part's item ``row`` in RGB."""
        return self.base.image(int(self.rows[row]))

    def for_workers(self) -> Callable[[], Subset]:
        """Called in a process that is forked from this one, what this returns gives the same part of its own whole."""
        make = getattr(self.base, "for_workers", None)
        return (lambda: self) if make is None else partial(_part_of, self, make())


def _part_of(part: Subset, make: Callable[[], ImageSource]) -> Subset:
    return replace(part, base=make())


def open_split(
    uri: str,
    params: dict[str, str],
    open_whole: Callable[[str], ImageSource],
    *,
    hash_cache: HashCache | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> ImageSource:
    """Open a source, or the part of it that ``split`` and ``holdout`` ask for.

    Args:
        uri: The data set as the user named it.
        params: Its query; ``split`` is ``train`` or ``test``, ``holdout`` the fraction held out for testing.
        open_whole: Opens the whole, given the uri.
        hash_cache: Digests remembered from before; a split is decided by the digest of every item.
        progress: Called with (items hashed, items in all) where there is a split to decide.

    Returns:
        The whole where no split is asked for.

    Raises:
        UsageError: A parameter is unknown, or has a value it cannot have.
    """  # noqa: DOC501
    for name in params:
        if name not in {"split", "holdout"}:
            raise unknown_name(f"query parameter of data set {uri!r}:", name, ("split", "holdout"))
    split, given = params.get("split"), params.get("holdout")
    if split is None:
        if given is not None:
            raise UsageError(
                f"data set {uri!r}: got holdout={given} without split, which would hold nothing out",
                hint=f"say which part is meant: split=train&holdout={given}, or split=test&holdout={given}",
            )
        return open_whole(uri)
    if split not in SPLITS:
        raise UsageError(f"data set {uri!r}: got split={split}, expected split=train or split=test")
    try:
        holdout = DEFAULT_HOLDOUT if given is None else float(given)
    except ValueError:
        holdout = -1.0
    if not 0 < holdout < 1:
        raise UsageError(f"data set {uri!r}: got holdout={given}, expected a fraction between 0 and 1, e.g. 0.2")
    return split_by_content(open_whole(uri), split, holdout, hash_cache=hash_cache, progress=progress)


def split_by_content(
    source: ImageSource,
    split: str,
    holdout: float,
    *,
    hash_cache: HashCache | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Subset:
    """Take the training or the test part of a source.

    An item is held out if the first 8 bytes of its SHA-256, read as a fraction, are below ``holdout``. Content and not
    position decides, because web-crawled data sets are full of exact duplicates, and one on each side would let a test
    reward memory; because adding or renaming items then moves no other item across; and because it needs no file that
    records the split. The held-out share is close to ``holdout`` and not exactly it. Every item is read once, or not at
    all where ``hash_cache`` knows it.

    Args:
        source: The whole.
        split: ``train`` or ``test``.
        holdout: The fraction held out, between 0 and 1.
        hash_cache: Digests remembered from before.
        progress: Called with (items hashed, items in all).

    Returns:
        The part.

    Raises:
        DatasetError: The part would be empty.
    """
    held_out = _held_out(source, hash_items(source, hash_cache=hash_cache, progress=progress), holdout)
    rows = np.flatnonzero(held_out if split == "test" else ~held_out).astype(np.int64)
    if not rows.size:
        raise DatasetError(
            f"data set {source.uri!r}: got 0 of {len(source)} items in its {split} part, expected some",
            hint="use another holdout, or a larger data set",
        )
    return Subset(
        base=source,
        uri=source.uri,
        rows=rows,
        ids=Names.of((source.ids[row] for row in map(int, rows)), "strict"),
        labels=source.labels[rows],
        notes=(*source.notes, f"{split} part: {len(rows)} of {len(source)} items (holdout {holdout:g})"),
    )


def _held_out(source: ImageSource, digests: UInt8[np.ndarray, "N 32"], holdout: float) -> Bool[np.ndarray, " N"]:
    for row in np.flatnonzero((digests == np.frombuffer(UNREADABLE, np.uint8)).all(axis=1)).tolist():
        # Unreadable items have no content to go by; without this all of them would be test items.
        digests[row] = np.frombuffer(hashlib.sha256(source.ids[row].encode()).digest(), np.uint8)
    # int(x * 2**53) of a float is exact, so the comparison is the same on every machine.
    fractions = digests[:, :8].copy().view(">u8")[:, 0] >> np.uint64(11)
    return np.asarray(fractions < np.uint64(int(holdout * 2**53)))
