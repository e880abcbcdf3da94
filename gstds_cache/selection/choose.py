"""The rows of one batch: what its rule keeps, or, for a draw by losses, all of them with what a trainer draws by."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Int64

from gstds_cache.config import CLASSES, SelectConfig
from gstds_cache.seeding import rng_for
from gstds_cache.selection.difficulty import Difficulty
from gstds_cache.selection.draws import Draw
from gstds_cache.selection.floors import hold_floor
from gstds_cache.selection.guidance import Guidance
from gstds_cache.selection.plan import BatchPlan, SelectionPlan
from gstds_cache.selection.rule import Rule, RuleBatch, read_only
from gstds_cache.selection.selected_batch import Candidates, SelectedBatch
from gstds_cache.selection.spectra import Spectrum
from gstds_cache.selection.spread import weights
from gstds_cache.selection.strata import cells_of
from gstds_cache.spectral.status import Status
from gstds_cache.store.reader import EmbeddingStore


@dataclass(frozen=True)
class RowChooser:
    """Chooses rows of any batch of a run; nothing changes with a batch, so threads share it.

    Attributes:
        store: Where labels and classes are.
        config: How to select.
        plan: The run's batches.
        rule: How rows are kept.
        draw: What a trainer draws by, where rows are offered and not kept.
        guidance: The rows' difficulty.
        reference: The rows' reference losses; None where no draw looks at them.
    """

    store: EmbeddingStore
    config: SelectConfig
    plan: SelectionPlan
    rule: Rule
    draw: Draw | None
    guidance: Guidance
    reference: Difficulty | None

    def labels_of(self, rows: Int64[np.ndarray, " B"]) -> Int64[np.ndarray, " B"]:
        """Labels of some rows."""
        return np.asarray(self.store.labels[rows], np.int64)

    def _see(self, batch: BatchPlan, spectrum: Spectrum | None) -> RuleBatch:
        """What the rule gets to see of a batch."""
        seen = RuleBatch(
            vector=np.zeros(len(batch.indices)),
            keep=batch.keep,
            rng=rng_for(self.config.seed, "rule", batch.epoch, batch.batch_id),
            labels=self.labels_of(batch.indices),
            ratio=self.plan.ratio(batch.seq),
            repeat=self.plan.repeat(batch.epoch),
            per_batch_rng=rng_for(self.config.seed, "steady", batch.assignment, batch.group),
        )
        if spectrum is not None:
            seen = replace(
                seen,
                vector=np.ascontiguousarray(spectrum.basis[:, 0]),
                basis=spectrum.basis,
                values=spectrum.values,
                neighbors=spectrum.neighbors.astype(np.int64),
                similarities=spectrum.similarities,
            )
        if self.rule.needs_guidance:
            hard = self.guidance.of(batch.indices, self.labels_of(batch.indices), seen.neighbors)
            seen = replace(seen, guidance=hard)
        return read_only(seen)

    def choose(self, batch: BatchPlan, spectrum: Spectrum | None) -> tuple[SelectedBatch, RuleBatch]:
        """The batch's selection, and what the rule saw of it; ``spectrum`` of its graph, if it has one."""
        seen = self._see(batch, spectrum)
        if self.draw is not None:
            return self._offer(batch, spectrum, seen), seen
        positions = self.rule.choose(seen)
        if self.config.min_per_class:
            positions = self.hold_floor(batch, positions)
        selection = SelectedBatch(
            seq=batch.seq,
            epoch=batch.epoch,
            batch_id=batch.batch_id,
            n_in=len(batch.indices),
            kept=batch.indices[positions],
            score=None if spectrum is None else seen.vector[positions].astype(np.float32),
            status=Status.NOT_COMPUTED if spectrum is None else spectrum.status,
            value=float("nan") if spectrum is None else float(spectrum.values[0]),
            residual=float("nan") if spectrum is None else spectrum.residual,
        )
        return selection, seen

    def hold_floor(self, batch: BatchPlan, positions: Int64[np.ndarray, " M"]) -> Int64[np.ndarray, " M"]:
        """``positions``, with rows put back until each class keeps ``min_per_class``."""
        where = f"batch {batch.batch_id} of epoch {batch.epoch}"
        labels = self.labels_of(batch.indices)
        return hold_floor(positions, labels, self.config.min_per_class, self.store.classes, where)

    def _offer(self, batch: BatchPlan, spectrum: Spectrum | None, seen: RuleBatch) -> SelectedBatch:
        """All rows of a batch, with what a trainer draws by."""
        rows, count = batch.indices, len(batch.indices)
        stratum = np.zeros(count, np.int16)
        if self.config.strata == CLASSES:
            _, of = np.unique(self.labels_of(rows), return_inverse=True)
            stratum = of.astype(np.int16)
        elif spectrum is not None:
            assert self.config.strata is not None  # with_strata settled it
            order, bounds = cells_of(seen, min(self.config.strata, count))
            stratum[order] = np.repeat(np.arange(len(bounds) - 1), np.diff(bounds))
        prior = np.ones(count) if seen.guidance is None else weights(seen)
        reference = np.full(count, np.nan) if self.reference is None else self.reference.of(rows)
        return SelectedBatch(
            seq=batch.seq,
            epoch=batch.epoch,
            batch_id=batch.batch_id,
            n_in=count,
            kept=rows,
            score=None,
            status=Status.NOT_COMPUTED if spectrum is None else spectrum.status,
            value=float("nan") if spectrum is None else float(spectrum.values[0]),
            residual=float("nan") if spectrum is None else spectrum.residual,
            candidates=Candidates(
                batch.keep, stratum, reference.astype(np.float32), (prior / prior.mean()).astype(np.float32)
            ),
        )
