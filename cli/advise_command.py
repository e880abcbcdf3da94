"""``gstds-cache advise``: is selection likely to pay on this data?"""

from __future__ import annotations

import click

from gstds_cache.config import ADVICE_EPOCHS, ADVICE_RATIOS

from .common import Command, device_option, json_option, print_json, print_table

ADVISE_HELP = """Say whether selection is likely to pay on the data of STORE, before anything is trained.

Linear probes learn from the cached embeddings of up to 16,384 rows: from all of them, and from as many as stay at each
filter ratio, drawn at random and in other ways; they are judged on rows that they never saw. STORE needs labels. The
probes tell the sign of a difference, not its size; how they agreed with networks stands in docs/results.md.

\b
Example:
  gstds-cache advise photos.store
"""


@click.command("advise", cls=Command, help=ADVISE_HELP)
@click.argument("store")
@click.option(
    "--ratio",
    "ratios",
    type=float,
    multiple=True,
    default=ADVICE_RATIOS,
    show_default=True,
    help="Share of each epoch that is left out; may be given several times.",
)
@click.option(
    "--epochs",
    type=click.IntRange(min=1),
    default=ADVICE_EPOCHS,
    show_default=True,
    help="Passes over the data set that the run would make.",
)
@device_option
@click.option("--threads", type=click.IntRange(min=0), default=0, show_default=True, help="CPU threads; 0 for all.")
@json_option
def advise(store: str, ratios: tuple[float, ...], epochs: int, device: str, threads: int, as_json: bool) -> None:
    """Call :func:`gstds_cache.advise`, print."""
    from gstds_cache.api.advise import advise as ask
    from gstds_cache.api.advise import table

    advice = ask(store, ratios=ratios, epochs=epochs, device=device, threads=threads)
    rows = table(advice)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        click.echo("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())
    print_table(
        [
            ("linear probe", f"right on {advice.probe_accuracy:.1%} of held-out rows, {advice.classes:,} classes"),
            ("advice", advice.verdict),
            *(("note", note) for note in advice.notes),
            ("cost", advice.cost),
        ]
    )
    click.echo(f"next: {advice.command}")
    if as_json:
        print_json(advice.to_dict())
