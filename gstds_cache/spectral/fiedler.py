"""Fiedler vectors of many graphs: which solver, what happened, and one result for all."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from gstds_cache.config import SelectConfig
from gstds_cache.cuda.build import log_fallback
from gstds_cache.errors import SolverError, UsageError, in_words
from gstds_cache.graph.components import bridge_components, label_components
from gstds_cache.graph.cuda import graph_stack, room_for_edges
from gstds_cache.graph.knn import nearest, resolve_backend
from gstds_cache.graph.laplacian import Laplacian, SparseGraph, symmetrise
from gstds_cache.graph.neighbors import as_stack, normalized_rows
from gstds_cache.runtime.resources import out_of_memory
from gstds_cache.spectral.block import fiedler_of_stack, rest_on_cpu, solve_graphs, solve_stack, why_not_solved
from gstds_cache.spectral.compiled import block_size, lobpcg_compiled
from gstds_cache.spectral.dense import iterate, solve_dense
from gstds_cache.spectral.lobpcg import lobpcg
from gstds_cache.spectral.result import FiedlerResult, Ritz, result_of
from gstds_cache.spectral.status import Status

DENSE_BY_DESIGN = 32  # rows up to which a dense solve is quicker than starting an iteration


def _solve(
    A: Laplacian, q: int, *, tolerance: float, max_iterations: int, seed: int, start: Tensor | None, threads: int
) -> tuple[Ritz, Bool[Tensor, " G"]]:
    """Solve by the method that fits, and tell which graphs took the dense fallback."""
    device, nodes = A.diagonal.device, A.graph.nodes
    if nodes <= max(DENSE_BY_DESIGN, 3 * block_size(q)):
        return solve_dense(A, q, tolerance=tolerance), torch.zeros(A.graph.graphs, dtype=torch.bool, device=device)
    options: dict[str, Any] = {"tolerance": tolerance, "max_iterations": max_iterations, "seed": seed}
    if start is None:
        reason = why_not_solved(device, nodes, q, A.graph.col.numel() // A.graph.graphs)
        ritz = None if reason else solve_graphs(A.graph, q, laplacian=A.kind, **options)
        if ritz is not None:
            return ritz, rest_on_cpu(ritz, A.graph.subset, A.kind, threads=threads, **options)
        log_fallback(device, reason)
    solver = partial(lobpcg_compiled, threads=threads) if device.type == "cpu" else lobpcg
    return iterate(A, q, partial(solver, start=start, **options), tolerance=tolerance)


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


def _check_options(q: int, tolerance: float, max_iterations: int, seed: int, threads: int | None) -> None:
    for what, got, good, expected in (
        ("q", q, q >= 1, "at least 1"),
        ("tolerance", tolerance, 0 < tolerance < 1, "between 0 and 1, both excluded"),
        ("max_iterations", max_iterations, max_iterations >= 1, "at least 1"),
        ("seed", seed, seed >= 0, "0 or more"),
        ("threads", threads, threads is None or threads >= 1, "at least 1"),
    ):
        if not good:
            raise UsageError(f"{what}: got {got}, expected {expected}")


def fiedler_of_graph(
    graph: SparseGraph,
    *,
    q: int = 1,
    laplacian: str = SelectConfig.laplacian,
    tolerance: float = SelectConfig.tolerance,
    max_iterations: int = SelectConfig.max_iterations,
    seed: int = 0,
    start: Float64[Tensor, "G B q"] | None = None,
    threads: int | None = None,
) -> FiedlerResult:
    """Find the lowest nontrivial eigenpairs of every connected graph's Laplacian.

    LOBPCG, then a dense solve of the graphs on which it did not converge (``DENSE_FALLBACK``; ``MAX_ITERATIONS`` goes
    unless that fails too, or B > 8192). Graphs of up to 32 nodes are solved densely by design, without a flag, and so
    are those too small for the block size. A second pair is always looked at, so that the eigengap is known: where it
    is at most 1e-3 of the second eigenvalue the graph is ``DEGENERATE``. Fewer than 4 nodes are ``TOO_SMALL``, with the
    exact result all the same; a single node has value 0 and vector [0].

    Args:
        graph: G connected graphs of B nodes, on any device; those that `bridge_components` had to join are ``BRIDGED``.
        q: Pairs, >= 1; those beyond B - 1 are padding (see :class:`FiedlerResult`).
        laplacian: ``combinatorial`` or ``normalized``.
        tolerance: Residual of a pair relative to its eigenvalue, between 0 and 1.
        max_iterations: LOBPCG iterations before the dense fallback, >= 1.
        seed: Seed of the start, >= 0.
        start: Vectors to start from, if some are known, such as those of a graph that was nearly the same.
        threads: CPU threads, over which the graphs are spread; as many as torch uses by default.

    Returns:
        Pairs, residuals and status of each graph, on its device; a graph's own are the same, to the bit, whatever it
        is stacked with and however many threads there are.

    Raises:
        UsageError: If an argument is out of range.
        SolverError: If a graph is disconnected: its Fiedler vector would be an arbitrary null vector.
    """
    _check_options(q, tolerance, max_iterations, seed, threads)
    parts, _ = label_components(graph)
    if bool((parts > 1).any()):
        g = int((parts > 1).nonzero()[0])
        raise SolverError(
            f"graph {g} has {int(parts[g])} components, expected 1: its Fiedler vector is not defined",
            hint="join them first: gstds_cache.graph.components.bridge_components(graph, rows)",
        )
    A = Laplacian(graph, laplacian)
    if graph.nodes == 1:
        return _single_nodes(A, q)
    pairs = min(q, graph.nodes - 1)
    ritz, fallback = _solve(
        A,
        pairs,
        tolerance=tolerance,
        max_iterations=max_iterations,
        seed=seed,
        start=start if start is None else start[..., :pairs],
        threads=threads or torch.get_num_threads(),
    )
    return result_of(ritz, q, fallback, graph.component.amax(dim=1) + 1)


def fiedler_vectors(
    x: Float[Tensor, "*G B D"] | Float[np.ndarray, "*G B D"],
    *,
    k: int = 10,
    q: int = 1,
    laplacian: str = SelectConfig.laplacian,
    tolerance: float = SelectConfig.tolerance,
    max_iterations: int = SelectConfig.max_iterations,
    seed: int = 0,
    backend: str = "auto",
    device: str | None = None,
    threads: int | None = None,
) -> FiedlerResult:
    """The Fiedler vector of each batch of rows: a nearest-neighbour graph, its Laplacian, its lowest eigenpairs.

    The Fiedler vector orders the rows so that neighbours are close to each other: its sign cuts the graph in two where
    that is cheapest. Edges weigh max(0, cosine), a graph is the union of both directions, and disconnected graphs are
    joined by their strongest similarities (``BRIDGED``).

    ::

        result = fiedler_vectors(torch.randn(8, 512, 64), k=10)
        result.vector           # [8, 512] float64
        result.values[:, 0]     # [8] algebraic connectivities
        Status(int(result.status[0])).describe()

    Args:
        x: Finite embeddings of G batches, ``[G, B, D]``, or of one, ``[B, D]``; any float dtype.
        k: Neighbours per row, >= 1; clipped to B - 1.
        q: Pairs, >= 1.
        laplacian: ``combinatorial`` (D - W) or ``normalized``.
        tolerance: Residual of a pair relative to its eigenvalue.
        max_iterations: LOBPCG iterations before the dense fallback.
        seed: Seed of the start.
        backend: kNN backend: ``auto``, ``cuda``, ``torch``, ``faiss-cpu`` or ``faiss-gpu``.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``; where ``x`` is by default.
        threads: CPU threads of the solver; as many as torch uses by default.

    Returns:
        As :func:`fiedler_of_graph`; where a graph was disconnected, ``BRIDGED`` and the number of its components.

    Raises:
        UsageError: If an argument is out of range.
        SolverError: If a row holds NaN or Inf.
        RuntimeError: If something else than memory fails on a GPU.
    """
    batches = as_stack(x, device)
    _check_options(q, tolerance, max_iterations, seed, threads)
    options: dict[str, Any] = {
        "laplacian": laplacian,
        "tolerance": tolerance,
        "max_iterations": max_iterations,
        "seed": seed,
    }
    _, nodes, _ = batches.shape
    name = resolve_backend(backend, batches.device, nodes, k)
    if (
        name == "cuda"
        and k >= 1
        and nodes > DENSE_BY_DESIGN
        and not why_not_solved(*(batches.device, nodes, q, room_for_edges(nodes, min(k, nodes - 1))))
    ):
        try:
            graphs = graph_stack(batches, min(k, nodes - 1))
            return fiedler_of_stack(graphs, solve_stack(graphs, q, **options), batches, threads=threads, **options)
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            log_fallback(batches.device, in_words(error))
        return fiedler_vectors(batches.cpu(), k=k, q=q, threads=threads, **options).to(batches.device)
    rows = normalized_rows(batches)
    graph, _ = bridge_components(symmetrise(nearest(rows, k, backend=name)), rows)
    return fiedler_of_graph(graph, q=q, threads=threads, **options)
