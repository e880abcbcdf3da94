"""Charts as SVG text for a page: no pixels, text that stays text, lines that follow the page's light or dark colours.

Colours are Okabe and Ito's (2008, "Color universal design"), told apart by every kind of colour vision; kept and
dropped differ in shape or side as well.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from jaxtyping import Bool, Float64, Int64
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

KEPT, DROPPED, THIRD = "#0072B2", "#D55E00", "#009E73"
INK = "#123456"  # stands for the page's text colour until the SVG is written
STYLE: Any = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    "text.parse_math": False,  # a class may be called $
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.formatter.use_mathtext": False,
    "axes.unicode_minus": True,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "hatch.color": INK,
}
SIZE = (4.7, 3.2)  # inches of 72 units: as wide as a phone, so that letters are as large as the page's


def svg(name: str, draw: Callable[[Axes], None], size: tuple[float, float] = SIZE) -> str:
    """What ``draw`` draws, as an element for an HTML page; ``name`` makes its ids unique there."""
    with warnings.catch_warnings(), mpl.rc_context(STYLE | {"svg.hashsalt": name}):
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # the reader's fonts have it
        figure = Figure(figsize=size, layout="constrained")
        draw(figure.subplots())
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    # Names are unique in a file, and have to be in a page of several.
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", text)
    text = re.sub(r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" role="img">', text, count=1)
    # Its tick marks are <use>; inline in HTML, href needs no namespace.
    return text.replace("xlink:href", "href")


def schedule(name: str, shares: Float64[np.ndarray, " n"], per_epoch: int) -> str:
    """Share of each batch that is trained on, over the run: what the schedule removes is the area above."""

    def draw(axes: Axes) -> None:
        epochs = np.arange(len(shares)) / per_epoch
        axes.fill_between(epochs, 0, 100 * shares, color=KEPT, step="post", linewidth=0, label="kept")
        axes.fill_between(
            epochs, 100 * shares, 100, color=DROPPED, alpha=0.25, step="post", linewidth=0, label="dropped"
        )
        axes.set(xlabel="epoch", ylabel="share of a batch, %", ylim=(0, 100), xlim=(0, max(epochs[-1], 1e-9)))
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)

    return svg(name, draw)


def spent(name: str, all_in: Int64[np.ndarray, " n"], kept: Int64[np.ndarray, " n"], per_epoch: int) -> str:
    """Gradients over the run, with selection and without."""

    def draw(axes: Axes) -> None:
        epochs = (np.arange(len(kept)) + 1) / per_epoch
        axes.plot(epochs, np.cumsum(all_in) / 1000, color=DROPPED, linestyle="--", label="everything")
        axes.plot(epochs, np.cumsum(kept) / 1000, color=KEPT, label="this selection")
        axes.set(xlabel="epoch", ylabel="gradients, thousand samples", ylim=(0, None), xlim=(0, None))
        axes.legend(loc="upper left")

    return svg(name, draw)


def coordinates(name: str, kept: Float64[np.ndarray, " n"], dropped: Float64[np.ndarray, " m"]) -> str:
    """Kept above the axis, dropped below it, by Fiedler coordinate."""

    def draw(axes: Axes) -> None:
        both = np.concatenate([kept, dropped])
        edges = np.linspace(both.min(), both.max() + 1e-9, 41)
        for values, sign, colour, label in ((kept, 1, KEPT, "kept"), (dropped, -1, DROPPED, "dropped")):
            counts, _ = np.histogram(values, edges)
            axes.bar(edges[:-1], sign * counts, np.diff(edges), align="edge", color=colour, label=label)
        axes.set_yscale("symlog", linthresh=10)
        axes.axhline(0, color=INK, linewidth=0.8)
        ticks = [t for t in (10, 100, 1000, 10_000, 100_000) if t <= max(10, len(both) / 2)]
        positions = [-t for t in reversed(ticks)] + [0, *ticks]
        axes.set_yticks(positions, [f"{abs(t):,}" for t in positions])
        axes.minorticks_off()
        axes.set(xlabel="Fiedler coordinate, times root of batch size", ylabel="samples (log scale)")
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)

    return svg(name, draw)


def keep_rate(name: str, place: Float64[np.ndarray, " n"], stays: Bool[np.ndarray, " n"]) -> str:
    """How much stays of each twentieth of the Fiedler order."""

    def draw(axes: Axes) -> None:
        edges = np.linspace(0, 1, 21)
        part = np.clip(np.digitize(place, edges) - 1, 0, 19)
        total = np.bincount(part, minlength=20)
        rate = np.bincount(part, stays, minlength=20) / np.maximum(total, 1)
        axes.bar(100 * edges[:-1], 100 * rate, 5, align="edge", color=KEPT, edgecolor=INK, linewidth=0.4)
        axes.axhline(100 * stays.mean(), color=DROPPED, linestyle="--", label=f"on average {stays.mean():.1%}")
        axes.set(xlabel="place along the Fiedler order, %", ylabel="kept, %", xlim=(0, 100), ylim=(0, None))
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0))

    return svg(name, draw)


def spectral_map(
    name: str,
    percentiles: Float64[np.ndarray, "B 2"],
    edges: Int64[np.ndarray, "E 2"],
    stays: Bool[np.ndarray, " B"],
) -> str:
    """A batch in its first two eigenvectors, by rank: raw coordinates put all but a few rows on one spot."""

    def draw(axes: Axes) -> None:
        axes.add_collection(LineCollection(list(percentiles[edges]), colors=INK, linewidths=0.4, alpha=0.16))
        marks = (("o", DROPPED, ~stays, "dropped", "none", 13), ("s", KEPT, stays, "kept", KEPT, 15))
        for marker, colour, which, label, face, size in marks:
            axes.scatter(
                percentiles[which, 0],
                percentiles[which, 1],
                s=size,
                marker=marker,
                facecolors=face,
                edgecolors=colour,
                linewidths=0.9,
                label=label,
            )
        axes.set(xlim=(-2, 102), ylim=(-2, 102))
        axes.set(xlabel="place along eigenvector 1 (Fiedler), %", ylabel="place along eigenvector 2, %")
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)

    return svg(name, draw, (4.7, 4.4))


def class_rates(name: str, names: Sequence[str], rates: Sequence[float], counts: Sequence[int], mean: float) -> str:
    """Keep rate of every class, the lowest last."""

    def draw(axes: Axes) -> None:
        rows = np.arange(len(names))
        axes.barh(rows, [100 * rate for rate in rates], color=KEPT, height=0.7)
        axes.axvline(100 * mean, color=DROPPED, linestyle="--", label=f"all classes {mean:.1%}")
        axes.set_yticks(rows, [f"{_short(text)} ({count:,})" for text, count in zip(names, counts, strict=True)])
        axes.tick_params(axis="y", length=0, labelsize=9)
        axes.set(xlabel="kept of the times seen, %", ylim=(-0.6, len(names) - 0.4))
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0))

    return svg(name, draw, (4.7, 1.1 + 0.2 * len(names)))


def histogram(name: str, values: Sequence[float], label: str, *, log: bool) -> str:
    """Batches by a value of each."""

    def draw(axes: Axes) -> None:
        data = np.asarray(values, dtype=np.float64)
        low, high = data.min(), data.max()
        if log and high > 1.5 * low > 0:
            edges = np.geomspace(low, high * (1 + 1e-9), 25)
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high < 50 * low else (1.0,)))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _place: f"{value:g}"))
            axes.xaxis.set_minor_formatter(NullFormatter())
        elif not log and high - low <= 60:  # whole numbers, each with a bar of its own
            edges = np.arange(low - 0.5, high + 1.5)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        else:
            margin = max(abs(low) * 0.05, 1e-12) if high <= low else 0.0
            edges = np.linspace(low - margin, high + margin, 25)
        axes.hist(data, edges.tolist(), color=THIRD, edgecolor=INK, linewidth=0.3)
        axes.set(xlabel=label, ylabel="batches")
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))

    return svg(name, draw, (4.7, 2.5))


def bars(name: str, labels: Sequence[str], counts: Sequence[int], xlabel: str) -> str:
    """Counts by name."""

    def draw(axes: Axes) -> None:
        drawn = axes.barh(range(len(labels)), counts, color=THIRD, edgecolor=INK, linewidth=0.3, height=0.6)
        axes.bar_label(drawn, labels=[f"{count:,}" for count in counts], padding=3)
        axes.set_yticks(range(len(labels)), labels)
        axes.set(xlabel=xlabel, xlim=(0, 1.15 * max(counts)), ylim=(-0.7, len(labels) - 0.3))
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))

    return svg(name, draw, (4.7, 1.0 + 0.42 * len(labels)))


def accuracy(name: str, labels: Sequence[str], costs: Sequence[float], accuracies: Sequence[float], xlabel: str) -> str:
    """Accuracy against a cost, a numbered mark per run."""

    def draw(axes: Axes) -> None:
        axes.scatter(costs, [100 * value for value in accuracies], s=210, color=KEPT, zorder=2)
        for text, cost, value in zip(labels, costs, accuracies, strict=True):
            axes.annotate(text, (cost, 100 * value), color="white", ha="center", va="center", fontsize=9, zorder=3)
        axes.grid(alpha=0.25)
        axes.margins(0.15)
        axes.set(xlabel=xlabel, ylabel="test accuracy, %")

    return svg(name, draw)


def _short(text: str, limit: int = 22) -> str:
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return text if len(text) <= limit else text[: limit - 1] + "…"
