"""``gstds-embed``: embed a data set once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from errno import EACCES, ENOTDIR, EPERM, EROFS
from typing import TYPE_CHECKING, Any, Literal

import click

from gstds_cache.config import DEFAULT_MODEL, EmbedConfig
from gstds_cache.costs.records import Cost, keep_record, store_costs
from gstds_cache.errors import GstdsError, UsageError, command_line
from gstds_cache.files.location import Location
from gstds_cache.runtime.openmp import wait_briefly

from .common import (
    Command,
    Progress,
    device_option,
    json_option,
    print_json,
    print_table,
    seconds_line,
    shares_line,
    warn_if_inside,
    workers_option,
)

if TYPE_CHECKING:
    from gstds_cache.embedding.estimate import Estimate
    from gstds_cache.embedding.run import EmbedReport

PHASES = ("hash", "model", "probe", "embed", "finish", "total")

HELP = f"""Embed every image of DATASET once, with a frozen reference model, into a Zarr store.

DATASET is one of

\b
  digits                        scikit-learn's 1,797 digits
  imagefolder:PATH              PATH/<class>/<image files>
  torchvision:CLASS?root=PATH   CIFAR10, OxfordIIITPet, Flowers102, ...
  module:factory                your own function that returns a data set

The same command again is a cache hit and embeds nothing; after an interrupt it goes on where it stopped. Where more
than 1,000 images are left, a few are measured first, and the time, disk and memory that the rest will take are shown;
--dry-run does only that.

\b
Examples:
  gstds-embed digits
  gstds-embed imagefolder:photos --cache photos.store --dry-run
  gstds-embed imagefolder:photos --cache photos.store
  gstds-embed 'torchvision:CIFAR10?root=data' --model 'timm:resnet18?weights=resnet18.safetensors'

The default MODEL is {DEFAULT_MODEL} with the ImageNet weights of an installed package; others are
timm:NAME, torchvision:NAME and module:factory, each with ?weights=FILE; with ?size=64 the first two look at 64 x 64
pixels instead of the model's own size, in a fraction of the time.
"""


@click.command(cls=Command, help=HELP)
@click.argument("dataset")
@click.option("--model", default=DEFAULT_MODEL, show_default=True, help="The reference model.")
@click.option(
    "--cache",
    metavar="STORE",
    help="The store: a directory, or s3://BUCKET/PREFIX. [default: a directory named by data set, model and their "
    "contents, in $GSTDS_CACHE]",
)
@device_option
@click.option(
    "--batch-size",
    type=int,
    help="Images per forward pass; halved until a new store's fits the memory. [default: the store's own, or 16; "
    "CUDA 256]",
)
@click.option(
    "--shard-rows",
    type=int,
    help="Rows committed at once, rounded up to whole batches. [default: the store's own, or about 4 MB]",
)
@workers_option
@click.option("--dtype", type=click.Choice(["float16", "float32"]), default="float16", show_default=True)
@click.option(
    "--reuse",
    metavar="STORE",
    multiple=True,
    help="Take over rows of the same images by the same model from this store, found by the hash of their bytes; a "
    "grown data set then embeds only what is new. May be given several times.",
)
@click.option("--allow-untrained", is_flag=True, help="Accept a model without pretrained weights.")
@click.option("--dry-run", is_flag=True, help="Only measure what it would take; hash, embed and write nothing.")
@json_option
def main(
    dataset: str,
    model: str,
    cache: str | None,
    device: str,
    batch_size: int | None,
    shard_rows: int | None,
    workers: int | None,
    dtype: Literal["float16", "float32"],
    reuse: tuple[str, ...],
    allow_untrained: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Parse, call :func:`gstds_cache.embedding.run.embed_dataset`, print."""
    wait_briefly()
    for flag, place in (("--cache", cache), *(("--reuse", other) for other in reuse)):
        if place is not None:
            Location.parse(place, flag)  # what cannot be meant is said before a model is loaded
    config = EmbedConfig(
        model=model,
        batch_size=batch_size,
        shard_rows=shard_rows,
        workers=workers,
        device=device,
        dtype=dtype,
        allow_untrained=allow_untrained,
    )
    from gstds_cache.costs.energy import EnergyMeter
    from gstds_cache.data.hash_cache import HashCache
    from gstds_cache.data.sources import open_source
    from gstds_cache.embedding.run import embed_dataset, estimate_dataset
    from gstds_cache.files.derived import cache_root, find_cache_root, hashes_folder
    from gstds_cache.runtime.allocator import keep_freed_memory
    from gstds_cache.runtime.devices import describe_device, resolve_device

    keep_freed_memory()
    if dry_run:
        source = open_source(dataset, hash_cache=HashCache(hashes_folder()), read=False)
        warn_if_inside(source, cache or find_cache_root(), what="the store", flag="--cache")
        estimate = estimate_dataset(source, config, where=cache, root=find_cache_root(), say=_say)
        _print_estimate(estimate, cache, reuse)
        if as_json:
            print_json({"dry_run": True, **estimate.to_dict()})
        return
    root = None if cache is not None else cache_root("--cache STORE")
    hash_cache = HashCache(hashes_folder())
    progress = Progress("images", "decoded images", check="shards")
    meter = EnergyMeter(resolve_device(device))

    def show(phase: str, done: int, total: int, shares: Mapping[str, float]) -> None:
        meter.add("embed")
        progress(phase, done, total, shares)

    try:
        source = open_source(
            dataset, hash_cache=hash_cache, progress=lambda done, total: progress("hash", done, total, {})
        )
        warn_if_inside(source, cache or root, what="the store", flag="--cache")
        report = embed_dataset(
            source, config, where=cache, root=root, reuse=reuse, progress=show, say=_say, hash_cache=hash_cache
        )
    except OSError as error:
        if root is None or isinstance(error, GstdsError) or error.errno not in {EACCES, EPERM, EROFS, ENOTDIR}:
            raise
        raise UsageError(
            f"the default place for stores cannot be written: {error.filename or root}: {error.strerror}",
            hint="name the store with --cache STORE, or set GSTDS_CACHE to a folder that can be written",
        ) from error
    finally:
        progress.end()
    meter.add("embed")
    notes = hash_cache.notes
    if not report.cache_hit:
        notes = (*notes, *_record_cost(report, meter.joules, describe_device(resolve_device(device))))
    _print(report, notes, reuse)
    if as_json:
        print_json(_as_dict(report))


def _record_cost(report: EmbedReport, joules: dict[str, float] | None, device: str) -> list[str]:
    """Write down beside the store what it cost, for the ledgers of the runs that use it.

    Returns:
        A note for the user where it is not written down.
    """
    spent = None if joules is None else sum(joules.values())
    cost = Cost(report.fingerprint, report.embedded, report.reused, report.seconds["total"], spent, device)
    # A record that was there before the first row is of another store of the same fingerprint, that was removed.
    note = keep_record(store_costs(report.location), cost, anew=not report.committed_before)
    return [note] if note else []


def _say(line: str) -> None:
    click.echo(line, err=True)


def _print_estimate(estimate: Estimate, cache: str | None, reuse: tuple[str, ...]) -> None:
    for line in estimate.lines():
        click.echo(line)
    if cache is None:
        click.echo("store: not looked for, since its name needs the hash of every image; name it with --cache")
    else:
        click.echo(f"store: {cache} has {estimate.committed:,} of {estimate.items:,} rows committed")
    if reuse:
        click.echo("reuse: not counted, since what other stores have is found by the hash of every image")
    click.echo("dry run: nothing was written")


def _print(report: EmbedReport, notes: tuple[str, ...], reuse: tuple[str, ...]) -> None:
    for note in (*report.notes, *notes):
        click.echo(f"note: {note}")
    bad = report.quarantined
    if report.cache_hit:
        click.echo("cache hit: every image is embedded already, nothing was computed")
    print_table(
        [
            ("store", report.location),
            ("fingerprint", report.fingerprint[:12]),
            ("model", report.model),
            ("images", f"{report.items:,} in = {report.ok:,} ok + {len(bad):,} quarantined"),
            (
                "this run",
                f"embedded {report.embedded:,} ({report.images_per_second:.1f} images/s), "
                f"found {report.committed_before:,} committed"
                + (f", took {report.reused:,} over (--reuse)" if reuse else ""),
            ),
            ("time", seconds_line({phase: report.seconds[phase] for phase in PHASES})),
            *([] if report.cache_hit else [("of embed", shares_line(report.shares))]),
        ]
    )
    # What stands before the colon is the kind of failure; after it come the particulars of one image.
    for kind, count in Counter(item.reason.partition(":")[0] for item in bad).most_common(10):
        example = next(item for item in bad if item.reason.startswith(kind))
        click.echo(f"quarantined {count:,}: {kind}, e.g. {example.id}: {example.reason}")
    if bad:
        click.echo(f"all quarantined images: {command_line('gstds-cache', 'info', report.location)}")
    if report.ok:
        click.echo(f"next: {command_line('gstds-select', report.location)}")
    else:
        click.echo(f"no image has an embedding: {bad[0].reason}; see gstds-cache info {report.location}", err=True)


def _as_dict(report: EmbedReport) -> dict[str, Any]:
    return {
        "store": report.location,
        "fingerprint": report.fingerprint,
        "model": report.model,
        "items": report.items,
        "ok": report.ok,
        "quarantined": [vars(item) for item in report.quarantined],
        "embedded": report.embedded,
        "reused": report.reused,
        "committed_before": report.committed_before,
        "cache_hit": report.cache_hit,
        "images_per_second": round(report.images_per_second, 2),
        "batch_size": report.batch_size,
        "workers": report.workers,
        "seconds": report.seconds,
        "shares": report.shares,
        "estimate": report.estimate.to_dict() if report.estimate else None,
    }


if __name__ == "__main__":
    main()
