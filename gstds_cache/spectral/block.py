"""LOBPCG by a CUDA kernel, one thread block a graph (cuda/solve.cu); nothing waits for the device.

The letters, the convergence criterion and the guarantees are those of spectral/lobpcg.py. What is different:

    * The preconditioner is a Chebyshev polynomial in D^-1 A, of a degree that rises with the iterations: products
      alone, and the upper end of the spectrum is known. It takes fewer iterations than Jacobi or Gauss-Seidel.
    * The iterate is float64, and so is every sum; directions and residuals are float32, which costs iterations at most.
    * A graph that does not converge says so, and is solved on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import lru_cache, partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Float64, Int32
from torch import Tensor

from gstds_cache.config import SelectConfig
from gstds_cache.cuda import build, launch
from gstds_cache.errors import KernelError
from gstds_cache.graph.components import bridge_components
from gstds_cache.graph.cuda import LARGEST_GRAPH, GraphStack, aligned, stack_of, unsigned
from gstds_cache.graph.laplacian import Laplacian, SparseGraph, symmetrise
from gstds_cache.graph.neighbors import KnnGraph, normalized_rows
from gstds_cache.seeding import rng_for
from gstds_cache.spectral.compiled import block_size, lobpcg_compiled
from gstds_cache.spectral.dense import iterate, replace_pairs
from gstds_cache.spectral.result import FiedlerResult, Ritz, result_of

THREADS = 256
LARGEST_Q = 16  # more pairs than that do not fit into a block
SUMS_AT_ONCE, CHUNKS = 32, 32  # as in cuda/solve.cu and cuda/block.cuh
WORKSPACE_BYTES = 1 << 30  # at most, where graphs do not fit into shared memory


@dataclass(frozen=True)
class BlockRitz:
    """Approximate eigenpairs of G graphs as the kernel writes them, on its device.

    Attributes:
        values: Ritz values, ascending, ``[G, Q]`` float64.
        basis: Ritz vectors of unit length, ``[G, Q, B]`` float64.
        residual: ``||L v - value v|| / value``, ``[G, Q]`` float64.
        second: Second nontrivial Ritz value, ``[G]`` float64.
        iterations: Iterations taken, ``[G]`` int32.
        converged: 1; 0 where the residuals did not reach the tolerance; -1 where the graph has no room. ``[G]`` int32.
    """

    values: Float64[Tensor, "G Q"]
    basis: Float64[Tensor, "G Q B"]
    residual: Float64[Tensor, "G Q"]
    second: Float64[Tensor, " G"]
    iterations: Int32[Tensor, " G"]
    converged: Int32[Tensor, " G"]

    def ritz(self) -> Ritz:
        """The same as every solver returns it; where a graph had no room its values are undefined."""
        return Ritz(
            values=self.values,
            basis=self.basis.mT,
            residual=self.residual,
            second=self.second,
            iterations=self.iterations.long(),
            converged=self.converged == 1,
        )


def solve_bytes(nodes: int, edges: int, m: int, *, normalized: bool) -> int:
    """Bytes that solving one graph takes, of shared memory if they fit (cuda/solve.cu: fiedler_bytes).

    Args:
        nodes: Nodes, B.
        edges: Edges that there is room for, each direction counted.
        m: Vectors in the block.
        normalized: Whether it is the normalized Laplacian.
    """
    k = 3 * m
    sizes = [nodes * m * 8, nodes * 8, *[k * k * 8] * 2, *[k * 8] * 2, k * m * 8, *[m * 8] * 2, (2 * m + 4) * 8]
    sizes += [*[nodes * m * 4] * 2, *[max(nodes * m, 2 * k * k) * 4] * 2]
    sizes += [edges * 4, nodes * 4, (nodes + 1) * 4, edges * 2, nodes * 2]
    sizes += [nodes * 8] * 2 if normalized else []
    sizes += [(k * k + min(k * m, SUMS_AT_ONCE) * CHUNKS) * 8]
    return sum(map(aligned, sizes))


def why_not_solved(device: torch.device, nodes: int, q: int, edges: int = 0) -> str:
    """Why the kernel cannot solve graphs of this size on a device, in words; empty where it can.

    The kernel is compiled, if it is not in the cache, and so is its variant for graphs that shared memory does not hold
    where these are such.

    Args:
        device: Any device.
        nodes: Nodes of a graph, B.
        q: Pairs wanted.
        edges: Edges that there is room for, each direction counted.
    """
    reason = build.why_not(device)
    if reason:
        return reason
    if q > LARGEST_Q or nodes > LARGEST_GRAPH:
        return f"{q} eigenvectors of {nodes:,} nodes are more than {LARGEST_Q} and {LARGEST_GRAPH:,}"
    if 3 * block_size(q) >= nodes:
        return f"{q} eigenvectors of {nodes} nodes leave no room for an iteration"
    m = block_size(q)
    try:
        solve_kernel(device, m, spill=False)
        if solve_bytes(nodes, edges, m, normalized=True) > launch.shared_memory_limit(device):
            solve_kernel(device, m, spill=True)
    except KernelError as error:
        return error.message
    return ""


def solve_kernel(device: torch.device, m: int, *, spill: bool) -> launch.Kernel:
    """The kernel for blocks of m vectors.

    Args:
        device: A CUDA device.
        m: Vectors, even.
        spill: Whether what does not fit into shared memory lies in global memory.

    Raises:
        KernelError: It cannot run here.
    """
    return build.kernel("solve.cu", "fiedler_block", (f"M={m}", *(["SPILL"] if spill else [])), device=device)


@lru_cache(maxsize=16)
def _start(nodes: int, m: int, seed: int, device: torch.device) -> Float64[Tensor, "B m"]:
    return torch.from_numpy(rng_for(seed, "lobpcg").standard_normal((nodes, m))).to(device)


def solve_stack(
    stack: GraphStack, q: int, *, laplacian: str, tolerance: float, max_iterations: int, seed: int
) -> BlockRitz:
    """Find the ``q`` lowest nontrivial eigenpairs of every graph's Laplacian, without a wait for the device.

    Args:
        stack: G connected graphs of B nodes.
        q: Pairs wanted, for which :func:`why_not_solved` has no reason.
        laplacian: ``combinatorial`` or ``normalized``.
        tolerance: Residual of a pair relative to its eigenvalue.
        max_iterations: Iterations after which a graph is returned as it is.
        seed: Seed of the start, the same for every graph.

    Returns:
        Pairs on the device of ``stack``. A graph's are the same, to the bit, in every stack with room for as many
        edges.

    Raises:
        KernelError: The kernel cannot run here.
    """
    graphs, nodes, device, m = stack.graphs, stack.nodes, stack.crow.device, block_size(q)
    edges, normalized = stack.col.shape[1], laplacian == "normalized"
    needed, limit = solve_bytes(nodes, edges, m, normalized=normalized), launch.shared_memory_limit(device)
    spill = needed > limit
    kernel = solve_kernel(device, m, spill=spill)
    at_once = max(1, min(graphs, WORKSPACE_BYTES // needed)) if spill else graphs
    workspace = torch.empty(at_once * needed, dtype=torch.uint8, device=device) if spill else None
    shared = min(needed, limit)
    start = _start(nodes, m, seed, device)

    def room(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.empty(graphs, *shape, dtype=dtype, device=device)

    ritz = BlockRitz(
        values=room(q),
        basis=room(q, nodes),
        residual=room(q),
        second=room(),
        iterations=room(dtype=torch.int32),
        converged=room(dtype=torch.int32),
    )
    for first in range(0, graphs, max(1, at_once)):
        some = slice(first, first + at_once)
        part, out = stack.part(some), [getattr(ritz, field.name)[some] for field in fields(ritz)]
        kernel(
            part.graphs,
            THREADS,
            shared,
            nodes,
            q,
            edges,
            int(normalized),
            float(tolerance),
            max_iterations,
            shared,
            workspace,
            part.crow,
            part.col,
            part.weight,
            start,
            *out,
        )
    return ritz


def solve_graphs(graph: SparseGraph, q: int, **options: Any) -> Ritz | None:
    """:func:`solve_stack` of sparse graphs; waits for the device.

    Args:
        graph: G connected graphs, on a device where the kernel runs.
        q: Pairs wanted.
        **options: As :func:`solve_stack` takes them.

    Returns:
        Pairs; a graph's are the same, to the bit, in every stack. None where a weight is no float32.

    Raises:
        KernelError: The kernel cannot run here.
    """
    edges = (graph.crow[graph.nodes :: graph.nodes] - graph.crow[: -graph.nodes : graph.nodes]).tolist()
    m, normalized = block_size(q), options["laplacian"] == "normalized"
    limit = launch.shared_memory_limit(graph.crow.device)
    # Which variant solves a graph follows from its own size, or its bits would depend on the stack.
    far = [solve_bytes(graph.nodes, count, m, normalized=normalized) > limit for count in edges]
    parts: list[tuple[list[int], Ritz]] = []
    for spill in sorted(set(far)):
        which = [g for g, spills in enumerate(far) if spills is spill]
        stack = stack_of(graph if len(which) == len(edges) else graph.subset(which))
        if stack is None:
            return None
        parts.append((which, solve_stack(stack, q, **options).ritz()))
    if len(parts) == 1:
        return parts[0][1]
    order = torch.tensor([g for which, _ in parts for g in which], device=graph.crow.device).argsort()
    return Ritz(**{f.name: torch.cat([getattr(ritz, f.name) for _, ritz in parts])[order] for f in fields(Ritz)})


def rest_on_cpu(
    ritz: Ritz, graphs: Callable[[list[int]], SparseGraph], kind: str, *, threads: int, **options: Any
) -> Bool[Tensor, " G"]:
    """Solve on the CPU the graphs that did not converge, and only those; waits for the device.

    Args:
        ritz: What the kernel found, in which theirs are replaced.
        graphs: Gives some of the graphs, on any device.
        kind: Kind of the Laplacian.
        threads: CPU threads.
        **options: Tolerance, limit of iterations and seed.

    Returns:
        Which graphs took the dense fallback.
    """
    fallback = torch.zeros_like(ritz.converged)
    again: list[int] = (~ritz.converged).nonzero().flatten().tolist()
    if again:
        solver = partial(lobpcg_compiled, threads=threads, **options)
        q = ritz.values.shape[1]
        other, dense = iterate(Laplacian(graphs(again).cpu(), kind), q, solver, tolerance=options["tolerance"])
        replace_pairs(ritz, again, other)
        ritz.iterations[again] = other.iterations.to(ritz.iterations.device)
        fallback[again] = dense.to(fallback.device)
    return fallback


def fiedler_of_stack(
    stack: GraphStack,
    solved: BlockRitz,
    x: Float[Tensor, "G B D"],
    *,
    laplacian: str = SelectConfig.laplacian,
    tolerance: float = SelectConfig.tolerance,
    max_iterations: int = SelectConfig.max_iterations,
    seed: int = 0,
    threads: int | None = None,
) -> FiedlerResult:
    """What the kernels found, finished: the graphs that did not converge, and only those, are solved on the CPU.

    This waits for the device, once to learn which graphs these are.

    Args:
        stack: Graphs, as :func:`~gstds_cache.graph.cuda.graph_stack` made them.
        solved: Their pairs, as :func:`~gstds_cache.spectral.block.solve_stack` found them.
        x: The rows that the graphs were made from, ``[G, B, D]``.
        laplacian: As it was solved for, and so are ``tolerance``, ``max_iterations`` and ``seed``.
        tolerance: Residual of a pair relative to its eigenvalue.
        max_iterations: LOBPCG iterations before the dense fallback.
        seed: Seed of the start.
        threads: CPU threads; as many as torch uses by default.

    Returns:
        As :func:`~gstds_cache.spectral.fiedler.fiedler_of_graph`, on the device of ``stack``.

    Raises:
        SolverError: A row holds NaN or Inf.
    """
    stack.require_finite(x)
    ritz, components = solved.ritz(), stack.components.long()

    def graphs(some: list[int]) -> SparseGraph:
        made = _sparse(stack, x, some)
        components[some] = (made.component.amax(dim=1) + 1).to(components.device)
        return made

    fallback = rest_on_cpu(
        ritz,
        graphs,
        laplacian,
        threads=threads or torch.get_num_threads(),
        tolerance=tolerance,
        max_iterations=max_iterations,
        seed=seed,
    )
    return result_of(ritz, ritz.values.shape[1], fallback, components)


def _sparse(stack: GraphStack, x: Float[Tensor, "G B D"], graphs: list[int]) -> SparseGraph:
    """Some of a stack's graphs on the CPU; made there from their neighbours where the edges had no room."""
    if bool((stack.components[graphs] > 0).all()):
        return stack.on_cpu(graphs)
    knn = KnnGraph(neighbors=unsigned(stack.neighbors[graphs]).cpu(), similarities=stack.similarities[graphs].cpu())
    return bridge_components(symmetrise(knn), normalized_rows(x[graphs].cpu()))[0]
