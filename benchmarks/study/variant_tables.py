"""The table of variants of the draw, from its result lines into docs/results.md, between markers.

python -m benchmarks.study.variant_tables            # write it
python -m benchmarks.study.variant_tables --check    # exit code 1 if the document says something else
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.study.document import DOCS, write_or_check
from benchmarks.study.lines import RESULTS, read_lines
from benchmarks.study.tables import table
from benchmarks.study.variants import PREFIX

DOCUMENT = DOCS / "results.md"
BEGIN, END = "<!-- variants:begin (python -m benchmarks.study.variant_tables) -->", "<!-- variants:end -->"
FOLDER = RESULTS / "variants"
SETTING = "cifar10-validation"
PLAIN = "form=subtract"
DEFAULTS = {PLAIN, "strata=8", "impute=both", ""}
BEFORE = "impute=none"  # the default once; variants that were run again without it are shown as they are now
OWN = {"random": "form=uniform+strata=1", "draw:uniform": "form=uniform", "draw:loss": "form=loss"}
OWN |= {"draw:loss-minus-reference": PLAIN, "draw:damped-loss": "form=damped"}
LIKE = {"strata=1", BEFORE}  # what a variant is compared with has these, where it has
Cell = dict[tuple[int, str], float]
"""Accuracy in % by seed and processor: on another one the same seed is another run, as sums are rounded otherwise."""


def key_of(line: dict[str, Any]) -> str:
    """A line's method as a variant, with its strata: ``draw:loss^32`` is ``form=loss+strata=32``."""
    if line["kind"] == "screen":
        return _sorted({*line["variant"].split("+"), "strata=1"})
    name, _, guidance = line["method"].removeprefix(PREFIX).partition("/")
    name, _, strata = name.partition("^")
    given = {"strata": strata, "guidance": guidance}
    return _sorted({*OWN.get(name, name).split("+"), *(f"{key}={value}" for key, value in given.items() if value)})


def _sorted(parts: set[str]) -> str:
    return "+".join(sorted(parts - DEFAULTS)) or PLAIN


def cells(results: Path = FOLDER) -> dict[tuple[str, float], dict[str, Cell]]:
    """Accuracies at r = 0.75, by file and learning rate, then by variant and seed."""
    found: dict[tuple[str, float], dict[str, Cell]] = {}
    for path in sorted(results.glob(f"{SETTING}*.jsonl")):
        for line in read_lines(path):
            if line["kind"] == "screen" or (line["kind"] == "run" and line["ratio"] == 0.75):
                column = found.setdefault((path.stem, line["lr"]), {})
                column.setdefault(key_of(line), {})[line["seed"], line.get("cpu", "")] = 100 * line["test_accuracy"]
    return found


def shown(cell: Cell | None, baseline: Cell | None) -> str:
    """Mean, its difference from the baseline's on the same seeds and processor with a standard error, and the runs."""
    if not cell:
        return ""
    text = f"{np.mean(list(cell.values())):.2f}"
    both = sorted(cell.keys() & (baseline or {}).keys())
    if baseline is not None and both and cell is not baseline:
        differences = [cell[run] - (baseline or {})[run] for run in both]
        error = f" ± {np.std(differences, ddof=1) / len(both) ** 0.5:.2f}" if len(both) > 1 else ""
        text += f" ({np.mean(differences):+.2f}{error})"
    return f"{text}, {len(cell)}"


def render(results: Path = FOLDER) -> str:
    """The text between the markers."""
    found = cells(results)
    columns = sorted(found)
    rows = []
    names = {name for column in found.values() for name in column}
    again = {_sorted({*name.split("+"), BEFORE}) for name in names if BEFORE not in name} - {BEFORE}
    for name in sorted(names - again):
        row = [f"`{name}`"]
        for column in columns:
            like, made = LIKE & {*name.split("+")}, found[column]
            row.append(shown(made.get(name), made.get(_sorted(like)) or made.get(_sorted(like | {BEFORE}))))
        rows.append(row)
    return table(["variant", *(f"{stem}, rate {lr:g}" for stem, lr in columns)], rows)


def main() -> int:
    return write_or_check(__doc__, DOCUMENT, render, BEGIN, END)


if __name__ == "__main__":
    sys.exit(main())
