"""``gstds-embed``: embed a data set once."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from gstds_cache.config import DEFAULT_MODEL, EmbedConfig
from gstds_cache.errors import command_line

from .common import (
    Command,
    Progress,
    cache_root,
    device_option,
    json_option,
    print_json,
    print_table,
    seconds_line,
)

if TYPE_CHECKING:
    from gstds_cache.embed.run import EmbedReport

HELP = f"""Embed every image of DATASET once, with a frozen reference model, into a Zarr store.

DATASET is one of

\b
  digits                        scikit-learn's 1,797 digits
  imagefolder:PATH              PATH/<class>/<image files>
  torchvision:CLASS?root=PATH   CIFAR10, OxfordIIITPet, Flowers102, ...
  module:factory                your own function that returns a data set

The same command again is a cache hit and embeds nothing; after an interrupt it goes on where it stopped.

\b
Examples:
  gstds-embed digits
  gstds-embed imagefolder:photos --cache photos.store
  gstds-embed 'torchvision:CIFAR10?root=data' --model 'timm:resnet18?weights=resnet18.safetensors'

The default MODEL is {DEFAULT_MODEL} with the ImageNet weights of an installed package; others are
timm:NAME, torchvision:NAME and module:factory, each with ?weights=FILE.
"""


@click.command(cls=Command, help=HELP)
@click.argument("dataset")
@click.option("--model", default=DEFAULT_MODEL, show_default=True, help="The reference model.")
@click.option(
    "--cache",
    type=click.Path(path_type=Path),
    metavar="STORE",
    help="The store's directory. [default: named by data set, model and their contents, in $GSTDS_CACHE]",
)
@device_option
@click.option("--batch-size", type=int, help="Images per forward pass. [default: the store's own, or 16; CUDA 256]")
@click.option(
    "--unit-rows",
    type=int,
    help="Rows committed at once, rounded up to whole batches. [default: the store's own, or about 4 MB]",
)
@click.option("--workers", type=int, default=1, show_default=True, help="Processes that decode images.")
@click.option("--dtype", type=click.Choice(["float16", "float32"]), default="float16", show_default=True)
@click.option("--allow-untrained", is_flag=True, help="Accept a model without pretrained weights.")
@json_option
def main(
    dataset: str,
    model: str,
    cache: Path | None,
    device: str,
    batch_size: int | None,
    unit_rows: int | None,
    workers: int,
    dtype: Literal["float16", "float32"],
    allow_untrained: bool,
    as_json: bool,
) -> None:
    """Parse, call :func:`gstds_cache.embed.run.embed_dataset`, print."""
    config = EmbedConfig(
        model=model,
        batch_size=batch_size,
        unit_rows=unit_rows,
        workers=workers,
        device=device,
        dtype=dtype,
        allow_untrained=allow_untrained,
    )
    from gstds_cache.data.sources import open_source
    from gstds_cache.embed.run import embed_dataset
    from gstds_cache.memory import keep_freed_memory

    keep_freed_memory()
    progress = Progress("images", "decoded images")
    try:
        report = embed_dataset(open_source(dataset), config, path=cache, root=cache_root(), progress=progress)
    finally:
        progress.end()
    _print(report)
    if as_json:
        print_json(_as_dict(report))


def _print(report: EmbedReport) -> None:
    for note in report.notes:
        click.echo(f"note: {note}")
    bad = report.quarantined
    if report.cache_hit:
        click.echo("cache hit: every image is embedded already, nothing was computed")
    print_table(
        [
            ("store", str(report.path)),
            ("fingerprint", report.fingerprint[:12]),
            ("model", report.model),
            ("images", f"{report.items:,} in = {report.ok:,} ok + {len(bad):,} quarantined"),
            (
                "this run",
                f"embedded {report.embedded:,} ({report.images_per_second:.1f} images/s), "
                f"found {report.committed_before:,} committed",
            ),
            ("time", seconds_line(report.seconds)),
        ]
    )
    # What stands before the colon is the kind of failure; after it come the particulars of one image.
    for kind, count in Counter(item.reason.partition(":")[0] for item in bad).most_common(10):
        example = next(item for item in bad if item.reason.startswith(kind))
        click.echo(f"quarantined {count:,}: {kind}, e.g. {example.id}: {example.reason}")
    if bad:
        click.echo(f"all quarantined images: {command_line('gstds-cache', 'info', report.path)}")
    click.echo(f"next: {command_line('gstds-select', report.path)}")


def _as_dict(report: EmbedReport) -> dict[str, Any]:
    return {
        "store": str(report.path),
        "fingerprint": report.fingerprint,
        "model": report.model,
        "items": report.items,
        "ok": report.ok,
        "quarantined": [vars(item) for item in report.quarantined],
        "embedded": report.embedded,
        "committed_before": report.committed_before,
        "cache_hit": report.cache_hit,
        "images_per_second": round(report.images_per_second, 2),
        "seconds": report.seconds,
    }


if __name__ == "__main__":
    main()
