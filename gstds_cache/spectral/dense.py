"""Dense eigenvectors: for graphs too small for LOBPCG, and for those on which it did not converge."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields

import torch
from jaxtyping import Bool, Float64
from torch import Tensor

from gstds_cache.graph.laplacian import Laplacian
from gstds_cache.spectral.result import Ritz

DENSE_LIMIT = 8192  # rows beyond which a dense matrix is not tried: 0.5 GB, and minutes

Solver = Callable[[Laplacian, int], Ritz]
DensePair = tuple[Float64[Tensor, " q"], Float64[Tensor, "B q"], Float64[Tensor, " q"]]


def dense_pairs(A: Laplacian, graph: int, q: int) -> DensePair:
    """The ``q`` lowest nontrivial eigenpairs of one graph, by ``torch.linalg.eigh``.

    The null vector is not left to chance: it is lifted out of the way, ``A + 2 bound z z^T``, so that it cannot mix
    with a Fiedler vector whose eigenvalue is close to 0.

    Args:
        A: Laplacians of connected graphs.
        graph: Which of them.
        q: Pairs, from 0 to B - 1.

    Returns:
        Values ``[q]``, unit vectors ``[B, q]`` and residuals relative to the values ``[q]``, float64.
    """
    null = A.null_vector[graph]
    matrix = A.dense(graph)
    values, vectors = torch.linalg.eigh(matrix + 2 * A.bound[graph] * torch.outer(null, null))
    values, vectors = values[:q], vectors[:, :q]
    error = torch.linalg.vector_norm(matrix @ vectors - vectors * values, dim=0)
    return values.clamp(min=0), vectors, error / values.clamp(min=torch.finfo(torch.float64).tiny)


def solve_dense(A: Laplacian, q: int, *, tolerance: float) -> Ritz:
    """Solve every stacked graph densely, one after the other.

    Args:
        A: Laplacians of connected graphs, any device.
        q: Pairs wanted, at most B - 1.
        tolerance: Relative residual above which a pair does not count as converged: its eigenvalue is then below what
            float64 can tell from 0.

    Returns:
        Pairs in float64 on the device of ``A``, with 0 iterations.
    """
    more = min(max(q, 2), A.graph.nodes - 1)
    lowest, vectors, error = zip(*(dense_pairs(A, g, more) for g in range(A.graph.graphs)), strict=True)
    values, worst = torch.stack(lowest), torch.stack(error)[:, :q]
    return Ritz(
        values=values[:, :q],
        basis=torch.stack(vectors)[..., :q],
        residual=worst,
        second=values[:, 1] if more > 1 else torch.full_like(values[:, 0], torch.inf),
        iterations=torch.zeros(len(worst), dtype=torch.int64, device=worst.device),
        converged=(worst <= tolerance).all(dim=1),
    )


def iterate(A: Laplacian, q: int, solver: Solver, *, tolerance: float) -> tuple[Ritz, Bool[Tensor, " G"]]:
    """Solve by iteration, then densely what did not converge.

    Args:
        A: Laplacians of connected graphs.
        q: Pairs wanted.
        solver: What iterates.
        tolerance: Relative residual.

    Returns:
        Pairs, and which graphs were solved densely, ``[G]`` bool.
    """
    fallback = torch.zeros(A.graph.graphs, dtype=torch.bool, device=A.diagonal.device)
    ritz = solver(A, q)
    again: list[int] = (~ritz.converged).nonzero().flatten().tolist()
    if again and A.graph.nodes <= DENSE_LIMIT:
        replace_pairs(ritz, again, solve_dense(A.subset(again), q, tolerance=tolerance))
        fallback[again] = True
    return ritz, fallback


def replace_pairs(ritz: Ritz, graphs: list[int], other: Ritz) -> None:
    """Put the pairs of ``other`` in place of some graphs'; their iterations stay counted."""
    for field in fields(Ritz):
        if field.name != "iterations":
            mine = getattr(ritz, field.name)
            mine[graphs] = getattr(other, field.name).to(mine.device)
