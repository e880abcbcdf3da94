"""Charts of an audit's page."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float32
from matplotlib.axes import Axes

from gstds_cache.report.charts import DROPPED, INK, KEPT, svg


def cosines(name: str, values: Float32[np.ndarray, " M"], xlabel: str, threshold: float | None = None) -> str:
    """How many rows have each cosine, on a log scale; those from the threshold on in another colour."""

    def draw(axes: Axes) -> None:
        low = min(float(values.min()), 1.0 if threshold is None else threshold)
        edges = np.linspace(low, max(1.0, float(values.max())) if threshold is not None else float(values.max()), 51)
        if edges[-1] <= edges[0]:
            edges = np.linspace(edges[0] - 0.01, edges[0] + 0.01, 51)
        below = values if threshold is None else values[values < threshold]
        axes.hist(below, edges.tolist(), color=KEPT, edgecolor=INK, linewidth=0.3, label="below the threshold")
        if threshold is not None:
            above = values[values >= threshold]
            axes.hist(above, edges.tolist(), color=DROPPED, edgecolor=INK, linewidth=0.3, label="near-duplicates")
            axes.axvline(threshold, color=INK, linestyle="--", linewidth=0.9)
            axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
        axes.set_yscale("symlog", linthresh=1)
        axes.set_ylim(0, None)
        ticks = [tick for tick in (0, 1, 10, 100, 1000, 10_000, 100_000, 1_000_000) if tick <= max(1, len(values))]
        axes.set_yticks(ticks, [f"{tick:,}" for tick in ticks])
        axes.minorticks_off()
        axes.set(xlabel=xlabel, ylabel="rows (log scale)")

    return svg(name, draw, (4.7, 2.8))
