"""``gstds_cache.train``: train a network on a selection; and what a run would take, before it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Unpack

from gstds_cache.api.opened_run import OpenedRun, is_stream, open_run, show_hashing
from gstds_cache.api.selection import Selection
from gstds_cache.config import TrainConfig, TrainSettings, require_settings
from gstds_cache.costs.records import Cost
from gstds_cache.data.hash_cache import HashCache
from gstds_cache.data.manifest import build_manifest
from gstds_cache.data.outputs import inside_warning
from gstds_cache.errors import IncompleteError
from gstds_cache.files.derived import hashes_folder
from gstds_cache.files.location import LocationLike, local_file
from gstds_cache.runtime.devices import describe_device
from gstds_cache.runtime.notify import Notify
from gstds_cache.runtime.progress import Progress
from gstds_cache.seeding import GLOBAL_NUMBERS
from gstds_cache.store.reader import EmbeddingStore
from gstds_cache.stream.schema import Header
from gstds_cache.trackers.names import tracker_names
from gstds_cache.training.identity import default_run_dir, run_config
from gstds_cache.training.interrupt import stop_after_step
from gstds_cache.training.ledger import Ledger
from gstds_cache.training.loop import train as train_network
from gstds_cache.training.planning import plan_run
from gstds_cache.training.report import TrainingResult, TrainReport
from gstds_cache.training.run_dir import LATER, RunDir, stored_config
from gstds_cache.training.tracking import Tracking

PACKAGES = ("gstds-cache", "torch", "torchvision", "timm")


def train(
    dataset: Any,
    selection: Selection | str | Path,
    *,
    evaluation: Any = None,
    cache: EmbeddingStore | LocationLike | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    log: str | Sequence[str] = (),
    progress: Progress | bool | None = True,
    notify: Notify | None = None,
    **settings: Unpack[TrainSettings],
) -> TrainReport:
    """Train a network on a selection of ``dataset``, each batch of kept rows one step.

    Each batch of kept rows is one step of SGD with a one-cycle learning rate. After the last one the running statistics
    of batch normalisation, which describe the rows that were kept, are re-estimated by forward passes of
    ``norm_samples`` random rows; the run's last checkpoint holds those. Under ``torchrun`` every process makes
    the same call and takes its share of each step; the first writes the run's directory. The first Ctrl-C stops after
    the step that is under way, with a checkpoint.

    A process trains once at a time, as a run needs torch's global random numbers to itself: a call in a second thread
    waits until the first one ends. So does what builds a model there, such as :func:`gstds_cache.embed`.

    Args:
        dataset: The data set the selection was made from: a URI, such as ``imagefolder:PATH``, or any map-style object.
        selection: What :func:`gstds_cache.select` returned, a file, ``-`` for stdin, or a service's address
            (``grpc://HOST:PORT``).
        evaluation: A data set with the same classes, to measure accuracy on at the end. Items without a label are left
            out, and counted.
        cache: The store; a selection that was made from another one is refused.
        out: The run's directory. None is ``runs/ARCH-SELECTION-sSEED``, and what is not the default, e.g. ``-lr0.3``.
        resume: Continue the run in ``out``, if there is one.
        log: Experiment trackers that are told of the run: ``tensorboard``, ``wandb``, ``mlflow``, several joined by
            commas or in a list. One that fails does not end the run (docs/trainers.md).
        progress: True shows a bar on stderr, False nothing; or a function that is called with phase, steps done, steps
            in all, and shares of the time.
        notify: Called with each line for the user: warnings, notes. None logs them as warnings.
        **settings: Fields of :class:`gstds_cache.TrainConfig`.

    Returns:
        Accuracy, loss, time, and the ledger of the experiment; the same on every rank but for the times.

    Raises:
        UsageError: An argument cannot be meant, a run is in ``out`` already, or labels are missing.
        DatasetError: A data set cannot be read.
        FingerprintMismatchError: The selection was made from another data set or store, or the run that is resumed has
            other settings.
        IntegrityError: The run's checkpoint is damaged.
        StreamError: The selection is damaged or truncated; what was trained so far is in the checkpoint.
        DivergedError: The loss is NaN or infinite.
        IncompleteError: Another process writes ``out``, or a process that decodes was killed; the same call with
            ``resume=True`` goes on.
        KeyboardInterrupt: It was interrupted; the same call with ``resume=True`` goes on.
    """
    require_settings(train, TrainConfig, settings)
    trackers = tracker_names(log)
    hash_cache = HashCache(hashes_folder())
    opening = open_run(
        dataset,
        selection,
        evaluation=evaluation,
        cache=cache,
        settings=settings,
        hash_cache=hash_cache,
        hash_items=True,
        progress=progress,
        notify=notify,
    )
    with GLOBAL_NUMBERS, ExitStack() as held:
        begun = time.perf_counter()
        run = held.enter_context(opening)
        config, run_dir = _hold_run_dir(run, out, resume, hash_cache, held)
        opened = time.perf_counter() - begun  # libraries loaded, items hashed
        for note in hash_cache.notes:
            run.notify(f"note: {note}")
        with _naming_the_run(run_dir.path), _tracking(trackers, run, run_dir) as tracking:
            result = train_network(
                run.source,
                run.stream,
                config,
                run_dir,
                evaluation=run.evaluation,
                ranks=run.ranks,
                progress=run.progress,
                interruptible=partial(stop_after_step, run.notify),
                tracking=tracking,
            )
        if result.seconds_per_sample is None:  # the run was finished, and no step was taken
            result = replace(result, seconds_per_sample=run_dir.ledger().get("step_seconds_per_sample"))
        seconds = {"open": round(opened, 3), **result.seconds, "total": round(result.seconds["total"] + opened, 3)}
        report = _report(run, replace(result, seconds=seconds), run_dir.path)
        if run.ranks.first:
            run_dir.write_ledger(report.ledger.to_dict())
        return report


def estimate_training(
    dataset: Any,
    selection: Selection | str | Path,
    *,
    evaluation: Any = None,
    cache: EmbeddingStore | LocationLike | None = None,
    progress: Progress | bool | None = True,
    notify: Notify | None = None,
    **settings: Unpack[TrainSettings],
) -> Ledger:
    """The ledger that :func:`train` would end with, from a few measured steps. Trains and writes nothing.

    Args:
        dataset: As for :func:`train`; its items are counted, not hashed.
        selection: As for :func:`train`.
        evaluation: As for :func:`train`.
        cache: As for :func:`train`. Where the selection's cost was not recorded, a few batches are selected from it.
        progress: As for :func:`train`.
        notify: As for :func:`train`.
        **settings: Fields of :class:`gstds_cache.TrainConfig`.

    Returns:
        The ledger, with ``planned`` set.

    Raises:
        UsageError: An argument cannot be meant, labels are missing, or no image can be decoded.
        DatasetError: A data set cannot be read.
        FingerprintMismatchError: The selection was made from another data set or store.
        StreamError: It is no selection.
    """
    require_settings(estimate_training, TrainConfig, settings)
    opening = open_run(
        dataset,
        selection,
        evaluation=evaluation,
        cache=cache,
        settings=settings,
        hash_cache=HashCache(hashes_folder()),
        hash_items=False,
        progress=progress,
        notify=notify,
    )
    with GLOBAL_NUMBERS, opening as run:
        seconds, source = _recorded_cost(run.select_cost)
        if seconds is None and cache is not None:
            seconds, source = _measured_cost(cache, run.stream.header)
        return plan_run(
            run.source,
            run.evaluation,
            run.stream.header,
            run.config,
            embed=run.embed_cost,
            select=run.select_cost,
            select_seconds=seconds,
            select_source=source,
        )


def _recorded_cost(cost: Cost | None) -> tuple[float | None, str]:
    """Seconds of a selection, and how they are known."""
    if cost is None:
        return None, "no record of its cost was found; name the store (`cache`) to have it measured"
    return cost.seconds, "recorded by gstds-select"


def _measured_cost(cache: EmbeddingStore | LocationLike, header: Header) -> tuple[float, str]:
    """Seconds of a selection by what a few of its batches take, and that they are known so."""
    from gstds_cache.report.recompute import selector_of, store_of
    from gstds_cache.selection.throughput import samples_per_second

    store = cache if isinstance(cache, EmbeddingStore) else store_of(header, cache)
    rate = samples_per_second(selector_of(store, header))
    return header.items * header.epochs / rate, f"at {rate:,.0f} samples/s, as a few batches took"


def _hold_run_dir(
    run: OpenedRun, out: str | Path | None, resume: bool, hash_cache: HashCache, held: ExitStack
) -> tuple[TrainConfig, RunDir]:
    """The settings the run has, and its directory, held until the ledger is in it.

    Raises:
        FingerprintMismatchError: The selection was made from another data set.
    """
    header, source = run.stream.header, run.source
    manifest = build_manifest(source, hash_cache=hash_cache, progress=partial(show_hashing, run.progress))
    run.require_items(manifest)
    eval_root = build_manifest(run.evaluation, hash_cache=hash_cache).root if run.evaluation else None
    path = default_run_dir(run.config, source, header, eval_root) if out is None else local_file(out, "`out`")
    if warning := inside_warning(source, path, what="the run", argument="out"):
        run.notify(warning)
    provenance = {
        "dataset": source.uri,
        "selection": header.settings,
        "device": describe_device(run.ranks.device),
        "ranks": run.ranks.world_size,
        **{package: version(package) for package in PACKAGES},
    }

    def hold() -> tuple[TrainConfig, RunDir]:
        config = _as_begun(run.config, path) if resume else run.config
        identity = run_config(config, header, eval_root)
        run_dir = RunDir(path, identity, provenance=provenance, resume=resume, writes=run.ranks.first)
        return config, held.enter_context(run_dir)

    config, run_dir = run.ranks.after_first(hold)  # all look at the directory before the first writes to it
    if config != run.config:
        run.notify(
            f"note: {path} is a run of before batch-norm statistics were re-estimated, and goes on without: they "
            "describe the rows that are kept"
        )
    return config, run_dir


def _tracking(names: tuple[str, ...], run: OpenedRun, run_dir: RunDir) -> Tracking:
    """What the trackers are told: rank 0's alone."""
    return Tracking(
        names,
        run_dir=run_dir.path if run.ranks.first else None,
        config=run_dir.config | run_dir.provenance,
        identity=run_dir.config,
        notify=run.notify,
    )


def _as_begun(config: TrainConfig, path: Path) -> TrainConfig:
    """The settings; without re-estimated statistics where the run there was begun before there were any."""
    stored = stored_config(path)
    if stored is None or "norm_samples" in stored:
        return config
    return replace(config, norm_samples=LATER["norm_samples"])


@contextmanager
def _naming_the_run(path: Path) -> Iterator[None]:
    """Name the run in whatever ends training before its end.

    Yields:
        Nothing.

    Raises:
        KeyboardInterrupt: It was interrupted.
        IncompleteError: A process that decodes was killed, or a resource ran out.
    """
    how = f"with `resume=True` `out={str(path)!r}`"
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"run the same again {how} to go on") from None
    except IncompleteError as error:
        raise IncompleteError(error.message, hint=f"{error.hint}, {how}") from error


def _report(run: OpenedRun, result: TrainingResult, path: Path) -> TrainReport:
    header = run.stream.header
    seconds, source = None, "no record of its cost was found beside the selection"
    if run.select_cost is not None:
        seconds, source = run.select_cost.seconds, "by gstds-select"
    elif is_stream(run.where):
        seconds, source = result.seconds["indices"], "that training waited for it"
    ledger = Ledger(
        planned=False,
        embed=run.embed_cost,
        select=run.select_cost,
        select_seconds=seconds,
        select_source=source,
        gradient_samples=result.gradient_samples,
        forward_samples=result.forward_samples,
        all_samples=result.samples_in,
        seconds=result.seconds,
        joules=result.joules,
        joules_from=result.joules_from,
        flops_per_sample=run.flops,
        step_seconds_per_sample=result.seconds_per_sample,
    )
    return TrainReport(
        **vars(result),
        run_dir=path,
        ledger=ledger,
        left_over=header.total_kept - result.gradient_samples,
        rank=run.ranks.rank,
        world_size=run.ranks.world_size,
        selection_digest=header.selection_digest,
        cache_fingerprint=header.cache_fingerprint,
    )
