"""``gstds-train``: train a network on a stream of kept indices."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from gstds_cache.config import TrainConfig
from gstds_cache.costs.records import Cost, recall, recall_store, selection_costs
from gstds_cache.errors import IncompleteError, UsageError, command_line
from gstds_cache.files.location import local_file
from gstds_cache.runtime.openmp import wait_briefly

from .common import (
    Command,
    LocalPath,
    Progress,
    device_option,
    json_option,
    print_json,
    print_table,
    seconds_line,
    shares_line,
    stop_after_step,
    warn_if_inside,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from gstds_cache.data.hash_cache import HashCache
    from gstds_cache.data.source import ImageSource
    from gstds_cache.stream.reader import SelectionStream
    from gstds_cache.stream.schema import Header
    from gstds_cache.training.distributed import Ranks
    from gstds_cache.training.ledger import Ledger
    from gstds_cache.training.loop import TrainReport
    from gstds_cache.training.planning import SelectionCost
    from gstds_cache.training.run_dir import RunDir

HELP = """Train a network on a selection of DATASET, each batch of kept rows one step.

\b
Examples:
  gstds-train digits --selection selection.arrow
  gstds-train 'imagefolder:photos?split=train' --selection s.arrow --eval 'imagefolder:photos?split=test'
  gstds-select photos.store --out - | gstds-train imagefolder:photos --selection -
  gstds-train digits --selection selection.arrow --out runs/a --resume
  torchrun --nproc-per-node 2 --no-python gstds-train digits --selection selection.arrow
  gstds-train digits --selection selection.arrow --plan

--arch takes any architecture torchvision or timm knows by that name.
"""


@click.command(cls=Command, help=HELP)
@click.argument("dataset")
@click.option("--selection", required=True, metavar="FILE|-|grpc://HOST:PORT", help="From gstds-select.")
@click.option(
    "--cache",
    metavar="STORE",
    help="Refuse a selection that was made from another store than this.",
)
@click.option("--eval", "eval_dataset", metavar="DATASET", help="Measure accuracy on this at the end.")
@click.option("--arch", default="resnet18", show_default=True, help="The network.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--lr", type=float, default=0.1, show_default=True, help="Peak learning rate.")
@click.option("--momentum", type=float, default=0.9, show_default=True)
@click.option("--weight-decay", type=float, default=5e-4, show_default=True)
@click.option(
    "--image-size",
    type=int,
    default=0,
    help="Side in pixels. [default: the images' own where they are equal squares up to 64, else 64]",
)
@click.option(
    "--augment",
    type=click.Choice(["auto", "none", "crop", "crop+flip"]),
    default="auto",
    show_default=True,
    help="auto mirrors where that keeps an image's label.",
)
@device_option
@click.option("--workers", type=int, default=1, show_default=True, help="Processes that decode images.")
@click.option("--memory-budget", type=int, default=2048, show_default=True, help="MiB of decoded images to hold.")
@click.option(
    "--threads", type=int, default=0, help="CPU threads to use. [default: 1 where a step is a few ms, else all]"
)
@click.option(
    "--repack",
    type=int,
    default=0,
    metavar="N",
    help="Re-pack what is kept into batches of N rows: fewer full steps. [default: each batch of the selection a step]",
)
@click.option(
    "--out",
    type=LocalPath(),
    metavar="RUN_DIR",
    help="[default: runs/ARCH-SELECTION-sSEED, and what is not the default, e.g. -lr0.3]",
)
@click.option("--resume", is_flag=True, help="Continue the run in RUN_DIR, if there is one.")
@click.option(
    "--plan", is_flag=True, help="Only print the ledger that the run would end with, from a few measured steps."
)
@json_option
def main(
    dataset: str,
    selection: str,
    cache: str | None,
    eval_dataset: str | None,
    arch: str,
    seed: int,
    lr: float,
    momentum: float,
    weight_decay: float,
    image_size: int,
    augment: Literal["auto", "none", "crop", "crop+flip"],
    device: str,
    workers: int,
    memory_budget: int,
    threads: int,
    repack: int,
    out: Path | None,
    resume: bool,
    plan: bool,
    as_json: bool,
) -> None:
    """Parse, call :func:`gstds_cache.training.loop.train`, print."""
    config = TrainConfig(
        arch=arch,
        seed=seed,
        lr=lr,
        momentum=momentum,
        weight_decay=weight_decay,
        image_size=image_size,
        augment=augment,
        device=device,
        workers=workers,
        memory_budget=memory_budget << 20,
        threads=threads,
        repack=repack,
    )
    begun, selection = time.perf_counter(), _named(selection)
    wait_briefly()
    from gstds_cache.data.hash_cache import HashCache
    from gstds_cache.data.manifest import build_manifest
    from gstds_cache.data.repeatable import why_items_differ
    from gstds_cache.files.derived import hashes_folder
    from gstds_cache.runtime.allocator import keep_freed_memory
    from gstds_cache.runtime.threads import limit_threads
    from gstds_cache.store.metadata import StoreMetadata
    from gstds_cache.stream.reader import open_selection, require_dataset, require_store
    from gstds_cache.training.distributed import process_group
    from gstds_cache.training.loop import train

    keep_freed_memory()
    limit_threads(threads)
    with process_group(device) as ranks:
        if selection == "-" and ranks.world_size > 1:
            raise UsageError(
                f"--selection -: {ranks.world_size} ranks cannot share one stdin",
                hint="give a file, or the address of gstds-select --serve",
            )
        progress = Progress("steps", "data", hash="items", load="images") if ranks.first else _quiet
        hash_cache = HashCache(hashes_folder())

        def hashed_items(done: int, total: int) -> None:
            progress("hash", done, total, 0.0)

        source, evaluation = _opened(dataset, eval_dataset, hash_cache, hashed_items, read=not plan)
        with open_selection(selection) as stream:
            header = stream.header
            if cache is not None:
                require_store(header, fingerprint=StoreMetadata(cache).spec.fingerprint, where=cache)
            embed_cost, select_cost = _costs(header, selection, cache)
            config = _settled(config, source)
            flops = _choose_threads(config, source, header, ranks)
            if plan:
                if ranks.first:
                    _print_plan(source, evaluation, stream, config, cache, (embed_cost, select_cost), as_json)
                return
            manifest = build_manifest(source, hash_cache=hash_cache, progress=hashed_items)
            require_dataset(
                header,
                items=len(manifest),
                items_root=manifest.root,
                uri=source.uri,
                why=why_items_differ(source),
            )
            eval_root = build_manifest(evaluation, hash_cache=hash_cache).root if evaluation else None
            run_dir = _hold_run_dir(out, config, source, stream, eval_root, ranks, resume)
            opened = time.perf_counter() - begun  # libraries loaded, items hashed
            for note in hash_cache.notes if ranks.first else ():
                click.echo(f"note: {note}", err=True)
            try:
                with _saying_how_to_go_on(run_dir.path):
                    report = train(
                        source,
                        stream,
                        config,
                        run_dir,
                        evaluation=evaluation,
                        ranks=ranks,
                        progress=progress,
                        interruptible=stop_after_step,
                    )
            finally:
                if isinstance(progress, Progress):
                    progress.end()
    if not ranks.first:
        return
    seconds = {"open": round(opened, 3), **report.seconds, "total": round(report.seconds["total"] + opened, 3)}
    report = replace(report, seconds=seconds)
    ledger = _ledger(report, selection, embed_cost, select_cost, flops)
    run_dir.write_ledger(ledger.to_dict())
    _print(run_dir.path, report, left_over=header.total_kept - report.gradient_samples)
    _print_ledger(ledger)
    if as_json:
        print_json(_as_dict(run_dir.path, report, header, ranks.world_size) | {"ledger": ledger.to_dict()})


@contextmanager
def _saying_how_to_go_on(run_dir: Path) -> Iterator[None]:
    """Name the run in whatever ends training before its end.

    Yields:
        Nothing.

    Raises:
        KeyboardInterrupt: It was interrupted.
        IncompleteError: A process that decodes was killed, or a resource ran out.
    """
    words = command_line("--resume", "--out", run_dir)
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"run the same command again with {words} to go on") from None
    except IncompleteError as error:
        raise IncompleteError(error.message, hint=f"{error.hint}, with {words}") from error


def _opened(
    dataset: str, eval_dataset: str | None, hash_cache: HashCache, progress: Callable[[int, int], None], *, read: bool
) -> tuple[ImageSource, ImageSource | None]:
    """Both data sets; refused where their labels are none that can be trained on, before every image is hashed."""
    from gstds_cache.data.sources import open_sources
    from gstds_cache.training.loop import count_classes

    names = [dataset, eval_dataset] if eval_dataset else [dataset]
    source, *others = open_sources(names, hash_cache=hash_cache, progress=progress, read=read)
    evaluation = others[0] if others else None
    count_classes(source, evaluation)
    return source, evaluation


def _named(selection: str) -> str:
    """The selection with a path as it is meant; stdin and services stay."""
    is_file = selection != "-" and not selection.startswith(("grpc://", "grpc+tls://"))
    return str(local_file(selection, "--selection")) if is_file else selection


def _measured_selection(cache: str, header: Header) -> SelectionCost:
    from gstds_cache.report.recompute import selector_of
    from gstds_cache.selection.throughput import samples_per_second
    from gstds_cache.store.reader import EmbeddingStore
    from gstds_cache.training.planning import SelectionCost

    rate = samples_per_second(selector_of(EmbeddingStore(cache), header))
    return SelectionCost(None, rate, f"at {rate:,.0f} samples/s, as a few batches took")


def _settled(config: TrainConfig, source: ImageSource) -> TrainConfig:
    """The configuration with nothing left to the data set."""
    from gstds_cache.training.images import default_side

    return replace(
        config,
        image_size=config.image_size or default_side(source),
        augment=("crop+flip" if source.mirror_safe else "crop") if config.augment == "auto" else config.augment,
    )


def _default(config: TrainConfig, source: ImageSource) -> TrainConfig:
    """The configuration of a run of the same network and seed for which nothing else was given."""
    return _settled(TrainConfig(arch=config.arch, seed=config.seed), source)


def _hold_run_dir(
    out: Path | None,
    config: TrainConfig,
    source: ImageSource,
    stream: SelectionStream,
    eval_root: str | None,
    ranks: Ranks,
    resume: bool,
) -> RunDir:
    """The run's directory, held until the command ends, its ledger included."""
    from gstds_cache.runtime.devices import describe_device
    from gstds_cache.training.loop import run_config
    from gstds_cache.training.run_dir import RunDir, default_name

    identity = run_config(config, stream, eval_root)
    path = out or Path("runs") / default_name(identity, run_config(_default(config, source), stream, None))
    if ranks.first:
        warn_if_inside(source, path, what="the run", flag="--out")

    def hold() -> RunDir:
        run_dir = RunDir(
            path,
            identity,
            provenance={
                "dataset": source.uri,
                "selection": stream.header.settings,
                "device": describe_device(ranks.device),
                "ranks": ranks.world_size,
                **{package: version(package) for package in ("gstds-cache", "torch", "torchvision", "timm")},
            },
            resume=resume,
            writes=ranks.first,
        )
        return click.get_current_context().with_resource(run_dir)

    return ranks.after_first(hold)  # all look at the directory before the first writes to it


def _choose_threads(config: TrainConfig, source: ImageSource, header: Header, ranks: Ranks) -> float | None:
    """Where the user gave no number of threads, take what a step on a CPU is worth; returns FLOPs per sample."""
    from gstds_cache.runtime.threads import limit_threads
    from gstds_cache.training.flops import flops_per_sample, step_threads
    from gstds_cache.training.loop import count_classes

    flops = flops_per_sample(config.arch, classes=count_classes(source, None), side=config.image_size)
    if not config.threads and ranks.device.type == "cpu":
        samples = (config.repack or header.total_kept / max(header.total_batches, 1)) / ranks.world_size
        limit_threads(step_threads(flops, samples))
    return flops


def _costs(header: Header, selection: str, cache: str | None) -> tuple[Cost | None, Cost | None]:
    """What embedding and selection cost, where their commands wrote it down."""
    is_file = selection != "-" and "://" not in selection
    select = recall(selection_costs(Path(selection)), header.selection_digest) if is_file else None
    store = cache or (select.store if select else None)
    return (recall_store(store, header.cache_fingerprint) if store else None), select


def _ledger(
    report: TrainReport, selection: str, embed: Cost | None, select: Cost | None, flops: float | None
) -> Ledger:
    from gstds_cache.training.ledger import Ledger

    seconds, source = None, "no record of its cost was found beside the selection"
    if select is not None:
        seconds, source = select.seconds, "by gstds-select"
    elif selection == "-" or "://" in selection:
        seconds, source = report.seconds["indices"], "that training waited for it"
    return Ledger(
        planned=False,
        embed=embed,
        select=select,
        select_seconds=seconds,
        select_source=source,
        gradient_samples=report.gradient_samples,
        all_samples=report.samples_in,
        seconds=report.seconds,
        joules=report.joules,
        joules_from=report.joules_from,
        flops_per_sample=flops,
        step_seconds_per_sample=report.seconds_per_sample,
    )


def _print_ledger(ledger: Ledger) -> None:
    print_table([("plan" if ledger.planned else "ledger", ""), *((f"  {name}", text) for name, text in ledger.rows())])
    if not ledger.planned:
        click.echo("next: the same with another --seed; the embeddings and the selection are reused")


def _print_plan(
    source: ImageSource,
    evaluation: ImageSource | None,
    stream: SelectionStream,
    config: TrainConfig,
    cache: str | None,
    costs: tuple[Cost | None, Cost | None],
    as_json: bool,
) -> None:
    """Measure a few steps, say what the run will take, and whether selection pays; nothing is trained or written."""
    from gstds_cache.training.planning import plan_run, recorded

    taken = recorded(costs[1])
    if costs[1] is None and cache is not None:
        taken = _measured_selection(cache, stream.header)
    ledger = plan_run(source, evaluation, stream, config, embed=costs[0], select=costs[1], selection=taken)
    _print_ledger(ledger)
    if ledger.pays is False:
        click.echo(
            f"warning: selection takes {ledger.select_seconds:,.1f} s and saves {ledger.saved_seconds:,.1f} s of "
            "training: without it (gstds-select --rule random) this run is over sooner",
            err=True,
        )
    click.echo("plan: nothing was trained or written")
    if as_json:
        print_json({"plan": True, "ledger": ledger.to_dict()})


def _quiet(_phase: str, _done: int, _total: int, _waited: object) -> None:
    """Ranks but the first show no progress."""


def _print(path: Path, report: TrainReport, *, left_over: int) -> None:
    accuracy = report.accuracy
    left = f" ({left_over:,} kept rows left out: fewer than a batch)" if left_over else ""
    print_table(
        [
            ("run", str(path)),
            (
                "test accuracy",
                f"{accuracy.value:.2%} of {accuracy.items:,} ({accuracy.undecodable:,} undecodable left out)"
                if accuracy
                else "not measured: give --eval DATASET",
            ),
            ("gradients", f"{report.gradient_samples:,} samples in {report.steps:,} steps{left}"),
            ("loss", f"{report.loss:.4f} in the last epoch"),
            ("waited", f"{shares_line(report.waited)} of the training time"),
            ("time", seconds_line(report.seconds)),
        ]
    )


def _as_dict(path: Path, report: TrainReport, header: Header, world_size: int) -> dict[str, Any]:
    return {
        "run_dir": str(path),
        "test_accuracy": report.accuracy.value if report.accuracy else None,
        "test_items": report.accuracy.items if report.accuracy else 0,
        "gradient_samples": report.gradient_samples,
        "steps": report.steps,
        "loss": report.loss,
        "seconds": report.seconds,
        "waited": {what: round(share, 5) for what, share in report.waited.items()},
        "world_size": world_size,
        "selection_digest": header.selection_digest,
        "cache_fingerprint": header.cache_fingerprint,
    }


if __name__ == "__main__":
    main()
