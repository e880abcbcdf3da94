"""Reference losses as draws look at them: less what classes differ by.

A class that many rows are labelled with wrongly, or that is rare, has high reference losses all over, its right labels
too: the probe learned it from the same labels. As they are they say which class a row has, and a draw by them leaves
out the class. So the mean of its class is taken off each, as confident learning judges labels by thresholds of their
classes (C. Northcutt, L. Jiang, I. Chuang, J. Artif. Intell. Res. 70, 2021). Measured in docs/results.md.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Float64, Int, Int64

from gstds_cache.selection.difficulty import Difficulty, pieces


@dataclass(frozen=True, eq=False)
class ClassCentred(Difficulty):
    """Reference losses less the mean of their class, plus the mean of all: below 0 for some rows.

    Attributes:
        labels: Of every row, [N]; -1 for none.
        names: The labels of the classes that have a reference loss, ascending, int64 [C].
        shift: What is taken off the losses of each, float64 [C].
    """

    labels: Int[np.ndarray, " N"]
    names: Int64[np.ndarray, " C"]
    shift: Float64[np.ndarray, " C"]

    def of(self, rows: Int64[np.ndarray, " B"]) -> Float64[np.ndarray, " B"]:
        """The reference losses of some rows, float64 [B]; those of rows without one are the median."""
        losses: Float64[np.ndarray, " B"] = super().of(rows) - self._shift_of(self.labels[rows])
        return losses

    def all(self) -> Float32[np.ndarray, " N"]:
        """The reference losses of all rows, in memory."""
        losses: Float32[np.ndarray, " N"] = (super().all() - self._shift_of(self.labels)).astype(np.float32)
        return losses

    def _shift_of(self, labels: Int[np.ndarray, " n"]) -> Float64[np.ndarray, " n"]:
        place = np.minimum(np.searchsorted(self.names, labels), len(self.names) - 1)
        shifts: Float64[np.ndarray, " n"] = np.where(self.names[place] == labels, self.shift[place], 0.0)
        return shifts


def class_centred(losses: Difficulty, labels: Int[np.ndarray, " N"]) -> ClassCentred:
    """Take off what classes differ by.

    Args:
        losses: Reference losses; NaN for rows that have none.
        labels: Labels of all rows; one at least of a row that has a loss.

    Returns:
        The losses by class. Their mean over all rows stays what it was.
    """
    names, sums = np.empty(0, np.int64), np.empty((2, 0))  # of losses, and of rows, of each class
    for values, of in zip(pieces(losses.known), pieces(labels), strict=True):
        known = np.isfinite(values) & (of >= 0)
        here, place = np.unique(of[known], return_inverse=True)
        new = [np.bincount(place, values[known]), np.bincount(place)]
        names, place = np.unique(np.concatenate([names, here]), return_inverse=True)
        sums = np.stack([np.bincount(place, parts) for parts in np.concatenate([sums, new], axis=1)])
    losses_of, rows_of = sums
    shift = losses_of / rows_of - losses_of.sum() / rows_of.sum()
    return ClassCentred(losses.known, labels, names.astype(np.int64), shift)
