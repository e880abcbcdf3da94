"""``gstds-cache import``: a store of embeddings that another tool made."""

from __future__ import annotations

from typing import Literal

import click

from .common import Command, json_option, next_selection, notify, print_json, print_table, seconds_line

HELP = """Make a complete store of VECTORS that another tool made: .npy, .parquet, .arrow or .safetensors, [N, D].

Row i is vector i. Rows of length 1 are kept to the last bit, others are divided by their lengths. float16 and float32
stay what they are; float64 and bfloat16 are stored as float32. A vector that is zeros alone, or holds NaN or Inf, is
quarantined: its row stays in its place, without an embedding, and no selection takes it. The same command again finds
the store, and after an interrupt goes on.

A table is expected to have one column of lists; its columns `id` and `label` are taken with it.

With --dataset the vectors are of that data set's images: gstds-train can train on it. Vector i is then of item i; with
--ids as well, vectors are found by id and may be in any order.

\b
Examples:
  gstds-cache import vectors.npy --labels labels.txt --out vectors.store
  gstds-cache import clip.parquet --dataset imagefolder:photos --out photos.store
  gstds-cache import vectors.safetensors --key image_embeds --ids names.txt --out vectors.store
"""

FILES = ".txt (a line each), .npy, or .parquet or .arrow with ?column=NAME."


@click.command("import", cls=Command, help=HELP)
@click.argument("vectors")
@click.option("--out", "cache", metavar="STORE", required=True, help="The store: a directory, or s3://BUCKET/PREFIX.")
@click.option(
    "--ids",
    metavar="FILE",
    help=f"A name for each row, each once: {FILES} [default: column `id` of a table, else row numbers]",
)
@click.option(
    "--labels",
    metavar="FILE",
    help=f"A label for each row: {FILES} Text makes classes. [default: column `label` of a table]",
)
@click.option("--dataset", metavar="DATASET", help="The images that the vectors are of, as for gstds-embed.")
@click.option("--key", metavar="NAME", help="Which tensor, or column of a table; needed where there are several.")
@click.option("--model", metavar="NAME", help="What made the vectors, in your words; part of the store's identity.")
@click.option("--dtype", type=click.Choice(["float16", "float32"]), help="How they are stored. [default: as they are]")
@click.option("--shard-rows", type=int, help="Rows committed at once (a shard). [default: about 16 MB]")
@json_option
def import_command(
    vectors: str,
    cache: str,
    ids: str | None,
    labels: str | None,
    dataset: str | None,
    key: str | None,
    model: str | None,
    dtype: Literal["float16", "float32"] | None,
    shard_rows: int | None,
    as_json: bool,
) -> None:
    """Call :func:`gstds_cache.import_embeddings`, print."""
    from gstds_cache.api.import_rows import import_embeddings

    store = import_embeddings(
        vectors,
        cache,
        ids=ids,
        labels=labels,
        dataset=dataset,
        key=key,
        model=model,
        dtype=dtype,
        shard_rows=shard_rows,
        notify=notify,
    )
    report = store.report
    assert report is not None
    if report.cache_hit:
        click.echo("cache hit: these vectors are imported already, nothing was written")
    print_table(
        [
            ("store", report.location),
            ("fingerprint", report.fingerprint[:12]),
            ("model", report.model),
            ("embeddings", f"[{report.items}, {store.spec.dim}] {store.spec.dtype}"),
            ("rows", f"{report.items:,} in = {report.ok:,} ok + {len(report.quarantined):,} quarantined"),
            ("classes", f"{len(store.classes):,}" if store.classes else "none have a name"),
            ("time", seconds_line(report.seconds)),
        ]
    )
    click.echo(next_selection(report.location))
    if as_json:
        print_json(report.to_dict())
