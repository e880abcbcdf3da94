"""Fiedler vectors of many graphs: which solver, what happened, and one result for all."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Float64, Int8
from torch import Tensor

from gstds_cache.errors import SolverError, UsageError
from gstds_cache.graph.components import bridge_components, label_components
from gstds_cache.graph.knn import knn_graph
from gstds_cache.graph.laplacian import Laplacian, SparseGraph, symmetrise
from gstds_cache.spectral.dense import solve_dense
from gstds_cache.spectral.lobpcg import GUARD, Ritz, lobpcg
from gstds_cache.spectral.result import FiedlerResult, canonical_sign
from gstds_cache.spectral.status import Status

DENSE_BY_DESIGN = 32  # rows up to which a dense solve is quicker than starting an iteration
DENSE_LIMIT = 8192  # rows beyond which a dense matrix is not tried: 0.5 GB, and minutes
SMALLEST = 4  # fewer rows are flagged TOO_SMALL
DEGENERATE_GAP = 1e-3  # of the third eigenvalue; closer than that, the Fiedler vector is any vector of a plane


def _solve(A: Laplacian, q: int, tolerance: float, max_iterations: int, seed: int) -> tuple[Ritz, Bool[Tensor, " G"]]:
    """Solve by the method that fits, and tell which graphs took the dense fallback."""
    graphs, nodes = A.graph.graphs, A.graph.nodes
    fallback = torch.zeros(graphs, dtype=torch.bool, device=A.diagonal.device)
    if nodes <= max(DENSE_BY_DESIGN, 3 * (q + GUARD)):
        return solve_dense(A, q, tolerance=tolerance), fallback
    ritz = lobpcg(A, q, tolerance=tolerance, max_iterations=max_iterations, seed=seed)
    again: list[int] = (~ritz.converged).nonzero().flatten().tolist()
    if not again or nodes > DENSE_LIMIT:
        return ritz, fallback
    dense = solve_dense(A.subset(again), q, tolerance=tolerance)
    fallback[again] = True
    for mine, exact in (
        (ritz.values, dense.values),
        (ritz.basis, dense.basis),
        (ritz.residual, dense.residual),
        (ritz.converged, dense.converged),
    ):
        mine[again] = exact
    return ritz, fallback


def _pad(x: Float64[Tensor, "*head q"], q: int, value: float) -> Float64[Tensor, "*head Q"]:
    return torch.nn.functional.pad(x, (0, q - x.shape[-1]), value=value)


def _status(ritz: Ritz, fallback: Bool[Tensor, " G"], graph: SparseGraph) -> Int8[Tensor, " G"]:
    degenerate = torch.zeros_like(fallback)
    if ritz.values.shape[1] > 1:
        second, third = ritz.values[:, 0], ritz.values[:, 1]
        degenerate = third - second <= DEGENERATE_GAP * third
    status = torch.zeros(len(fallback), dtype=torch.int8, device=fallback.device)
    for flag, holds in (
        (Status.MAX_ITERATIONS, ~ritz.converged),
        (Status.DENSE_FALLBACK, fallback),
        (Status.DEGENERATE, degenerate),
        (Status.BRIDGED, graph.component.amax(dim=1) > 0),
    ):
        status += holds.to(torch.int8) * int(flag)
    return status | int(Status.TOO_SMALL) if graph.nodes < SMALLEST else status


def _single_nodes(A: Laplacian, q: int) -> FiedlerResult:
    """The result for graphs of one node: value 0, vector [0], and padding."""
    zero = torch.zeros(A.graph.graphs, dtype=torch.int64, device=A.diagonal.device)
    values = torch.full((len(zero), q), torch.inf, dtype=torch.float64, device=zero.device)
    values[:, 0] = 0
    return FiedlerResult(
        values=values,
        basis=torch.zeros_like(values)[:, None],
        residual=torch.zeros_like(values),
        iterations=zero,
        status=torch.full_like(zero, int(Status.TOO_SMALL), dtype=torch.int8),
        components=zero + 1,
    )


def fiedler_vectors(
    graph: SparseGraph,
    *,
    q: int = 2,
    laplacian: str = "combinatorial",
    tolerance: float = 1e-6,
    max_iterations: int = 500,
    seed: int = 0,
) -> FiedlerResult:
    """Find the lowest nontrivial eigenpairs of every connected graph's Laplacian.

    LOBPCG, then a dense solve of the graphs on which it did not converge (``DENSE_FALLBACK``; ``MAX_ITERATIONS`` goes
    unless that fails too, or B > 8192). Graphs of up to 32 nodes are solved densely by design, without a flag, and so
    are those too small for the block size. Two pairs are always solved for, so that the eigengap is known: where it is
    at most 1e-3 of the third eigenvalue the graph is ``DEGENERATE``. Fewer than 4 nodes are ``TOO_SMALL``, with the
    exact result all the same; a single node has value 0 and vector [0].

    Args:
        graph: G connected graphs of B nodes, on any device; those that `bridge_components` had to join are ``BRIDGED``.
        q: Pairs, >= 1; those beyond B - 1 are padding (see :class:`FiedlerResult`).
        laplacian: ``combinatorial`` or ``normalized``.
        tolerance: Residual of a pair relative to its eigenvalue, between 0 and 1.
        max_iterations: LOBPCG iterations before the dense fallback, >= 1.
        seed: Seed of the start, >= 0.

    Returns:
        Pairs, residuals and status of each graph, on its device; a graph's own are the same, to the bit, whatever it
        is stacked with.

    Raises:
        UsageError: If an argument is out of range.
        SolverError: If a graph is disconnected: its Fiedler vector would be an arbitrary null vector.
    """
    for what, got, good, expected in (
        ("q", q, q >= 1, "at least 1"),
        ("tolerance", tolerance, 0 < tolerance < 1, "between 0 and 1, both excluded"),
        ("max_iterations", max_iterations, max_iterations >= 1, "at least 1"),
        ("seed", seed, seed >= 0, "0 or more"),
    ):
        if not good:
            raise UsageError(f"{what}: got {got}, expected {expected}")
    parts, _ = label_components(graph)
    if bool((parts > 1).any()):
        g = int((parts > 1).nonzero()[0])
        raise SolverError(
            f"graph {g} has {int(parts[g])} components, expected 1: its Fiedler vector is not defined",
            hint="join them first: gstds_cache.graph.components.bridge_components(graph, x)",
        )
    A = Laplacian(graph, laplacian)
    if graph.nodes == 1:
        return _single_nodes(A, q)
    ritz, fallback = _solve(A, min(max(q, 2), graph.nodes - 1), tolerance, max_iterations, seed)
    return FiedlerResult(
        values=_pad(ritz.values, max(q, 2), torch.inf)[:, :q],
        basis=_pad(canonical_sign(ritz.basis), max(q, 2), 0.0)[..., :q],
        residual=_pad(ritz.residual, max(q, 2), 0.0)[:, :q],
        iterations=ritz.iterations,
        status=_status(ritz, fallback, graph),
        components=graph.component.amax(dim=1) + 1,
    )


def fiedler_of_embeddings(
    x: Float[Tensor, "G B D"],
    *,
    k: int,
    q: int = 2,
    laplacian: str = "combinatorial",
    tolerance: float = 1e-6,
    max_iterations: int = 500,
    seed: int = 0,
    backend: str = "auto",
) -> FiedlerResult:
    """From embeddings to Fiedler vectors: nearest neighbours, union graph, bridges where needed, solve.

    Args:
        x: Finite embeddings of G batches, ``[G, B, D]``, any float dtype and device.
        k: Neighbours per row, >= 1; clipped to B - 1.
        q: Pairs, >= 1.
        laplacian: ``combinatorial`` or ``normalized``.
        tolerance: Residual of a pair relative to its eigenvalue.
        max_iterations: LOBPCG iterations before the dense fallback.
        seed: Seed of the start.
        backend: kNN backend: ``auto``, ``faiss-cpu`` or ``faiss-gpu``.

    Returns:
        As :func:`fiedler_vectors`; where a graph was disconnected, ``BRIDGED`` and the number of its components.

    Raises:
        UsageError: If an argument is out of range.
        SolverError: If a row holds NaN or Inf.
    """
    graph, _ = bridge_components(symmetrise(knn_graph(x, k, backend=backend)), x)
    return fiedler_vectors(
        graph, q=q, laplacian=laplacian, tolerance=tolerance, max_iterations=max_iterations, seed=seed
    )
