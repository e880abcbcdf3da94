"""Rules that part a batch into as many pieces as rows stay, and draw one of each, by difficulty."""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Float64, Int64

from gstds_cache.graph.compiled import compiled
from gstds_cache.selection.rule import RuleBatch
from gstds_cache.selection.spread import coordinates, weights

GOLDEN = (math.sqrt(5) - 1) / 2


def strata(batch: RuleBatch) -> Int64[np.ndarray, " M"]:
    """One row of each of ``keep`` equal stretches of the Fiedler order, drawn in proportion to difficulty."""
    order = np.argsort(batch.vector, kind="stable")
    bounds = (np.arange(batch.keep + 1) * len(batch)) // batch.keep
    return _one_of_each(batch, order, bounds, power=1.0)


def cells(batch: RuleBatch) -> Int64[np.ndarray, " M"]:
    """One row of each of ``keep`` cells of about equal size, drawn in proportion to difficulty.

    Cells come from halving: a set that is to give m rows is cut across the eigenvector along which it is widest, so
    that the two sides give m // 2 and the rest, and hold rows in that proportion.
    """
    return _one_of_each(batch, *cells_of(batch, batch.keep), power=1.0)


def cells_squared(batch: RuleBatch) -> Int64[np.ndarray, " M"]:
    """The same cells, drawn in proportion to squared difficulty.

    Drawn from the whole batch, squared weights keep too few of the easy rows; one row of each cell stays whatever its
    weight (docs/results.md has both, measured).
    """
    return _one_of_each(batch, *cells_of(batch, batch.keep), power=2.0)


def guided(batch: RuleBatch) -> Int64[np.ndarray, " M"]:
    """Rows drawn in proportion to difficulty, without looking at a graph: what every guided rule has to beat."""
    # The Gumbel-max trick: of any set of rows, the largest number is a draw in proportion to weight.
    drawn = np.log(weights(batch)) + batch.rng.gumbel(size=len(batch))
    return np.sort(np.argsort(-drawn, kind="stable")[: batch.keep])


def cells_of(batch: RuleBatch, count: int) -> tuple[Int64[np.ndarray, " B"], Int64[np.ndarray, " M1"]]:
    """Cut a batch into ``count`` cells of about equal size; as :func:`halve` gives them.

    Returns:
        The positions sorted by cell, and the cells' bounds in them.
    """
    order = np.arange(len(batch))
    bounds = np.empty(count + 1, np.int64)
    halve(coordinates(batch), order, bounds)
    return order, bounds


def _one_of_each(
    batch: RuleBatch, order: Int64[np.ndarray, " B"], bounds: Int64[np.ndarray, " M1"], *, power: float
) -> Int64[np.ndarray, " M"]:
    """Of each piece ``order[bounds[m]:bounds[m + 1]]`` one row, drawn in proportion to weight^power.

    How far along the piece's cumulative weights the draw lies is uniformly random when a batch comes for the first
    time. Each further time it has gone on by the golden ratio, modulo 1: the sequence whose members lie most evenly,
    however many there are (the Kronecker sequence; L. Kuipers and H. Niederreiter, Uniform Distribution of Sequences,
    1974, chapter 2). So over a run a row stays about as often as its weight says, where independent draws would be off
    by chance.
    """
    reached = np.concatenate([[0.0], np.cumsum(weights(batch)[order] ** power)])
    first, last = reached[bounds[:-1]], reached[bounds[1:]]
    along = (batch.per_batch_rng.random(batch.keep) + batch.repeat * GOLDEN) % 1.0
    at = np.searchsorted(reached[1:], first + along * (last - first), side="right")
    return np.sort(order[np.clip(at, bounds[:-1], bounds[1:] - 1)])  # rounding may step over an end


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
