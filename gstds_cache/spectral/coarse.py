"""A graph made small: aggregates of neighbouring nodes, and the Laplacian between them. Compiled by numba.

Piecewise constant vectors over aggregates hold the smooth part of the lowest eigenvectors. They give an iteration its
start (measured, B = 512: 16 to 10 iterations to 1e-3), and, added to a smoother, a preconditioner for what the smoother
does not see, as in two-level algebraic multigrid: P. Vanek, J. Mandel, M. Brezina, Algebraic multigrid by smoothed
aggregation for second and fourth order elliptic problems, Computing 56 (1996), whose aggregates these are, unsmoothed.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float64, Int64, UInt32
from numba import uint64

from gstds_cache.graph.compiled import compiled
from gstds_cache.spectral.small import cholesky

LARGEST = 320
"""Aggregates beyond which these are aggregated again: the coarse problem is factored densely."""

Csr = tuple[Int64[np.ndarray, " n1"], UInt32[np.ndarray, " e"], Float64[np.ndarray, " e"]]


@compiled()
def _aggregate(crow: np.ndarray, col: np.ndarray, weight: np.ndarray, part: np.ndarray) -> int:
    """Vanek's aggregates: a node and its neighbours, where half of them at least are free; the rest join the nearest.

    Vanek asks for all neighbours to be free, which leaves most nodes of a dense graph to the second pass.
    """
    part[:] = -1
    parts = 0
    for i in range(len(part)):
        if part[i] >= 0:
            continue
        free = 0
        for e in range(uint64(crow[i]), uint64(crow[i + 1])):
            free += part[uint64(col[e])] < 0
        if 2 * free >= crow[i + 1] - crow[i]:
            part[i] = parts
            for e in range(uint64(crow[i]), uint64(crow[i + 1])):
                if part[uint64(col[e])] < 0:
                    part[uint64(col[e])] = parts
            parts += 1
    for i in range(len(part)):
        if part[i] < 0:
            nearest, heaviest = -1, -1.0
            for e in range(uint64(crow[i]), uint64(crow[i + 1])):
                if part[uint64(col[e])] >= 0 and weight[e] > heaviest:
                    nearest, heaviest = part[uint64(col[e])], weight[e]
            if nearest < 0:
                nearest = parts
                parts += 1
            part[i] = nearest
    return parts


@compiled()
def _between(crow: np.ndarray, col: np.ndarray, weight: np.ndarray, part: np.ndarray, parts: int) -> Csr:
    """The graph of the aggregates: sums of the weights between each two."""
    nodes = len(part)
    start = np.zeros(parts + 1, np.int64)
    for i in range(nodes):
        start[part[i] + 1] += 1
    for a in range(parts):
        start[a + 1] += start[a]
    members, place = np.empty(nodes, np.int64), start[:-1].copy()
    for i in range(nodes):
        members[place[part[i]]] = i
        place[part[i]] += 1
    crow2, col2, weight2 = np.zeros(parts + 1, np.int64), np.empty(len(col), np.uint32), np.empty(len(col))
    seen = np.full(parts, -1, np.int64)  # where an aggregate stands in the row that is being made
    edges = 0
    for a in range(parts):
        first = edges
        for m in range(start[a], start[a + 1]):
            i = members[m]
            for e in range(uint64(crow[i]), uint64(crow[i + 1])):
                b = part[uint64(col[e])]
                if b == a:
                    continue
                if seen[b] < first:
                    seen[b], col2[edges], weight2[edges] = edges, b, 0.0
                    edges += 1
                weight2[seen[b]] += weight[e]
        crow2[a + 1] = edges
    return crow2, col2[:edges], weight2[:edges]


@compiled()
def aggregates(crow: np.ndarray, col: np.ndarray, weight: np.ndarray, part: Int64[np.ndarray, " B"]) -> int:
    """Put the nodes of one graph into at most ``LARGEST`` aggregates.

    Args:
        crow: Bounds of the rows, ``[B + 1]``.
        col: Columns, uint32.
        weight: Weights.
        part: Where each node's aggregate goes, numbered from 0.

    Returns:
        How many there are; 0 if there would be too many, or no more than 2.
    """
    parts = _aggregate(crow, col, weight, part)
    last = part
    while parts > LARGEST:
        crow, col, weight = _between(crow, col, weight, last, parts)
        last = np.empty(parts, np.int64)
        fewer = _aggregate(crow, col, weight, last)
        if fewer == parts:
            return 0
        for i in range(len(part)):
            part[i] = last[part[i]]
        parts = fewer
    return parts if parts > 2 else 0


@compiled(fast=True)
def coarse_problem(
    crow: np.ndarray,
    mid: np.ndarray,
    col: np.ndarray,
    weight: np.ndarray,
    null: Float64[np.ndarray, " B"],
    part: Int64[np.ndarray, " B"],
    A: Float64[np.ndarray, "c c"],
    length: Float64[np.ndarray, " c"],
    coarse_null: Float64[np.ndarray, " c"],
) -> bool:
    """The Laplacian on the span of the aggregates' indicators times the null vector, each scaled to unit length.

    Args:
        crow: Bounds of the rows, ``[B + 1]``.
        mid: Where the columns below the diagonal end in each row, ``[B]``.
        col: Columns, uint32.
        weight: Weights of the Laplacian's off-diagonal part.
        null: The Laplacian's null vector, no entry 0.
        part: Each node's aggregate.
        A: Where the Cholesky factor of the coarse Laplacian goes, whose null vector is lifted to the mean of the
            diagonal; lower part.
        length: Where the lengths of the indicators go.
        coarse_null: Where the coarse null vector goes.

    Returns:
        Whether there is a Cholesky factor.
    """
    parts = len(length)
    for a in range(parts):
        length[a] = 0.0
        for b in range(a + 1):
            A[a, b] = 0.0
    for i in range(len(part)):
        a, f = part[i], null[i]
        length[a] += f * f
        for e in range(uint64(crow[i]), uint64(mid[i])):
            j = uint64(col[e])
            b = part[j]
            if b != a:
                value = weight[e] * f * null[j]
                A[max(a, b), min(a, b)] -= value
                A[a, a] += value
                A[b, b] += value
    mean, total = 0.0, 0.0
    for a in range(parts):
        total += length[a]
        mean += A[a, a] / (length[a] * parts)
        length[a] = np.sqrt(length[a])
    for a in range(parts):
        coarse_null[a] = length[a] / np.sqrt(total)
        for b in range(a + 1):
            A[a, b] = A[a, b] / (length[a] * length[b]) + mean * coarse_null[a] * coarse_null[b]
    return bool(cholesky(A, parts, 0.0))


@compiled(fast=True)
def solve_pair(L: Float64[np.ndarray, "c c"], x: Float64[np.ndarray, "c 2"]) -> None:
    """Solve ``L L^T y = x`` in place for two right-hand sides."""
    n = len(x)
    for i in range(n):
        s, t = x[i, 0], x[i, 1]
        for k in range(i):
            s -= L[i, k] * x[k, 0]
            t -= L[i, k] * x[k, 1]
        x[i, 0], x[i, 1] = s / L[i, i], t / L[i, i]
    for i in range(n - 1, -1, -1):
        s, t = x[i, 0] / L[i, i], x[i, 1] / L[i, i]
        x[i, 0], x[i, 1] = s, t
        for k in range(i):
            x[k, 0] -= L[i, k] * s
            x[k, 1] -= L[i, k] * t


@compiled(fast=True)
def lowest_coarse(
    L: Float64[np.ndarray, "c c"], null: Float64[np.ndarray, " c"], y: Float64[np.ndarray, "p c 2"], rounds: int
) -> None:
    """Turn random vectors towards the lowest eigenvectors but the null vector, by inverse iteration, in place.

    Args:
        L: The Cholesky factor.
        null: The coarse null vector, of unit length.
        y: Pairs of vectors.
        rounds: Solves; each is followed by Gram-Schmidt, in the order of the pairs.
    """
    pairs, n = y.shape[:2]
    for _ in range(rounds):
        for p in range(pairs):
            solve_pair(L, y[p])
        for v in range(2 * pairs):
            x = y[v // 2, :, v % 2]
            s = 0.0
            for a in range(n):
                s += x[a] * null[a]
            for a in range(n):
                x[a] -= s * null[a]
            for u in range(v):
                other = y[u // 2, :, u % 2]
                s = 0.0
                for a in range(n):
                    s += x[a] * other[a]
                for a in range(n):
                    x[a] -= s * other[a]
            s = 0.0
            for a in range(n):
                s += x[a] * x[a]
            s = 1 / np.sqrt(s) if s > 0 else 0.0
            for a in range(n):
                x[a] *= s
