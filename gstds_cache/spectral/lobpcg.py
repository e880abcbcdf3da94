"""Batched LOBPCG for the lowest nontrivial eigenpairs of G graph Laplacians.

Letters, in this file only:

    A  the Laplacians, an operator, applied as ``A @ x``
    X  current approximations of the M lowest eigenvectors
    R  residuals A X - X diag(theta), and then the preconditioned ones
    P  the previous step's directions
    V  orthonormal basis of what R and P add to X
    S  the trial basis [X, V]
    T  the preconditioner, applied as ``T(R)``
    M  block size: the Q pairs asked for and GUARD more

Blocks are held as ``[M, G, B]``: a vector is contiguous, and the sums over B are the innermost loop.

References:
    1. A. V. Knyazev, Toward the optimal preconditioned eigensolver: locally optimal block preconditioned conjugate
       gradient method, SIAM J. Sci. Comput. 23 (2001), algorithm 5.1.
    2. A. Stathopoulos, K. Wu, A block orthogonalization procedure with constant synchronization requirements, SIAM J.
       Sci. Comput. 23 (2002): SVQB.
    3. J. A. Duersch, M. Shao, C. Yang, M. Gu, A robust and efficient implementation of LOBPCG, SIAM J. Sci. Comput. 40
       (2018): why the trial basis must be orthonormal, and rank deficiency.

How this differs from Knyazev's algorithm, and from scipy.sparse.linalg.lobpcg:

    * G problems at once, each with its own convergence. A converged graph is copied out and leaves the stack: nothing
      touches it afterwards. (scipy masks single columns of one problem, "soft locking"; here a block runs whole.)
    * The trial basis is orthonormalised (SVQB, twice) before Rayleigh-Ritz, which is then an ordinary symmetric
      eigenproblem. Both references solve a generalised one on a Gram matrix, which loses half the digits.
    * Directions of no substance are dropped from the basis by zeroing them, not by restarting without P (scipy).
    * The null vector is known exactly and projected out of every new direction.
    * A S is computed afresh in every iteration, never by recurrence: the products are cheap and nothing drifts.
    * GUARD extra vectors make the Q wanted ones converge at the rate of the gap beyond the guard.
    * The start is a function of the seed alone, the same for every graph, and every sum over B is taken in an order
      that does not depend on G: a graph's result is the same, to the bit, whatever it is stacked with. (On the same
      device with the same number of threads: BLAS may split a sum otherwise with another.)
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor

from gstds_cache.graph.laplacian import Laplacian
from gstds_cache.seeding import torch_rng_for
from gstds_cache.spectral.preconditioner import Preconditioner
from gstds_cache.spectral.result import DEGENERATE_GAP, Ritz

GUARD = 1
FIRST_PASS_DROP = 1e-12  # of a unit direction's squared length, what is left after projection; less is rounding
SECOND_PASS_DROP = 1e-2  # after one pass everything of substance is orthonormal to a few digits

SmallStack = Float64[np.ndarray, "G m n"]


def pairwise_sum(x: Float64[Tensor, "*batch B"]) -> Float64[Tensor, "*batch"]:
    """Sum the last axis by halving: elementwise additions alone, so the order depends on B and nothing else."""
    while x.shape[-1] > 1:
        half, odd = divmod(x.shape[-1], 2)
        folded = x[..., :half] + x[..., half : 2 * half]
        if odd:
            folded[..., 0] += x[..., -1]
        x = folded
    return x[..., 0]


def ordered_sum(x: Float64[Tensor, "*batch B"]) -> Float64[Tensor, "*batch"]:
    """Sum the last axis in an order that does not depend on the others: torch's own sum keeps to that on a CPU."""
    return x.sum(dim=-1) if x.device.type == "cpu" else pairwise_sum(x)


def gram(left: Float64[Tensor, "m G B"], right: Float64[Tensor, "n G B"]) -> SmallStack:
    """Inner products ``left^T right`` of every graph, on the host, ``[G, m, n]`` float64."""
    products = ordered_sum(left[:, None] * right[None])
    return np.ascontiguousarray(products.permute(2, 0, 1).cpu().numpy())


def combine(block: Float64[Tensor, "m G B"], coefficients: SmallStack) -> Float64[Tensor, "n G B"]:
    """The linear combinations ``block @ coefficients``, term by term in order, ``[n, G, B]`` float64."""
    c = torch.from_numpy(np.ascontiguousarray(coefficients.transpose(1, 2, 0))).to(block.device)[..., None]
    out = c[0] * block[0]
    for term, factor in zip(block[1:], c[1:], strict=True):
        out = out.addcmul_(factor, term)
    return out


def orthonormalise(v: Float64[Tensor, "n G B"], against: Float64[Tensor, "m G B"]) -> Float64[Tensor, "n G B"]:
    """Make ``v`` orthonormal, and orthogonal to ``against``: SVQB (reference 2), twice.

    Args:
        v: Directions, ``[n, G, B]`` float64, of any length; zeros are allowed.
        against: Orthonormal vectors, ``[m, G, B]`` float64.

    Returns:
        ``[n, G, B]`` float64. Where a graph's directions span fewer than n dimensions the rest are exactly zero.
    """
    m = len(against)
    for drop in (FIRST_PASS_DROP, SECOND_PASS_DROP):
        both = torch.cat([against, v])
        products = gram(both, v)
        overlap, own = products[:, :m], products[:, m:]
        size = np.sqrt(np.diagonal(own, axis1=1, axis2=2))
        scale = np.divide(1, size, out=np.zeros_like(size), where=size > np.finfo(np.float64).tiny)
        left = (own - overlap.transpose(0, 2, 1) @ overlap) * scale[:, :, None] * scale[:, None, :]
        weight, rotation = np.linalg.eigh((left + left.transpose(0, 2, 1)) / 2)
        kept = weight > drop
        inverse = np.where(kept, 1 / np.sqrt(np.where(kept, weight, 1)), 0)
        own_part = scale[:, :, None] * rotation * inverse[:, None, :]
        v = combine(both, np.concatenate([-overlap @ own_part, own_part], axis=1))
    return v


def rayleigh_ritz(
    S: Float64[Tensor, "m G B"], AS: Float64[Tensor, "m G B"], count: int
) -> tuple[Float64[np.ndarray, "G count 1"], Float64[np.ndarray, "G m count"]]:
    """Lowest Ritz pairs in the span of an orthonormal basis, some of whose vectors may be zero.

    Args:
        S: Orthonormal basis, ``[m, G, B]`` float64; zero vectors stand for dropped directions.
        AS: The operator's product with it, ``[m, G, B]`` float64.
        count: Pairs to return; at least as many vectors of the basis must not be zero.

    Returns:
        Ritz values ``[G, count, 1]``, ascending, and coefficients ``[G, m, count]``, float64 on the host.
    """
    H = gram(S, AS)
    H = (H + H.transpose(0, 2, 1)) / 2
    diagonal = np.einsum("gii->gi", H)  # a view: A is positive definite on S, so 0 there is a dropped direction
    dropped = diagonal == 0
    diagonal[dropped] = np.broadcast_to(2 * np.trace(H, axis1=1, axis2=2)[:, None] + 1, dropped.shape)[dropped]
    values, coefficients = np.linalg.eigh(H)
    return values[:, :count, None], coefficients[:, :, :count]


def _apply(A: Laplacian, block: Float64[Tensor, "m G B"]) -> Float64[Tensor, "m G B"]:
    return (A @ block.permute(1, 2, 0)).permute(2, 0, 1).contiguous()


def lobpcg(
    A: Laplacian,
    q: int,
    *,
    tolerance: float,
    max_iterations: int,
    seed: int,
    start: Float64[Tensor, "G B q"] | None = None,
) -> Ritz:
    """Find the ``q`` lowest nontrivial eigenpairs of every graph's Laplacian.

    Convergence of a pair is ``||A v - theta v|| <= tolerance * theta``, relative to its own eigenvalue: by Davis and
    Kahan the sine of the angle to the true eigenvector is then at most ``tolerance * theta / gap``, so that 1e-4
    gives |cos| >= 0.9999 wherever the relative gap to the next eigenvalue exceeds 1e-2, and the default 1e-6 keeps the
    order of all but equal coordinates, which rules read. (Relative to ||A||, as is
    usual, says nothing about an eigenvalue near 0, and the one wanted here is.) A graph goes on until it is also known
    whether there is a gap behind the first pair.

    The preconditioner is the diagonal (Jacobi), with a coarse term for clustered graphs. The null vector is
    ``A.null_vector``; graphs must be connected.

    Args:
        A: Laplacians of G graphs of B nodes, any device.
        q: Pairs wanted, >= 1, with 3 * (q + GUARD) < B.
        tolerance: Relative residual.
        max_iterations: Iterations after which a graph is returned as it is.
        seed: Seed of the start, the same for every graph.
        start: Vectors to start from in place of the first q.

    Returns:
        Pairs in float64 on the device of ``A``.
    """
    graphs, nodes = A.graph.graphs, A.graph.nodes
    m, device = q + GUARD, A.diagonal.device
    values = torch.zeros(graphs, q, dtype=torch.float64, device=device)
    basis = torch.zeros(graphs, nodes, q, dtype=torch.float64, device=device)
    residual = torch.zeros_like(values)
    second = torch.zeros(graphs, dtype=torch.float64, device=device)
    iterations = torch.zeros(graphs, dtype=torch.int64, device=device)
    converged = torch.zeros(graphs, dtype=torch.bool, device=device)

    noise = torch.randn(m, 1, nodes, dtype=torch.float64, generator=torch_rng_for(seed, "lobpcg"))
    first = noise.to(device).expand(m, graphs, nodes)
    if start is not None:
        first = torch.cat([start.permute(2, 0, 1), first[start.shape[2] :]])
    active = list(range(graphs))  # position in the stack -> graph
    null = A.null_vector[None]
    T = Preconditioner.of(A)
    X = orthonormalise(first.contiguous(), null)
    V = torch.zeros(0, graphs, nodes, dtype=torch.float64, device=device)
    for iteration in range(max_iterations + 1):
        # X and V are orthonormal, to each other and to the null vector; vectors of V may be zero, those of X are not.
        S = torch.cat([X, V])
        AS = _apply(A, S)
        ritz_values, Y = rayleigh_ritz(S, AS, m)
        X, AX = combine(S, Y), combine(AS, Y)
        P = combine(V, Y[:, m:]) if len(V) else torch.zeros_like(X)
        theta = torch.from_numpy(ritz_values.transpose(1, 0, 2).copy()).to(device)
        R = AX - theta * X
        error = ordered_sum(R * R).sqrt() / theta[..., 0].clamp(min=torch.finfo(torch.float64).tiny)

        # [Q, stack] on the host: the one place where the loop waits for the device besides the small eigenproblems.
        gap = theta[1, :, 0] * (1 - error[1]) - theta[0, :, 0] > DEGENERATE_GAP * theta[1, :, 0]
        known = gap | (error[1] <= max(tolerance, 0.1 * DEGENERATE_GAP))
        reached = (error[:q] <= tolerance).all(dim=0) & known
        done = reached.cpu() if iteration < max_iterations else torch.ones(len(active), dtype=torch.bool)
        if bool(done.any()):
            out = done.nonzero().flatten().tolist()
            which = [active[position] for position in out]
            values[which] = theta[:q, out, 0].T
            second[which] = theta[1, out, 0]
            basis[which] = X[:q, out].permute(1, 2, 0)
            residual[which] = error[:q, out].T
            iterations[which] = iteration
            converged[which] = reached[out]
            stay = (~done).nonzero().flatten().tolist()
            if not stay:
                break
            active = [active[position] for position in stay]
            A, T, null = A.subset(stay), T.subset(stay), null[:, stay]
            X, R, P = X[:, stay], R[:, stay], P[:, stay]

        V = orthonormalise(torch.cat([T(R), P]), torch.cat([null, X]))
    return Ritz(
        values=values, basis=basis, residual=residual, second=second, iterations=iterations, converged=converged
    )
