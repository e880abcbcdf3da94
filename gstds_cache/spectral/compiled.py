"""LOBPCG for one graph after the other on a CPU, compiled by numba; threads take graphs in turn.

The algorithm, its letters and its references are those of spectral/lobpcg.py, and W is the preconditioned residuals.
What is different here:

    * The preconditioner is symmetric Gauss-Seidel, in whose reach a graph of a few hundred nodes is solved in half the
      iterations that Jacobi takes, at less than twice the price: A T r comes out of applying T but for one pass over
      half of the edges (S. C. Eisenstat, Efficient implementation of a class of preconditioned conjugate gradient
      methods, SIAM J. Sci. Stat. Comput. 2 (1981)). It cannot be stacked; hence Jacobi in lobpcg.py.
    * After ``COARSE_AFTER`` iterations a coarse term is added (spectral/coarse.py), without which graphs of many
      clusters and paths take hundreds.
    * The start is the lowest eigenvectors of the coarse problem with some noise, which no symmetry of a graph is
      orthogonal to.
    * The trial basis [X, W, P] is not orthonormalised; its Gram matrix is factored, and where that fails the dependent
      directions are left out (spectral/small.py).
    * Pairs of vectors that have converged get no new directions (soft locking), for as long as they stay so.
    * A X and A P go by recurrence. When a graph has converged by them A X is computed afresh, and the graph goes on
      from there if it has not.
    * Vectors are taken in pairs, [nodes, 2], where edges are walked: that is one load of 16 bytes an edge. Blocks are
      of even size.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float64
from numba import uint64
from torch import Tensor

from gstds_cache.graph.compiled import compiled
from gstds_cache.graph.laplacian import Laplacian
from gstds_cache.seeding import rng_for
from gstds_cache.spectral.coarse import LARGEST, aggregates, coarse_problem, lowest_coarse, solve_pair
from gstds_cache.spectral.result import DEGENERATE_GAP, Ritz
from gstds_cache.spectral.small import rayleigh_ritz

COARSE_AFTER = 24
COARSE_AT_ONCE = 1536  # nodes from which it pays from the first iteration
COARSE_ROUNDS = 4
NOISE = 0.01  # of the start


@compiled(fast=True)
def _smooth(crow, mid, col, weight, inverse, r, z, az):
    """``z = (D - U)^-1 D (D - L)^-1 r``, and half of ``A z``."""
    nodes = len(r)
    for i in range(nodes):
        s, t = r[i, 0], r[i, 1]
        for e in range(uint64(crow[i]), uint64(mid[i])):
            j, w = uint64(col[e]), weight[e]
            s += w * z[j, 0]
            t += w * z[j, 1]
        az[i, 0], az[i, 1] = s, t
        z[i, 0], z[i, 1] = s * inverse[i], t * inverse[i]
    for n in range(nodes):
        u = uint64(nodes - 1 - n)
        s, t = 0.0, 0.0
        for e in range(uint64(mid[u]), uint64(crow[u + uint64(1)])):
            j, w = uint64(col[e]), weight[e]
            s += w * z[j, 0]
            t += w * z[j, 1]
        z[u, 0] += s * inverse[u]
        z[u, 1] += t * inverse[u]


@compiled(fast=True)
def _finish_product(crow, mid, col, weight, z, az):
    """The other half: ``A z = (D - U) z - L z``, of which the first is there."""
    for i in range(len(z)):
        s, t = az[i, 0], az[i, 1]
        for e in range(uint64(crow[i]), uint64(mid[i])):
            j, w = uint64(col[e]), weight[e]
            s -= w * z[j, 0]
            t -= w * z[j, 1]
        az[i, 0], az[i, 1] = s, t


@compiled(fast=True)
def _product(crow, col, weight, diagonal, z, az):
    for i in range(len(z)):
        s, t = diagonal[i] * z[i, 0], diagonal[i] * z[i, 1]
        for e in range(uint64(crow[i]), uint64(crow[i + 1])):
            j, w = uint64(col[e]), weight[e]
            s -= w * z[j, 0]
            t -= w * z[j, 1]
        az[i, 0], az[i, 1] = s, t


@compiled(fast=True)
def _product_of_rows(crow, col, weight, diagonal, S, A, m, z, az):
    for v in range(0, m, 2):
        for i in range(len(z)):
            z[i, 0], z[i, 1] = S[v, i], S[v + 1, i]
        _product(crow, col, weight, diagonal, z, az)
        for i in range(len(z)):
            A[v, i], A[v + 1, i] = az[i, 0], az[i, 1]


@compiled(fast=True)
def _add_coarse(L, length, null, part, r, y, z):
    """``z += C (C^T A C)^+ C^T r``."""
    for a in range(len(y)):
        y[a, 0], y[a, 1] = 0.0, 0.0
    for i in range(len(r)):
        a = uint64(part[i])
        y[a, 0] += null[i] * r[i, 0]
        y[a, 1] += null[i] * r[i, 1]
    for a in range(len(y)):
        y[a, 0] /= length[a]
        y[a, 1] /= length[a]
    solve_pair(L, y)
    for a in range(len(y)):
        y[a, 0] /= length[a]
        y[a, 1] /= length[a]
    for i in range(len(r)):
        a = uint64(part[i])
        z[i, 0] += null[i] * y[a, 0]
        z[i, 1] += null[i] * y[a, 1]


@compiled(fast=True)
def _four_dots(a, b, c, d):
    ac, ad, bc, bd = 0.0, 0.0, 0.0, 0.0
    for i in range(len(a)):
        ac += a[i] * c[i]
        ad += a[i] * d[i]
        bc += b[i] * c[i]
        bd += b[i] * d[i]
    return ac, ad, bc, bd


@compiled(fast=True)
def _gram(S, A, size, M, H):
    """Lower parts of ``M = S S^T`` and ``H = S A^T``."""
    for a in range(0, size, 2):
        for b in range(0, a + 2, 2):
            M[a, b], M[a, b + 1], M[a + 1, b], M[a + 1, b + 1] = _four_dots(S[a], S[a + 1], S[b], S[b + 1])
            H[a, b], H[a, b + 1], H[a + 1, b], H[a + 1, b + 1] = _four_dots(S[a], S[a + 1], A[b], A[b + 1])


@compiled(fast=True)
def _combine(S, Y, m, size, new):
    """New X and P: ``P = [W, P] Y[m:]``, ``X = X Y[:m] + P``. Rows from ``size`` on may be read, times 0."""
    width = S.shape[1]
    for j in range(m):
        x, p = new[j], new[2 * m + j]
        if size == m:
            p[:] = 0.0
        for k in range(m, size, 4):
            a, b, c, d = Y[k, j], Y[k + 1, j], Y[k + 2, j], Y[k + 3, j]
            s, t, u, v = S[k], S[k + 1], S[k + 2], S[k + 3]
            if k == m:
                for i in range(width):
                    p[i] = a * s[i] + b * t[i] + c * u[i] + d * v[i]
            else:
                for i in range(width):
                    p[i] += a * s[i] + b * t[i] + c * u[i] + d * v[i]
        for k in range(0, m, 2):
            a, b = Y[k, j], Y[k + 1, j]
            s, t = S[k], S[k + 1]
            if k == 0:
                for i in range(width):
                    x[i] = p[i] + a * s[i] + b * t[i]
            else:
                for i in range(width):
                    x[i] += a * s[i] + b * t[i]


@compiled(fast=True)
def _take_in(z, az, null, S, A, m, v):
    """Put a pair of directions, and A times them, into rows ``v`` and ``v + 1``, without null vector and X."""
    nodes = len(z)
    s, t, b, c = S[v], S[v + 1], A[v], A[v + 1]
    n0, n1 = 0.0, 0.0
    for i in range(nodes):
        s[i], t[i], b[i], c[i] = z[i, 0], z[i, 1], az[i, 0], az[i, 1]
        n0 += z[i, 0] * null[i]
        n1 += z[i, 1] * null[i]
    for i in range(nodes):
        s[i] -= n0 * null[i]
        t[i] -= n1 * null[i]
    for k in range(0, m, 2):
        x, y, ax, ay = S[k], S[k + 1], A[k], A[k + 1]
        xs, xt, ys, yt = _four_dots(x, y, s, t)
        for i in range(len(x)):
            s[i] -= xs * x[i] + ys * y[i]
            t[i] -= xt * x[i] + yt * y[i]
            b[i] -= xs * ax[i] + ys * ay[i]
            c[i] -= xt * ax[i] + yt * ay[i]


@compiled(fast=True)
def _residuals(S, A, theta, m, r, error):
    for v in range(0, m, 2):
        x, y, ax, ay, e, f = S[v], S[v + 1], A[v], A[v + 1], 0.0, 0.0
        for i in range(r.shape[1]):
            d, g = ax[i] - theta[v] * x[i], ay[i] - theta[v + 1] * y[i]
            r[v // 2, i, 0], r[v // 2, i, 1] = d, g
            e += d * d
            f += g * g
        error[v] = np.sqrt(e) / theta[v] if theta[v] > 0 else np.inf
        error[v + 1] = np.sqrt(f) / theta[v + 1] if theta[v + 1] > 0 else np.inf


@compiled()
def _locked(error, v, q, tolerance):
    """Whether vectors ``v`` and ``v + 1`` are wanted and have converged: they stay in X, and need no directions."""
    return v + 1 < q and error[v] <= tolerance and error[v + 1] <= tolerance


@compiled()
def _reached(theta, error, q, tolerance):
    """Whether the pairs wanted have converged, and the second is known well enough to tell whether there is a gap."""
    for j in range(q):
        if not error[j] <= tolerance:
            return False
    clear = theta[1] * (1 - error[1]) - theta[0] > DEGENERATE_GAP * theta[1]
    return clear or error[1] <= max(tolerance, 0.1 * DEGENERATE_GAP)


class _Room(NamedTuple):
    """What a thread needs to solve one graph after the other: allocating it anew for each took a third of the time."""

    S: np.ndarray
    A: np.ndarray
    new_S: np.ndarray
    new_A: np.ndarray
    r: np.ndarray
    z: np.ndarray
    az: np.ndarray
    theta: np.ndarray
    error: np.ndarray
    M: np.ndarray
    H: np.ndarray
    Y: np.ndarray
    work: np.ndarray
    crow: np.ndarray
    mid: np.ndarray
    col: np.ndarray
    inverse: np.ndarray
    part: np.ndarray
    coarse: np.ndarray
    length: np.ndarray
    coarse_null: np.ndarray
    coarse_vectors: np.ndarray

    @classmethod
    def of(cls, nodes: int, m: int, edges: int) -> _Room:
        """Room for graphs of so many nodes and edges, and m vectors."""
        new, c, k = np.empty, min(nodes, LARGEST), 3 * m
        # The small ones in one piece: side by side with another thread's, they would share its cache lines.
        small = iter(
            np.split(new(2 * m + 5 * k * k + k * m + 32), np.cumsum([16, m, m, k * k, k * k, k * m, 3 * k * k]))
        )
        next(small)
        block = (k, nodes // 8 * 8 + 24)  # rows 4096 bytes apart, as for 512 nodes, would share a cache set
        return cls(
            S=new(block), A=new(block), new_S=new(block), new_A=new(block),
            r=new((m // 2, nodes, 2)), z=new((nodes, 2)), az=new((nodes, 2)),
            theta=next(small), error=next(small), M=next(small).reshape(k, k), H=next(small).reshape(k, k),
            Y=next(small).reshape(k, m), work=next(small).reshape(3, k, k),
            crow=new(nodes + 1, np.int64), mid=new(nodes, np.int64), col=new(edges, np.uint32), inverse=new(nodes),
            part=new(nodes, np.int64), coarse=new((c, c)), length=new(c), coarse_null=new(c),
            coarse_vectors=new((m // 2, c, 2)),
        )  # fmt: skip


@compiled(fast=True)
def _begin(weight, diagonal, null, start, coarse_start, room):
    """Make the preconditioner, and the first X with A X; returns the number of aggregates, 0 for no coarse term."""
    crow, mid, col, part, S, A = room.crow, room.mid, room.col, room.part, room.S, room.A
    nodes, m = len(diagonal), len(room.theta)
    for i in range(nodes):
        room.inverse[i] = 1 / diagonal[i]
    parts = aggregates(crow, col, weight, part)
    L, length, coarse_null = room.coarse[:parts, :parts], room.length[:parts], room.coarse_null[:parts]
    if parts and not coarse_problem(crow, mid, col, weight, null, part, L, length, coarse_null):
        parts = 0
    S[:], A[:], room.new_S[:], room.new_A[:] = 0.0, 0.0, 0.0, 0.0  # columns beyond the nodes stay 0
    S[:m, :nodes] = start
    if coarse_start and parts > 2 * m:
        lowest = room.coarse_vectors[:, :parts]
        for v in range(m):
            lowest[v // 2, :, v % 2] = start[v, :parts]
        lowest_coarse(L, coarse_null, lowest, COARSE_ROUNDS)
        for v in range(m):
            for i in range(nodes):
                a = uint64(part[i])
                S[v, i] = null[i] / length[a] * lowest[v // 2, a, v % 2] + NOISE / np.sqrt(nodes) * start[v, i]
    for v in range(m):
        s = 0.0
        for i in range(nodes):
            s += S[v, i] * null[i]
        for i in range(nodes):
            S[v, i] -= s * null[i]
    _product_of_rows(crow, col, weight, diagonal, S, A, m, room.z, room.az)
    return parts


@compiled(fast=True)
def _solve(weight, diagonal, null, start, coarse_start, q, tolerance, max_iterations, room):
    """One graph, whose edges are in ``room``; the result is in the first rows of what is returned."""
    crow, mid, col, r, z, az = room.crow, room.mid, room.col, room.r, room.z, room.az
    S, A, new_S, new_A, theta, error = room.S, room.A, room.new_S, room.new_A, room.theta, room.error
    nodes, m = len(diagonal), len(theta)
    parts = _begin(weight, diagonal, null, start, coarse_start, room)
    iteration, size = 0, m
    while True:
        # The first ``size`` rows of S are X, m vectors, and W and P of the pairs that have not converged; A holds their
        # products. All are orthogonal to the null vector, and W to X. Where ``size`` is m, A X was computed and not
        # carried on.
        _gram(S, A, size, room.M, room.H)
        if rayleigh_ritz(room.M, room.H, size, m, room.work, room.Y, theta) < m:
            return iteration, S, False
        _combine(S, room.Y, m, size, new_S)
        _combine(A, room.Y, m, size, new_A)
        S, new_S, A, new_A = new_S, S, new_A, A
        _residuals(S, A, theta, m, r, error)
        reached = _reached(theta, error, q, tolerance)
        if reached or iteration == max_iterations:
            if size == m:
                return iteration, S, reached
            _product_of_rows(crow, col, weight, diagonal, S, A, m, z, az)
            S[m:] = 0
            A[m:] = 0
            size = m
            continue
        iteration += 1
        coarse = parts > 0 and (iteration > COARSE_AFTER or nodes >= COARSE_AT_ONCE)
        active = 0
        for v in range(0, m, 2):
            if _locked(error, v, q, tolerance):
                continue
            _smooth(crow, mid, col, weight, room.inverse, r[v // 2], z, az)
            if coarse:
                y = room.coarse_vectors[0, :parts]
                _add_coarse(room.coarse[:parts, :parts], room.length, null, room.part, r[v // 2], y, z)
                _product(crow, col, weight, diagonal, z, az)
            else:
                _finish_product(crow, mid, col, weight, z, az)
            _take_in(z, az, null, S, A, m, m + active)
            active += 2
        end = m + active
        if size > m:
            for v in range(0, m, 2):
                if not _locked(error, v, q, tolerance):
                    if end < 2 * m + v:  # where _combine put them
                        S[end : end + 2], A[end : end + 2] = S[2 * m + v : 2 * m + v + 2], A[2 * m + v : 2 * m + v + 2]
                    end += 2
        size = end


@compiled()
def _solve_some(
    first, step, crow, col, weight, diagonal, null, start, coarse_start, q, tolerance, max_iterations, room, values,
    basis, residual, second, iterations, converged
):  # fmt: skip
    """Solve graphs ``first``, ``first + step``, ..."""
    graphs, nodes = diagonal.shape
    for g in range(first, graphs, step):
        # Of its own: columns within the graph, in 4 bytes, and where a row's lower part ends.
        low, base = crow[g * nodes], g * nodes
        for i in range(nodes):
            begin, end = crow[base + i] - low, crow[base + i + 1] - low
            below = 0
            for e in range(uint64(begin), uint64(end)):
                j = col[uint64(low) + e] - base
                room.col[e] = j
                below += j < i
            room.crow[i], room.mid[i] = begin, begin + below
        room.crow[nodes] = crow[base + nodes] - low
        iterations[g], result, converged[g] = _solve(
            weight[low:], diagonal[g], null[g], start[g % len(start)], coarse_start, q, tolerance, max_iterations, room
        )
        for j in range(q):
            values[g, j], residual[g, j] = room.theta[j], room.error[j]
            for i in range(nodes):
                basis[g, i, j] = result[j, i]
        second[g] = room.theta[1]


def lobpcg_compiled(
    A: Laplacian,
    q: int,
    *,
    tolerance: float,
    max_iterations: int,
    seed: int,
    start: Float64[Tensor, "G B q"] | None = None,
    threads: int = 1,
) -> Ritz:
    """Find the ``q`` lowest nontrivial eigenpairs of every graph's Laplacian, as :func:`~.lobpcg.lobpcg` does.

    Args:
        A: Laplacians of G connected graphs of B nodes, on a CPU.
        q: Pairs wanted, >= 1; the block is of the next even size above, and three blocks have to fit into B - 1.
        tolerance: Residual of a pair relative to its eigenvalue.
        max_iterations: Iterations after which a graph is returned as it is.
        seed: Seed of the start, the same for every graph.
        start: Vectors to start from; the seed's noise is added, and fills the block.
        threads: Threads that take graphs in turn; which does one changes nothing.

    Returns:
        Pairs in float64.
    """
    graphs, nodes = A.graph.graphs, A.graph.nodes
    m = block_size(q)
    noise = rng_for(seed, "lobpcg").standard_normal((1, m, nodes))
    if start is not None:
        given = start.numpy().transpose(0, 2, 1)
        length = np.sqrt(np.square(given).sum(axis=2, keepdims=True).clip(min=1e-300))
        noise = np.repeat(noise, graphs, axis=0)
        noise[:, : given.shape[1]] *= NOISE / np.sqrt(nodes)
        noise[:, : given.shape[1]] += given / length
    values, residual = np.zeros((graphs, q)), np.zeros((graphs, q))
    basis, second = np.zeros((graphs, nodes, q)), np.zeros(graphs)
    iterations, converged = np.zeros(graphs, np.int64), np.zeros(graphs, np.bool_)
    tensors = (A.graph.crow, A.graph.col, A.off_diagonal, A.diagonal, A.null_vector)
    arrays = [tensor.numpy() for tensor in tensors]
    edges = int(np.diff(arrays[0][::nodes]).max())

    def some(first: int, step: int) -> None:
        _solve_some(
            first, step, *arrays, noise, start is None, q, tolerance, max_iterations, _Room.of(nodes, m, edges),
            values, basis, residual, second, iterations, converged
        )  # fmt: skip

    threads = min(threads, graphs)
    if threads <= 1:
        some(0, 1)
    else:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(some, range(threads), [threads] * threads))
    return Ritz(
        values=torch.from_numpy(values),
        basis=torch.from_numpy(basis),
        residual=torch.from_numpy(residual),
        second=torch.from_numpy(second),
        iterations=torch.from_numpy(iterations),
        converged=torch.from_numpy(converged),
    )


def block_size(q: int) -> int:
    """Vectors iterated on for ``q`` pairs: at least one more, in pairs."""
    return 2 * (q // 2 + 1)
