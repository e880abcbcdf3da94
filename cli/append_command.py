"""``gstds-cache append``: a store that grows in place."""

from __future__ import annotations

import click

from gstds_cache.errors import command_line

from .common import (
    Command,
    device_option,
    json_option,
    next_selection,
    notify,
    print_json,
    print_table,
    seconds_line,
    workers_option,
)

HELP = """Embed what is new in DATASET and append it to STORE, in place.

DATASET is the grown data set, or new images alone. Items are found by their ids (for folders: class/file). One that
STORE has with the same bytes and label is passed over; one that has changed is refused by name, and nothing is done.
Images that DATASET no longer has keep their rows: leave them out of selections with `gstds-cache hide`.

Nothing that was there is touched. A kill at any point leaves the old store or the new one; the same command again goes
on. Selections made before stay what they are. Where DATASET begins with STORE's items in their order, STORE then has
the fingerprint of a store of all of DATASET, and selections from it train on DATASET; else its order is its own.

\b
Examples:
  gstds-cache append photos.store list:photos.csv
  gstds-cache append s3://bucket/photos imagefolder:new-photos
"""


@click.command("append", cls=Command, help=HELP)
@click.argument("store")
@click.argument("dataset")
@click.option("--model", help="Where the model is now. [default: where it was when STORE was made]")
@device_option
@workers_option
@json_option
def append_command(
    store: str, dataset: str, model: str | None, device: str, workers: int | None, as_json: bool
) -> None:
    """Call :func:`gstds_cache.append_to_store`, print."""
    from gstds_cache.api.append import append_to_store
    from gstds_cache.runtime.allocator import keep_freed_memory

    keep_freed_memory()
    report = append_to_store(store, dataset, model=model, device=device, workers=workers, notify=notify)
    if not report.appended:
        click.echo("nothing new: every item of the data set is in the store")
    print_table(
        [
            ("store", report.location),
            ("rows", f"{report.items_before:,} and {report.appended:,} new = {report.items:,}"),
            ("data set", f"{report.already_there:,} items were there already, {report.appended:,} are new"),
            (
                "new rows",
                f"embedded {report.embedded:,}, took {report.reused:,} over whose bytes the store has under other ids, "
                f"quarantined {report.quarantined:,}",
            ),
            ("fingerprint", f"{report.fingerprint_before[:12]} -> {report.fingerprint[:12]}"),
            ("time", seconds_line(report.seconds)),
        ]
    )
    if report.not_in_dataset:
        click.echo(
            f"{report.not_in_dataset:,} rows are of items that {dataset} does not have: they stay, and can be left out "
            f"of selections: {command_line('gstds-cache', 'hide', report.location, 'ROWS')}"
        )
    if not report.in_order:
        click.echo(
            "note: the data set does not begin with the store's items in their order; rows are in the order in which "
            "they were appended, which no data set has: gstds-train refuses selections from it. To train, "
            f"{command_line('gstds-embed', dataset)} --cache NEW --reuse {report.location}",
            err=True,
        )
    click.echo(next_selection(report.location))
    if as_json:
        print_json(report.to_dict())
