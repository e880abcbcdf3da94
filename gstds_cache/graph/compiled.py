"""Loops over graphs on a CPU, compiled by numba: what array libraries do in many passes with large temporaries.

All release Python's lock, so that threads can run one each. Every function is deterministic, and a graph's result does
not depend on the graphs it is stacked with. Indices are unsigned where a loop reads through them: numba lets negative
ones wrap around, and looking for those costs half of such a loop's time (measured: 14.6 against 7.2 us for the product
of a graph of 512 nodes).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, cast

import numpy as np
from jaxtyping import Float32, Float64, Int64, UInt16, UInt32
from numba import njit, uint64

from gstds_cache.runtime.jit import code_cache

FAST = frozenset({"reassoc", "contract", "nsz", "arcp"})  # sums in any fixed order, so that they can be vectorised
LANES = 32
SQUARES = (1e-25, 1e25)  # a sum of squares in between has neither lost entries nor overflowed, in float32


def compiled(*, fast: bool = False) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Compile a function with numba when it is first called, without Python's lock.

    Compiled code is kept for the next time where there is a place for it (:mod:`gstds_cache.runtime.jit`).

    Args:
        fast: Whether sums may be reordered, once and for all, so that they can be vectorised.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        # Under the tests functions come wrapped in a check of their annotations.
        plain = inspect.unwrap(function)
        dispatcher = njit(nogil=True, error_model="numpy", fastmath=set(FAST) if fast else False)(plain)
        kept = code_cache(plain)
        if kept is not None and hasattr(dispatcher, "_cache"):  # NUMBA_DISABLE_JIT leaves a plain function
            dispatcher._cache = kept
        return cast(Callable[..., Any], dispatcher)

    return decorate


@compiled(fast=True)
def normalize_rows_into(x: Float32[np.ndarray, "B D"], out: Float32[np.ndarray, "B D"]) -> int:
    """Scale rows to unit length; zero rows stay zero.

    Args:
        x: Rows, ``[B, D]`` float32.
        out: Where they go, ``[B, D]`` float32; may be ``x``.

    Returns:
        The first row that holds NaN or Inf, or -1. That row and those after it are left undone.
    """
    low, high = np.float32(SQUARES[0]), np.float32(SQUARES[1])
    for i in range(x.shape[0]):
        total = np.float32(0)
        for d in range(x.shape[1]):
            total += x[i, d] * x[i, d]
        if total > low and total < high:
            scale = np.float32(1) / np.sqrt(total)
            for d in range(x.shape[1]):
                out[i, d] = x[i, d] * scale
            continue
        # In float64 no square of a float32 overflows or vanishes.
        exact = 0.0
        for d in range(x.shape[1]):
            if not abs(x[i, d]) < np.inf:
                return i
            exact += np.float64(x[i, d]) * np.float64(x[i, d])
        exact = 1 / np.sqrt(exact) if exact > 0 else 0.0
        for d in range(x.shape[1]):
            out[i, d] = np.float64(x[i, d]) * exact
    return -1


@compiled(fast=True)
def normalize_half_rows_into(
    x: UInt16[np.ndarray, "B D"], out: Float32[np.ndarray, "B D"], bits: UInt32[np.ndarray, "B D"]
) -> int:
    """:func:`normalize_rows_into` of float16 rows, converted on the way: in one pass over memory instead of three.

    A float16's exponent and fraction, moved to their places in a float32, are the number times 2^-112.

    Args:
        x: Rows, ``[B, D]``, the bits of float16.
        out: Where they go, ``[B, D]`` float32.
        bits: The same memory as ``out``.

    Returns:
        The first row that holds NaN or Inf, or -1. That row and those after it are left undone.
    """
    unit = np.float32(2.0**112)
    for i in range(x.shape[0]):
        largest = np.uint32(0)
        for d in range(x.shape[1]):
            half = np.uint32(x[i, d])
            size = half & np.uint32(0x7FFF)
            largest = size if size > largest else largest
            bits[i, d] = ((half & np.uint32(0x8000)) << np.uint32(16)) | (size << np.uint32(13))
        if largest >= np.uint32(0x7C00):
            return i
        total = 0.0
        for d in range(x.shape[1]):
            value = out[i, d] * unit
            total += value * value
        scale = unit / np.float32(np.sqrt(total)) if total > 0 else np.float32(0)
        for d in range(x.shape[1]):
            out[i, d] *= scale
    return -1


@compiled()
def nearest_in_rows(
    similarity: Float32[np.ndarray, "R B"],
    first: int,
    neighbors: Int64[np.ndarray, "R K"],
    similarities: Float32[np.ndarray, "R K"],
) -> None:
    """The K largest entries of every row but the row's own, largest first, ties by lowest index.

    A row is read from left to right, and an entry taken in only if it is larger than the least of those held: of
    equals the first stays. Where rows are long, the largest entry of each 32nd part is found first: the K + 1 st of
    these is a bound that few other entries reach.

    Args:
        similarity: Rows ``first`` to ``first + R`` of a graph's similarities, ``[R, B]`` float32, no NaN.
        first: Number of the first row.
        neighbors: Where the row numbers go, ``[R, K]``; K < B.
        similarities: Where the entries go, clipped to [-1, 1].
    """
    rows, columns = similarity.shape
    k = neighbors.shape[1]
    one, low = np.float32(1), np.float32(-np.inf)
    lanes, top = np.empty(LANES, np.float32), np.empty(k + 1, np.float32)
    for r in range(rows):
        best, names, entries, own = similarities[r], neighbors[r], similarity[r], first + r
        for a in range(k):
            best[a] = low
        least = low
        if k < LANES and columns >= 4 * LANES:
            for n in range(LANES):
                lanes[n] = entries[n]
            for c in range(1, columns // LANES):
                part = entries[c * LANES : (c + 1) * LANES]
                for n in range(LANES):
                    lanes[n] = lanes[n] if lanes[n] > part[n] else part[n]
            for a in range(k + 1):
                top[a] = low
            for n in range(LANES):
                value = lanes[n]
                if value > top[k]:
                    a = k
                    while a > 0 and top[a - 1] < value:
                        top[a] = top[a - 1]
                        a -= 1
                    top[a] = value
            least = np.float32(np.nextafter(top[k] if top[k] < one else one, low))
        for j in range(columns):
            value = entries[j]
            if value > least and j != own:
                value = min(value, one)
                if value <= best[k - 1]:
                    continue
                a = k - 1
                while a > 0 and best[a - 1] < value:
                    best[a], names[a] = best[a - 1], names[a - 1]
                    a -= 1
                best[a], names[a] = value, j
                least = max(least, best[k - 1])
        for a in range(k):
            best[a] = max(best[a], -one)


@compiled()
def union_into(
    neighbors: Int64[np.ndarray, "G B K"],
    similarities: Float32[np.ndarray, "G B K"],
    crow: Int64[np.ndarray, " N1"],
    col: Int64[np.ndarray, " E"],
    weight: Float64[np.ndarray, " E"],
    degree: Float64[np.ndarray, "G B"],
) -> int:
    """The union graph ``W = max(W, W^T)`` of nearest neighbours, as one block-diagonal CSR matrix.

    Args:
        neighbors: Row numbers within each graph, -1 for none.
        similarities: Cosines; those that are not > 0 are no edge.
        crow: Where the rows' bounds go, ``[G * B + 1]``.
        col: Where the columns go, ascending in each row; room for ``2 * G * B * K``.
        weight: Where the weights go, as large as ``col``.
        degree: Where the sums of each row's weights go.

    Returns:
        The number of edges, each direction counted.
    """
    graphs, nodes, k = neighbors.shape
    start = np.empty(nodes + 1, np.int64)
    source, cosine = np.empty(nodes * k, np.int64), np.empty(nodes * k, np.float64)
    names, values = np.empty(k, np.int64), np.empty(k, np.float64)
    edges = 0
    crow[0] = 0
    for g in range(graphs):
        # Who names a node: ``source[start[i] : start[i + 1]]``, ascending.
        start[:] = 0
        for i in range(nodes):
            for a in range(k):
                j = neighbors[g, i, a]
                if j >= 0 and j != i and similarities[g, i, a] > 0:
                    start[j + 1] += 1
        for i in range(nodes):
            start[i + 1] += start[i]
        for i in range(nodes):
            for a in range(k):
                j = neighbors[g, i, a]
                if j >= 0 and j != i and similarities[g, i, a] > 0:
                    source[start[j]], cosine[start[j]] = i, similarities[g, i, a]
                    start[j] += 1
        for i in range(nodes, 0, -1):
            start[i] = start[i - 1]
        start[0] = 0
        for i in range(nodes):
            # Whom it names, put in ascending order.
            count = 0
            for a in range(k):
                j, value = neighbors[g, i, a], similarities[g, i, a]
                if j >= 0 and j != i and value > 0:
                    b = count
                    while b > 0 and names[b - 1] > j:
                        names[b], values[b] = names[b - 1], values[b - 1]
                        b -= 1
                    names[b], values[b] = j, value
                    count += 1
            # Both lists merged.
            a, b, end, total = 0, start[i], start[i + 1], 0.0
            while a < count or b < end:
                if b == end or (a < count and names[a] < source[b]):
                    j, value = names[a], values[a]
                    a += 1
                elif a == count or source[b] < names[a]:
                    j, value = source[b], cosine[b]
                    b += 1
                else:
                    j, value = names[a], max(values[a], cosine[b])
                    a += 1
                    b += 1
                col[edges], weight[edges] = g * nodes + j, value
                total += value
                edges += 1
            degree[g, i] = total
            crow[g * nodes + i + 1] = edges
    return edges


@compiled()
def insert_into(
    crow: Int64[np.ndarray, " N1"],
    col: Int64[np.ndarray, " E"],
    weight: Float64[np.ndarray, " E"],
    near: Int64[np.ndarray, " F"],
    far: Int64[np.ndarray, " F"],
    value: Float64[np.ndarray, " F"],
    new_crow: Int64[np.ndarray, " N1"],
    new_col: Int64[np.ndarray, " E_plus_F"],
    new_weight: Float64[np.ndarray, " E_plus_F"],
    degree: Float64[np.ndarray, " N"],
) -> None:
    """Insert edges into a CSR matrix that has none of them.

    Args:
        crow: Bounds of the rows.
        col: Columns, ascending in each row.
        weight: Weights.
        near: Rows of the new edges, ascending.
        far: Their columns, ascending among equal rows.
        value: Their weights.
        new_crow: Where the new bounds go.
        new_col: Where the new columns go.
        new_weight: Where the new weights go.
        degree: Where the sums of each row's weights go.
    """
    to, added = 0, 0
    new_crow[0] = 0
    for i in range(len(crow) - 1):
        e, end, total = crow[i], crow[i + 1], 0.0
        while e < end or (added < len(near) and near[added] == i):
            if e == end or (added < len(near) and near[added] == i and far[added] < col[e]):
                new_col[to], new_weight[to] = far[added], value[added]
                added += 1
            else:
                new_col[to], new_weight[to] = col[e], weight[e]
                e += 1
            total += new_weight[to]
            to += 1
        degree[i] = total
        new_crow[i + 1] = to


@compiled()
def components_into(
    crow: Int64[np.ndarray, " N1"],
    col: Int64[np.ndarray, " E"],
    label: Int64[np.ndarray, "G B"],
    count: Int64[np.ndarray, " G"],
) -> None:
    """Connected components of stacked graphs, by breadth-first search.

    Args:
        crow: Bounds of the rows of a block-diagonal CSR matrix.
        col: Its columns.
        label: Where each node's component goes, numbered from 0 in each graph by lowest node.
        count: Where the number of components goes.
    """
    graphs, nodes = label.shape
    queue = np.empty(nodes, np.int64)
    for g in range(graphs):
        own = label[g]
        own[:] = -1
        base, parts = g * nodes, 0
        for first in range(nodes):
            if own[first] >= 0:
                continue
            own[first], queue[0] = parts, first
            head, tail = 0, 1
            while head < tail:
                i = uint64(base + queue[head])
                head += 1
                for e in range(uint64(crow[i]), uint64(crow[i + uint64(1)])):
                    j = uint64(col[e] - base)
                    if own[j] < 0:
                        own[j], queue[tail] = parts, j
                        tail += 1
            parts += 1
        count[g] = parts
