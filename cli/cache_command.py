"""``gstds-cache``: look at stores and check them."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import click

from gstds_cache.errors import EXIT_INCOMPLETE, EXIT_INTEGRITY, GstdsError, UsageError

from .common import Command, Group, cache_root, json_option, print_json, print_table

GROUP_HELP = """Look at embedding stores, and check them.

\b
Examples:
  gstds-cache ls
  gstds-cache info photos.store
  gstds-cache verify photos.store --level full
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

VERIFY_HELP = """Check STORE against its receipts; exit code 3 if anything is wrong, 4 if it is not complete.

\b
Example:
  gstds-cache verify photos.store --level full
"""


@click.group(cls=Group, help=GROUP_HELP)
def main() -> None:
    """Look at stores, and check them."""


@main.command("ls", cls=Command, help=LS_HELP)
@click.argument("root", type=click.Path(path_type=Path), required=False)
@json_option
def list_stores(root: Path | None, as_json: bool) -> None:
    """List stores."""
    from gstds_cache.store.describe import StoreSummary, summarise

    if root is not None and not root.is_dir():
        raise UsageError(f"no folder at {root}", hint="gstds-cache ls, without a folder, lists the default place")
    root = root or cache_root()
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
    rows = [("name", "items", "MB", "state", "model")]
    for s in summaries:
        state = "complete" if s.complete else f"{s.committed}/{s.units} units"
        rows.append((s.path.name, f"{s.items:,}", f"{s.size / 1e6:,.1f}", state, s.model))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        click.echo("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())


@main.command("info", cls=Command, help=INFO_HELP)
@click.argument("store", type=click.Path(path_type=Path))
@json_option
def show_store(store: Path, as_json: bool) -> None:
    """Show one store."""
    from gstds_cache.store.describe import summarise

    summary = summarise(store)
    if as_json:
        print_json(summary.to_dict())
        return
    done = "complete" if summary.complete else "not complete: run the same gstds-embed command again"
    print_table(
        [
            ("store", str(summary.path)),
            ("fingerprint", summary.fingerprint),
            ("state", f"{summary.committed:,} of {summary.units:,} units committed, {done}"),
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


@main.command("verify", cls=Command, help=VERIFY_HELP)
@click.argument("store", type=click.Path(path_type=Path))
@click.option(
    "--level",
    type=click.Choice(["quick", "full"]),
    default="quick",
    show_default=True,
    help="quick: sizes against receipts, and the small files; full: hash every byte.",
)
@json_option
@click.pass_context
def verify_store(ctx: click.Context, store: Path, level: Literal["quick", "full"], as_json: bool) -> None:
    """Check one store."""
    from gstds_cache.store.journal import corrupt
    from gstds_cache.store.verify import verify

    report = verify(store, level)
    hashed = f", {report.bytes_hashed / 1e6:,.1f} MB hashed" if level == "full" else ""
    click.echo(f"{store}: {level} check of {report.committed:,} of {report.units:,} units{hashed}")
    if as_json:
        print_json({**vars(report), "problems": list(report.problems)})
    if report.problems:
        click.echo(f"error: {corrupt(store, list(report.problems))}", err=True)
        ctx.exit(EXIT_INTEGRITY)
    if not report.complete:
        click.echo("no problem found; not complete: run the same gstds-embed command again", err=True)
        ctx.exit(EXIT_INCOMPLETE)
    click.echo("no problem found", err=as_json)


if __name__ == "__main__":
    main()
