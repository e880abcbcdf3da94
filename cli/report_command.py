"""``gstds-cache export`` and ``gstds-cache report``: what there is, for other tools and for people to look at."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from gstds_cache.errors import UsageError
from gstds_cache.files.derived import hashes_folder
from gstds_cache.files.location import local_file

from .common import Command, LocalPath, Progress, device_option, json_option, print_json

if TYPE_CHECKING:
    from gstds_cache.report.recompute import RecomputeSettings

EXPORT_HELP = """Write the rows of STORE to FILE for other tools: .npy, .parquet or .arrow.

Row i is item i. Where an image could not be decoded, .npy holds zeros; in a table, `valid` is 2 and `embedding` null.

With --scores SELECTION the rows are not embeddings but how the selection sees each sample: `seen` and `kept` count how
often it was in a batch and stayed; `percentile` is its mean place along the Fiedler order (0 to 1; which end is which
is settled batch by batch, so `from_middle`, 0 in the middle and 1 at either end, compares better between batches);
`spacing` is the mean distance to its neighbours in that order, as a multiple of the batch's; `difficulty` is the
guidance, where there is one. Null where it is not known.

\b
Examples:
  gstds-cache export photos.store photos.parquet
  gstds-cache export photos.store scores.parquet --scores selection.arrow
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


@click.command("export", cls=Command, help=EXPORT_HELP)
@click.argument("store")
@click.argument("file", type=LocalPath(dir_okay=False))
@click.option("--scores", "selection", metavar="SELECTION", help="Write this selection's view of each sample.")
@click.option(
    "--device", metavar="DEVICE", help="With --scores: where the selection is computed again. [default: auto]"
)
@GUIDANCE
@SCHEDULE
@click.option("--force", is_flag=True, help="Replace FILE.")
@json_option
def export(
    store: str,
    file: Path,
    selection: str | None,
    device: str | None,
    guidance: str | None,
    schedule: str | None,
    force: bool,
    as_json: bool,
) -> None:
    """Write one store's rows for other tools."""
    from gstds_cache.report.recompute import RecomputeSettings

    if selection is not None:
        recompute_settings = RecomputeSettings(device=device or "auto", guidance=guidance, schedule=schedule)
        _export_scores(store, file, local_file(selection, "--scores"), recompute_settings, force=force, as_json=as_json)
        return
    if (device, guidance, schedule) != (None, None, None):
        raise UsageError(
            "--device, --guidance and --schedule belong to --scores; an export of embeddings computes nothing"
        )
    from gstds_cache.store.export import export_rows
    from gstds_cache.store.reader import EmbeddingStore

    opened = EmbeddingStore(store)
    size = export_rows(opened, file, replace=force)
    bad = len(opened.quarantined)
    click.echo(f"wrote {file}: {len(opened):,} rows of {opened.spec.dim} {opened.spec.dtype}, {size / 1e6:,.1f} MB")
    if bad:
        click.echo(f"note: {bad:,} of them are of images that could not be decoded: gstds-cache info {store}")
    if as_json:
        print_json({"file": str(file), "rows": len(opened), "undecodable": bad, "bytes": size})


def _export_scores(
    store: str, file: Path, selection: Path, recompute_settings: RecomputeSettings, *, force: bool, as_json: bool
) -> None:
    from gstds_cache.report.recompute import selector_of, watch_again
    from gstds_cache.report.scores import SampleScores, check_target, write_scores
    from gstds_cache.store.reader import EmbeddingStore
    from gstds_cache.stream.reader import open_selection

    check_target(file, replace=force)
    opened = EmbeddingStore(store)
    progress = Progress("batches", "")
    scores = SampleScores(len(opened))
    with open_selection(selection) as stream:
        selector = selector_of(opened, stream.header, recompute_settings)
        try:
            for batch in watch_again(selector, stream):
                scores.add(batch)
                progress("score", batch.selection.seq + 1, stream.header.total_batches, 0.0)
        finally:
            progress.end()
        header = stream.header
    size = write_scores(scores, opened, header, file)
    never = int(((scores.kept == 0) & (scores.seen > 0)).sum())
    unseen = int((scores.seen == 0).sum())
    click.echo(f"wrote {file}: {len(opened):,} samples in {header.epochs} epochs, {size / 1e6:,.1f} MB")
    click.echo(f"never kept: {never:,}; never in a batch, as they have no embedding: {unseen:,}")
    if as_json:
        print_json({"file": str(file), "rows": len(opened), "never_kept": never, "unseen": unseen, "bytes": size})


@click.command("report", cls=Command, help=REPORT_HELP)
@click.argument("what", nargs=-1, required=True, type=LocalPath())
@click.option("--out", type=LocalPath(dir_okay=False), default=Path("report.html"), show_default=True)
@click.option("--cache", metavar="STORE", help="The store. [default: where it was when the selection was made]")
@click.option("--dataset", help="Where the data set is now. [default: where it was when STORE was made]")
@click.option("--batches", type=click.IntRange(min=3), default=48, show_default=True, help="Batches computed again.")
@device_option
@GUIDANCE
@SCHEDULE
@click.option("--force", is_flag=True, help="Replace a page that is there.")
@json_option
def report(
    what: tuple[Path, ...],
    out: Path,
    cache: str | None,
    dataset: str | None,
    batches: int,
    device: str,
    guidance: str | None,
    schedule: str | None,
    force: bool,
    as_json: bool,
) -> None:
    """Make a page."""
    if out.exists() and not force:
        raise UsageError(f"--out {out}: the file is there already", hint="give another name, or --force")
    try:
        from gstds_cache.report.page import render, write_page
    except ModuleNotFoundError as error:
        raise UsageError(
            f"the report needs {error.name}, which is not installed", hint="pip install 'gstds-cache[report]'"
        ) from error
    from gstds_cache.data.hash_cache import HashCache
    from gstds_cache.data.sources import open_source
    from gstds_cache.report.recompute import RecomputeSettings
    from gstds_cache.report.run_view import read_run
    from gstds_cache.report.selection_view import view_selection

    hash_cache = HashCache(hashes_folder())
    progress = Progress("batches", "")
    runs = [read_run(path, number) for number, path in enumerate((p for p in what if p.is_dir()), 1)]
    try:
        selections = [
            view_selection(
                path,
                key=f"s{number}",
                cache=cache,
                dataset=lambda uri: open_source(uri, hash_cache=hash_cache),
                dataset_uri=dataset,
                recompute_settings=RecomputeSettings(device=device, guidance=guidance, schedule=schedule),
                most=batches,
                progress=lambda done, total: progress("compute", done, total, 0.0),
            )
            for number, path in enumerate(p for p in what if not p.is_dir())
        ]
    finally:
        progress.end()
    size = write_page(out, render(selections, runs))
    click.echo(
        f"wrote {out}: {len(selections)} selections, {len(runs)} runs, {size / 1e6:,.1f} MB; open it in a browser"
    )
    missing = sorted({panel.missing for view in selections for panel in view.panels if panel.missing})
    for line in missing:
        click.echo(f"note: left out: {line}", err=True)
    if as_json:
        result = {"out": str(out), "selections": len(selections), "runs": len(runs), "bytes": size, "missing": missing}
        print_json(result)
