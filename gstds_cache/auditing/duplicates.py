"""Near-duplicates: rows whose cosine reaches a threshold, in groups; and pairs of two stores (leaks)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float32, Int64, UInt8
from scipy.sparse import coo_array, csr_array
from scipy.sparse.csgraph import connected_components

from gstds_cache.auditing.search import NOTHING, Nearest
from gstds_cache.selection.difficulty import PIECE
from gstds_cache.selection.unit_rows import UnitRows

EXAMPLES = 6
AT_ONCE = 1024  # rows of a large group that are compared at once
ROUNDING = 1e-6  # of a cosine: equal rows may be 0.9999999 alike


@dataclass(frozen=True, eq=False)
class Pairs:
    """Pairs of rows, nearest first.

    Attributes:
        one: A row of the store, int64 [P].
        other: The other row: of the same store, and larger; or of the other store.
        cosine: Float32 [P].
        same_bytes: Whether both items have the same bytes.
    """

    one: Int64[np.ndarray, " P"]
    other: Int64[np.ndarray, " P"]
    cosine: Float32[np.ndarray, " P"]
    same_bytes: Bool[np.ndarray, " P"]

    def __len__(self) -> int:
        return len(self.one)

    def at(self, which: Int64[np.ndarray, " q"]) -> Pairs:
        """Some of the pairs."""
        return Pairs(self.one[which], self.other[which], self.cosine[which], self.same_bytes[which])


@dataclass(frozen=True, eq=False)
class Groups:
    """Rows that are near-duplicates, directly or by way of others; a group's rows stand together, ascending.

    Attributes:
        row: Rows of the store, int64 [R].
        group: Number of each one's group, from 0, the largest group first.
        cosine: Cosine to its nearest row.
        same_bytes: Whether another row of the store has the same bytes.
        first: Whether it is its group's first row.
        keep: Whether to keep it where near-duplicates go: every row that goes is a near-duplicate of one that stays,
            and of those that stay no two are.
    """

    row: Int64[np.ndarray, " R"]
    group: Int64[np.ndarray, " R"]
    cosine: Float32[np.ndarray, " R"]
    same_bytes: Bool[np.ndarray, " R"]
    first: Bool[np.ndarray, " R"]
    keep: Bool[np.ndarray, " R"]

    @property
    def count(self) -> int:
        """How many groups."""
        return int(self.first.sum())

    @property
    def spare(self) -> int:
        """Rows that could go."""
        return int((~self.keep).sum())


def pairs_above(
    found: Nearest,
    queries: UnitRows,
    base: UnitRows,
    threshold: float,
    hashes: tuple[UInt8[np.ndarray, "M 32"], UInt8[np.ndarray, "N 32"]],
) -> Pairs:
    """The pairs that were found and reach a threshold, each once.

    Args:
        found: Nearest rows of ``queries`` in ``base``.
        queries: What was searched for.
        base: What was searched in.
        threshold: Smallest cosine.
        hashes: SHA-256 of the items of both stores.

    Returns:
        The pairs: ``one`` of ``queries``, ``other`` of ``base``.
    """
    parts = []
    for first in range(0, len(found.index), PIECE):
        near = found.similarity[first : first + PIECE]
        row, place = np.nonzero(near >= max(threshold - ROUNDING, -1))
        parts.append((row + first, found.index[first : first + PIECE][row, place].astype(np.int64), near[row, place]))
    one, other, cosine = (np.concatenate([part[n] for part in parts]) for n in range(3))
    one, other = queries.rows.at(one), base.rows.at(other)
    if queries is base:
        low, high = np.minimum(one, other), np.maximum(one, other)
        _, kept = np.unique(low * len(base.store) + high, return_index=True)
        one, other, cosine = low[kept], high[kept], cosine[kept]
    order = np.lexsort((other, one, -cosine))
    one, other, cosine = one[order], other[order], cosine[order]
    same = np.concatenate(
        [_equal(hashes[0][one[at : at + PIECE]], hashes[1][other[at : at + PIECE]]) for at in
         range(0, len(one), PIECE)] or [np.zeros(0, bool)]
    )  # fmt: skip
    return Pairs(one, other, cosine, same)


def group_rows(
    pairs: Pairs, found: Nearest, rows: UnitRows, hashes: UInt8[np.ndarray, "N 32"], threshold: float
) -> Groups:
    """Groups of rows that pairs, or the same bytes, connect.

    Items of the same bytes are found by their hashes as well: of more than ``k`` of them not all are a row's nearest.

    Args:
        pairs: Pairs that reach the threshold.
        found: Nearest rows of all rows.
        rows: The rows.
        hashes: SHA-256 of the store's items.
        threshold: The threshold.

    Returns:
        The groups.
    """
    same_one, same_other = _same_bytes(rows, hashes)
    one, other = np.concatenate([pairs.one, same_one]), np.concatenate([pairs.other, same_other])
    members, ends = np.unique(np.concatenate([one, other]), return_inverse=True)
    edges = (np.ones(len(one), np.int8), (ends[: len(one)], ends[len(one) :]))
    graph = coo_array(edges, shape=(len(members), len(members))).tocsr()
    _, label = connected_components(graph, directed=False)
    sizes = np.bincount(label) if len(label) else np.zeros(0, np.int64)
    begins = np.unique(label, return_index=True)[1]
    rank = np.empty(len(sizes), np.int64)
    rank[np.lexsort((begins, -sizes))] = np.arange(len(sizes))
    group = rank[label]
    order = np.lexsort((members, group))
    row, group = members[order], group[order]
    first = np.diff(group, prepend=-1) > 0
    cosine = found.similarity[rows.rows.below(row), 0]
    same = np.isin(row, np.concatenate([same_one, same_other]))
    keep = _stay((graph + graph.T).tocsr())[order]
    begins = np.flatnonzero(first)
    ends = np.append(begins[1:], len(row))[: len(begins)]
    # A row has more near-duplicates than were looked for only in groups of more rows: there, all are compared.
    for begin, end in zip(begins.tolist(), ends.tolist(), strict=True):
        if end - begin > found.k:
            keep[begin:end] = _stay_of_all(rows, rows.rows.below(row[begin:end]), threshold)
    return Groups(row, group, cosine, same, first, keep)


def _stay(graph: csr_array) -> Bool[np.ndarray, " R"]:
    """Which rows stay, each looked at in turn: one that is a near-duplicate of none that stays already."""
    stay = np.ones(graph.shape[0], bool)
    for row, (begin, end) in enumerate(zip(graph.indptr[:-1].tolist(), graph.indptr[1:].tolist(), strict=True)):
        if stay[row]:
            near = graph.indices[begin:end]
            stay[near[near > row]] = False
    return stay


def _stay_of_all(rows: UnitRows, members: Int64[np.ndarray, " m"], threshold: float) -> Bool[np.ndarray, " m"]:
    """Which rows of a group stay, as :func:`_stay` says, by the cosines of all of them."""
    stay, kept = np.zeros(len(members), bool), np.empty((0, rows.dim), np.float32)
    for first in range(0, len(members), AT_ONCE):
        block = rows.at(members[first : first + AT_ONCE])
        near = threshold - ROUNDING
        free: np.ndarray = np.all(block @ kept.T < near, axis=1)
        among: np.ndarray = np.greater_equal(block @ block.T, near)
        for place in range(len(block)):
            if free[place]:
                stay[first + place] = True
                free[place + 1 :] &= ~among[place, place + 1 :]
        kept = np.concatenate([kept, block[stay[first : first + len(block)]]])
    return stay


def _same_bytes(
    rows: UnitRows, hashes: UInt8[np.ndarray, "N 32"]
) -> tuple[Int64[np.ndarray, " P"], Int64[np.ndarray, " P"]]:
    """Each row that has the bytes of an earlier one, and the last such row before it; 8 bytes a row."""
    every = rows.rows.all()
    key = np.ascontiguousarray(hashes[:, :8]).view(np.uint64)[:, 0][every]
    order = np.argsort(key, kind="stable")
    next_to = np.flatnonzero(key[order][1:] == key[order][:-1])
    before, after = every[order[next_to]], every[order[next_to + 1]]
    same = _equal(hashes[before], hashes[after])
    return before[same], after[same]


def _equal(one: UInt8[np.ndarray, "P 32"], other: UInt8[np.ndarray, "P 32"]) -> Bool[np.ndarray, " P"]:
    """Which hashes are the same. Zeros stand for a hash that is not known: imported rows have no bytes to hash."""
    same: Bool[np.ndarray, " P"] = (one == other).all(axis=1) & one.any(axis=1)
    return same


def around(found: Nearest, rows: UnitRows, base: UnitRows, threshold: float, pairs: Pairs, count: int = EXAMPLES) -> (
    tuple[Pairs, Pairs]
):  # fmt: skip
    """Pairs just above a threshold and just below it, to judge the threshold by.

    Args:
        found: Nearest rows of ``rows`` in ``base``.
        rows: What was searched for.
        base: What was searched in.
        threshold: The threshold.
        pairs: Those that reach it.
        count: How many of each.

    Returns:
        The nearest ones above, and below, of different bytes; only a row's nearest is looked at below.
    """
    above = np.flatnonzero(~pairs.same_bytes)[::-1][:count]
    nearest = found.similarity[:, 0]
    below = np.flatnonzero((nearest < threshold - ROUNDING) & (nearest > NOTHING))
    below = below[np.argsort(-nearest[below], kind="stable")[: 2 * count]]
    one, other = rows.rows.at(below), base.rows.at(found.index[below, 0].astype(np.int64))
    if rows is base:
        one, other = np.minimum(one, other), np.maximum(one, other)
    once = np.sort(np.unique(np.stack([one, other]), axis=1, return_index=True)[1])[:count]
    none = np.zeros(len(once), bool)
    return pairs.at(above), Pairs(one[once], other[once], nearest[below[once]], none)
