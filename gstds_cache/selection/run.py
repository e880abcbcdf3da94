"""The per-batch path: gather, nearest neighbours, graph, Fiedler vector, rule."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing, nullcontext
from dataclasses import fields, replace
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64

from gstds_cache.config import SelectConfig
from gstds_cache.data.label_counts import LabelCounts
from gstds_cache.errors import UsageError
from gstds_cache.files.digest import digest_of
from gstds_cache.graph.knn import resolve_backend
from gstds_cache.runtime.devices import resolve_device
from gstds_cache.runtime.threads import cores, in_threads
from gstds_cache.seeding import rng_for
from gstds_cache.selection.counts import SelectionCounts
from gstds_cache.selection.floors import check_floor, hold_floor
from gstds_cache.selection.guidance import (
    DEFAULT,
    Guidance,
    GuidanceSpec,
    guidance_digest,
    load_or_make_guidance,
    parse_guidance,
)
from gstds_cache.selection.order import parse_order, shards_at_once
from gstds_cache.selection.plan import BatchPlan, SelectionPlan
from gstds_cache.selection.rows import EligibleRows
from gstds_cache.selection.rule import Rule, RuleBatch, read_only
from gstds_cache.selection.rules import RULES, find_rule
from gstds_cache.selection.schedule import Schedule, parse_schedule
from gstds_cache.selection.selected_batch import Selection
from gstds_cache.selection.spectra import Spectra, Spectrum
from gstds_cache.selection.trial import TrialSettings
from gstds_cache.spectral.status import Status
from gstds_cache.store.reader import EmbeddingStore

STACK = {"cpu": 4, "cuda": 64}  # graphs worked on at once, by one thread, where they are solved
ALGORITHM = 3  # raised by whoever changes what the same settings select, so that no stored selection is silently stale
NOT_IDENTITY = frozenset({"device", "knn_backend", "solver", "threads"})


class BatchSelector:
    """Selects the batches of one run over one store.

    Attributes:
        plan: The run's batches.
        digest: Identity of the selection: the store's fingerprint and every setting that decides the outcome.
        counts: Totals so far.
        knn_backend: The kNN backend, never ``auto``.
        solver: Where graphs are solved.
        graphs_note: Why the last run made graphs again that could have been kept; empty where there is nothing to say.
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
            EligibleRows(len(store), store.without_embedding),
            batch_size=config.batch_size,
            epochs=config.epochs,
            schedule=parse_schedule(config.schedule),
            seed=config.seed,
            window=parse_order(config.order),
            shard_rows=store.spec.shard_rows,
            partitions=_partitions(config, self.rule),
        )
        if config.min_per_class:
            check_floor(config.min_per_class, store.labels[self.plan.rows.all()], store.classes)
        self.device = resolve_device(config.device)
        self.knn_backend = resolve_backend(config.knn_backend, self.device)
        self.solver = _solver(config, self.device)
        self._guidance_spec = _guidance_spec(config.guidance, self.rule, store, self.plan)
        self.guidance_digest = guidance_digest(store, self._guidance_spec)
        self.identity = identity(store, config, self.rule, self.plan.schedule, self.guidance_digest)
        self.digest = digest_of(self.identity)
        self.counts, self.graphs_note = SelectionCounts(), ""
        self._labels = store.labels
        self._ids = LabelCounts.of(store.labels).one_each  # labels that are none: counts by class would be by row

    def run(self, start: int = 0) -> Iterator[Selection]:
        """Select batch after batch, from batch ``start`` of the run.

        Where graphs are solved on a CPU each thread works on batches of its own, alone: what is selected does not
        depend on their number.

        Args:
            start: First ``seq``; the batches before it are not computed.

        Yields:
            The selections in order.

        Raises:
            SolverError: A row's embedding holds NaN or Inf.
        """
        for selection, _seen in self.watch(start):
            yield selection

    def watch(self, start: int = 0) -> Iterator[tuple[Selection, RuleBatch]]:
        """:meth:`run`, with what the rule saw of every row beside what it kept.

        Args:
            start: First ``seq``.

        Yields:
            The selections in order, and each one's batch as the rule saw it (its ``rng`` is used up).
        """
        guidance = self.guidance  # before the threads start
        looks = self.rule.vectors or guidance.kind == "disagreement"
        with closing(self._new_spectra()) if looks else nullcontext() as spectra:
            threads = (self.config.threads or cores()) if self.solver.type == "cpu" else 1
            done = in_threads(partial(self._select, spectra), self._stacks(start), threads)
            try:
                while True:
                    begun = time.perf_counter()
                    selections = next(done, None)
                    self.counts.elapsed += time.perf_counter() - begun
                    if selections is None:
                        return
                    for selection, seen in selections:
                        labels = kept = np.zeros(0, np.int64)
                        if seen.labels is not None and not self._ids:
                            labels, kept = seen.labels, self._labels_of(selection.kept)
                        self.counts.add(selection, labels, kept)
                        yield selection, seen
            finally:
                done.close()
                self.graphs_note = spectra.note if spectra is not None else ""

    def _new_spectra(self) -> Spectra:
        return Spectra(
            self.store,
            self.config,
            self.plan,
            self.counts,
            vectors=max(1, self.rule.vectors),
            device=self.device,
            solver=self.solver,
            backend=self.knn_backend,
        )

    @property
    def slow_order(self) -> str:
        """Why this order reads shards of the store again and again, and what to do; empty where it does not."""
        store, window = self.store, self.plan.window
        if store.access_kind != "window":
            return ""
        if window is None:
            return "rows are read shard by shard, in random order: use --order window, or a larger --memory-budget"
        shard_bytes = store.spec.shard_rows * store.spec.dim * np.dtype(store.spec.dtype).itemsize
        # Two windows: a batch may begin in one and end in the next.
        needed = min(2 * shards_at_once(window, store.spec.shard_rows), store.spec.shards) * shard_bytes
        if store.memory_budget >= needed:
            return ""
        return (
            f"two windows of rows take {needed / (1 << 20):,.0f} MiB and --memory-budget is "
            f"{store.memory_budget >> 20:,}: shards are read more than once an epoch; raise it, or lower the rows of "
            "--order window:ROWS"
        )

    @cached_property
    def guidance(self) -> Guidance:
        """The rows' difficulty: found beside the store, or made now.

        Raises:
            UsageError: The store has no labels to learn from.
        """
        begun = time.perf_counter()
        threads = self.config.threads or cores()
        made = load_or_make_guidance(self.store, self._guidance_spec, threads=threads, device=self.device)
        if self._ids and made.kind == "none" and self.rule.needs_guidance:
            made = replace(made, note="none, since hardly two items have the same label: labels look like ids")
        self.counts.seconds["guidance"] += time.perf_counter() - begun
        self.counts.elapsed += time.perf_counter() - begun
        return made

    def _stacks(self, seq: int) -> Iterator[list[BatchPlan]]:
        """Full batches are stacked; the other last batch of an epoch stands alone.

        Where batches come again, a stack ends with its epoch: the next one finds what was computed in this.

        Yields:
            Batches of one size.
        """
        stack: list[BatchPlan] = []
        for batch in map(self.plan.batch, range(seq, self.plan.total_batches)):
            if stack and (
                len(stack) == STACK[self.solver.type]
                or len(batch.indices) != len(stack[0].indices)
                or (self.plan.partitions and batch.epoch != stack[0].epoch)
            ):
                yield stack
                stack = []
            stack.append(batch)
        if stack:
            yield stack

    def _select(self, spectra: Spectra | None, batches: list[BatchPlan]) -> list[tuple[Selection, RuleBatch]]:
        found = [None] * len(batches) if spectra is None else spectra.of(batches)
        with self.counts.timed("rule", self.device):
            return [self._choose(batch, spectrum) for batch, spectrum in zip(batches, found, strict=True)]

    def _labels_of(self, rows: Int64[np.ndarray, " B"]) -> Int64[np.ndarray, " B"]:
        return np.asarray(self._labels[rows], np.int64)

    def _see(self, batch: BatchPlan, spectrum: Spectrum | None) -> RuleBatch:
        """What the rule gets to see of a batch."""
        seen = RuleBatch(
            vector=np.zeros(len(batch.indices)),
            keep=batch.keep,
            rng=rng_for(self.config.seed, "rule", batch.epoch, batch.batch_id),
            labels=self._labels_of(batch.indices),
            ratio=self.plan.ratio(batch.seq),
            visit=self.plan.visit(batch.epoch),
            steady_rng=rng_for(self.config.seed, "steady", batch.partition, batch.group),
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
            hard = self.guidance.of(batch.indices, self._labels_of(batch.indices), seen.neighbors)
            seen = replace(seen, guidance=hard)
        return read_only(seen)

    def _choose(self, batch: BatchPlan, spectrum: Spectrum | None) -> tuple[Selection, RuleBatch]:
        seen = self._see(batch, spectrum)
        positions = self.rule.choose(seen)
        if self.config.min_per_class:
            where = f"batch {batch.batch_id} of epoch {batch.epoch}"
            classes = self.store.classes
            labels = self._labels_of(batch.indices)
            positions = hold_floor(positions, labels, self.config.min_per_class, classes, where)
        selection = Selection(
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


def _guidance_spec(text: str, rule: Rule, store: EmbeddingStore, plan: SelectionPlan) -> GuidanceSpec:
    spec = parse_guidance(text)
    if rule.needs_guidance:
        if spec.kind != "auto":
            return spec
        counts = LabelCounts.of(store.labels)
        if counts.different < 2 or counts.one_each:
            return replace(spec, kind="none")
        share = plan.total_kept / (len(plan.rows) * plan.epochs)
        return replace(spec, kind=DEFAULT, trial=TrialSettings(rule.power, round(share, 2), plan.epochs))
    if spec.kind not in {"auto", "none"}:
        guided = [name for name, other in RULES.items() if other.needs_guidance]
        raise UsageError(
            f"--guidance {text}: rule {rule.name} does not look at guidance",
            hint=f"leave --guidance out, or take a rule that does: {', '.join(guided)}",
        )
    return replace(spec, kind="none")


def _solver(config: SelectConfig, device: torch.device) -> torch.device:
    """Where graphs are solved.

    Raises:
        UsageError: On a GPU, where neighbours are not found on one.
    """
    if config.solver != "cuda":
        return torch.device("cpu")
    if device.type != "cuda":
        raise UsageError(
            f"--solver cuda: --device {config.device} is {device} here", hint="leave --solver out: it solves on the CPU"
        )
    return device


def _partitions(config: SelectConfig, rule: Rule) -> int:
    """Ways the rows are dealt out to batches. A rule that makes no graph has nothing to gain from dealing them once."""
    return config.partitions if config.partitions is not None else int(rule.vectors > 0)


def identity(
    store: EmbeddingStore, config: SelectConfig, rule: Rule, schedule: Schedule, guidance: str
) -> dict[str, Any]:
    """Everything that decides a selection's outcome, as JSON-able values."""
    settings = {f.name: getattr(config, f.name) for f in fields(config) if f.name not in NOT_IDENTITY}
    settings |= {"schedule": schedule.identity, "guidance": guidance, "partitions": _partitions(config, rule)}
    window = parse_order(config.order)
    if window is not None:
        settings["order"] = f"window:{window}"
    source = {"rule_source": rule.source} if rule.source else {}
    return {"algorithm": ALGORITHM, "cache": store.fingerprint, "select": settings, **source}
