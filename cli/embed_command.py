"""``gstds-embed``: embed a data set once."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import click

from gstds_cache.config import DEFAULT_MODEL, ENGINE, EmbedConfig
from gstds_cache.errors import UsageError, command_line
from gstds_cache.runtime.openmp import wait_briefly
from gstds_cache.runtime.progress import shares_text

from .common import (
    Command,
    engine_option,
    json_option,
    next_selection,
    notify,
    print_json,
    print_table,
    seconds_line,
    setting_option,
    shown,
    workers_option,
)

if TYPE_CHECKING:
    from gstds_cache.store.embed_report import EmbedReport

PHASES = ("hash", "model", "estimate", "embed", "finish", "total")

HELP = f"""Embed every image of DATASET once, with a frozen reference model, into a Zarr store.

DATASET is one of

\b
  digits                        scikit-learn's 1,797 digits
  imagefolder:PATH              PATH/<class>/**/<image>
  folder:PATH                   images without class folders, no labels
  list:FILE.csv                 rows path,label
  parquet:PATH?image=COLUMN     Parquet or Arrow files; &label=COLUMN
  webdataset:s-{{0000..0099}}.tar tar shards, also s3://...; &label=FIELD of json
  hf:PATH_OR_NAME?split=train   a data set of Hugging Face's datasets
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
  gstds-embed imagefolder:photos --cache photos.store --shard 0/4
  gstds-embed 'torchvision:CIFAR10?root=data' --model 'timm:resnet18?weights=resnet18.safetensors'

The default MODEL is {DEFAULT_MODEL} with the ImageNet weights of an installed package; others are
timm:NAME, torchvision:NAME, dinov2-small, siglip2-base, clip-vit-b16 and other aliases (docs/models.md), and
module:factory, each with ?weights=FILE. With ?size=64 all but the last look at 64 x 64 pixels, in a fraction of the
time; without, models that take any size look at no more pixels than the images' size makes worth while.
"""


@click.command(cls=Command, help=HELP, renamed={"--unit-rows": "--shard-rows"})
@click.argument("dataset")
@setting_option(EmbedConfig, "model", help="The reference model.")
@click.option(
    "--cache",
    metavar="STORE",
    help="The store: a directory, or s3://BUCKET/PREFIX. [default: a directory named by data set, model and their "
    "contents, in $GSTDS_CACHE]",
)
@setting_option(EmbedConfig, "device", metavar="DEVICE", help="auto, cpu, cuda, cuda:N, or several GPUs: cuda:0,1.")
@setting_option(
    EmbedConfig,
    "decoder",
    help="What decodes images: Pillow in worker processes, or nvJPEG on the GPU, whose pixels differ a little; either "
    "has stores of its own.",
)
@setting_option(
    EmbedConfig,
    "decode",
    help="How Pillow decodes large JPEGs: exact, or scaled, at 1/2, 1/4 or 1/8 of their size where that is twice what "
    "the model looks at, still. auto is the store's own, and for a new store scaled where a sample has such JPEGs.",
)
@setting_option(EmbedConfig, "max_pixels", help="Images of more pixels (width x height) are quarantined.")
@setting_option(
    EmbedConfig,
    "batch_size",
    help="Images per forward pass; halved until a new store's fits the memory. [default: the store's own, or 16; "
    "CUDA 256]",
)
@setting_option(
    EmbedConfig,
    "shard_rows",
    help="Rows committed at once (a shard), rounded up to whole batches. [default: the store's own, or about 4 MB]",
)
@workers_option
@setting_option(EmbedConfig, "dtype", help="How embeddings are stored.")
@click.option(
    "--reuse",
    metavar="STORE",
    multiple=True,
    help="Take over rows of the same images by the same model from this store, found by the hash of their bytes; a "
    "grown data set then embeds only what is new. May be given several times.",
)
@engine_option
@click.option(
    "--gpus-per-task",
    type=float,
    metavar="GPUS",
    help="With --engine ray: GPUs of a task, or the part of one. [default: 1 where the model runs on a GPU]",
)
@setting_option(EmbedConfig, "allow_untrained", help="Accept a model without pretrained weights.")
@setting_option(
    EmbedConfig,
    "cuda_graphs",
    flags=(" /--no-cuda-graphs",),
    help="Start the kernels of each forward pass one by one, also with --decoder nvjpeg; else those of a timm or "
    "torchvision model are recorded in a CUDA graph there, and started together.",
)
@setting_option(
    EmbedConfig,
    "shard",
    metavar="I/N",
    help="Embed part I of N of the store, I from 0, beside other processes or machines that take the others; the last "
    "one finishes the store (docs/scale.md).",
)
@click.option("--dry-run", is_flag=True, help="Only measure what it would take; hash, embed and write nothing.")
@json_option
def main(
    dataset: str,
    cache: str | None,
    reuse: tuple[str, ...],
    engine: str,
    gpus_per_task: float | None,
    dry_run: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    """Parse, call :func:`gstds_cache.embed`, print."""
    wait_briefly()
    from gstds_cache.api.embed import embed
    from gstds_cache.runtime.allocator import keep_freed_memory

    keep_freed_memory()
    if dry_run:
        if engine != ENGINE or gpus_per_task is not None:
            raise UsageError("--dry-run measures this machine: it takes no --engine and no --gpus-per-task")
        _dry_run(dataset, cache, reuse, as_json, settings)
        return
    where: Any = {"engine": engine, "gpus_per_task": gpus_per_task}
    report = embed(dataset, cache, reuse=reuse, notify=notify, **where, **settings).report
    assert report is not None
    _print(report, reuse)
    if as_json:
        print_json(report.to_dict())


def _dry_run(dataset: str, cache: str | None, reuse: tuple[str, ...], as_json: bool, settings: dict[str, Any]) -> None:
    from gstds_cache.api.embed import estimate_embedding

    estimate = estimate_embedding(dataset, cache, notify=notify, **settings)
    for line in estimate.lines():
        click.echo(line)
    if cache is None:
        click.echo(
            "store: not checked, since its default name needs the hash of every image; give --cache to check one"
        )
    else:
        click.echo(f"store: {cache} has {estimate.committed:,} of {estimate.items:,} rows committed")
    if reuse:
        click.echo("reuse: not counted, since what other stores have is found by the hash of every image")
    click.echo("dry run: nothing was written")
    if as_json:
        print_json({"dry_run": True, **estimate.to_dict()})


def _print(report: EmbedReport, reuse: tuple[str, ...]) -> None:
    bad = report.quarantined
    if report.cache_hit:
        click.echo("cache hit: every image is embedded already, nothing was computed")
    print_table(
        [
            ("store", report.location),
            ("fingerprint", report.fingerprint[:12]),
            ("model", report.model),
            ("looks at", report.looks_at),
            ("images", _images_line(report)),
            *([] if report.shard is None else [("part", _part_line(report))]),
            (
                "this run",
                f"embedded {report.embedded:,} ({report.images_per_second:.1f} images/s), "
                f"found {report.committed_before:,} committed"
                + (f", took {report.reused:,} over (--reuse)" if reuse else ""),
            ),
            ("time", seconds_line({phase: report.seconds[phase] for phase in PHASES})),
            *([] if report.cache_hit else [("of embed", shares_text(report.shares))]),
        ]
    )
    # What stands before the colon is the kind of failure; after it come the particulars of one image.
    for kind, count in Counter(item.reason.partition(":")[0] for item in bad).most_common(10):
        example = next(item for item in bad if item.reason.startswith(kind))
        click.echo(shown(f"quarantined {count:,}: {kind}, e.g. {example.id}: {example.reason}"))
    if any(item.reason.startswith("too many pixels") for item in bad):
        click.echo("larger images are taken with --max-pixels N, into a store of its own")
    if bad:
        click.echo(f"all quarantined images: {command_line('gstds-cache', 'info', report.location)}")
    if report.shards_left:
        click.echo(
            f"shards left: {report.shards_left:,} of {report.shards:,}, being embedded by others or not begun; whoever "
            "commits the last one finishes the store, and so does this command without --shard"
        )
    elif not report.complete:
        click.echo(
            "shards left: 0, and another process is finishing the store; if that ends first, this command without "
            "--shard finishes it"
        )
    elif report.ok:
        click.echo(next_selection(report.location))
    else:
        click.echo(f"no image has an embedding: {bad[0].reason}; see gstds-cache info {report.location}", err=True)


def _images_line(report: EmbedReport) -> str:
    known = report.ok + len(report.quarantined)
    of = "in" if known == report.items else f"of {report.items:,} in this part"
    return f"{known:,} {of} = {report.ok:,} ok + {len(report.quarantined):,} quarantined"


def _part_line(report: EmbedReport) -> str:
    return f"{report.shard} of the store's shards: {report.part_shards:,} of {report.shards:,}, all committed"


if __name__ == "__main__":
    main()
