"""The README's chart, from the result lines: ``python -m benchmarks.study.chart``.

For each data set, how far a quarter of each batch is ahead of a random quarter, in points of test accuracy, with the
95 % interval over seeds: rows drawn as ``draw="auto"`` draws them there (the advice lines say how), and those that the
default rule keeps. Rare classes come as often as others there, in both: drawn in the usual order they are ahead of a
random quarter of that order by far, and far behind a random quarter of this one (docs/results.md).
"""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

from benchmarks.study.analysis import Interval, Study
from benchmarks.study.lines import RESULTS
from benchmarks.study.settings import load_setting
from benchmarks.study.tables import TAKEN, studies_of
from gstds_cache.selection.order import parse_order

OUT = Path(__file__).parents[2] / "docs" / "images" / "ahead-of-random.svg"
RATIO = 0.75
SETS = {
    "cifar10-noise30": "CIFAR-10, 30 % wrong labels",
    "glyphs-size64-noise30": "letters, 30 % wrong labels",
    "cifar10": "CIFAR-10, small network",
    "cifar10-imbalance100-balanced": "CIFAR-10, 100:1, balanced epochs",
    "glyphs-size64-imbalance100-balanced": "letters, 100:1, balanced epochs",
    "glyphs-size64": "letters",
    "glyphs-size64-doubled": "letters, half of them twice",
    "clothing14": "clothing photographs, fine-tuning",
    "flowers89": "flowers, fine-tuning",
    "openclipart": "clip art, fine-tuning",
    "digits": "1,797 digits",
}
SERIES = (("auto", 'draw="auto"', "#0072B2", "o", 0.14), ("default", "default rule", "#999999", "s", -0.14))


def advised(study: Study) -> str | None:
    """The method that ``draw="auto"`` is on a data set; None where probes were not asked."""
    for line in study.lines:
        if line["kind"] == "advice" and line["ratio"] == RATIO:
            return TAKEN.get(line["advised"] or "default", "default")
    return None


def ahead(study: Study, name: str, epochs: int) -> Interval | None:
    """How far a method is ahead of random rows; None where it was run with fewer than three seeds."""
    method = advised(study) if name == "auto" else name
    if method is None:
        return None
    if parse_order(load_setting(study.runs[0]["setting"]).order).balanced:  # the strata are the classes there
        method = method.partition("^")[0]
    found = study.difference(method, "random", RATIO, epochs)
    return found if found is not None and found.seeds >= 3 else None


def main() -> None:
    """Write the chart."""
    studies = studies_of(RESULTS)
    shown = [name for name in SETS if name in studies]
    with mpl.rc_context(
        {
            "svg.fonttype": "none",
            "svg.hashsalt": "readme",
            "font.size": 10,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.spines.left": False,
        }
    ):
        figure = Figure(figsize=(6.4, 0.42 * len(shown) + 1.0), layout="constrained", facecolor="white")
        axes = figure.subplots()
        axes.axvline(0, color="black", linewidth=0.8)
        for name, label, colour, marker, shift in SERIES:
            for place, setting in enumerate(shown):
                found = ahead(studies[setting], name, load_setting(setting).epochs)
                if found is None:
                    continue
                sides = [[found.mean - found.low], [found.high - found.mean]]
                axes.errorbar(
                    [found.mean], [-place + shift], xerr=sides, color=colour, marker=marker, capsize=2, markersize=5,
                    label=label if label not in axes.get_legend_handles_labels()[1] else None, linestyle="none",
                )  # fmt: skip
        axes.set_yticks([-place for place in range(len(shown))], [SETS[name] for name in shown])
        axes.tick_params(axis="y", length=0)
        axes.set_xscale("symlog", linthresh=2)
        axes.set_xticks([-5, -2, -1, 0, 1, 2, 5, 10], ["-5", "-2", "-1", "0", "+1", "+2", "+5", "+10"])
        axes.minorticks_off()
        axes.set_xlabel("points of test accuracy ahead of a random quarter")
        axes.legend(frameon=False, loc="center right")
        figure.savefig(OUT, metadata={"Date": None, "Creator": None})


if __name__ == "__main__":
    main()
