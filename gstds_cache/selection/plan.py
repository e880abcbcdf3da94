"""Which rows make up which batch, and how many of them stay: all of it known before anything is computed.

The order of an epoch is keyed by (seed, epoch), so any batch of any epoch can be made without the ones before it. What
is held does not grow with the rows or the epochs, but for 8 bytes a batch of an epoch. The last batch of an epoch is
between half and one and a half times as large as the others: a remainder of a few rows has no graph worth the name, and
a training step on its one kept row undid the others (measured on digits: the loss diverged).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from jaxtyping import Int64

from gstds_cache.errors import UsageError
from gstds_cache.selection.order import make_order
from gstds_cache.selection.rows import RowsTakingPart
from gstds_cache.selection.schedule import PIECE, Schedule


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
        rows: Rows that take part.
        batches_per_epoch: Batches in an epoch; the last holds what is left, from 0.5 to 1.5 times ``batch_size``.
        total_batches: Batches in the run.
        window: Rows of a window of the order, or None.
        total_rows: Rows that go in over the whole run: what training on everything would spend.
        total_kept: Rows kept in the run: the gradient samples a trainer will spend.
    """

    def __init__(
        self,
        rows: RowsTakingPart,
        *,
        batch_size: int,
        epochs: int,
        schedule: Schedule,
        seed: int,
        window: int | None = None,
        unit_rows: int = 1,
    ) -> None:
        """Lay out the run.

        Args:
            rows: Rows that take part; those without an embedding are left out.
            batch_size: Rows a batch holds before selection (B).
            epochs: Passes over ``rows``.
            schedule: Filter ratio over the run.
            seed: Key of the permutations.
            window: Rows of a window of the order (:mod:`gstds_cache.selection.order`); None permutes all rows.
            unit_rows: Rows of a unit of the store; matters with a window.

        Raises:
            UsageError: There are fewer rows than one batch holds, or the schedule does not fit the run.
        """
        if batch_size > len(rows):
            raise UsageError(
                f"--batch-size: got {batch_size}, but only {len(rows)} rows have an embedding",
                hint=f"use --batch-size {max(4, len(rows) // 4)} or so",
            )
        self.rows, self.batch_size, self.epochs, self.schedule, self.seed = rows, batch_size, epochs, schedule, seed
        self.window = window
        self.batches_per_epoch = max(1, (len(rows) + batch_size // 2) // batch_size)
        self.total_batches = self.batches_per_epoch * epochs
        sizes = np.full(self.batches_per_epoch, batch_size, np.int64)
        sizes[-1] = len(rows) - batch_size * (self.batches_per_epoch - 1)
        laid_out = schedule.lay_out(sizes, epochs)
        self.total_rows, self.total_kept = len(rows) * epochs, laid_out.total_kept
        self._piece = lru_cache(maxsize=2)(lambda n: laid_out.piece(n * PIECE, (n + 1) * PIECE))
        self._order = make_order(rows, seed=seed, window=window, unit_rows=unit_rows)

    def batch(self, seq: int) -> BatchPlan:
        """Batch ``seq`` of the run, by itself."""
        epoch, batch_id = divmod(seq, self.batches_per_epoch)
        start = batch_id * self.batch_size
        indices = self._order(epoch, start, start + self._rows_in(batch_id))
        return BatchPlan(seq=seq, epoch=epoch, batch_id=batch_id, indices=indices, keep=self.keep(seq))

    def keep(self, seq: int) -> int:
        """Rows that stay of batch ``seq``."""
        return int(self._piece(seq // PIECE)[1][seq % PIECE])

    def ratio(self, seq: int) -> float:
        """The schedule's filter ratio at batch ``seq``."""
        return float(self._piece(seq // PIECE)[0][seq % PIECE])

    def _rows_in(self, batch_id: int) -> int:
        last = batch_id == self.batches_per_epoch - 1
        return len(self.rows) - batch_id * self.batch_size if last else self.batch_size
