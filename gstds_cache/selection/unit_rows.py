"""Rows of a store as unit vectors, read a block at a time: what looks at a whole data set at once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float32, Int64

from gstds_cache.graph.neighbors import normalized_rows
from gstds_cache.selection.rows import EligibleRows, rows_left_out
from gstds_cache.store.reader import EmbeddingStore

BLOCK_BYTES = 48 << 20
"""Of unit rows that are held at a time."""


@dataclass(frozen=True, eq=False)
class UnitRows:
    """Rows of a store that have an embedding and are not hidden, numbered from 0 in the store's order.

    Attributes:
        store: The store.
        rows: Which of its rows.
    """

    store: EmbeddingStore
    rows: EligibleRows

    @classmethod
    def of(cls, store: EmbeddingStore) -> UnitRows:
        """All rows that take part."""
        return cls(store, EligibleRows(len(store), rows_left_out(store)))

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def dim(self) -> int:
        """Length of a row."""
        return self.store.spec.dim

    @property
    def block(self) -> int:
        """Rows of a block."""
        return max(256, BLOCK_BYTES // (4 * self.dim))

    def at(self, numbers: Int64[np.ndarray, " b"]) -> Float32[np.ndarray, "b D"]:
        """Some rows, by their numbers here."""
        stored = torch.from_numpy(self.store.gather(self.rows.at(numbers)))
        return normalized_rows(stored[None])[0].numpy() if len(numbers) else np.empty((0, self.dim), np.float32)

    def blocks(self) -> Iterator[tuple[int, Float32[np.ndarray, "b D"]]]:
        """All rows, one block after the other.

        Yields:
            The number of a block's first row, and its rows.
        """
        for first in range(0, len(self), self.block):
            yield first, self.at(np.arange(first, min(first + self.block, len(self))))
