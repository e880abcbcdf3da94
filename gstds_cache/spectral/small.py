"""Dense problems of a few dozen numbers, inside compiled loops: Cholesky, eigenvectors, Rayleigh-Ritz. numba.

LAPACK takes longer to be called than these take to be solved (6 x 6: 3 us here).
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float64

from gstds_cache.graph.compiled import compiled

JACOBI_LIMIT = 8  # beyond it LAPACK is quicker
NEGLIGIBLE = 1e-26  # of the product of two diagonal entries, the square of the entry between them
DEPENDENT = 1e-12  # of a unit vector's squared length, what the others leave of it; less is rounding


@compiled(fast=True)
def cholesky(A: Float64[np.ndarray, "n n"], n: int, smallest: float) -> bool:
    """Factor the lower part of ``A[:n, :n]`` in place.

    A pivot's rounding error grows as the pivots before it get small: where one of them is 1e-5, a direction that
    depends on the others leaves up to 1e-11 in place of 0. The bound grows as much.

    Returns:
        Whether every pivot was above ``smallest`` over the smallest pivot before it.
    """
    least = 1.0
    for j in range(n):
        d = A[j, j]
        for k in range(j):
            d -= A[j, k] * A[j, k]
        if not d * least > smallest:
            return False
        least = min(least, d)
        d = np.sqrt(d)
        A[j, j] = d
        for i in range(j + 1, n):
            s = A[i, j]
            for k in range(j):
                s -= A[i, k] * A[j, k]
            A[i, j] = s / d
    return True


@compiled()
def jacobi(C: Float64[np.ndarray, "n n"], U: Float64[np.ndarray, "n n"], n: int) -> None:
    """Eigenpairs of the symmetric ``C[:n, :n]`` by cyclic Jacobi rotations, ascending: values on C's diagonal.

    G. H. Golub, C. F. Van Loan, Matrix Computations, 4th ed. (2013), algorithm 8.5.3.
    """
    for i in range(n):
        for j in range(n):
            U[i, j] = 0.0
        U[i, i] = 1.0
    for _ in range(30):
        turned = False
        for p in range(n - 1):
            for q in range(p + 1, n):
                a = C[p, q]
                if a * a <= NEGLIGIBLE * abs(C[p, p] * C[q, q]):
                    continue
                turned = True
                t = (C[q, q] - C[p, p]) / (2 * a)
                t = (1.0 if t >= 0 else -1.0) / (abs(t) + np.sqrt(t * t + 1))
                c = 1 / np.sqrt(t * t + 1)
                s = t * c
                for k in range(n):
                    x, y = C[k, p], C[k, q]
                    C[k, p], C[k, q] = c * x - s * y, s * x + c * y
                for k in range(n):
                    x, y = C[p, k], C[q, k]
                    C[p, k], C[q, k] = c * x - s * y, s * x + c * y
                for k in range(n):
                    x, y = U[k, p], U[k, q]
                    U[k, p], U[k, q] = c * x - s * y, s * x + c * y
        if not turned:
            break
    for i in range(n):
        b = i
        for j in range(i + 1, n):
            if C[j, j] < C[b, b]:
                b = j
        if b != i:
            C[i, i], C[b, b] = C[b, b], C[i, i]
            for k in range(n):
                U[k, i], U[k, b] = U[k, b], U[k, i]


@compiled()
def eigenpairs(C: Float64[np.ndarray, "n n"], U: Float64[np.ndarray, "n n"], n: int) -> None:
    """As :func:`jacobi`, by whichever method is quicker for ``n``."""
    if n <= JACOBI_LIMIT:
        jacobi(C, U, n)
        return
    values, vectors = np.linalg.eigh(np.ascontiguousarray(C[:n, :n]))
    for i in range(n):
        C[i, i] = values[i]
        for j in range(n):
            U[i, j] = vectors[i, j]


@compiled(fast=True)
def rayleigh_ritz(
    M: Float64[np.ndarray, "K K"],
    H: Float64[np.ndarray, "K K"],
    size: int,
    wanted: int,
    work: Float64[np.ndarray, "3 K K"],
    Y: Float64[np.ndarray, "K m"],
    theta: Float64[np.ndarray, " m"],
) -> int:
    """Lowest Ritz pairs ``H Y = M Y diag(theta)`` in a basis that may be dependent.

    Cholesky of the scaled Gram matrix; where that meets a dependent direction, its eigenvectors instead, without those
    of eigenvalue 0 (as in SVQB: A. Stathopoulos, K. Wu, SIAM J. Sci. Comput. 23 (2002)).

    Args:
        M: Gram matrix of the basis, lower part; destroyed.
        H: The operator on it, lower part; destroyed.
        size: How many vectors the basis has.
        wanted: Pairs (m).
        work: Room.
        Y: Where the coefficients go; rows from ``size`` on are set to 0.
        theta: Where the values go, ascending.

    Returns:
        How many independent directions there were, 0 where the matrices hold NaN or Inf; fewer than ``wanted`` leave Y
        and theta unchanged.
    """
    C, U, T = work[0], work[1], work[2]
    for a in range(size):
        for b in range(a + 1):
            if not (np.isfinite(M[a, b]) and np.isfinite(H[a, b])):
                return 0  # the basis has broken down: this graph has no answer here, and LAPACK would end the run
    scale = np.empty(size)
    for a in range(size):
        scale[a] = 1 / np.sqrt(M[a, a]) if M[a, a] > 1e-300 else 0.0
    for a in range(size):
        for b in range(a + 1):
            M[a, b] *= scale[a] * scale[b]
            H[a, b] *= scale[a] * scale[b]
            M[b, a], H[b, a], T[a, b], T[b, a] = M[a, b], H[a, b], M[a, b], M[a, b]
    rank = size
    if cholesky(T, size, DEPENDENT):
        # C = L^-1 H L^-T, and Y = L^-T U
        for b in range(size):
            for a in range(size):
                s = H[a, b]
                for k in range(a):
                    s -= T[a, k] * C[k, b]
                C[a, b] = s / T[a, a]
        for a in range(size):
            for b in range(size):
                s = C[a, b]
                for k in range(b):
                    s -= T[b, k] * C[a, k]
                C[a, b] = s / T[b, b]
        eigenpairs(C, U, size)
        for j in range(wanted):
            for a in range(size - 1, -1, -1):
                s = U[a, j]
                for k in range(a + 1, size):
                    s -= T[k, a] * Y[k, j]
                Y[a, j] = s / T[a, a]
            theta[j] = C[j, j]
    else:
        # T = V Lambda^-1/2 over the eigenvalues that are not 0, C = T^T H T, and Y = T U
        eigenpairs(M, U, size)
        first = 0
        while first < size and M[first, first] <= DEPENDENT:
            first += 1
        rank = size - first
        if rank < wanted:
            return rank
        for a in range(size):
            for b in range(rank):
                T[a, b] = U[a, first + b] / np.sqrt(M[first + b, first + b])
        for a in range(size):
            for b in range(rank):
                s = 0.0
                for k in range(size):
                    s += H[a, k] * T[k, b]
                U[a, b] = s
        for a in range(rank):
            for b in range(rank):
                s = 0.0
                for k in range(size):
                    s += T[k, a] * U[k, b]
                C[a, b] = s
        eigenpairs(C, U, rank)
        for j in range(wanted):
            for a in range(size):
                s = 0.0
                for k in range(rank):
                    s += T[a, k] * U[k, j]
                Y[a, j] = s
            theta[j] = C[j, j]
    for j in range(wanted):
        for a in range(size):
            Y[a, j] *= scale[a]
        for a in range(size, len(Y)):
            Y[a, j] = 0.0
    return rank
