"""Rows of one list of ids by the ids of another: sets of vectors and data sets that have the same items, each its way.

Ids are compared by 64-bit hashes in sorted arrays, and then as text: no table of names is held in memory.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int64

from gstds_cache.data.names import AT_ONCE, Names
from gstds_cache.data.source import ImageSource
from gstds_cache.data.subset import Subset, taken
from gstds_cache.errors import FingerprintMismatchError
from gstds_cache.files import mapped


def rows_by_id(wanted: Sequence[str], among: Sequence[str]) -> Int64[np.ndarray, " M"]:
    """Where each id of ``wanted`` is in ``among``.

    Args:
        wanted: M ids.
        among: Ids, each once.

    Returns:
        [M] its position, -1 for an id that is not there.
    """
    names, theirs = Names.of(wanted), Names.of(among)
    if names == theirs:
        found = mapped.zeros((len(names),), np.int64)
        found[:] = np.arange(len(names))
        return found
    hashes = _hashes(theirs)
    order = np.argsort(hashes, kind="stable")
    hashes = hashes[order]
    found = mapped.zeros((len(names),), np.int64)
    for start in range(0, len(names), AT_ONCE):
        encoded = names.encoded(start, start + AT_ONCE)
        mine = np.fromiter(map(hash, encoded), np.int64, len(encoded))
        first = np.searchsorted(hashes, mine, side="left")
        for place, (name, at) in enumerate(zip(encoded, first.tolist(), strict=True), start):
            found[place] = _among(theirs, order, hashes, name, at)
    return found


def in_order(source: ImageSource, ids: Sequence[str]) -> ImageSource:
    """A data set's items in another order, by their ids; items that are not among ``ids`` are left out.

    Args:
        source: The data set.
        ids: The order.

    Returns:
        The data set; itself where it is in this order.

    Raises:
        FingerprintMismatchError: It lacks an item.
    """
    names = Names.of(ids)
    rows = rows_by_id(names, source.ids)
    if (missing := np.flatnonzero(rows < 0)).size:
        raise FingerprintMismatchError(
            f"{missing.size:,} of {len(names):,} items are not in {source.uri}, first {names[int(missing[0])]!r} (row "
            f"{missing[0]} of the store)",
            hint="give a data set that has all of the store's items",
        )
    if len(rows) == len(source) and bool((rows == np.arange(len(rows))).all()):
        return source
    return part_of(source, rows, names)


def part_of(source: ImageSource, rows: Int64[np.ndarray, " M"], ids: Sequence[str]) -> Subset:
    """Some rows of a data set, by the ids that they have."""
    labels = taken(source.labels, rows)
    return Subset(base=source, uri=source.uri, rows=rows, ids=ids, labels=labels, notes=source.notes)


def _among(theirs: Names, order: np.ndarray, hashes: np.ndarray, name: bytes, at: int) -> int:
    """The row of ``name``, from the first that has its hash on; -1 where there is none."""
    mine = hash(name)
    while at < len(hashes) and hashes[at] == mine:
        row = int(order[at])
        if theirs.encoded(row, row + 1) == [name]:
            return row
        at += 1
    return -1


def _hashes(names: Names) -> Int64[np.ndarray, " N"]:
    hashes = np.empty(len(names), np.int64)
    for start in range(0, len(names), AT_ONCE):
        part = names.encoded(start, start + AT_ONCE)
        hashes[start : start + len(part)] = np.fromiter(map(hash, part), np.int64, len(part))
        mapped.release(names.file)
    return hashes
