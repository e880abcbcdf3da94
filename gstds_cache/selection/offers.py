"""Candidates of batches that come again are held in memory: nothing about them is new but how many rows are drawn."""

from __future__ import annotations

from dataclasses import replace

from gstds_cache.selection.plan import SelectionPlan
from gstds_cache.selection.selected_batch import SelectedBatch

HELD_BYTES = (18, 900)  # of a row (its number, stratum, reference loss, prior), and of a batch
MOST_HELD = 1 << 30  # bytes; with more they are made in each epoch


class Offers:
    """The candidates of a run, from the batch on from which all have come before."""

    def __init__(self, plan: SelectionPlan) -> None:
        """Hold none yet.

        Args:
            plan: The run's batches.
        """
        self._plan, self._held = plan, dict[tuple[int, int], SelectedBatch]()

    def hold(self, selection: SelectedBatch) -> None:
        """Keep a batch of candidates for later epochs."""
        self._held[self._plan.place(selection.seq)] = selection

    def again(self, seq: int) -> SelectedBatch:
        """Batch ``seq`` of the run, which is one that is held, in another epoch."""
        before = self._held[self._plan.place(seq)]
        assert before.candidates is not None
        epoch, batch_id = divmod(seq, self._plan.batches_per_epoch)
        candidates = replace(before.candidates, keep=self._plan.keep(seq))
        return replace(before, seq=seq, epoch=epoch, batch_id=batch_id, candidates=candidates)


def offered_again_from(plan: SelectionPlan, start: int) -> int:
    """The ``seq`` from which on a run from ``start`` offers them again; its end where they are too many to hold."""
    a_row, a_batch = HELD_BYTES
    held = plan.batch_assignments * (a_row * len(plan.rows) + a_batch * plan.batches_per_epoch)
    return plan.total_batches if held > MOST_HELD else plan.came_before(start)
