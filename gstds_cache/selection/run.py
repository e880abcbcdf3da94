"""The per-batch path: gather, graph, Fiedler vector, rule."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch

from gstds_cache.config import SelectConfig
from gstds_cache.devices import resolve_device
from gstds_cache.digest import digest_of
from gstds_cache.seeding import rng_for
from gstds_cache.selection.plan import BatchPlan, SelectionPlan
from gstds_cache.selection.rules import find_rule, settle_ties
from gstds_cache.selection.schedule import parse_schedule
from gstds_cache.selection.selected import Selection
from gstds_cache.spectral.fiedler import fiedler_of_embeddings
from gstds_cache.spectral.result import FiedlerResult
from gstds_cache.spectral.status import Status
from gstds_cache.store.layout import OK
from gstds_cache.store.reader import EmbeddingStore

STACK = 8  # graphs solved together
ALGORITHM = 1  # raised by whoever changes what the same settings select, so that no stored selection is silently stale
NOT_IDENTITY = frozenset({"device", "knn_backend", "threads"})


@dataclass
class SelectionCounts:
    """Running totals of a selection.

    Attributes:
        batches: Batches done.
        rows: Rows they held.
        kept: Rows that stayed.
        status: Batches by status flag; a batch with two flags counts in both.
        seconds: Time spent in gather, spectrum and rule.
    """

    batches: int = 0
    rows: int = 0
    kept: int = 0
    status: Counter[str] = field(default_factory=Counter)
    seconds: dict[str, float] = field(default_factory=lambda: {"gather": 0.0, "spectrum": 0.0, "rule": 0.0})

    def add(self, selection: Selection) -> None:
        """Count one batch."""
        self.batches += 1
        self.rows += selection.n_in
        self.kept += len(selection.kept)
        self.status.update(flag.name.lower() for flag in selection.status if flag.name)
        if selection.status == Status.CONVERGED:
            self.status["converged"] += 1


class BatchSelector:
    """Selects the batches of one run over one store.

    Attributes:
        plan: The run's batches.
        digest: Identity of the selection: the store's fingerprint and every setting that decides the outcome.
        counts: Totals so far.
    """

    def __init__(self, store: EmbeddingStore, config: SelectConfig) -> None:
        """Check the configuration against the store and lay out the run; nothing is computed yet.

        Args:
            store: Where the embeddings are.
            config: How to select.

        Raises:
            UsageError: The rule or schedule is unknown, or the batch size exceeds the rows that have an embedding.
        """
        self.store, self.config = store, config
        self.rule = find_rule(config.rule)
        self.plan = SelectionPlan(
            np.flatnonzero(store.valid == OK).astype(np.int64),
            batch_size=config.batch_size,
            epochs=config.epochs,
            schedule=parse_schedule(config.schedule),
            seed=config.seed,
        )
        self.device = resolve_device(config.device)
        self.identity = identity(store, config)
        self.digest = digest_of(self.identity)
        self.counts = SelectionCounts()

    def run(self, start: int = 0) -> Iterator[Selection]:
        """Select batch after batch, from batch ``start`` of the run.

        Args:
            start: First ``seq``; the batches before it are not computed.

        Yields:
            The selections in order.

        Raises:
            SolverError: A row's embedding holds NaN or Inf.
        """
        seq = start
        while seq < self.plan.total_batches:
            batches = [self.plan.batch(seq)]
            # Full batches are stacked; the smaller last batch of an epoch stands alone.
            while len(batches) < STACK and seq + len(batches) < self.plan.total_batches:
                following = self.plan.batch(seq + len(batches))
                if len(following.indices) != len(batches[0].indices):
                    break
                batches.append(following)
            for selection in self._select(batches):
                self.counts.add(selection)
                yield selection
            seq += len(batches)

    def _select(self, batches: list[BatchPlan]) -> list[Selection]:
        spectrum = self._spectrum(batches) if self.rule.needs_spectrum else None
        begun = time.perf_counter()
        selections = [self._choose(batch, spectrum, graph) for graph, batch in enumerate(batches)]
        self.counts.seconds["rule"] += time.perf_counter() - begun
        return selections

    def _spectrum(self, batches: list[BatchPlan]) -> FiedlerResult:
        begun = time.perf_counter()
        gathered = np.stack([self.store.gather(batch.indices) for batch in batches])
        rows = torch.from_numpy(gathered).to(self.device)
        ready = time.perf_counter()
        result = fiedler_of_embeddings(
            rows,
            k=self.config.knn,
            backend=self.config.knn_backend,
            laplacian=self.config.laplacian,
            tolerance=self.config.tolerance,
            max_iterations=self.config.max_iterations,
            seed=self.config.seed,
        )
        result = replace(result, **{f.name: getattr(result, f.name).cpu() for f in fields(result)})
        self.counts.seconds["gather"] += ready - begun
        self.counts.seconds["spectrum"] += time.perf_counter() - ready
        return result

    def _choose(self, batch: BatchPlan, spectrum: FiedlerResult | None, graph: int) -> Selection:
        vector = np.zeros(len(batch.indices)) if spectrum is None else settle_ties(spectrum.vector[graph].numpy())
        rng = rng_for(self.config.seed, "rule", batch.epoch, batch.batch_id)
        positions = self.rule.choose(vector, batch.keep, rng)
        return Selection(
            seq=batch.seq,
            epoch=batch.epoch,
            batch_id=batch.batch_id,
            n_in=len(batch.indices),
            kept=batch.indices[positions],
            score=None if spectrum is None else vector[positions].astype(np.float32),
            status=Status.NOT_COMPUTED if spectrum is None else Status(int(spectrum.status[graph])),
            value=float("nan") if spectrum is None else float(spectrum.values[graph, 0]),
            residual=float("nan") if spectrum is None else float(spectrum.residual[graph, 0]),
        )


def identity(store: EmbeddingStore, config: SelectConfig) -> dict[str, Any]:
    """Everything that decides a selection's outcome, as JSON-able values."""
    settings = {f.name: getattr(config, f.name) for f in fields(config) if f.name not in NOT_IDENTITY}
    return {"algorithm": ALGORITHM, "cache": store.fingerprint, "select": settings}
