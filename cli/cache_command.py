"""``gstds-cache``: list, describe, verify, repair, import, export and remove stores; advise on them, audit them."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from gstds_cache.config import CHECK_LEVEL, SAMPLE_ROWS, SAMPLE_SEED
from gstds_cache.errors import EXIT_INCOMPLETE, EXIT_INTEGRITY, UsageError, command_line

from .advise_command import advise
from .append_command import append_command
from .audit_command import audit
from .common import (
    Command,
    Group,
    LocalPath,
    device_option,
    json_option,
    print_json,
    print_table,
    shown,
    workers_option,
)
from .hide_command import hidden_command, hide_command, unhide_command
from .import_command import import_command
from .report_command import export, report

if TYPE_CHECKING:
    from gstds_cache.store.describe import StoreSummary

GROUP_HELP = """List, describe, verify, repair, import, append to, hide rows of, export and remove stores.

STORE is a directory or s3://bucket/prefix.

\b
Examples:
  gstds-cache ls
  gstds-cache info photos.store
  gstds-cache advise photos.store
  gstds-cache audit photos.store
  gstds-cache verify photos.store --level full
  gstds-cache repair photos.store
  gstds-cache import vectors.npy --labels labels.txt --out vectors.store
  gstds-cache append photos.store imagefolder:photos
  gstds-cache hide photos.store 3,17,100-199
  gstds-cache export photos.store photos.parquet
  gstds-cache rm photos.store
"""

LS_HELP = """List the stores in FOLDER (default: $GSTDS_CACHE, or ~/.cache/gstds-cache).

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


NOT_COMPLETE = "not complete: run the same gstds-embed command again"
DATASET = click.option("--dataset", help="Where the data set is now. [default: where it was when STORE was made]")
MODEL = click.option("--model", help="Where the model is now. [default: where it was when STORE was made]")


@main.command("ls", cls=Command, help=LS_HELP)
@click.argument("folder", type=LocalPath(), required=False)
@json_option
def list_command(folder: Path | None, as_json: bool) -> None:
    """Call :func:`gstds_cache.list_stores`, print."""
    from gstds_cache.api.cache import list_stores

    found = list_stores(folder)
    for name, problem in found.damaged.items():
        click.echo(shown(f"{name}: {problem}"), err=True)
    if as_json:
        print_json(found.to_dict())
        return
    if not found.stores:
        click.echo(f"no stores in {found.folder}; make one with: gstds-embed digits")
        click.echo("stores made with --cache lie elsewhere: gstds-cache ls FOLDER")
        return
    rows = [("name", "rows", "MB", "state", "model", "data set", "last used")]
    for s in found.stores:
        state = "complete" if s.complete else f"{s.committed}/{s.shards} shards"
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(s.last_used)) if s.last_used else "-"
        dataset = str(s.provenance.get("dataset", s.kind))
        rows.append((Path(s.location).name, _rows_text(s), f"{s.size / 1e6:,.1f}", state, s.model, dataset, used))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        click.echo("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())


def _rows_text(summary: StoreSummary) -> str:
    return f"{summary.items:,}" + (f" ({summary.hidden:,} hidden)" if summary.hidden else "")


@main.command("info", cls=Command, help=INFO_HELP)
@click.argument("store")
@json_option
def describe_command(store: str, as_json: bool) -> None:
    """Call :func:`gstds_cache.describe_store`, print."""
    from gstds_cache.api.cache import describe_store

    summary = describe_store(store)
    if as_json:
        print_json(summary.to_dict())
        return
    print_table(
        [
            ("store", summary.location),
            ("fingerprint", summary.fingerprint),
            (
                "state",
                f"{summary.committed:,} of {summary.shards:,} shards committed, "
                + ("complete" if summary.complete else NOT_COMPLETE),
            ),
            (
                "items",
                f"{summary.items:,}, {len(summary.quarantined):,} of them quarantined"
                + ("" if summary.complete else " so far")
                + (f", {summary.hidden:,} hidden from selections" if summary.hidden else "")
                + (f", {summary.appended:,} appended" if summary.appended else ""),
            ),
            ("embeddings", f"[{summary.items}, {summary.dim}] {summary.dtype}, {summary.size / 1e6:,.1f} MB on disk"),
            ("data set", f"{summary.kind}, {summary.classes:,} classes, root {summary.items_root[:12]}"),
            *((f"model.{name}", str(value)) for name, value in summary.encoder.items()),
            *((f"made with {name}", str(value)) for name, value in summary.provenance.items()),
        ]
    )
    for item in summary.quarantined[:20]:
        click.echo(shown(f"quarantined row {item.row}: {item.id}: {item.reason}"))
    if len(summary.quarantined) > 20:
        click.echo(f"... and {len(summary.quarantined) - 20} more; see --json")


@main.command("verify", cls=Command, help=VERIFY_HELP)
@click.argument("store")
@click.option("--level", type=click.Choice(["quick", "full", "sample"]), default=CHECK_LEVEL, show_default=True)
@click.option(
    "--rows", type=click.IntRange(min=1), default=SAMPLE_ROWS, show_default=True, help="Rows that sample compares."
)
@click.option(
    "--seed", type=click.IntRange(min=0), default=SAMPLE_SEED, show_default=True, help="Which rows sample compares."
)
@DATASET
@MODEL
@device_option
@json_option
@click.pass_context
def verify_command(
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
    """Call :func:`gstds_cache.verify_store`, print."""
    from gstds_cache.api.cache import verify_store

    report = verify_store(store, level=level, rows=rows, seed=seed, dataset=dataset, model=model, device=device)
    hashed = f", {report.bytes_hashed / 1e6:,.1f} MB hashed" if level == "full" else ""
    click.echo(f"{store}: {level} check of {report.committed:,} of {report.shards:,} shards{hashed}")
    if report.hidden:
        click.echo(f"{report.hidden:,} rows are hidden from selections")
    if report.cosine_min is not None:
        click.echo(f"{len(report.sampled):,} rows embedded again: smallest cosine {report.cosine_min:.7f}")
    if as_json:
        print_json(report.to_dict())
    if report.problems:
        click.echo(shown(f"error: {report.error}"), err=True)
        if report.cosine_min is not None:
            # These bytes are the committed ones, so that a hash does not tell them from good ones.
            words = [word for shard in report.bad_shards for word in ("--shard", shard)]
            click.echo(f"  (their hashes are right: {command_line('gstds-cache', 'repair', store, *words)})", err=True)
        ctx.exit(EXIT_INTEGRITY)
    if not report.complete:
        click.echo(f"no problem found; {NOT_COMPLETE}", err=True)
        ctx.exit(EXIT_INCOMPLETE)
    click.echo("no problem found", err=as_json)


@main.command("repair", cls=Command, help=REPAIR_HELP, renamed={"--unit": "--shard"})
@click.argument("store")
@DATASET
@MODEL
@click.option("--shard", "shards", type=int, multiple=True, help="Make this shard again as well, whatever its hash.")
@device_option
@workers_option
@json_option
@click.pass_context
def repair_command(
    ctx: click.Context,
    store: str,
    dataset: str | None,
    model: str | None,
    shards: tuple[int, ...],
    device: str,
    workers: int | None,
    as_json: bool,
) -> None:
    """Call :func:`gstds_cache.repair_store`, print."""
    from gstds_cache.api.repair import repair_store
    from gstds_cache.runtime.allocator import keep_freed_memory

    keep_freed_memory()
    report = repair_store(store, shards=shards, dataset=dataset, model=model, device=device, workers=workers)
    for problem in report.before.problems[:20]:
        click.echo(shown(f"was wrong: {problem}"))
    for shard in report.changed:
        click.echo(
            f"note: shard {shard} has other bits now than before: another machine, other library versions, or what the "
            "file of a model of your own imports"
        )
    print_table(
        [
            ("store", store),
            ("checked", f"{report.before.committed:,} of {report.before.shards:,} shards, all bytes"),
            ("repaired", f"{len(report.shards):,} shards, {report.images:,} images embedded"),
            ("now", f"{len(report.after.problems)} problems, {'complete' if report.after.complete else NOT_COMPLETE}"),
        ]
    )
    if as_json:
        print_json(report.to_dict())
    if report.after.problems:
        click.echo(shown("error: " + "; ".join(map(str, report.after.problems[:5]))), err=True)
        ctx.exit(EXIT_INTEGRITY)
    if not report.after.complete:
        ctx.exit(EXIT_INCOMPLETE)


main.add_command(advise)
main.add_command(audit)
main.add_command(import_command)
main.add_command(append_command)
for hiding in (hide_command, unhide_command, hidden_command):
    main.add_command(hiding)
main.add_command(export)
main.add_command(report)


@main.command("rm", cls=Command, help=RM_HELP)
@click.argument("store")
@click.option("--yes", is_flag=True, help="Do not ask.")
@json_option
def remove_command(store: str, yes: bool, as_json: bool) -> None:
    """Call :func:`gstds_cache.remove_store` after a question, print."""
    from gstds_cache.api.cache import describe_store, list_derived, remove_store

    summary = describe_store(store)
    click.echo(
        f"{summary.location}: {summary.items:,} rows of {summary.model}, {summary.size / 1e6:,.1f} MB"
        + "".join(f"\n  and {path}" for path in list_derived(store)),
        err=True,
    )
    if not yes:
        if not sys.stdin.isatty():
            raise UsageError(
                "stdin is not a terminal, so rm cannot ask for confirmation", hint="add --yes to remove without asking"
            )
        click.confirm("Remove it for good?", abort=True, err=True)
    removed = remove_store(store)
    click.echo(f"removed {removed.store} ({removed.objects} objects)")
    for note in removed.remaining:
        click.echo(f"note: {note}", err=True)
    if as_json:
        print_json(removed.to_dict())


if __name__ == "__main__":
    main()
