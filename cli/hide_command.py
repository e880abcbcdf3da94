"""``gstds-cache hide``, ``unhide`` and ``hidden``: rows that no selection takes."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import click

from gstds_cache.errors import UsageError

from .common import Command, json_option, print_json

if TYPE_CHECKING:
    from gstds_cache.api.hide import HiddenList

HIDE_HELP = """Leave rows of STORE out of selections that are made from now on. No byte of the store's rows changes.

ROWS are row numbers and ranges, with commas: 3,17,100-199 (to 199 inclusive). Hidden rows are a part of a selection's
identity: the same gstds-select command then makes another selection. Selections that exist stay what they are.

\b
Examples:
  gstds-cache hide photos.store 3,17,100-199
  gstds-cache hide photos.store --ids blurred.txt
"""

UNHIDE_HELP = """Take hidden rows of STORE into selections again; without ROWS and --ids all of them.

\b
Examples:
  gstds-cache unhide photos.store 17
  gstds-cache unhide photos.store
"""

HIDDEN_HELP = """List the rows of STORE that no selection takes, a row and its id a line.

\b
Example:
  gstds-cache hidden photos.store
"""

IDS = click.option(
    "--ids", metavar="FILE", help="Ids: .txt (a line each), .npy, or .parquet or .arrow with ?column=NAME."
)
ROWS = click.argument("rows", required=False)


def _parsed(store: str, rows: str | None) -> list[int] | None:
    """Row numbers and ranges, of rows that the store has.

    Raises:
        UsageError: The text is something else, or names other rows.
    """
    if rows is None:
        return None
    from gstds_cache.api.cache import describe_store

    items, found = describe_store(store).items, list[int]()
    for part in rows.split(","):
        match = re.fullmatch(r"\s*(\d{1,18})(?:-(\d{1,18}))?\s*", part)
        if match is None or (match[2] and int(match[2]) < int(match[1])):
            raise UsageError(f"ROWS: got {part!r:.80}, expected row numbers and ranges with commas, like 3,17,100-199")
        first, last = int(match[1]), int(match[2] or match[1])
        if last >= items:
            raise UsageError(f"ROWS: got {part!r:.80}, expected 0 to {items - 1}, the rows of {store}")
        found += range(first, last + 1)
    return found


@click.command("hide", cls=Command, help=HIDE_HELP)
@click.argument("store")
@ROWS
@IDS
@json_option
def hide_command(store: str, rows: str | None, ids: str | None, as_json: bool) -> None:
    """Call :func:`gstds_cache.hide_rows`, print."""
    from gstds_cache.api.hide import hide_rows

    _print(hide_rows(store, _parsed(store, rows), ids=ids), "hid", as_json)


@click.command("unhide", cls=Command, help=UNHIDE_HELP)
@click.argument("store")
@ROWS
@IDS
@json_option
def unhide_command(store: str, rows: str | None, ids: str | None, as_json: bool) -> None:
    """Call :func:`gstds_cache.unhide_rows`, print."""
    from gstds_cache.api.hide import unhide_rows

    _print(unhide_rows(store, _parsed(store, rows), ids=ids), "showed", as_json)


@click.command("hidden", cls=Command, help=HIDDEN_HELP)
@click.argument("store")
@json_option
def hidden_command(store: str, as_json: bool) -> None:
    """Call :func:`gstds_cache.list_hidden`, print."""
    from gstds_cache.api.hide import list_hidden

    found = list_hidden(store)
    for row, name in zip(found.rows, found.ids, strict=True):
        click.echo(f"{row}\t{name}")
    click.echo(f"{len(found.rows):,} of {found.items:,} rows of {found.location} are hidden", err=True)
    if as_json:
        print_json(found.to_dict())


def _print(found: HiddenList, done: str, as_json: bool) -> None:
    left = found.items - len(found.rows)
    click.echo(f"{done} {found.changed:,} rows of {found.location}; {len(found.rows):,} are hidden, {left:,} are left")
    if as_json:
        print_json(found.to_dict())
