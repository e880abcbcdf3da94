"""``gstds-cache audit``: what a store's embeddings say of its data set."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gstds_cache.config import AUDIT_FOLDER, AuditConfig

from .common import Command, F, LocalPath, engine_option, json_option, notify, print_json, print_table, setting_option

if TYPE_CHECKING:
    from gstds_cache.api.audit import AuditReport

AUDIT_HELP = """Look through STORE for near-duplicates, labels in doubt and outliers; with --against for leaks.

Writes tables (Parquet, a row each with its id) and one page of pictures to the folder --out: duplicates, outliers,
labels and their counts where rows have labels, leaks. Nothing in STORE changes. The page needs:
pip install 'gstds-cache[report]'

\b
Examples:
  gstds-cache audit photos.store
  gstds-cache audit train.store --against test.store --out leaks
  gstds-cache audit photos.store --threshold 0.9 --no-page
"""


def setting(name: str, text: str | None = None, **attributes: Any) -> Callable[[F], F]:
    """The option of a setting, by what its configuration says of it."""
    return setting_option(AuditConfig, name, help=text, **attributes)


@click.command("audit", cls=Command, help=AUDIT_HELP)
@click.argument("store")
@click.option("--against", metavar="OTHER_STORE", help="Another store of the same model, e.g. of the test set.")
@click.option("--out", type=LocalPath(), default=Path(AUDIT_FOLDER), show_default=True, help="Folder for the files.")
@setting(
    "threshold", "Cosine from which on two rows are near-duplicates; the page shows pairs just above and below it."
)
@setting("knn", "Nearest rows that are looked for of each row.")
@setting("folds", "Parts whose labels a probe of the others judges.")
@setting("rank", "What doubted labels are ranked by.")
@setting("flipped", "Share of the labels flipped on purpose, to measure how many are found; 0 measures nothing.")
@setting("shown", "Images of each part of the page.")
@setting("exact_rows", "Rows up to which every row is compared with every other; more are put into cells first.")
@setting("seed")
@setting("device", "auto, cpu, cuda or cuda:N.", metavar="DEVICE")
@setting("threads", "CPU threads to use; 0 for all there are.")
@click.option("--dataset", help="Where the data set is now. [default: where it was when STORE was made]")
@click.option("--against-dataset", help="Where the data set of OTHER_STORE is now.")
@click.option("--page/--no-page", default=True, help="Whether to make the page of pictures.")
@click.option("--force", "replace", is_flag=True, help="Replace the files of an earlier audit.")
@engine_option
@json_option
def audit(store: str, as_json: bool, **options: Any) -> None:
    """Call :func:`gstds_cache.audit`, print."""
    from gstds_cache.api.audit import audit as run_audit
    from gstds_cache.runtime.allocator import keep_freed_memory

    keep_freed_memory()
    try:
        found = run_audit(store, notify=notify, **options)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("the same command again begins anew: an audit keeps nothing half done") from None
    _print(found)
    for line in found.missing:
        notify(f"note: left out: {line}")
    if as_json:
        print_json(found.to_dict())


def _print(found: AuditReport) -> None:
    test = found.flip_test
    compared = "every row with every other" if found.exact else "rows of the nearest cells"
    rows = [
        ("rows", f"{found.rows:,}, compared: {compared}"),
        ("near-duplicates", f"{found.groups:,} groups of {found.grouped:,} rows; {found.spare:,} could go"),
    ]
    if found.leaks is not None:
        rows.append(("leaks", f"{found.leaks:,} pairs; {found.leaked:,} rows of the other store are in one"))
    if found.no_doubts:
        rows.append(("labels", f"not judged: {found.no_doubts}"))
    else:
        rows.append(("labels", f"{found.doubted:,} of {found.labelled:,} doubted"))
    if test is not None:
        rows.append(
            (
                "of flipped labels",
                f"{test.flipped:,} flipped on purpose: {test.recall:.1%} doubted, {test.precision:.1%} of the first "
                f"{test.flipped:,}; of the {test.left:,} others {test.false_positive_rate:.1%} doubted",
            )
        )
    print_table([*rows, ("time", f"{found.seconds:,.1f} s")])
    for file in found.files:
        click.echo(f"wrote: {file}")
