"""Rules that part a batch into as many pieces as rows stay, and draw one of each, by difficulty."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float64, Int64

from gstds_cache.graph.compiled import compiled
from gstds_cache.selection.rule import RuleBatch
from gstds_cache.selection.spread import coordinates, weights


def _draw(batch: RuleBatch, power: float = 1.0) -> Float64[np.ndarray, " B"]:
    """A number for each row, of which the largest of any set of rows is a draw from it in proportion to weight^power.

    (The Gumbel-max trick: power log w + Gumbel noise.)
    """
    return np.asarray(power * np.log(weights(batch)) + batch.rng.gumbel(size=len(batch)), np.float64)


def strata(batch: RuleBatch) -> Int64[np.ndarray, " M"]:
    """One row of each of ``keep`` equal stretches of the Fiedler order, drawn in proportion to difficulty."""
    order = np.argsort(batch.vector, kind="stable")
    bounds = (np.arange(batch.keep + 1) * len(batch)) // batch.keep
    return np.sort(_winners(order, bounds, _draw(batch)))


def cells(batch: RuleBatch) -> Int64[np.ndarray, " M"]:
    """One row of each of ``keep`` cells of about equal size, drawn in proportion to difficulty.

    Cells come from halving: a set that is to give m rows is cut across the eigenvector along which it is widest, so
    that the two sides give m // 2 and the rest, and hold rows in that proportion.
    """
    return _one_of_each_cell(batch, power=1.0)


def cells_squared(batch: RuleBatch) -> Int64[np.ndarray, " M"]:
    """The same cells, drawn in proportion to squared difficulty.

    Drawn from the whole batch, squared weights keep too few of the easy rows; one row of each cell stays whatever its
    weight (docs/method.md has both, measured).
    """
    return _one_of_each_cell(batch, power=2.0)


def guided(batch: RuleBatch) -> Int64[np.ndarray, " M"]:
    """Rows drawn in proportion to difficulty, without looking at a graph: what every guided rule has to beat."""
    hardest_first = np.argsort(-_draw(batch), kind="stable")
    return np.sort(hardest_first[: batch.keep])


def _one_of_each_cell(batch: RuleBatch, power: float) -> Int64[np.ndarray, " M"]:
    order = np.arange(len(batch))
    bounds = np.empty(batch.keep + 1, np.int64)
    halve(coordinates(batch), order, bounds)
    return np.sort(_winners(order, bounds, _draw(batch, power)))


def _winners(
    order: Int64[np.ndarray, " B"], bounds: Int64[np.ndarray, " M1"], drawn: Float64[np.ndarray, " B"]
) -> Int64[np.ndarray, " M"]:
    """Of each piece ``order[bounds[m]:bounds[m + 1]]`` the row with the largest number."""
    piece = np.repeat(np.arange(len(bounds) - 1), np.diff(bounds))
    best_last = order[np.lexsort((drawn[order], piece))]
    return np.asarray(best_last[bounds[1:] - 1], np.int64)


@compiled()
def halve(points: Float64[np.ndarray, "B Q"], order: Int64[np.ndarray, " B"], bounds: Int64[np.ndarray, " M1"]) -> None:
    """Cut rows into M cells of about equal size, always across the coordinate in which a cell varies most.

    Args:
        points: Coordinates, ``[B, Q]``.
        order: The positions 0..B-1; afterwards sorted by cell, ascending within each.
        bounds: Where the cells' bounds go, ``[M + 1]``: cell m is ``order[bounds[m]:bounds[m + 1]]``, never empty.
    """
    cells, dims = len(bounds) - 1, points.shape[1]
    bounds[0], bounds[cells] = 0, len(order)
    # Cells still to be cut: first and one past the last, as numbers of final cells.
    first, last = np.empty(cells + 1, np.int64), np.empty(cells + 1, np.int64)
    first[0], last[0], waiting = 0, cells, 1
    while waiting:
        waiting -= 1
        a, b = first[waiting], last[waiting]
        begin, end = bounds[a], bounds[b]
        if b - a == 1:
            order[begin:end] = np.sort(order[begin:end])
            continue
        widest, most = 0, -1.0
        for q in range(dims):
            mean, total = 0.0, 0.0
            for i in range(begin, end):
                mean += points[order[i], q]
            mean /= end - begin
            for i in range(begin, end):
                total += (points[order[i], q] - mean) ** 2
            if total > most:
                widest, most = q, total
        part = np.sort(order[begin:end])
        values = np.empty(len(part))
        for i in range(len(part)):
            values[i] = points[part[i], widest]
        order[begin:end] = part[np.argsort(values, kind="mergesort")]
        middle = a + (b - a) // 2
        bounds[middle] = begin + (end - begin) * (middle - a) // (b - a)
        first[waiting], last[waiting] = middle, b
        first[waiting + 1], last[waiting + 1] = a, middle
        waiting += 2
