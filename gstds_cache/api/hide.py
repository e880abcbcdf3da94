"""``gstds_cache.hide_rows``: rows that no selection takes, without touching the store's bytes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int64

from gstds_cache.data.align import rows_by_id
from gstds_cache.data.row_values import open_list, read_ids
from gstds_cache.errors import IncompleteError, UsageError, nearest_first
from gstds_cache.files.location import Location, LocationLike
from gstds_cache.store.grown import read_metadata
from gstds_cache.store.hidden import HiddenRows, read_hidden, write_hidden
from gstds_cache.store.metadata import StoreMetadata

TRIES = 5


@dataclass(frozen=True)
class HiddenList:
    """The rows of a store that no selection takes.

    Attributes:
        location: The store, as a user names it.
        items: Rows of the store.
        rows: Hidden rows, ascending.
        ids: The ids of their items.
        changed: How many the call hid or showed; 0 for :func:`list_hidden`.
        digest: Identity of the hidden rows, a part of a selection's; empty where there are none.
    """

    location: str
    items: int
    rows: tuple[int, ...]
    ids: tuple[str, ...]
    changed: int
    digest: str

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON-able values."""
        return vars(self) | {"rows": list(self.rows), "ids": list(self.ids)}


def hide_rows(store: LocationLike, rows: Sequence[int] | None = None, *, ids: Any = None) -> HiddenList:
    """Leave rows out of selections that are made from now on, besides those that are left out already.

    No byte of the store changes. The hidden rows are a part of a selection's identity: the same settings give another
    selection, whose plan, order, counts and guidance are of the other rows. A selection that exists stays what it is.

    Args:
        store: Its location: a directory, or ``s3://BUCKET/PREFIX``.
        rows: Rows, in any order.
        ids: Ids of items instead: a sequence, or a file: .txt (a line each), .npy, or .parquet or .arrow with
            ``?column=NAME``.

    Returns:
        What is hidden now.

    Raises:
        UsageError: The store has no such row or id; or no row would be left.
        StoreNotFoundError: There is no store.
        IncompleteError: Other processes hide rows all the time.
    """
    return _change(store, rows, ids, np.union1d)


def unhide_rows(store: LocationLike, rows: Sequence[int] | None = None, *, ids: Any = None) -> HiddenList:
    """Take rows into selections again.

    Args:
        store: As for :func:`hide_rows`.
        rows: Rows; where neither they nor ``ids`` are given, all.
        ids: As for :func:`hide_rows`.

    Returns:
        What is hidden now.

    Raises:
        UsageError: The store has no such row or id.
        StoreNotFoundError: There is no store.
        IncompleteError: Other processes hide rows all the time.
    """
    if rows is None and ids is None:
        return _change(store, range(read_metadata(store).spec.items), None, np.setdiff1d)
    return _change(store, rows, ids, np.setdiff1d)


def list_hidden(store: LocationLike) -> HiddenList:
    """The rows that no selection takes, with the ids of their items.

    Args:
        store: As for :func:`hide_rows`.

    Returns:
        The rows.

    Raises:
        StoreNotFoundError: There is no store.
        IntegrityError: The list is damaged.
    """
    metadata = read_metadata(Location.parse(store, "`store`"))
    return _listed(metadata, read_hidden(metadata.transport, metadata.spec.items), 0)


def _change(store: LocationLike, rows: Sequence[int] | None, ids: Any, change: Callable[..., np.ndarray]) -> HiddenList:
    metadata = read_metadata(Location.parse(store, "`store`"))
    named = _rows_named(metadata, rows, ids)
    with metadata.transport.lock():
        for _ in range(TRIES):
            # Rows that another process appended and hid meanwhile are among those that are hidden.
            metadata = read_metadata(metadata.location, transport=metadata.transport)
            before = read_hidden(metadata.transport, metadata.spec.items)
            after = np.asarray(change(before.rows, named), np.int64)
            if len(after) >= metadata.spec.items:
                raise UsageError(f"`rows`: got all {len(after):,} rows of {metadata.location}, expected one to be left")
            changed = abs(len(after) - len(before))
            now = before if not changed else write_hidden(metadata.transport, before, after)
            if now is not None:
                return _listed(metadata, now, changed)
    raise IncompleteError(
        f"{metadata.location}: other processes hide rows at the same time", hint="run the same command again"
    )


def _rows_named(metadata: StoreMetadata, rows: Sequence[int] | None, ids: Any) -> Int64[np.ndarray, " B"]:
    """The rows that were named, by number or by id, ascending.

    Raises:
        UsageError: The store has no such row or id; or both or neither were given.
    """
    items = metadata.spec.items
    if (rows is None) == (ids is None):
        raise UsageError("`rows` or `ids`: expected one of them")
    if rows is not None:
        named = np.asarray(rows)
        if named.ndim != 1 or (named.size and named.dtype.kind not in "iu"):
            raise UsageError(f"`rows`: got {rows!r:.80}, expected row numbers")
        named = np.unique(named.astype(np.int64))
        if named.size and (named[0] < 0 or named[-1] >= items):
            wrong = named[0] if named[0] < 0 else named[-1]
            raise UsageError(f"`rows`: got {wrong}, expected 0 to {items - 1}, the rows of {metadata.location}")
        return named
    names = read_ids(open_list(ids, "`ids`"), repeated=True)
    theirs = metadata.manifest().ids
    found = rows_by_id(names, theirs)
    if (missing := np.flatnonzero(found < 0)).size:
        first = names[int(missing[0])]
        near = nearest_first(first, theirs[:1000])[0]
        raise UsageError(
            f"`ids`: {missing.size:,} of {len(names):,} ids are not in {metadata.location}, first {first!r}",
            hint=f"ids are as the store has them, e.g. {near!r}; nothing was hidden",
        )
    return np.unique(found)


def _listed(metadata: StoreMetadata, hidden: HiddenRows, changed: int) -> HiddenList:
    names = metadata.manifest().ids if len(hidden) else ()
    rows = tuple(hidden.rows.tolist())
    ids = tuple(names[row] for row in rows)
    return HiddenList(str(metadata.location), metadata.spec.items, rows, ids, changed, hidden.digest)
