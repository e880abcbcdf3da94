"""Rows that other stores hold, taken over by the hash of the item's bytes: a grown data set embeds only what is new.

A row is taken over when another store has one for the same bytes, made by the same encoder (weights, layer, pooling,
every preprocessing parameter) and kept in the same dtype. Items that could not be decoded there are tried again here.
Of a store that does not say which code of a user's own made its rows none is taken over into one that says it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int64, UInt8

from gstds_cache.data.hashing import UNREADABLE
from gstds_cache.errors import FingerprintMismatchError
from gstds_cache.files import mapped
from gstds_cache.files.location import LocationLike
from gstds_cache.runtime.notify import Notify
from gstds_cache.store.reader import EmbeddingStore

WINDOW_BYTES = 256 << 20
PART_ROWS = 1 << 16
"""Items that are sorted in memory at a time, up to 256 times as many in all."""


class KnownRows:
    """The rows of a data set that other stores hold.

    Attributes:
        count: How many of the data set's items have one.
        batch_size: The batch size of the first store that has any, or None: with the same one the rows taken over are
            the ones this run would have computed.
        of_unknown_code: How many of the stores are left out, as they do not say which code of a user's own made them.
    """

    def __init__(
        self,
        stores: Sequence[LocationLike],
        sha256: UInt8[np.ndarray, "N 32"],
        encoder: dict[str, Any],
        dtype: str,
        notify: Notify | None = None,
    ) -> None:
        """Look up every item; no embedding is read yet.

        Args:
            stores: Where to look, at least one; the first that has an item wins. They need not be complete.
            sha256: Hashes of the data set's items.
            encoder: The encoder's specification.
            dtype: How embeddings are stored.
            notify: Told of a store that does not say which code of a user's own made its rows.

        Raises:
            FingerprintMismatchError: A store's encoder or dtype is another.
            ChunkCorruptError: A store is damaged.
            StoreNotFoundError: There is none.
        """
        self._stores = [
            EmbeddingStore(where, allow_partial=True, access="window", memory_budget=WINDOW_BYTES) for where in stores
        ]
        self._sha256 = sha256
        self._from = mapped.zeros((len(sha256),), np.int16)
        self._from[:] = -1
        self._row = mapped.zeros((len(sha256),), np.int64)
        self.batch_size: int | None = None
        self.count = self.of_unknown_code = 0
        for number, store in enumerate(self._stores):
            if not _same_code_is_known(store, encoder, dtype, notify):
                self.of_unknown_code += 1
                continue
            found = self._find_in(number, store.manifest().sha256, store.without_embedding)
            self.count += found
            if found and self.batch_size is None:
                self.batch_size = store.spec.batch_size

    def _find_in(self, number: int, theirs: UInt8[np.ndarray, "M 32"], without: Int64[np.ndarray, " A"]) -> int:
        """Look up the items that are not known yet in one store, a part at a time; returns how many it has."""
        count, parts = 0, 1
        while parts < 256 and max(len(theirs), len(self._sha256)) > parts * PART_ROWS:
            parts *= 2
        for part in range(parts):
            rows, mine = _rows_of(theirs, part, parts), _rows_of(self._sha256, part, parts)
            rows, mine = np.setdiff1d(rows, without, assume_unique=True), mine[self._from[mine] < 0]
            names, wanted = _sortable(theirs[rows]), _sortable(self._sha256[mine])
            order = np.argsort(names)
            found, where = _lookup(names[order], wanted)
            new = found & (wanted != np.void(UNREADABLE))
            self._from[mine[new]], self._row[mine[new]] = number, rows[order][where[new]]
            count += int(new.sum())
            mapped.release(theirs, self._sha256, self._from, self._row)
        return count

    def count_in(self, span: range) -> int:
        """How many of the rows ``span`` of the data set are known."""
        return int((self._from[span.start : span.stop] >= 0).sum())

    def __call__(self, span: range) -> tuple[Bool[np.ndarray, " R"], Float[np.ndarray, "K D"]]:
        """The known rows among the rows ``span`` of the data set (:data:`gstds_cache.embedding.plan.Known`).

        Args:
            span: Rows of the data set.

        Returns:
            Which are known, and the embeddings of those, in order.

        Raises:
            ChunkCorruptError: A shard of a store is damaged.
        """
        part = slice(span.start, span.stop)
        known = self._from[part] >= 0
        origin, rows = self._from[part][known], self._row[part][known]
        taken = np.empty((len(rows), self._stores[0].spec.dim), self._stores[0].spec.dtype)
        for number in np.unique(origin).tolist():
            here = origin == number
            taken[here] = self._stores[number].gather(rows[here])
        return known, taken


def count_readable_among(some: UInt8[np.ndarray, "N 32"], others: UInt8[np.ndarray, "M 32"]) -> tuple[int, int]:
    """How many of some items could be read, and how many of these have the bytes of one of the others.

    Args:
        some: Hashes of the items.
        others: Hashes of the others.

    Returns:
        Both numbers; what is held are the hashes of a part of either.
    """
    readable, found, parts = 0, 0, 1
    while parts < 256 and max(len(some), len(others)) > parts * PART_ROWS:
        parts *= 2
    for part in range(parts):
        mine, names = (_sortable(hashes[_rows_of(hashes, part, parts)]) for hashes in (some, others))
        mine = mine[mine != np.void(UNREADABLE)]
        readable, found = readable + len(mine), found + int(_lookup(np.sort(names), mine)[0].sum())
        mapped.release(some, others)
    return readable, found


def _same_code_is_known(store: EmbeddingStore, encoder: dict[str, Any], dtype: str, notify: Notify | None) -> bool:
    """Whether a store's rows were made as this run makes them; False where it does not say by which code.

    Raises:
        FingerprintMismatchError: They were made in another way.
    """
    ours, theirs = {**store.spec.encoder, "dtype": store.spec.dtype}, {**encoder, "dtype": dtype}
    unknown = "source" not in ours and theirs.pop("source", None) is not None
    lines = [
        f"{name}: that store has {ours.get(name)!r}, this run has {theirs.get(name)!r}"
        for name in sorted(ours.keys() | theirs.keys())
        if ours.get(name) != theirs.get(name)
    ]
    if lines:
        raise FingerprintMismatchError(
            f"`reuse`: the rows of {store.location} were made in another way:\n    " + "\n    ".join(lines),
            hint="leave it out, or embed with the same model, weights, preprocessing and `dtype`",
        )
    if unknown and notify is not None:
        notify(
            f"note: `reuse`: {store.location} was made before the code of {ours['model']} was recorded, so whether its "
            "rows are of the code of today is not known: none is taken over, all are embedded. `append_to_store` keeps "
            'its rows; compare some first: `verify_store(..., level="sample")`'
        )
    return not unknown


def _rows_of(sha256: UInt8[np.ndarray, "N 32"], part: int, parts: int) -> Int64[np.ndarray, " R"]:
    """The rows whose hashes are in one of ``parts`` (at most 256) equal parts of all hashes."""
    starts = range(0, len(sha256), PART_ROWS)
    first = (sha256[start : start + PART_ROWS, 0].astype(np.int64) for start in starts)
    found = [np.flatnonzero(byte * parts >> 8 == part) + start for start, byte in zip(starts, first, strict=True)]
    return np.concatenate([np.empty(0, np.int64), *found])


def _sortable(sha256: UInt8[np.ndarray, "N 32"]) -> np.ndarray:
    """[N] values of 32 bytes, which NumPy sorts and compares as one."""
    return np.ascontiguousarray(sha256).view("V32")[:, 0]


def _lookup(names: np.ndarray, wanted: np.ndarray) -> tuple[Bool[np.ndarray, " N"], Int64[np.ndarray, " N"]]:
    if not len(names):
        return np.zeros(len(wanted), bool), np.zeros(len(wanted), np.int64)
    where = np.minimum(np.searchsorted(names, wanted), len(names) - 1)
    return names[where] == wanted, where
