"""``gstds-cache export`` and ``gstds-cache report``: what there is, for other tools and for people to look at."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from gstds_cache.config import DEVICE, REPORT_BATCHES, REPORT_FILE
from gstds_cache.errors import UsageError

from .common import Command, LocalPath, device_option, json_option, notify, print_json

EXPORT_HELP = """Write the rows of STORE to FILE for other tools: .npy, .parquet or .arrow.

Row i is item i. Where an image could not be decoded, .npy holds zeros; in a table, `valid` is 2 and `embedding` null.

With --scores SELECTION the rows are not embeddings but how the selection sees each sample: `seen` and `kept` count how
often it was in a batch and stayed; `percentile` is its mean place along the Fiedler order (0 to 1; which end is which
is chosen batch by batch, so `from_middle`, 0 in the middle and 1 at either end, compares better between batches);
`spacing` is the mean distance to its neighbours in that order, as a multiple of the batch's; `difficulty` is the
guidance, where there is one. Null where it is not known.

With --fiftyone FILE is a folder that FiftyOne imports, each item a sample. With --scores the selection's view of each
sample becomes fields, with --join the columns of other tables, by their column `id`, which every table here has.

\b
Examples:
  gstds-cache export photos.store photos.parquet
  gstds-cache export photos.store scores.parquet --scores selection.arrow
  gstds-cache export photos.store photos.fiftyone --fiftyone --scores selection.arrow
"""

REPORT_HELP = """Make one HTML page of selections and training runs: what is kept and dropped, and what it cost.

WHAT is a selection, or a RUN_DIR of gstds-train; several are shown side by side. The page loads nothing and runs no
script. Images and dropped rows are found through what gstds-select and gstds-embed wrote down, or through --cache and
--dataset; what cannot be found, the page says. Needs: pip install 'gstds-cache[report]'

\b
Examples:
  gstds-cache report selection.arrow --out report.html
  gstds-cache report runs/a runs/b selection.arrow --out report.html
"""

GUIDANCE = click.option(
    "--guidance", help="The selection's --guidance, where it was a file or had parameters. [default: found out]"
)


SCHEDULE = click.option(
    "--schedule", help="The selection's --schedule, where it was file:PATH; a selection names no paths."
)


FORCE = click.option("--force", "replace", is_flag=True, help="Replace a file that is there.")


@click.command("export", cls=Command, help=EXPORT_HELP)
@click.argument("store")
@click.argument("file", type=LocalPath())
@click.option("--fiftyone", is_flag=True, help="Write a folder for FiftyOne instead of a table.")
@click.option("--scores", "selection", metavar="SELECTION", help="Write this selection's view of each sample.")
@click.option(
    "--device", metavar="DEVICE", help="With --scores: where the selection is computed again. [default: auto]"
)
@click.option(
    "--join",
    multiple=True,
    type=LocalPath(dir_okay=False),
    metavar="TABLE",
    help="With --fiftyone: a .parquet or .arrow table whose columns become fields, by its column id; may be repeated.",
)
@click.option(
    "--dataset", help="With --fiftyone: where the data set is now. [default: where it was when STORE was made]"
)
@GUIDANCE
@SCHEDULE
@FORCE
@json_option
def export(
    store: str,
    file: Path,
    fiftyone: bool,
    selection: str | None,
    join: tuple[Path, ...],
    dataset: str | None,
    device: str | None,
    guidance: str | None,
    schedule: str | None,
    replace: bool,
    as_json: bool,
) -> None:
    """Call :func:`gstds_cache.export_store`, `export_scores` or `export_fiftyone`, print."""
    if not fiftyone and (join or dataset is not None):
        raise UsageError("--join and --dataset belong to --fiftyone")
    if fiftyone:
        how = {"device": device or DEVICE, "guidance": guidance, "schedule": schedule, "replace": replace}
        _export_fiftyone(store, file, as_json, selection=selection, join=join, dataset=dataset, **how)
        return
    if selection is not None:
        _export_scores(store, selection, file, device or DEVICE, guidance, schedule, replace, as_json)
        return
    if (device, guidance, schedule) != (None, None, None):
        raise UsageError(
            "--device, --guidance and --schedule belong to --scores; an export of embeddings computes nothing"
        )
    from gstds_cache.api.export import export_store

    done = export_store(store, file, replace=replace)
    click.echo(f"wrote {file}: {done.rows:,} rows of {done.dim} {done.dtype}, {done.bytes / 1e6:,.1f} MB")
    if done.undecodable:
        click.echo(
            f"note: {done.undecodable:,} of them are of images that could not be decoded: gstds-cache info {store}"
        )
    if as_json:
        print_json(done.to_dict())


def _export_scores(
    store: str,
    selection: str,
    file: Path,
    device: str,
    guidance: str | None,
    schedule: str | None,
    replace: bool,
    as_json: bool,
) -> None:
    from gstds_cache.api.export import export_scores

    done = export_scores(store, selection, file, device=device, guidance=guidance, schedule=schedule, replace=replace)
    click.echo(f"wrote {file}: {done.rows:,} samples in {done.epochs} epochs, {done.bytes / 1e6:,.1f} MB")
    click.echo(
        f"never kept: {done.never_kept:,}; never in a batch, as they have no embedding or are hidden: {done.unseen:,}"
    )
    if as_json:
        print_json(done.to_dict())


def _export_fiftyone(store: str, folder: Path, as_json: bool, **options: Any) -> None:
    from gstds_cache.api.export import export_fiftyone

    done = export_fiftyone(store, folder, **options)
    click.echo(f"wrote {folder}: {done.samples:,} samples; fields: {', '.join(done.fields) or 'label, row, item_id'}")
    if done.left_out:
        click.echo(f"note: {done.left_out:,} items are left out: they are neither files nor images")
    click.echo(
        f"next, in Python: fiftyone.Dataset.from_dir({str(folder)!r}, dataset_type=fiftyone.types.FiftyOneDataset)"
    )
    if as_json:
        print_json(done.to_dict())


@click.command("report", cls=Command, help=REPORT_HELP)
@click.argument("what", nargs=-1, required=True, type=LocalPath())
@click.option("--out", type=LocalPath(dir_okay=False), default=Path(REPORT_FILE), show_default=True)
@click.option("--cache", metavar="STORE", help="The store. [default: where it was when the selection was made]")
@click.option("--dataset", help="Where the data set is now. [default: where it was when STORE was made]")
@click.option(
    "--batches", type=click.IntRange(min=3), default=REPORT_BATCHES, show_default=True, help="Batches computed again."
)
@device_option
@GUIDANCE
@SCHEDULE
@FORCE
@json_option
def report(what: tuple[Path, ...], out: Path, as_json: bool, **settings: Any) -> None:
    """Call :func:`gstds_cache.write_report`, print."""
    from gstds_cache.api.report import write_report

    page = write_report(*what, out=out, **settings)
    click.echo(
        f"wrote {out}: {page.selections} selections, {page.runs} runs, {page.bytes / 1e6:,.1f} MB; open it in a browser"
    )
    for line in page.missing:
        notify(f"note: left out: {line}")
    if as_json:
        print_json(page.to_dict())
