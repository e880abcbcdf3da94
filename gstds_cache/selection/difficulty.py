"""A number for every row of a store, left where it is: in a file as large as the rows are many."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Float32, Float64, Int64, Shaped

PIECE = 1 << 18  # rows looked at in one go


def pieces(values: Shaped[np.ndarray, " N"]) -> Iterator[Shaped[np.ndarray, " P"]]:
    """An array's parts, one after the other: what is made of all of it at once is as large as it.

    Yields:
        Views of up to :data:`PIECE` of its elements.
    """
    for first in range(0, len(values), PIECE):
        yield values[first : first + PIECE]


@dataclass(frozen=True, eq=False)
class Difficulty:
    """The difficulty of every row.

    Attributes:
        known: float32 [N], in memory or mapped from a file; NaN for rows that have none, which count as the median.
    """

    known: Float32[np.ndarray, " N"]

    def of(self, rows: Int64[np.ndarray, " B"]) -> Float64[np.ndarray, " B"]:
        """The difficulty of some rows, float64 [B]."""
        values = np.asarray(self.known[rows], np.float64)
        known = np.isfinite(values)
        return values if known.all() else np.where(known, values, self.middle)

    def all(self) -> Float32[np.ndarray, " N"]:
        """The difficulty of all rows, in memory."""
        return np.where(np.isfinite(self.known), self.known, np.float32(self.middle))

    @cached_property
    def middle(self) -> float:
        """The median of what is known."""
        count = sum(int(np.isfinite(part).sum()) for part in pieces(self.known))
        pair = [nth_smallest(self.known, n) for n in ((count - 1) // 2, count // 2)]
        return float(np.float32((float(pair[0]) + float(pair[1])) / 2))  # the sum of two large ones is no float32


def nth_smallest(values: Float32[np.ndarray, " N"], n: int) -> np.float32:
    """The finite value that ``n`` others are not above, found in memory that does not grow with N.

    The bits of a float, those of a negative one but for the sign turned over, are in the order of the floats: the
    values are counted by their upper 16 bits, then those of the one count that holds the n-th by their lower 16.

    Args:
        values: At least ``n + 1`` of them finite.
        n: From 0.
    """
    upper = np.zeros(1 << 16, np.int64)
    for part in _ordered(values):
        upper += np.bincount(part >> 16, minlength=1 << 16)
    ends = np.cumsum(upper)
    high = int(np.searchsorted(ends, n, side="right"))
    lower = np.zeros(1 << 16, np.int64)
    for part in _ordered(values):
        lower += np.bincount(part[part >> 16 == high] & 0xFFFF, minlength=1 << 16)
    low = int(np.searchsorted(np.cumsum(lower), n - (ends[high] - upper[high]), side="right"))
    bits = np.uint32(high << 16 | low)
    return np.float32((bits ^ (np.uint32(1 << 31) if bits >> 31 else ~np.uint32(0))).view(np.float32))


def _ordered(values: Float32[np.ndarray, " N"]) -> Iterator[Int64[np.ndarray, " P"]]:
    for part in pieces(values):
        bits = np.ascontiguousarray(part[np.isfinite(part)], np.float32).view(np.uint32)
        yield np.where(bits >> 31, ~bits, bits ^ np.uint32(1 << 31)).astype(np.int64)
