"""The per-batch path: gather, nearest neighbours, graph, Fiedler vector, rule."""

from __future__ import annotations

import math
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, nullcontext
from dataclasses import replace
from functools import cached_property, partial

import numpy as np
import torch

from gstds_cache.config import BY_CLASS, CLASSES, SelectConfig
from gstds_cache.cuda.build import log_fallback
from gstds_cache.errors import UsageError
from gstds_cache.files.digest import digest_of
from gstds_cache.graph.cuda import room_for_edges
from gstds_cache.graph.knn import resolve_backend
from gstds_cache.runtime.devices import resolve_device
from gstds_cache.runtime.executor import Executor
from gstds_cache.runtime.threads import cores, in_threads, limited_threads
from gstds_cache.selection.choose import RowChooser
from gstds_cache.selection.counts import SelectionCounts
from gstds_cache.selection.device_batches import map_pairs, pieces_of
from gstds_cache.selection.device_run import DeviceRun
from gstds_cache.selection.difficulty import Difficulty
from gstds_cache.selection.elsewhere import select_by
from gstds_cache.selection.floors import check_floor
from gstds_cache.selection.guidance import Guidance, guidance_for, load_or_make_guidance
from gstds_cache.selection.guidance_spec import GuidanceKey, GuidanceSpec, key_of, labels_digest
from gstds_cache.selection.offers import Offers, offered_again_from
from gstds_cache.selection.order import shards_at_once
from gstds_cache.selection.plan import BatchPlan, SelectionPlan
from gstds_cache.selection.reference import by_class
from gstds_cache.selection.rows import EligibleRows, count_labels, rows_left_out
from gstds_cache.selection.rule import RuleBatch
from gstds_cache.selection.selected_batch import SelectedBatch
from gstds_cache.selection.settings import ParsedSettings, identity, with_strata
from gstds_cache.selection.spectra import Spectra, Spectrum
from gstds_cache.spectral.block import why_not_solved
from gstds_cache.store.reader import EmbeddingStore

STACK = {"cpu": 4, "cuda": 64}  # graphs worked on at once, by one thread, where they are solved
WITHOUT_GRAPHS = (64, 32768)  # batches, and rows, there at most where no graph is made: handing over costs more


class BatchSelector:
    """Selects the batches of one run over one store.

    Attributes:
        plan: The run's batches.
        rule: How rows are chosen; with ``draw`` what is looked at for candidates.
        draw: What a trainer draws by of the candidates that are selected; None where rows are kept.
        digest: Identity of the selection: the store's fingerprint and every setting that decides the outcome.
        counts: Totals so far.
        knn_backend: The kNN backend, never ``auto``.
        solver: Where graphs are solved.
        graphs_note: Why the last run made graphs again that could have been kept; empty where there is nothing to say.
        device_run: What of it runs on a device from rows to results.
        pending: Batches after the one that a run handed over last which it need not wait for: who writes batches to a
            file takes them together.
        executor: Where batches are selected; None for this process's own threads and devices.
    """

    pending = 0
    executor: Executor | None = None

    def __init__(self, store: EmbeddingStore, config: SelectConfig) -> None:
        """Parse the configuration, check it against the store and plan the run; nothing is computed yet.

        Args:
            store: Where the embeddings are.
            config: How to select.

        Raises:
            UsageError: The rule or schedule is unknown, the batch size exceeds the rows that have an embedding, or
                there are no classes, and they are to be the strata or to come by turns, or reference losses are asked
                for that the draw does not look at.
        """
        config = with_strata(config)
        self.store, self.config = store, config
        self._settings = settings = ParsedSettings.parse(config)
        self.rule, self.draw = settings.rule, settings.draw
        self.plan = SelectionPlan(
            EligibleRows(len(store), rows_left_out(store)),
            batch_size=config.batch_size,
            epochs=config.epochs,
            schedule=settings.schedule,
            seed=config.seed,
            order=settings.order,
            shard_rows=store.spec.shard_rows,
            batch_assignments=settings.batch_assignments,
            labels=store.labels if settings.order.balanced else None,
        )
        if config.min_per_class:
            check_floor(config.min_per_class, store.labels[self.plan.rows.all()], store.classes)
        self.device = resolve_device(config.device)
        largest = max(self.plan.rows_in(0), self.plan.rows_in(self.plan.batches_per_epoch - 1))
        self.knn_backend = resolve_backend(config.knn_backend, self.device, largest, config.knn)
        self.solver = _solver(config, self.device, largest, max(1, self.rule.vectors))
        labels, share = count_labels(store), self.plan.total_kept / self.plan.total_rows
        self._label_counts = labels
        if config.strata == CLASSES and (labels.different < 2 or labels.one_each):
            asked = "`order`" if settings.order.balanced else "it"
            raise UsageError(
                f"`strata={CLASSES}` takes the classes, and {store.location} has none",
                hint=f"leave {asked} out, or embed images that have a class each",
            )
        spec = guidance_for(settings.guidance, self.rule, labels, share=share, epochs=config.epochs)
        self.change_guidance(config.guidance, key_of(store, spec))
        self.counts, self.graphs_note = SelectionCounts(), ""
        self._labels_are_ids = labels.one_each  # counts by class would be by row
        self.device_run = DeviceRun(self, count_labels=not labels.one_each)

    def change_guidance(self, guidance: str, key: GuidanceKey) -> None:
        """Select by another guidance from now on, in the batches that are planned already.

        Args:
            guidance: As the configuration has it.
            key: The same, with its digests.
        """
        self.config, self._guidance_key = replace(self.config, guidance=guidance), key
        self.guidance_digest = key.digest
        self._reference_key = self._key_of_reference(key)
        reference = "" if self._reference_key is None else self._reference_key.probe
        self.identity = identity(
            self.store.fingerprint,
            self.config,
            self._settings,
            key.digest,
            reference,
            self.store.hidden_digest,
            round(math.log(self._label_counts.different), 6) if reference else 0.0,
            labels_digest(self.store) if self._settings.order.balanced or self.config.strata == CLASSES else "",
        )
        self.digest = digest_of(self.identity)
        for made in ("guidance", "reference", "_chooser"):  # for the one before
            self.__dict__.pop(made, None)

    @property
    def guidance_looks_at_graphs(self) -> bool:
        """Whether a row's difficulty depends on its neighbours in the batch."""
        return self._guidance_key.spec.kind == "disagreement"

    @property
    def threads(self) -> int:
        """Threads that work on batches: where graphs are solved on a GPU one, else those of the configuration."""
        return self.cpu_threads if self.solver.type == "cpu" else 1

    @property
    def cpu_threads(self) -> int:
        """CPU threads that may be used."""
        return self.config.threads or cores()

    def run(self, start: int = 0) -> Iterator[SelectedBatch]:
        """Select batch after batch, from batch ``start`` of the run.

        Where graphs are solved on a CPU each thread works on batches of its own, alone: what is selected does not
        depend on their number. Until the iterator ends or is closed, NumPy's and SciPy's BLAS have one thread in this
        whole process.

        Args:
            start: First ``seq``; the batches before it are not computed.

        Yields:
            The batches in order.

        Raises:
            SolverError: A row's embedding holds NaN or Inf.
        """
        if self.executor is not None:
            yield from select_by(self, self.executor, start)
            return
        if self.device_run.has_rule:
            yield from self._run_on_device(start)
            return
        end = self.offers_again_from(start)
        offers = Offers(self.plan) if end < self.plan.total_batches else None
        for selection, _seen in self.watch(start, end=None if offers is None else end):
            if offers is not None:
                offers.hold(selection)
            yield selection
        if offers is not None:
            yield from self._offer_again(offers, end)

    def offers_again_from(self, start: int) -> int:
        """The ``seq`` from which on a run from ``start`` offers candidates from memory; its end where it does not."""
        return self.plan.total_batches if self.draw is None else offered_again_from(self.plan, start)

    def _offer_again(self, offers: Offers, start: int) -> Iterator[SelectedBatch]:
        """Candidates that are held, from batch ``start`` to the run's end, counted.

        Yields:
            The batches in order.
        """
        graphs, none = self.rule.vectors or self.guidance_looks_at_graphs, np.zeros(0, np.int64)
        for seq in range(start, self.plan.total_batches):
            begun = time.perf_counter()
            selection = offers.again(seq)
            self.pending = self.plan.total_batches - seq - 1
            self.counts.add(selection, none, none)
            self.counts.reuse(int(bool(graphs)))
            self.counts.elapsed += time.perf_counter() - begun
            yield selection

    def _run_on_device(self, start: int) -> Iterator[SelectedBatch]:
        """:meth:`run` where the rule runs on the device as well: nothing is made for a single batch but the result.

        Yields:
            The batches in order.
        """

        def choose(batch: BatchPlan, spectrum: Spectrum) -> SelectedBatch:
            return self._chooser.choose(batch, spectrum)[0]

        for ready in self.device_run.selections(start, self.guidance, choose, self._chooser.hold_floor):
            for selection in ready:
                # Those that follow come faster than a record batch of one could be written.
                self.pending = self.plan.total_batches - selection.seq - 1
                yield selection

    def watch(self, start: int = 0, *, end: int | None = None) -> Iterator[tuple[SelectedBatch, RuleBatch]]:
        """:meth:`run`, with what the rule saw of every row beside what it kept.

        Args:
            start: First ``seq``.
            end: One past the last; the run's end by default.

        Yields:
            The selections in order, and each one's batch as the rule saw it (its ``rng`` is used up).
        """
        guidance = self._chooser.guidance  # made before the threads start
        needs_graphs = self.rule.vectors or guidance.kind == "disagreement"
        # What ends before the run does is of candidates; from the start of an epoch each is offered here once.
        again = end is None or start % self.plan.batches_per_epoch > 0
        with closing(self._new_spectra(keep=again)) if needs_graphs else nullcontext() as spectra:
            done = self._chosen(spectra, start, self.plan.total_batches if end is None else end)
            try:
                while True:
                    begun = time.perf_counter()
                    selections = next(done, None)
                    self.counts.elapsed += time.perf_counter() - begun
                    if selections is None:
                        return
                    for left, (selection, seen) in zip(range(len(selections) - 1, -1, -1), selections, strict=True):
                        self.pending = left
                        self._count(selection, seen)
                        yield selection, seen
            finally:
                done.close()
                self.graphs_note = spectra.note if spectra is not None else ""

    def select(self, seqs: Sequence[int]) -> Iterator[SelectedBatch]:
        """Select some batches, in this thread; batches of the same rows share a graph.

        Args:
            seqs: Their positions in the run.

        Yields:
            The batches, in the order of ``seqs``; what :meth:`run` would have selected.
        """
        chooser = self._chooser
        needs_graphs = self.rule.vectors or chooser.guidance.kind == "disagreement"
        spectra = self._new_spectra() if needs_graphs else None
        batches = [self.plan.batch(seq) for seq in seqs]
        first: dict[tuple[int, int], BatchPlan] = {}
        for batch in batches:
            first.setdefault((batch.assignment, batch.group), batch)
        solved: dict[tuple[int, int], Spectrum] = {}
        if spectra is not None:
            with closing(spectra), limited_threads(1):
                for stack in _of_one_size(list(first.values()), STACK[self.solver.type]):
                    names = [(batch.assignment, batch.group) for batch in stack]
                    solved |= dict(zip(names, spectra.of(stack), strict=True))
            self.counts.reuse(len(batches) - len(first))
        for batch in batches:
            with self.counts.timed("rule", self.device):
                selection, seen = chooser.choose(batch, solved.get((batch.assignment, batch.group)))
            self._count(selection, seen)
            yield selection

    def _count(self, selection: SelectedBatch, seen: RuleBatch) -> None:
        labels = kept = np.zeros(0, np.int64)
        if seen.labels is not None and not self._labels_are_ids and selection.candidates is None:
            labels, kept = seen.labels, self._chooser.labels_of(selection.kept)
        self.counts.add(selection, labels, kept)

    def _chosen(
        self, spectra: Spectra | None, start: int, end: int
    ) -> Generator[list[tuple[SelectedBatch, RuleBatch]], None, None]:
        """Yields the selections of a few batches at a time, in order; once closed, no thread asks for spectra."""
        if spectra is None or self.device_run.why_not:
            most, threads = STACK[self.solver.type], self.threads
            if spectra is None:
                batches, rows = WITHOUT_GRAPHS
                most = max(most, min(batches, rows // self.plan.batch_size))
                # Our rules without a graph hold Python's lock: 16 threads take up to twice the time of one.
                threads = threads if ":" in self.config.rule else 1
            yield from in_threads(partial(self._select, spectra), self._stacks(start, end, most), threads)
            return
        with closing(self.device_run.path(spectra).solved(start, None, end=end)) as stacks:
            yield from in_threads(partial(map_pairs, self._chooser.choose), pieces_of(stacks), self.cpu_threads)

    def _new_spectra(self, *, keep: bool = True) -> Spectra:
        if not self.device_run.why_not:
            return self.device_run.spectra_on_cpu(keep=keep)
        return Spectra(
            self.store,
            self.config,
            self.plan,
            self.counts,
            vectors=max(1, self.rule.vectors),
            device=self.device,
            solver=self.solver,
            backend=self.knn_backend,
            keep=keep,
        )

    @property
    def too_many_strata(self) -> str:
        """Why a draw by losses would hardly look at them, and what to do; empty where it does."""
        strata, rows = self.config.strata, self.plan.rows_in(0)
        if strata == CLASSES:
            strata = self._label_counts.different
            if 2 * strata <= rows:
                return ""
            return (
                f"`batch_size`: {rows:,} rows of {strata:,} classes: most have a single row in a batch, so scores "
                f"choose next to nothing, and rows are drawn at random; raise it to {16 * strata:,} or so"
            )
        if strata is None or strata == 1 or 2 * strata <= rows:
            return ""
        return (
            f"`strata`: {strata:,} of a batch of {rows:,} rows: most hold a single row, so scores choose next to "
            f"nothing, and rows are drawn at random; lower it to {max(1, rows // 16)} or so, or raise `batch_size`"
        )

    @property
    def slow_order(self) -> str:
        """Why this order reads shards of the store again and again, and what to do; empty where it does not."""
        store, window = self.store, self.plan.order.window
        if store.access_kind != "window" or self.device_run.has_rows:
            return ""
        if window is None:
            windows = "" if self.plan.order.balanced else "`order='window'`, or "  # which would be another order
            return f"rows are read shard by shard, in random order: use {windows}a larger `memory_budget`"
        shard_bytes = store.spec.shard_rows * store.spec.dim * np.dtype(store.spec.dtype).itemsize
        # Two windows: a batch may begin in one and end in the next.
        needed = min(2 * shards_at_once(window, store.spec.shard_rows), store.spec.shards) * shard_bytes
        if store.memory_budget >= needed:
            return ""
        return (
            f"two windows of rows take {needed / (1 << 20):,.0f} MiB and `memory_budget` is "
            f"{store.memory_budget >> 20:,}: shards are read more than once an epoch; raise it, or lower the rows of "
            "`order='window:ROWS'`"
        )

    @cached_property
    def guidance(self) -> Guidance:
        """The rows' difficulty: found beside the store, or computed now.

        Raises:
            UsageError: The store has no labels to learn from.
        """
        begun = time.perf_counter()
        guidance = load_or_make_guidance(self.store, self._guidance_key, threads=self.cpu_threads, device=self.device)
        if self._labels_are_ids and guidance.kind == "none" and self.rule.needs_guidance:
            guidance = replace(guidance, note="none, since hardly two items have the same label: labels look like ids")
        self.counts.seconds["guidance"] += time.perf_counter() - begun
        self.counts.elapsed += time.perf_counter() - begun
        return guidance

    @cached_property
    def reference(self) -> Difficulty | None:
        """The rows' reference losses: found beside the store, or computed now; None where no draw looks at them."""
        if self._reference_key is None:
            return None
        begun = time.perf_counter()
        probe = load_or_make_guidance(self.store, self._reference_key, threads=self.cpu_threads, device=self.device)
        self.counts.seconds["guidance"] += time.perf_counter() - begun
        self.counts.elapsed += time.perf_counter() - begun
        if probe.of_rows is None or self.config.reference != BY_CLASS:
            return probe.of_rows
        return by_class(probe.of_rows, self.store.labels)

    @cached_property
    def _chooser(self) -> RowChooser:
        return RowChooser(self.store, self.config, self.plan, self.rule, self.draw, self.guidance, self.reference)

    def _key_of_reference(self, guidance: GuidanceKey) -> GuidanceKey | None:
        """The digests of the probe whose losses are the reference; it is that of the guidance, where that has one.

        Raises:
            UsageError: The store has no labels to learn from.
        """
        if self.draw is None or not self.draw.needs_reference:
            if self.config.reference == BY_CLASS:
                raise UsageError(
                    f"`reference`: got {BY_CLASS!r}, but `draw={self.config.draw!r}` looks at no reference losses",
                    hint="leave it out",
                )
            return None
        labels = self._label_counts
        if labels.different < 2 or labels.one_each:
            raise UsageError(
                f"`draw={self.draw.name!r}` looks at reference losses, and {self.store.location} has no labels that a "
                "probe could learn",
                hint="use `draw='loss'`, which looks at training losses alone",
            )
        spec = guidance.spec if guidance.probe else GuidanceSpec("probe")
        return key_of(self.store, replace(spec, kind="probe", cutoff=0.0, trial=None))

    def _stacks(self, seq: int, end: int, most: int) -> Iterator[list[BatchPlan]]:
        """Full batches are stacked; the other last batch of an epoch stands alone.

        Where assignments are fixed, a stack ends with its epoch: the next one finds what was computed in this.

        Yields:
            Batches of one size.
        """
        stack: list[BatchPlan] = []
        for batch in map(self.plan.batch, range(seq, end)):
            if stack and (
                len(stack) == most
                or len(batch.indices) != len(stack[0].indices)
                or (self.plan.batch_assignments and batch.epoch != stack[0].epoch)
            ):
                yield stack
                stack = []
            stack.append(batch)
        if stack:
            yield stack

    def _select(self, spectra: Spectra | None, batches: list[BatchPlan]) -> list[tuple[SelectedBatch, RuleBatch]]:
        solved = [None] * len(batches) if spectra is None else spectra.of(batches)
        with self.counts.timed("rule", self.device):
            return [self._chooser.choose(batch, spectrum) for batch, spectrum in zip(batches, solved, strict=True)]


def _of_one_size(batches: Sequence[BatchPlan], most: int) -> Iterator[list[BatchPlan]]:
    """Yields stacks of up to ``most`` batches that have as many rows."""
    by_size: dict[int, list[BatchPlan]] = {}
    for batch in batches:
        by_size.setdefault(len(batch.indices), []).append(batch)
    for same in by_size.values():
        for start in range(0, len(same), most):
            yield same[start : start + most]


def _solver(config: SelectConfig, device: torch.device, largest: int, vectors: int) -> torch.device:
    """Where graphs are solved.

    Args:
        config: The configuration.
        device: Where neighbours are found.
        largest: Rows of the largest batch.
        vectors: Eigenvectors wanted.

    Raises:
        UsageError: On a GPU, where neighbours are not found on one.
    """
    if config.solver == "cpu":
        return torch.device("cpu")
    if config.solver == "auto":
        reason = why_not_solved(device, largest, vectors, room_for_edges(largest, config.knn))
        log_fallback(device, reason)
        return torch.device("cpu") if reason else device
    if device.type != "cuda":
        raise UsageError(
            f"`solver='cuda'`: `device={config.device!r}` is {device} here",
            hint="leave `solver` out: it solves on the CPU",
        )
    return device
