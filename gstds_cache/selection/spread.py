"""Rules that keep points far from each other in several eigenvectors at once."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float64, Int64

from gstds_cache.errors import UsageError
from gstds_cache.graph.compiled import compiled
from gstds_cache.selection.rule import RuleBatch

FLOOR = 0.05  # of the batch's mean difficulty: what the easiest row counts, so that none is impossible


def coordinates(batch: RuleBatch) -> Float64[np.ndarray, "B Q"]:
    """Eigenvectors scaled by 1/sqrt(eigenvalue): distances between these are those of a random walk's commute time.

    (With all eigenvectors they would be exactly that: F. Fouss et al., Random-walk computation of similarities between
    nodes of a graph, IEEE TKDE 19 (2007).) Within a repeated eigenvalue, where eigenvectors are any basis of a space,
    distances do not depend on which.

    Raises:
        UsageError: The batch has no eigenvectors.
    """
    if batch.basis is None or batch.values is None:
        raise UsageError("this rule looks at eigenvectors, and the batch has none")
    scale = np.sqrt(np.maximum(batch.values, np.finfo(np.float64).tiny))
    return np.ascontiguousarray(batch.basis / scale)


def weights(batch: RuleBatch) -> Float64[np.ndarray, " B"]:
    """How much each row counts, float64 [B] > 0: its difficulty, and a little for all.

    Raises:
        UsageError: The batch has no guidance.
    """
    if batch.guidance is None:
        raise UsageError("this rule looks at guidance, and the batch has none")
    mean = float(batch.guidance.mean())
    return batch.guidance + FLOOR * mean if mean > 0 else np.ones(len(batch))


@compiled()
def farthest_points(
    points: Float64[np.ndarray, "B Q"], weight: Float64[np.ndarray, " B"], chosen: Int64[np.ndarray, " M"]
) -> None:
    """Greedy farthest points: each next one has the largest weight times distance to the nearest one chosen before.

    The first is farthest from the origin, by the same measure. Of equals the first in the batch is taken.
    (T. F. Gonzalez, Clustering to minimize the maximum intercluster distance, Theor. Comput. Sci. 38 (1985).)

    Args:
        points: Coordinates, ``[B, Q]``.
        weight: What distances are multiplied with, ``[B]``, > 0.
        chosen: Where the M positions go, in the order of choice.
    """
    rows, dims = points.shape
    nearest = np.empty(rows)
    for i in range(rows):
        total = 0.0
        for q in range(dims):
            total += points[i, q] * points[i, q]
        nearest[i] = total
    for m in range(len(chosen)):
        best, most = -1, -1.0
        for i in range(rows):
            # Negative for those that are chosen.
            value = nearest[i] * weight[i] * weight[i]
            if value > most:
                best, most = i, value
        chosen[m] = best
        for i in range(rows):
            total = 0.0
            for q in range(dims):
                step = points[i, q] - points[best, q]
                total += step * step
            if m == 0 or total < nearest[i]:
                nearest[i] = total if nearest[i] >= 0 else nearest[i]
        nearest[best] = -np.inf


def _farthest(batch: RuleBatch, weight: Float64[np.ndarray, " B"]) -> Int64[np.ndarray, " M"]:
    chosen = np.empty(batch.keep, np.int64)
    farthest_points(coordinates(batch), weight, chosen)
    return np.sort(chosen)


def spread(batch: RuleBatch) -> Int64[np.ndarray, " M"]:
    """Farthest points: each next row is the one farthest from all that were taken, beginning far from the middle."""
    return _farthest(batch, np.ones(len(batch)))


def spread_guided(batch: RuleBatch) -> Int64[np.ndarray, " M"]:
    """Farthest points, where distances count in proportion to a row's difficulty."""
    return _farthest(batch, weights(batch))
