"""The rows of a store that take part in a selection, held as the few that do not."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Int64

from gstds_cache.data.label_counts import LabelCounts
from gstds_cache.store.reader import EmbeddingStore


@dataclass(frozen=True, eq=False)
class EligibleRows:
    """All rows but some, numbered from 0 in ascending order; memory is that of the rows left out.

    Attributes:
        items: Rows of the store (N).
        left_out: Rows that do not take part, ascending, int64 [A].
    """

    items: int
    left_out: Int64[np.ndarray, " A"]

    def __len__(self) -> int:
        return self.items - len(self.left_out)

    @cached_property
    def _before(self) -> Int64[np.ndarray, " A"]:
        """How many take part before each row that does not."""
        return self.left_out - np.arange(len(self.left_out))

    def at(self, numbers: Int64[np.ndarray, " B"]) -> Int64[np.ndarray, " B"]:
        """The rows of the store that have these numbers among the rows that take part."""
        if not len(self.left_out):
            return numbers
        return numbers + np.searchsorted(self._before, numbers, side="right")

    def below(self, rows: Int64[np.ndarray, " B"]) -> Int64[np.ndarray, " B"]:
        """How many rows that take part come before each of these rows of the store."""
        return rows - np.searchsorted(self.left_out, rows, side="left")

    def all(self) -> Int64[np.ndarray, " n"]:
        """Every row that takes part: 8 bytes a row, for what needs them at once."""
        return self.at(np.arange(len(self), dtype=np.int64))


def rows_left_out(store: EmbeddingStore) -> Int64[np.ndarray, " A"]:
    """The rows of a store that no selection takes, ascending: those without an embedding, and those that are hidden."""
    return np.union1d(store.without_embedding, store.hidden)


def count_labels(store: EmbeddingStore) -> LabelCounts:
    """What labels the rows of a store have, but for those that are hidden."""
    return LabelCounts.of(np.delete(store.labels, store.hidden) if len(store.hidden) else store.labels)
