"""``gstds_cache.select``: everything that ``gstds-select`` does, as calls."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from decimal import Decimal
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Unpack

from gstds_cache.api.selection import Selection, SelectionSummary
from gstds_cache.cluster.engine import Engine
from gstds_cache.config import (
    DEVICE,
    ENGINE,
    MEMORY_BUDGET,
    SMALLEST_BATCH,
    SelectConfig,
    SelectSettings,
    as_type,
    require_settings,
)
from gstds_cache.costs.energy import EnergyMeter
from gstds_cache.costs.records import Cost, keep_record, selection_costs
from gstds_cache.errors import UsageError
from gstds_cache.files.location import local_file
from gstds_cache.runtime.devices import resolve_device
from gstds_cache.runtime.jit import why_not_kept
from gstds_cache.runtime.notify import Notify
from gstds_cache.runtime.progress import Progress, showing
from gstds_cache.runtime.threads import cores, limited_threads
from gstds_cache.selection.catalog import AUTO_DRAW
from gstds_cache.selection.draw_choice import choose_draw, without_draw
from gstds_cache.selection.floors import class_name
from gstds_cache.selection.plan import batch_of_few
from gstds_cache.selection.rows import rows_left_out
from gstds_cache.selection.run import BatchSelector
from gstds_cache.spectral.status import Status
from gstds_cache.store.access import Kind
from gstds_cache.store.reader import EmbeddingStore
from gstds_cache.stream.deliver import deliver_computed, deliver_kept, kept_paths, path_to_keep
from gstds_cache.stream.schema import ByteStream

SHOWN_EVERY = 64


def select(
    store: EmbeddingStore | str | Path,
    *,
    keep: float | None = None,
    out: str | Path | None = None,
    force: bool = False,
    memory_budget: int = MEMORY_BUDGET,
    access: Kind = "auto",
    mirror: str | Path | None = None,
    engine: str = ENGINE,
    progress: Progress | bool | None = True,
    notify: Notify | None = None,
    **settings: Unpack[SelectSettings],
) -> Selection:
    """Shuffle a store's rows into batches, remove a share of each by its graph's Fiedler vector, write what stays.

    With ``draw`` all rows of each batch are written, as candidates, and the trainer draws those that it trains on.

    A selection that was made before from the same store and settings is found, and nothing is computed. One that was
    interrupted goes on where it stopped. While the call runs, torch and BLAS have no more threads than ``threads``;
    when it returns they have what they had.

    Args:
        store: A store, or its location.
        keep: Share of each batch that stays, above 0 and up to 1: the constant schedule. Excludes ``schedule``.
        out: File to write; by default one named by the selection's digest in ``STORE.selections/``, or in
            ``$GSTDS_CACHE`` where nothing can be written beside the store.
        force: Replace a file that holds something else.
        memory_budget: Bytes of embeddings to hold. This and the next two are for a store that is opened here.
        access: How to read rows: all on the GPU (``device``); all in ``memory``; from a ``mirror``, a local copy made
            once; or a ``window`` of shards. ``auto`` takes the GPU where the CUDA kernels run and the rows fit, else
            memory where they fit the budget, else a mirror where the disk has room.
        mirror: Folder of the mirror; None is ``STORE.mirror``.
        engine: Where batches are selected: ``local``, in this process; ``ray``, on the Ray cluster of ``$RAY_ADDRESS``
            or one that is started on this machine for the call; or ``ray:HOST:PORT`` (docs/ray.md).
        progress: True for a line on stderr, a callback, or False.
        notify: Told the plan, notes and warnings, a line each; by default warnings are logged.
        settings: As the fields of :class:`~gstds_cache.SelectConfig`.

    Returns:
        The selection.

    Raises:
        UsageError: A setting cannot be meant, the store does not exist, or ``out`` holds something else.
        IncompleteError: The store is not complete, or another process is writing the same file.
        SolverError: A row's embedding holds NaN or Inf.
    """
    require_settings(select, SelectConfig, settings)
    config = config_of(keep, settings)
    with _opened(
        partial(open_store, store, memory_budget, access, mirror),
        config,
        notify,
        Engine.parse(engine),
        fit="batch_size" not in settings,
    ) as run:
        path = _default_path(run) if out is None else local_file(out, "`out`")
        run.deliver(path, force=force, progress=progress)
        return Selection(path.absolute(), run.summary(str(path)))


def stream_selection(
    store: EmbeddingStore | str | Path,
    stream: ByteStream,
    *,
    keep: float | None = None,
    memory_budget: int = MEMORY_BUDGET,
    access: Kind = "auto",
    mirror: str | Path | None = None,
    engine: str = ENGINE,
    progress: Progress | bool | None = True,
    notify: Notify | None = None,
    **settings: Unpack[SelectSettings],
) -> SelectionSummary:
    """Write a selection to a binary stream, batch by batch as it is computed, for a trainer that reads it.

    It is kept beside the store as well, where that can be done, and found there the next time. By default one thread
    computes, as a trainer needs the others.

    Args:
        store: A store, or its location.
        stream: A pipe, a socket's file, or any other binary stream.
        keep: As for :func:`select`.
        memory_budget: As for :func:`select`.
        access: As for :func:`select`.
        mirror: As for :func:`select`.
        engine: As for :func:`select`.
        progress: As for :func:`select`.
        notify: As for :func:`select`.
        settings: As for :func:`select`.

    Returns:
        What was selected.

    Raises:
        UsageError: A setting cannot be meant, or the store does not exist.
        BrokenPipeError: The stream's reader went away.
        IncompleteError: The store is not complete.
        SolverError: A row's embedding holds NaN or Inf.
    """
    require_settings(stream_selection, SelectConfig, settings)
    if not hasattr(stream, "write"):
        raise UsageError(f"`stream`: got {stream!r:.80}, expected a binary stream")
    settings.setdefault("threads", 1)
    config = config_of(keep, settings)
    with _opened(
        partial(open_store, store, memory_budget, access, mirror),
        config,
        notify,
        Engine.parse(engine),
        fit="batch_size" not in settings,
    ) as run:
        run.deliver(stream, force=False, progress=progress)
        return run.summary("-")


def config_of(keep: float | None, settings: SelectSettings) -> SelectConfig:
    """The configuration that keyword arguments mean.

    Raises:
        UsageError: A setting cannot be meant, or ``keep`` and ``schedule`` were both given.
    """
    if keep is None:
        return SelectConfig(**settings)
    settings = settings.copy()
    if "schedule" in settings:
        raise UsageError("`keep` and `schedule` both say how many rows stay: give one of them")
    # Decimals: 1 - 0.8 is 0.2, and not 0.19999999999999996, which would be another selection.
    settings["schedule"] = f"constant:{float(1 - _share(keep))}"
    return SelectConfig(**settings)


def _share(keep: object) -> Decimal:
    """The share that stays, as the decimal number that was written.

    Raises:
        UsageError: It is no number, or no share.
    """
    share = as_type("keep", keep, float)
    if not 0 < share <= 1:
        raise UsageError(
            f"`keep`: got {keep!r}, expected a share above 0 and up to 1", hint="a quarter of each batch: `keep=0.25`"
        )
    return Decimal(str(share if isinstance(keep, Fraction) else keep))


def open_store(
    store: EmbeddingStore | str | Path, memory_budget: int, access: Kind, mirror: str | Path | None
) -> EmbeddingStore:
    """The store, opened unless it is.

    Raises:
        UsageError: It is, and how to read it was said besides.
    """
    if not isinstance(store, EmbeddingStore):
        folder = None if mirror is None else local_file(mirror, "`mirror`")
        return EmbeddingStore(store, memory_budget=memory_budget, access=access, mirror=folder)
    if (memory_budget, access, mirror) != (MEMORY_BUDGET, "auto", None):
        raise UsageError(
            "`memory_budget`, `access` and `mirror` are for a store that is opened here; this one is open already",
            hint="give them to EmbeddingStore, or give the store's location",
        )
    return store


def with_batch_fitting(store: EmbeddingStore, config: SelectConfig) -> SelectConfig:
    """``config``, whose batch size nobody gave, for a store that has fewer rows than that."""
    rows = len(store) - len(rows_left_out(store))
    if not SMALLEST_BATCH <= rows < config.batch_size:
        return config
    return replace(config, batch_size=batch_of_few(rows, config.knn))


def with_draw_chosen(store: EmbeddingStore, config: SelectConfig, inform: Notify) -> SelectConfig:
    """``config``, of which a draw ``auto`` is what probes on the store say, or no draw; and ``inform`` told why."""
    if config.draw != AUTO_DRAW:
        return config
    plan, device = BatchSelector(store, without_draw(config)).plan, resolve_device(config.device)
    share = plan.total_kept / plan.total_rows
    chosen, why = choose_draw(store, config, share, threads=config.threads or cores(), device=device)
    inform(f"draw auto: {why}")
    if chosen.draw is None and config.strata is not None:
        inform(f"note: `strata` {config.strata} is not used: it is for draws, and the rule keeps rows")
    if chosen.reference != config.reference:
        inform(f"note: `reference` {config.reference} is not used: reference losses are not looked at")
    return chosen


@contextmanager
def _opened(
    open_it: Callable[[], EmbeddingStore],
    config: SelectConfig,
    notify: Notify | None,
    engine: Engine,
    *,
    fit: bool,
) -> Iterator[_Run]:
    """Open the store and plan the run, with its thread limits, and say what will be done.

    Args:
        open_it: Opens it.
        config: How to select.
        notify: Whom to tell.
        engine: Where batches are selected.
        fit: Whether the batch size, which nobody gave, is made to fit a store of few rows.

    Yields:
        The run.
    """
    begun, logger = time.perf_counter(), logging.getLogger("gstds_cache")
    inform = notify or logger.info
    config = _on_cpus(config) if engine.ray else config
    with limited_threads(config.threads or 0), engine.opened(notify or logger.warning) as executor:
        opened = open_it()
        if fit:
            config = with_batch_fitting(opened, config)
        config = with_draw_chosen(opened, config, inform)
        run = _Run(BatchSelector(opened, config), notify or logger.warning, inform, begun)
        run.selector.executor = executor
        run.announce()
        yield run


def _on_cpus(config: SelectConfig) -> SelectConfig:
    """``config`` for the workers of a cluster.

    Raises:
        UsageError: It asks for a GPU.
    """
    if config.device not in {DEVICE, "cpu"} or config.solver == "cuda":
        raise UsageError(
            f"`device`: got {config.device!r} with `engine='ray'`, which selects on CPUs",
            hint="leave `device` and `solver` out, or select on the GPU of this machine: `engine='local'`",
        )
    return replace(config, device="cpu")


@dataclass
class _Run:
    """One call: a selector, whom to tell, and when what began."""

    selector: BatchSelector
    warn: Notify
    inform: Notify
    begun: float
    opened: float = field(default_factory=time.perf_counter)

    def announce(self) -> None:
        """Say what will be done, and what is slow about it."""
        selector, plan = self.selector, self.selector.plan
        share, saved = plan.total_kept / plan.total_rows, plan.total_rows - plan.total_kept
        chosen = f"rule {selector.rule.name}; keeps" if selector.draw is None else f"{selector.rule.name}; draws"
        self.inform(
            f"plan: {plan.total_batches:,} batches of {plan.batch_size:,} in {plan.epochs} epochs, "
            f"{chosen} {plan.total_kept:,} of {plan.total_rows:,} samples ({share:.1%}), a step for "
            f"each batch; saves {saved:,} ({1 - share:.1%})"
        )
        self.inform(f"rows: {selector.device_run.rows_reason}")
        if selector.rule.vectors and (reason := why_not_kept()):
            self.warn(f"note: {reason}")
        if selector.too_many_strata:
            self.warn(f"warning: {selector.too_many_strata}")
        if selector.slow_order:
            self.warn(f"warning: {selector.slow_order}")

    def deliver(self, target: Path | ByteStream, *, force: bool, progress: Progress | bool | None) -> None:
        """Bring the selection to ``target``: from where it is kept, else as it is computed."""
        selector = self.selector
        if deliver_kept(selector, target, replace=force, notify=lambda text: self.inform(f"cache hit: {text}")):
            return
        meter, work = EnergyMeter(selector.device), selector.counts.seconds
        try:
            with showing(progress, "batches") as show:
                for batch in deliver_computed(selector, target, notify=lambda text: self.warn(f"note: {text}")):
                    if batch.seq % SHOWN_EVERY and selector.pending and selector.device_run.has_rule:
                        continue  # on a GPU batches come faster than anyone could be told of them
                    total = max(sum(work.values()), 1e-9)
                    show("select", batch.seq + 1, selector.plan.total_batches, {"gather": work["gather"] / total})
                    meter.add("select")
        finally:  # what an interrupted call took is recorded as well
            self._record_cost(target, meter)
        for note in filter(None, (selector.graphs_note, selector.store.fell_back)):
            self.warn(f"note: {note}")
        slow, batches = selector.counts.status["max_iterations"], selector.counts.batches
        if slow > 0.01 * batches:
            self.warn(f"warning: {slow} of {batches} Fiedler vectors: {Status.MAX_ITERATIONS.describe()}")

    def _record_cost(self, target: Path | ByteStream, meter: EnergyMeter) -> None:
        """Record what this call took beside each of the selection's files, for the ledgers of runs that train on it."""
        selector, counts = self.selector, self.selector.counts
        if not counts.batches:
            return
        cost = Cost(
            of=selector.digest,
            samples=counts.rows,
            reused=0,
            seconds=time.perf_counter() - self.begun,
            joules=meter.total,
            device=str(selector.device),
            store=str(selector.store.location.path or selector.store.location),
            joules_from=meter.source,
        )
        kept = kept_paths(selector)
        copies = [[target], kept] if isinstance(target, Path) else [kept]  # the kept one is in one of several folders
        if target in kept:
            copies = copies[:1]
        # Where all batches were computed now, nothing is left of an earlier call, or of another file.
        complete = counts.batches == selector.plan.total_batches
        notes = [keep_record([selection_costs(file) for file in files], cost, anew=complete) for files in copies]
        for note in dict.fromkeys(filter(None, notes)):
            self.warn(f"note: {note}")

    def summary(self, out: str) -> SelectionSummary:
        """What was done up to now."""
        selector, counts, plan = self.selector, self.selector.counts, self.selector.plan
        total, spent = time.perf_counter() - self.begun, self.opened - self.begun + counts.elapsed
        work = sum(counts.seconds.values())
        names = selector.store.classes
        return SelectionSummary(
            out=out,
            selection_digest=selector.digest,
            cache_fingerprint=selector.store.fingerprint,
            dataset_uri=selector.store.dataset_uri,
            cache_hit=counts.batches == 0,
            epochs=plan.epochs,
            total_batches=plan.total_batches,
            total_rows=plan.total_rows,
            total_kept=plan.total_kept,
            batches=counts.batches,
            rows=counts.rows,
            kept=counts.kept,
            samples_per_second=round(counts.rows / counts.elapsed, 1) if counts.elapsed else 0.0,
            classes={
                class_name(label, names): {"seen": seen, "kept": kept}
                for label, (seen, kept) in sorted(counts.classes.items())
                if label >= 0
            },
            status=dict(counts.status),
            graphs_found=counts.reused,
            rule=selector.rule.name,
            guidance=selector.guidance_digest,
            guidance_note=selector.guidance.note if counts.batches else "",
            knn_backend=selector.knn_backend,
            shares={phase: round(part / work, 4) for phase, part in counts.seconds.items()} if work else {},
            seconds={
                "open": round(self.opened - self.begun, 3),
                "select": round(counts.elapsed, 3),
                "write": round(total - spent, 3),
                "total": round(total, 3),
            },
        )


def _default_path(run: _Run) -> Path:
    """Where a selection goes for which no ``out`` was given.

    Raises:
        UsageError: Nothing can be written in any of the default folders.
    """
    writable = path_to_keep(run.selector)
    if writable.path is None:
        raise UsageError(
            f"there is no default folder for the selection: {writable.note}",
            hint="give `out`, or set GSTDS_CACHE to a folder that can be written",
        )
    if writable.note:
        run.warn(f"note: kept in {writable.path.parent}, as nothing can be written in {writable.note}")
    return writable.path
