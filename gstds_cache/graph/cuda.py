"""Nearest neighbours and union graphs by CUDA kernels, one thread block a graph; nothing waits for the device.

The inner products of all rows of a graph come from cuBLAS, the rest of the graph from one kernel (cuda/graph.cu): the k
nearest of every row, the union of both directions, its components, and the bridges that join them.

Stored float16 rows are multiplied as they are, on tensor cores, and their products divided by the lengths: in float32
the product of two float16 is exact, so that nothing is lost by it. cuBLAS chooses a kernel by the shape of a product.
Products are therefore made in chunks of one shape, which follows from the rows of a graph alone, the last chunk filled
up: so a graph's bits do not depend on the graphs it is stacked with.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cache

import torch
from jaxtyping import Bool, Float, Float32, Int16, Int32
from torch import Tensor

from gstds_cache.cuda import build, launch
from gstds_cache.errors import KernelError
from gstds_cache.graph.components import BRIDGE_FLOOR
from gstds_cache.graph.laplacian import SparseGraph
from gstds_cache.graph.neighbors import KnnGraph, normalized_rows, require_finite, require_rows

LARGEST_GRAPH = 8192  # rows; beyond that a matrix of all similarities takes more memory than it is worth
PLACES = (10, 16, 32)  # neighbours that a variant of the kernel keeps of a row: the least that is enough
LARGEST_K = PLACES[-1]
THREADS = 512
CHUNK = {torch.float16: 32, torch.float32: 8}  # graphs multiplied at once: enough of them to fill a device
CHUNK_ELEMENTS = 1 << 27  # of products, at most
PRODUCT_BYTES = 1 << 30  # of products in memory at once


@dataclass(frozen=True)
class GraphStack:
    """G graphs of B nodes as the kernels write and read them, on their device. Int16 holds the bits of uint16.

    Attributes:
        crow: First edge of every node and one past the last, from 0 in each graph, ``[G, B + 1]`` int32.
        col: Other end of every edge, ascending at each node, ``[G, E]``; there is room for E edges.
        weight: Weight of every edge, ``[G, E]`` float32, > 0.
        components: Components before bridging, ``[G]`` int32; -1 where the edges have no room.
        label: Lowest node of every node's component, ``[G, B]``.
        neighbors: The k nearest of every row, nearest first, ties by lowest index, ``[G, B, k]``; k is 0 where the
            graphs were made from something else.
        similarities: Their cosines, ``[G, B, k]`` float32.
        finite: Whether no row holds NaN or Inf, ``[]`` bool; what graphs hold where one does is undefined.
    """

    crow: Int32[Tensor, "G B1"]
    col: Int16[Tensor, "G E"]
    weight: Float32[Tensor, "G E"]
    components: Int32[Tensor, " G"]
    label: Int16[Tensor, "G B"]
    neighbors: Int16[Tensor, "G B k"]
    similarities: Float32[Tensor, "G B k"]
    finite: Bool[Tensor, ""]

    @property
    def graphs(self) -> int:
        """Stacked graphs, G."""
        return self.label.shape[0]

    @property
    def nodes(self) -> int:
        """Nodes of one graph, B."""
        return self.label.shape[1]

    def part(self, graphs: slice) -> GraphStack:
        """Some of the graphs, as views."""
        parts = {f.name: getattr(self, f.name)[graphs] for f in fields(self) if f.name != "finite"}
        return GraphStack(**parts, finite=self.finite)

    def require_finite(self, x: Float[Tensor, "G B D"]) -> None:
        """Refuse rows that hold NaN or Inf; waits for the device.

        Args:
            x: The rows that the graphs were made from, ``[G, B, D]``.

        Raises:
            SolverError: A row does; the first such graph and its rows are named.
        """
        if not bool(self.finite):
            require_finite(x)

    def knn(self) -> KnnGraph:
        """The nearest neighbours, on the same device."""
        return KnnGraph(neighbors=unsigned(self.neighbors), similarities=self.similarities)

    def on_cpu(self, graphs: Sequence[int]) -> SparseGraph:
        """Some of the graphs as the CPU's functions take them; waits for the device.

        Args:
            graphs: Their numbers, at least one; their edges have room.

        Returns:
            The same edges and weights, on the CPU.
        """
        nodes, which = self.nodes, torch.tensor(graphs)
        crow, components = self.crow.cpu()[which].long(), self.components.cpu()[which]
        edges = crow[:, -1]
        held = torch.arange(self.col.shape[1]) < edges[:, None]
        col = unsigned(self.col[which.to(self.col.device)].cpu()) + nodes * torch.arange(len(graphs))[:, None]
        weight = self.weight[which.to(self.weight.device)].cpu().double()
        first = edges.cumsum(0) - edges
        starts = torch.cat([(crow[:, :-1] + first[:, None]).flatten(), edges.sum()[None]])
        degree = torch.segment_reduce(weight[held], "sum", offsets=starts, initial=0).view(len(graphs), nodes)
        # Components are numbered by their lowest node here, and by the order of these there.
        label = unsigned(self.label.cpu()[which])
        is_lowest = label == torch.arange(nodes)
        number = (is_lowest.cumsum(1) - 1).gather(1, label)
        return SparseGraph(
            crow=starts,
            col=col[held],
            weight=weight[held],
            degree=degree,
            component=torch.where(components[:, None] > 1, number, 0),
        )


def unsigned(x: Int16[Tensor, "*shape"]) -> Tensor:
    """The uint16 whose bits an int16 tensor holds, as int64."""
    return x.to(torch.int64) & 0xFFFF


def places(k: int) -> int:
    """Neighbours of a row that the kernel's variant for k of them keeps."""
    return next(number for number in PLACES if k <= number)


def why_not_graphs(device: torch.device, nodes: int, k: int) -> str:
    """Why the kernel cannot make graphs of this size on a device, in words; empty where it can.

    The kernel is compiled, if it is not in the cache: what has been asked here is ready.

    Args:
        device: Any device.
        nodes: Rows of a graph, B.
        k: Neighbours of a row, as they are asked for: the other rows at most.
    """
    reason = build.why_not(device)
    if reason:
        return reason
    k = max(0, min(k, nodes - 1))
    if nodes > LARGEST_GRAPH or k > LARGEST_K:
        return f"{nodes:,} rows and {k} neighbours are more than {LARGEST_GRAPH:,} and {LARGEST_K}"
    try:
        limit, needed = launch.shared_memory_limit(device), graph_bytes(nodes, places(k), spill=True)
        if needed > limit:
            return f"a block has {limit:,} bytes of shared memory here, and {nodes:,} rows need {needed:,}"
        graph_kernel(device, nodes, k)
    except KernelError as error:
        return error.message
    return ""


def graph_kernel(device: torch.device, nodes: int, k: int) -> tuple[launch.Kernel, bool]:
    """The kernel for graphs of this size, and whether it keeps lists of neighbours in global memory.

    Raises:
        KernelError: It cannot run here.
    """
    held = places(k)
    spill = graph_bytes(nodes, held, spill=False) > launch.shared_memory_limit(device)
    defines = (f"KNN={held}", *(["SPILL"] if spill else []))
    return build.kernel("graph.cu", "graph_block", defines, device=device), spill


def aligned(size: int) -> int:
    """Bytes that an array of ``size`` takes in a block's memory."""
    return -(-size // 16) * 16


def lists_bytes(nodes: int, held: int) -> int:
    """Bytes of a graph's lists of neighbours (cuda/graph.cu: graph_lists_bytes)."""
    return aligned(nodes * held * 2) + aligned(nodes * held * 4) + aligned(nodes * -(-nodes // 32) * 4)


def graph_bytes(nodes: int, held: int, *, spill: bool) -> int:
    """Bytes of shared memory of a block (cuda/graph.cu: graph_bytes).

    Args:
        nodes: Rows, B.
        held: Neighbours kept of a row, of ``PLACES``.
        spill: Whether the lists of neighbours lie in global memory.
    """
    own = 4 * aligned((nodes + 1) * 4) + 3 * aligned(nodes * 2) + aligned(nodes * 4)
    return own if spill else own + lists_bytes(nodes, held)


def chunk_of(nodes: int, dtype: torch.dtype) -> int:
    """Graphs whose products are made at once."""
    return max(1, min(CHUNK[dtype], CHUNK_ELEMENTS // nodes**2))


@cache
def _half_products() -> bool:
    """Whether torch multiplies float16 into float32 (from version 2.8 on, on CUDA)."""
    return hasattr(torch.ops.aten.bmm, "dtype")


def _inner_products(rows: Tensor, out: Float32[Tensor, "C B B"]) -> None:
    if rows.dtype == torch.float32:
        torch.bmm(rows, rows.mT, out=out)
    elif rows.device.type == "cuda" and _half_products():
        torch.bmm(rows, rows.mT, out_dtype=torch.float32, out=out)
    else:
        whole = rows.float()
        torch.bmm(whole, whole.mT, out=out)


def products(rows: Float[Tensor, "G B D"], *, out: Float32[Tensor, "P B B"] | None = None) -> Float32[Tensor, "G B B"]:
    """Inner products of all rows of each graph, in float32.

    Args:
        rows: ``[G, B, D]``, float16 or float32, contiguous.
        out: Where they go: room for G rounded up to whole chunks, of :func:`chunk_of` graphs.

    Returns:
        ``[G, B, B]``, the head of ``out`` where that was given. Each graph's are the same, to the bit, in every stack.
    """
    graphs, nodes, dim = rows.shape
    chunk = chunk_of(nodes, rows.dtype)
    if out is None:
        out = torch.empty(-(-graphs // chunk) * chunk, nodes, nodes, device=rows.device)
    for first in range(0, graphs, chunk):
        part = rows[first : first + chunk]
        if len(part) < chunk:
            filled = rows.new_zeros(chunk, nodes, dim)
            filled[: len(part)] = part
            part = filled
        _inner_products(part, out[first : first + chunk])
    return out[:graphs]


def inverse_lengths(rows: Float[Tensor, "*shape D"]) -> Float32[Tensor, "*shape"]:
    """1 / length of float16 rows, 0 for zero rows, NaN or Inf for rows that hold one, float32.

    The square of no float16 overflows or vanishes in float32.
    """
    length = torch.linalg.vector_norm(rows, dim=-1, dtype=torch.float32)
    return torch.where(length > 0, 1 / length, length).where(length < torch.inf, torch.nan)


def graph_stack(x: Float[Tensor, "G B D"], k: int, *, inverse: Float32[Tensor, "G B"] | None = None) -> GraphStack:
    """Nearest-neighbour graphs of batches of rows, connected, without a wait for the device.

    Args:
        x: Embeddings, ``[G, B, D]``; float16 are multiplied as they are, others scaled to unit length in float32.
        k: Neighbours per row, from 1 to B - 1, at most 32.
        inverse: 1 / length of each float16 row, ``[G, B]``, as :func:`inverse_lengths` has them, where they are known.

    Returns:
        The graphs on the device of ``x``. Call its ``require_finite`` before they are used.

    Raises:
        SolverError: A row that is not float16 holds NaN or Inf.
        KernelError: The kernel cannot run here.
    """
    graphs, nodes, _ = x.shape
    device, held = x.device, places(k)
    finite = torch.ones((), dtype=torch.bool, device=device)
    if x.dtype == torch.float16:
        require_rows(x)
        rows = x.contiguous()
        inverse = inverse_lengths(rows) if inverse is None else inverse.contiguous()
        finite = inverse.isfinite().all()
    else:
        rows, inverse = normalized_rows(x), None
    kernel, spill = graph_kernel(device, nodes, k)
    stack = _empty_stack(graphs, nodes, k, device, finite)
    chunk = chunk_of(nodes, rows.dtype)
    at_once = max(1, PRODUCT_BYTES // (4 * chunk * nodes**2)) * chunk
    room = torch.empty(min(at_once, -(-graphs // chunk) * chunk), nodes, nodes, device=device)
    bridges = nodes - 1  # at most
    ends = torch.empty(min(at_once, graphs), bridges, 2, dtype=torch.int32, device=device)
    values = torch.empty(len(ends), bridges, device=device)
    lists = [torch.empty(len(ends) * lists_bytes(nodes, held), dtype=torch.uint8, device=device)] if spill else []
    for first in range(0, graphs, at_once):
        some = slice(first, min(first + at_once, graphs))
        part = stack.part(some)
        kernel(
            part.graphs,
            min(THREADS, aligned(nodes * 2) * 2),
            graph_bytes(nodes, held, spill=spill),
            nodes,
            k,
            part.col.shape[1],
            bridges,
            products(rows[some], out=room),
            None if inverse is None else inverse[some],
            part.neighbors,
            part.similarities,
            part.crow,
            part.col,
            part.weight,
            part.components,
            part.label,
            ends,
            values,
            *lists,
        )
    return stack


def room_for_edges(nodes: int, k: int) -> int:
    """Edges that a graph of a stack has room for, each direction counted.

    Where no two rows name each other there are 2 B k; the bridges find their room where some do.
    """
    return 2 * nodes * k


def _empty_stack(graphs: int, nodes: int, k: int, device: torch.device, finite: Bool[Tensor, ""]) -> GraphStack:
    def room(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(graphs, *shape, dtype=dtype, device=device)

    edges = room_for_edges(nodes, k)
    return GraphStack(
        crow=room(nodes + 1, dtype=torch.int32),
        col=room(edges, dtype=torch.int16),
        weight=room(edges, dtype=torch.float32),
        components=room(dtype=torch.int32),
        label=room(nodes, dtype=torch.int16),
        neighbors=room(nodes, k, dtype=torch.int16),
        similarities=room(nodes, k, dtype=torch.float32),
        finite=finite,
    )


def nearest_by_kernels(x: Float[Tensor, "G B D"], k: int) -> KnnGraph:
    """The k nearest other rows of each row.

    Args:
        x: Embeddings, ``[G, B, D]``, as :func:`graph_stack` takes them.
        k: Neighbours per row, from 0 to B - 1, at most 32.

    Returns:
        The graphs, on the device of ``x``.

    Raises:
        SolverError: A row holds NaN or Inf.
        KernelError: The kernel cannot run here.
    """
    if k == 0:
        return KnnGraph(
            neighbors=torch.empty(*x.shape[:2], 0, dtype=torch.int64, device=x.device),
            similarities=torch.empty(*x.shape[:2], 0, device=x.device),
        )
    stack = graph_stack(x, k)
    stack.require_finite(x)
    return stack.knn()


def stack_of(graph: SparseGraph) -> GraphStack | None:
    """Sparse graphs as the kernels read them; waits for the device.

    Args:
        graph: G graphs of B nodes.

    Returns:
        The same graphs, on the same device; None where a weight is neither a float32, as cosines are, nor
        the least of a bridge, or where a graph has too many nodes.
    """
    nodes = graph.nodes
    weight = graph.weight.float()
    exact = (weight.double() == graph.weight) | (graph.weight == BRIDGE_FLOOR)
    if nodes > LARGEST_GRAPH or not bool(exact.all()):
        return None
    crow = graph.crow.unfold(0, nodes + 1, nodes)
    first, edges = crow[:, 0], crow[:, -1] - crow[:, 0]
    room = int(edges.amax())
    at = torch.arange(room, device=crow.device) + first[:, None]
    held = at < (first + edges)[:, None]
    at = at.where(held, 0)
    none = torch.empty(graph.graphs, nodes, 0, device=crow.device)
    return GraphStack(
        crow=(crow - first[:, None]).to(torch.int32).contiguous(),
        col=(graph.col[at] - nodes * torch.arange(graph.graphs, device=crow.device)[:, None]).where(held, 0).short(),
        weight=weight[at].where(held, 0),
        components=graph.component.amax(dim=1).to(torch.int32) + 1,
        label=torch.zeros_like(graph.component, dtype=torch.int16),
        neighbors=none.short(),
        similarities=none,
        finite=torch.ones((), dtype=torch.bool, device=crow.device),
    )
