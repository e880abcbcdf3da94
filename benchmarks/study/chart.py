"""The README's chart, from the lines of ``results/glyphs.jsonl``: ``python -m benchmarks.study.chart``."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from benchmarks.study.analysis import OFTEN, Study
from benchmarks.study.lines import RESULTS, read_lines

OUT = Path(__file__).parents[2] / "docs" / "images" / "accuracy-against-cost.svg"
EPOCHS = 8
RATIOS = (0.9, 0.75, 0.5)
SERIES = (  # Okabe and Ito's colours, and a marker each
    ("random", "random share of each batch", "#D55E00", "s"),
    ("default", "selected share (default)", "#0072B2", "o"),
)


def points(study: Study, method: str, ratio: float) -> tuple[float, float, float]:
    """Core seconds, accuracy in % and its standard deviation, over seeds; embedding is not counted."""
    runs = study.of(method, ratio, EPOCHS).values()
    accuracy = 100 * np.array([line["test_accuracy"] for line in runs])
    return (
        float(np.mean([study.clock(line, OFTEN) for line in runs])),
        float(accuracy.mean()),
        float(accuracy.std(ddof=1)),
    )


def main() -> None:
    """Write the chart."""
    study = Study(tuple(read_lines(RESULTS / "glyphs.jsonl")))
    with mpl.rc_context(
        {
            "svg.fonttype": "none",
            "svg.hashsalt": "readme",
            "font.size": 10,
            "axes.spines.top": False,
            "axes.spines.right": False,
        }
    ):
        figure = Figure(figsize=(6.4, 3.4), layout="constrained", facecolor="white")
        axes = figure.subplots()
        for method, label, colour, marker in SERIES:
            seconds, mean, deviation = zip(*(points(study, method, ratio) for ratio in RATIOS), strict=True)
            axes.errorbar(seconds, mean, deviation, label=label, color=colour, marker=marker, capsize=3)
            if method == "default":
                for ratio, x, y in zip(RATIOS, seconds, mean, strict=True):
                    axes.annotate(
                        f"{1 - ratio:.0%}".replace("%", " %"), (x, y), (0, 20), textcoords="offset points", ha="center"
                    )
        x, y, deviation = points(study, "full", 0.0)
        axes.errorbar([x], [y], [deviation], label="everything", color="black", marker="D", capsize=3, linestyle="none")
        axes.set(xscale="log", xlabel="core seconds of selecting and training", ylabel="test accuracy, %")
        axes.set_xticks([10, 20, 50, 100], ["10", "20", "50", "100"])
        axes.minorticks_off()
        axes.margins(y=0.12)
        axes.legend(frameon=False, loc="lower right")
        figure.savefig(OUT, metadata={"Date": None, "Creator": None})


if __name__ == "__main__":
    main()
