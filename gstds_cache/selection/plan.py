"""Which rows make up which batch, and how many of them stay: all of it known before anything is computed.

The order of an epoch is a permutation keyed by (seed, epoch), so any batch of any epoch can be made without the ones
before it. The last batch of an epoch is between half and one and a half times as large as the others: a remainder of a
few rows has no graph worth the name, and a training step on its one kept row undid the others (measured on digits: the
loss diverged).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from jaxtyping import Int64

from gstds_cache.errors import UsageError
from gstds_cache.seeding import rng_for
from gstds_cache.selection.schedule import Schedule


@dataclass(frozen=True)
class BatchPlan:
    """One batch before selection.

    Attributes:
        seq: Position in the whole run, from 0.
        epoch: Epoch, from 0.
        batch_id: Position in the epoch, from 0.
        indices: Rows of the store, int64 [B].
        keep: How many of them stay (M).
    """

    seq: int
    epoch: int
    batch_id: int
    indices: Int64[np.ndarray, " B"]
    keep: int


class SelectionPlan:
    """The batches of a run.

    Attributes:
        rows: Rows that take part, int64 [n].
        batches_per_epoch: Batches in an epoch; the last holds what is left, from 0.5 to 1.5 times ``batch_size``.
        total_batches: Batches in the run.
        total_kept: Rows kept in the run: the gradient samples a trainer will spend.
    """

    def __init__(
        self, rows: Int64[np.ndarray, " n"], *, batch_size: int, epochs: int, schedule: Schedule, seed: int
    ) -> None:
        """Lay out the run.

        Args:
            rows: Rows that take part; those without an embedding are left out.
            batch_size: Rows a batch holds before selection (B).
            epochs: Passes over ``rows``.
            schedule: Filter ratio over the run.
            seed: Key of the permutations.

        Raises:
            UsageError: There are fewer rows than one batch holds.
        """
        if batch_size > len(rows):
            raise UsageError(
                f"--batch-size: got {batch_size}, but only {len(rows)} rows have an embedding",
                hint=f"use --batch-size {max(4, len(rows) // 4)} or so",
            )
        self.rows, self.batch_size, self.epochs, self.schedule, self.seed = rows, batch_size, epochs, schedule, seed
        self.batches_per_epoch = max(1, (len(rows) + batch_size // 2) // batch_size)
        self.total_batches = self.batches_per_epoch * epochs
        self.total_kept = sum(self.keep(seq) for seq in range(self.total_batches))
        self._permutation = lru_cache(maxsize=2)(self._permute)

    def batch(self, seq: int) -> BatchPlan:
        """Batch ``seq`` of the run, in O(1) batches (one permutation is held)."""
        epoch, batch_id = divmod(seq, self.batches_per_epoch)
        order = self._permutation(epoch)
        start = batch_id * self.batch_size
        indices = self.rows[order[start : start + self._rows_in(batch_id)]]
        return BatchPlan(seq=seq, epoch=epoch, batch_id=batch_id, indices=indices, keep=self.keep(seq))

    def keep(self, seq: int) -> int:
        """Rows that stay of batch ``seq``: the filter ratio's share is removed, rounded down; at least one stays."""
        n_in = self._rows_in(seq % self.batches_per_epoch)
        # 1e-9: a ratio of 0.7 of 10 rows is 7 rows, though 0.7 * 10 is 6.999...
        return max(1, n_in - int(self.ratio(seq) * n_in + 1e-9))

    def ratio(self, seq: int) -> float:
        """The schedule's filter ratio at batch ``seq``."""
        return self.schedule.ratio(seq, self.total_batches)

    def _rows_in(self, batch_id: int) -> int:
        last = batch_id == self.batches_per_epoch - 1
        return len(self.rows) - batch_id * self.batch_size if last else self.batch_size

    def _permute(self, epoch: int) -> Int64[np.ndarray, " n"]:
        return rng_for(self.seed, "plan", epoch).permutation(len(self.rows))
