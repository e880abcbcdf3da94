"""Give each method of a setting the learning rate that was best for it on validation data.

    python -m benchmarks.study cifar10-validation --methods random,infobatch --lrs 0.2,0.4,0.8 --seeds 1
    python -m benchmarks.study.tune cifar10-validation --into cifar10

Every method gets the same rates tried, or this ends with an error. A method that was not tried keeps the setting's own.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Collection, Iterable
from pathlib import Path

import numpy as np

from benchmarks.study.analysis import Line
from benchmarks.study.lines import RESULTS, read_lines
from benchmarks.study.settings import FOLDER, load_setting, names
from gstds_cache.errors import GstdsError, UsageError

Tried = dict[str, dict[float, float]]
"""Mean accuracy by method and learning rate."""


def tried(lines: Iterable[Line], epochs: int, methods: Collection[str] = ()) -> Tried:
    """What each method reached in ``epochs`` with each learning rate; methods with one rate alone are left out.

    Args:
        lines: Result lines.
        epochs: Of the runs that count.
        methods: Those that count; all where none is named.

    Raises:
        UsageError: Methods had different rates, or one had fewer seeds than another.
    """
    runs = [line for line in lines if line["kind"] == "run" and "lr" in line]
    found: dict[str, dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for line in runs:
        if line["epochs"] == epochs and (not methods or line["method"] in methods):
            found[line["method"]][line["lr"]].append(line["test_accuracy"])
    searched = {method: rates for method, rates in found.items() if len(rates) > 1}
    counts = {tuple(sorted((rate, len(values)) for rate, values in rates.items())) for rates in searched.values()}
    if len(counts) > 1:
        raise UsageError(f"not the same learning rates and seeds for every method: {sorted(counts)}")
    return {
        method: {rate: float(np.mean(values)) for rate, values in sorted(rates.items())}
        for method, rates in searched.items()
    }


def best(rates: dict[float, float]) -> float:
    """The rate of the highest accuracy; of equal ones the lowest."""
    return min(rates, key=lambda rate: (-rates[rate], rate))


def main(argv: list[str] | None = None) -> int:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("validation", metavar="SETTING", choices=names())
    made.add_argument("--into", required=True, nargs="+", choices=names(), help="settings that get the rates")
    made.add_argument("--epochs", type=int, help="of the runs that count; default: the setting's")
    made.add_argument("--methods", default="", help="comma between; default: all that were tried")
    made.add_argument("--results", type=Path, default=RESULTS)
    arguments = made.parse_args(argv)
    try:
        rates = tried(
            read_lines(arguments.results / f"{arguments.validation}.jsonl"),
            arguments.epochs or load_setting(arguments.validation).epochs,
            arguments.methods.split(",") if arguments.methods else (),
        )
    except GstdsError as error:
        print(f"error: {error.message}", file=sys.stderr)
        return error.exit_code
    for method, accuracy in sorted(rates.items()):
        print(method, ", ".join(f"{rate:g}: {value:.2%}" for rate, value in accuracy.items()), f"-> {best(accuracy):g}")
    for name in arguments.into:
        path = FOLDER / f"{name}.json"
        fields = json.loads(path.read_text())
        fields["lrs"] = dict(sorted((fields.get("lrs", {}) | {m: best(r) for m, r in rates.items()}).items()))
        lines = [f" {json.dumps(key)}: {json.dumps(value)}" for key, value in fields.items()]
        path.write_text("{\n" + ",\n".join(lines) + "\n}\n")
        load_setting(name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
