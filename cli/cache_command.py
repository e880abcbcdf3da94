"""``gstds-cache``: look at stores, check and mend them, hand them on, remove them."""

from __future__ import annotations

import os
import shutil
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from gstds_cache.errors import EXIT_INCOMPLETE, EXIT_INTEGRITY, GstdsError, UsageError, command_line
from gstds_cache.files.derived import cache_root, existing_derived, hashes_folder
from gstds_cache.files.location import Location

from .common import (
    Command,
    Group,
    LocalPath,
    Progress,
    device_option,
    json_option,
    print_json,
    print_table,
    workers_option,
)
from .report_command import export, report

if TYPE_CHECKING:
    from gstds_cache.data.source import ImageSource
    from gstds_cache.encoders.encoder import Encoder
    from gstds_cache.store.metadata import StoreMetadata
    from gstds_cache.store.verify import VerifyReport

GROUP_HELP = """Look at embedding stores, check and mend them, hand them on, remove them.

STORE is a directory or s3://bucket/prefix.

\b
Examples:
  gstds-cache ls
  gstds-cache info photos.store
  gstds-cache verify photos.store --level full
  gstds-cache repair photos.store
  gstds-cache export photos.store photos.parquet
  gstds-cache rm photos.store
"""

LS_HELP = """List the stores in ROOT (default: $GSTDS_CACHE, or ~/.cache/gstds-cache).

\b
Example:
  gstds-cache ls
"""

INFO_HELP = """Show what STORE holds and how it was made.

\b
Example:
  gstds-cache info photos.store
"""

VERIFY_HELP = """Check STORE against its commit records; exit code 3 if anything is wrong, 4 if it is not complete.

\b
Levels:
  quick   sizes against commit records, and the small objects
  full    hash every byte
  sample  embed some rows again and compare; needs the data set and the model

\b
Example:
  gstds-cache verify photos.store --level full
"""

REPAIR_HELP = """Hash every object of STORE and make again what is missing or damaged, and nothing else.

The data set and the model are the ones STORE was made with, unless --dataset or --model say where they are now. Either
must be the same in content: what differs is named, and nothing is changed.

\b
Example:
  gstds-cache repair photos.store
"""

RM_HELP = """Remove STORE, the selections and guidance made from it and its mirror, after a question.

\b
Example:
  gstds-cache rm photos.store
"""


@click.group(cls=Group, help=GROUP_HELP)
def main() -> None:
    """Look after stores."""


@main.command("ls", cls=Command, help=LS_HELP)
@click.argument("root", type=LocalPath(), required=False)
@json_option
def list_stores(root: Path | None, as_json: bool) -> None:
    """List stores."""
    from gstds_cache.store.describe import StoreSummary, summarise

    if root is not None and not root.is_dir():
        raise UsageError(f"no folder at {root}", hint="gstds-cache ls, without a folder, lists the default place")
    root = root or cache_root("the folder of the stores")
    summaries: list[StoreSummary] = []
    for path in sorted(root.iterdir()) if root.is_dir() else []:
        if (path / "zarr.json").is_file():
            try:
                summaries.append(summarise(path))
            except GstdsError as error:
                click.echo(f"{path.name}: {error}", err=True)
    if as_json:
        print_json({"root": str(root), "stores": [summary.to_dict() for summary in summaries]})
        return
    if not summaries:
        click.echo(f"no stores in {root}; make one with: gstds-embed digits")
        return
    rows = [("name", "rows", "MB", "state", "model", "data set", "last used")]
    for s in summaries:
        state = "complete" if s.complete else f"{s.committed}/{s.shards} shards"
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(s.last_used)) if s.last_used else "-"
        dataset = str(s.provenance.get("dataset", s.kind))
        name = Path(s.location).name
        rows.append((name, f"{s.items:,}", f"{s.size / 1e6:,.1f}", state, s.model, dataset, used))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        click.echo("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())


@main.command("info", cls=Command, help=INFO_HELP)
@click.argument("store")
@json_option
def show_store(store: str, as_json: bool) -> None:
    """Show one store."""
    from gstds_cache.store.describe import summarise

    summary = summarise(store)
    if as_json:
        print_json(summary.to_dict())
        return
    done = "complete" if summary.complete else "not complete: run the same gstds-embed command again"
    print_table(
        [
            ("store", summary.location),
            ("fingerprint", summary.fingerprint),
            ("state", f"{summary.committed:,} of {summary.shards:,} shards committed, {done}"),
            ("items", f"{summary.items:,}, of which {len(summary.quarantined):,} quarantined so far"),
            ("embeddings", f"[{summary.items}, {summary.dim}] {summary.dtype}, {summary.size / 1e6:,.1f} MB on disk"),
            ("data set", f"{summary.kind}, {summary.classes:,} classes, root {summary.items_root[:12]}"),
            *((f"model.{name}", str(value)) for name, value in summary.encoder.items()),
            *((f"made with {name}", str(value)) for name, value in summary.provenance.items()),
        ]
    )
    for item in summary.quarantined[:20]:
        click.echo(f"quarantined row {item.row}: {item.id}: {item.reason}")
    if len(summary.quarantined) > 20:
        click.echo(f"... and {len(summary.quarantined) - 20} more; see --json")


def _belonging(store: StoreMetadata, dataset: str | None, model: str | None) -> tuple[ImageSource, Encoder]:
    """The data set and the model a store was made with, from where they were then, or where they are said to be."""
    from gstds_cache.data.sources import open_source
    from gstds_cache.encoders.factory import open_encoder

    dataset, model = dataset or store.dataset_uri, model or store.model_uri
    if not dataset or not model:
        raise UsageError(
            f"{store.location} does not say where its {'data set' if not dataset else 'model'} is",
            hint="name it with --dataset or --model",
        )
    return open_source(dataset), open_encoder(model, allow_untrained=True)


DATASET = click.option("--dataset", help="Where the data set is now. [default: where it was when STORE was made]")
MODEL = click.option("--model", help="Where the model is now. [default: where it was when STORE was made]")


@main.command("verify", cls=Command, help=VERIFY_HELP)
@click.argument("store")
@click.option("--level", type=click.Choice(["quick", "full", "sample"]), default="quick", show_default=True)
@click.option("--rows", type=click.IntRange(min=1), default=64, show_default=True, help="Rows that sample compares.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Which rows sample compares.")
@DATASET
@MODEL
@device_option
@json_option
@click.pass_context
def verify_store(
    ctx: click.Context,
    store: str,
    level: Literal["quick", "full", "sample"],
    rows: int,
    seed: int,
    dataset: str | None,
    model: str | None,
    device: str,
    as_json: bool,
) -> None:
    """Check one store."""
    from gstds_cache.store.metadata import corrupt
    from gstds_cache.store.verify import verify

    progress = Progress("shards", "")
    try:
        report = verify(
            store,
            "full" if level == "full" else "quick",
            progress=lambda done, total: progress("check", done, total, 0.0),
        )
    finally:
        progress.end()
    problems, extra = list(report.problems), {}
    hashed = f", {report.bytes_hashed / 1e6:,.1f} MB hashed" if level == "full" else ""
    click.echo(f"{store}: {level} check of {report.committed:,} of {report.shards:,} shards{hashed}")
    if level == "sample" and not problems:
        from gstds_cache.data.hash_cache import HashCache
        from gstds_cache.embedding.check import check_sample
        from gstds_cache.embedding.repair import same_data
        from gstds_cache.store.reader import EmbeddingStore

        opened = EmbeddingStore(store, allow_partial=True, access="window")
        source, encoder = _belonging(opened.metadata, dataset, model)
        same_data(opened.metadata, source, encoder, HashCache(hashes_folder()))
        found = check_sample(opened, source, encoder, rows=rows, seed=seed, device=device)
        problems += found.problems
        extra = {"rows": list(found.rows), "cosine_min": found.cosine_min}
        click.echo(f"{len(found.rows):,} rows embedded again: smallest cosine {found.cosine_min:.7f}")
    if as_json:
        print_json(_as_dict(report) | {"level": level, "problems": [str(problem) for problem in problems]} | extra)
    if problems:
        click.echo(f"error: {corrupt(Location.parse(store), problems)}", err=True)
        if level == "sample" and not report.problems:
            # These bytes are the committed ones, so that a hash does not tell them from good ones.
            shards = sorted({problem.shard for problem in problems if problem.shard is not None})
            words = [word for shard in shards for word in ("--shard", shard)]
            click.echo(f"  (their hashes are right: {command_line('gstds-cache', 'repair', store, *words)})", err=True)
        ctx.exit(EXIT_INTEGRITY)
    if not report.complete:
        click.echo("no problem found; not complete: run the same gstds-embed command again", err=True)
        ctx.exit(EXIT_INCOMPLETE)
    click.echo("no problem found", err=as_json)


@main.command("repair", cls=Command, help=REPAIR_HELP)
@click.argument("store")
@DATASET
@MODEL
@click.option("--shard", "shards", type=int, multiple=True, help="Make this shard again as well, whatever its hash.")
@device_option
@workers_option
@json_option
@click.pass_context
def repair(
    ctx: click.Context,
    store: str,
    dataset: str | None,
    model: str | None,
    shards: tuple[int, ...],
    device: str,
    workers: int | None,
    as_json: bool,
) -> None:
    """Mend one store."""
    from gstds_cache.data.hash_cache import HashCache
    from gstds_cache.embedding.repair import repair_store
    from gstds_cache.runtime.allocator import keep_freed_memory
    from gstds_cache.store.metadata import StoreMetadata

    keep_freed_memory()
    source, encoder = _belonging(StoreMetadata(store), dataset, model)
    progress = Progress("images", "decoded images", check="shards")
    try:
        report = repair_store(
            store,
            source,
            encoder,
            shards=shards,
            device=device,
            workers=workers,
            hash_cache=HashCache(hashes_folder()),
            progress=lambda phase, done, total: progress(phase, done, total, 0.0),
        )
    finally:
        progress.end()
    for problem in report.before.problems[:20]:
        click.echo(f"was wrong: {problem}")
    for shard in report.changed:
        click.echo(f"note: shard {shard} has other bits now than before: another machine, or other library versions")
    done = "complete" if report.after.complete else "not complete: run the same gstds-embed command again"
    print_table(
        [
            ("store", store),
            ("checked", f"{report.before.committed:,} of {report.before.shards:,} shards, all bytes"),
            ("made again", f"{len(report.shards):,} shards, {report.images:,} images embedded"),
            ("now", f"{len(report.after.problems)} problems, {done}"),
        ]
    )
    if as_json:
        after, before = ([str(problem) for problem in part.problems] for part in (report.after, report.before))
        print_json(
            _as_dict(report.after)
            | {
                "problems": after,
                "was_wrong": before,
                "images": report.images,
                "shards_made_again": list(report.shards),
                "changed": list(report.changed),
            }
        )
    if report.after.problems:
        click.echo("error: " + "; ".join(map(str, report.after.problems[:5])), err=True)
        ctx.exit(EXIT_INTEGRITY)
    if not report.after.complete:
        ctx.exit(EXIT_INCOMPLETE)


def _as_dict(report: VerifyReport) -> dict[str, object]:
    return vars(report) | {"problems": [str(problem) for problem in report.problems]}


main.add_command(export)
main.add_command(report)


@main.command("rm", cls=Command, help=RM_HELP)
@click.argument("store")
@click.option("--yes", is_flag=True, help="Do not ask.")
@json_option
def remove(store: str, yes: bool, as_json: bool) -> None:
    """Remove one store."""
    from gstds_cache.store.describe import summarise
    from gstds_cache.store.remove import remove_store

    summary = summarise(store)
    derived = existing_derived(Location.parse(store))
    click.echo(
        f"{summary.location}: {summary.items:,} rows of {summary.model}, {summary.size / 1e6:,.1f} MB"
        + "".join(f"\n  and {folder}" for folder in derived),
        err=True,
    )
    if not yes:
        if not sys.stdin.isatty():
            raise UsageError("rm asks before it removes, and stdin is no terminal", hint="say --yes if it is meant")
        click.confirm("Remove it for good?", abort=True, err=True)
    objects = remove_store(store)
    left = [note for place in derived if (note := _remove_derived(place))]
    click.echo(f"removed {summary.location} ({objects} objects)")
    for note in left:
        click.echo(f"note: {note}", err=True)
    if as_json:
        print_json({"store": summary.location, "objects": objects, "also": [str(folder) for folder in derived]})


def _remove_derived(place: Path) -> str:
    """Remove a folder or file derived from a store; returns why it is still there, empty where it is not."""
    try:
        if place.is_dir() and not place.is_symlink():
            shutil.rmtree(place)
        else:
            place.unlink(missing_ok=True)
    except OSError as error:
        # Nothing is at a place that this user cannot even look into.
        gone = not os.path.lexists(place)
        return "" if gone else f"not removed: {place}: {error.strerror or error}"
    return ""


if __name__ == "__main__":
    main()
