"""Reference losses relative to those of their class, for draws that are to look at them so.

A class whose rows are often labelled as another, or that is rare, has high reference losses on its right labels, too:
the probe learned from the same labels. A draw by them as they are leaves such a class out. Confident learning meets the
same with a threshold for each class, the mean probability that its rows have of their own label (C. Northcutt, L.
Jiang, I. Chuang, J. Artif. Intell. Res. 70, 2021). So here a row's loss is that of its probability relative to its
class's threshold. Measured in docs/results.md, "Labels of one class for another".
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Float64, Int, Int64

from gstds_cache.selection.difficulty import Difficulty, pieces


@dataclass(frozen=True, eq=False)
class ByClass(Difficulty):
    """Reference losses, each less a number of its class, and not below 0.

    Below 0 a draw that subtracts them would find something to learn in rows that the network has learned.

    Attributes:
        labels: Of every row, [N]; -1 for none.
        names: The labels of the classes that have a reference loss, ascending, int64 [C].
        shift: What is taken off the losses of each, float64 [C].
    """

    labels: Int[np.ndarray, " N"]
    names: Int64[np.ndarray, " C"]
    shift: Float64[np.ndarray, " C"]

    def of(self, rows: Int64[np.ndarray, " B"]) -> Float64[np.ndarray, " B"]:
        """The reference losses of some rows, float64 [B]; of rows without a label the median of all, as they are."""
        labels = self.labels[rows]
        place = np.minimum(np.searchsorted(self.names, labels), len(self.names) - 1)
        shift = np.where(self.names[place] == labels, self.shift[place], 0.0)
        losses: Float64[np.ndarray, " B"] = np.maximum(super().of(rows) - shift, 0.0)
        return losses

    def all(self) -> Float32[np.ndarray, " N"]:
        """The reference losses of all rows, in memory."""
        return self.of(np.arange(len(self.known))).astype(np.float32)


def by_class(losses: Difficulty, labels: Int[np.ndarray, " N"]) -> ByClass:
    """Reference losses relative to their class.

    Args:
        losses: Reference losses, cross-entropies in nats; NaN for rows that have none.
        labels: Labels of all rows; one at least of a row that has a loss.

    Returns:
        The losses, each less -log of its class's threshold, which is the mean of exp(-loss) over the class; plus what
        leaves the mean over the labelled rows as it was, for all rows alike; and 0 where that is below 0.
    """
    names, sums = np.empty(0, np.int64), np.empty((2, 0))  # of probabilities, and of rows, of each class
    for values, of in zip(pieces(losses.known), pieces(labels), strict=True):
        known = np.isfinite(values) & (of >= 0)
        here, place = np.unique(of[known], return_inverse=True)
        new = [np.bincount(place, np.exp(-values[known].astype(np.float64))), np.bincount(place)]
        names, place = np.unique(np.concatenate([names, here]), return_inverse=True)
        sums = np.stack([np.bincount(place, parts) for parts in np.concatenate([sums, new], axis=1)])
    probabilities, rows = sums
    shift = -np.log(np.maximum(probabilities / rows, np.finfo(np.float64).tiny))
    return ByClass(losses.known, labels, names.astype(np.int64), shift - np.average(shift, weights=rows))
