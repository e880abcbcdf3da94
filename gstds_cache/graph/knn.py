"""Cosine nearest neighbours within each batch.

A backend is a function from unit rows ``[G, B, D]`` and k to the k nearest other rows of each row: largest similarity
first, ties by lowest index, also at the last place. What it takes to be equal is its own float32.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int32, Int64
from torch import Tensor

from gstds_cache.cuda.build import log_fallback
from gstds_cache.errors import UsageError, in_words, unknown_name
from gstds_cache.graph import faiss_search
from gstds_cache.graph.compiled import nearest_in_rows
from gstds_cache.graph.cuda import nearest_by_kernels, why_not_graphs
from gstds_cache.graph.neighbors import Candidates, KnnGraph, as_stack, normalized_rows
from gstds_cache.runtime.resources import out_of_memory

Search = Callable[[Float32[Tensor, "G B D"], int], Candidates]
Nearest = Callable[[Float32[Tensor, "G B D"], int], KnnGraph]

BLOCK_BYTES = 256 << 20
"""Of similarities at once, in the torch backend."""


def top_k(
    similarity: Float32[Tensor, "G B c"], index: Int64[Tensor, "G B c"], k: int
) -> tuple[KnnGraph, Bool[Tensor, " G"]]:
    """The k nearest of more candidates: ordered by (largest similarity, lowest index), without the row itself.

    Exact duplicates can stand before the row itself, and can push it off the list altogether. Both numbers make one
    integer to sort by, since on a GPU a sort of a stack takes longer than everything else here.

    Args:
        similarity: Similarities of each row's candidates, ``[G, B, c]`` float32, in any order; k < c.
        index: Their row numbers, ``[G, B, c]`` int64.
        k: How many to take.

    Returns:
        The graphs, similarities clipped to [-1, 1]; and in which of them the last candidate of a row is equal to the
        last one taken, so that rows that are no candidates may be as near.
    """
    similarity = similarity.clamp(-1, 1) + 0  # no -0
    own = index == torch.arange(index.shape[1], device=index.device)[:, None]
    falling = ~_rising(similarity.view(torch.int32)).to(torch.int64)
    order = (falling << 32 | index).masked_fill_(own, torch.iinfo(torch.int64).max).sort(dim=2).values[..., :k]
    taken = _rising((~order >> 32).to(torch.int32)).view(torch.float32)
    if k:
        open_end = (taken[..., -1] == similarity.amin(dim=2)).any(dim=1)
    else:
        open_end = torch.zeros(len(index), dtype=torch.bool, device=index.device)
    return KnnGraph(neighbors=order & 0xFFFFFFFF, similarities=taken), open_end


def _rising(bits: Int32[Tensor, "*any"]) -> Int32[Tensor, "*any"]:
    """Integers in the order of the float32 numbers that have these bits; of such an integer the bits again."""
    return bits ^ (bits >> 31 & 0x7FFFFFFF)


def by_candidates(search: Search, rows: Float32[Tensor, "G B D"], k: int, largest: int | None = None) -> KnnGraph:
    """The k nearest by a search that chooses among equals as it likes.

    It is asked for one candidate more than are needed, to see whether that is equal to the last one taken; if it is,
    for twice as many, until all equals are there. A stack without such ties is waited for once.

    Args:
        search: The search, itself included among a row's candidates.
        rows: Unit rows, ``[G, B, D]`` float32.
        k: Neighbours per row, from 0 to B - 1.
        largest: More candidates than this the search cannot find; then all similarities are computed.

    Returns:
        The graphs.
    """
    nodes = rows.shape[1]
    candidates = min(nodes, k + 2)
    if largest is not None and candidates > largest:
        search, largest = search_torch, None
    found, open_end = top_k(*search(rows, candidates), k)
    unresolved = torch.arange(len(rows), device=rows.device)
    while candidates < nodes and len(unresolved := unresolved[open_end]):
        candidates = min(2 * candidates, nodes)
        if largest is not None and candidates > largest:
            search, largest = search_torch, None
        again, open_end = top_k(*search(rows[unresolved], candidates), k)
        found.neighbors[unresolved], found.similarities[unresolved] = again.neighbors, again.similarities
    return found


def _products(some: Float32[Tensor, "G b D"], rows: Float32[Tensor, "G B D"]) -> Float32[Tensor, "G b B"]:
    """Inner products within each graph, one graph at a time: cuBLAS sums a stack's in another order than one's own."""
    out = torch.empty(len(rows), some.shape[1], rows.shape[1], device=rows.device)
    for one, graph, products in zip(some, rows, out, strict=True):
        torch.mm(one, graph.T, out=products)
    return out


def search_torch(rows: Float32[Tensor, "G B D"], candidates: int) -> Candidates:
    """The largest inner products by matrix products and, of a stack of them, ``topk``.

    Args:
        rows: Unit rows, ``[G, B, D]`` float32, any device. So many graphs, or rows of one, are multiplied at once that
            the similarities stay within ``BLOCK_BYTES``.
        candidates: Rows to find, self included, at most B.

    Returns:
        Similarities ``[G, B, candidates]`` float32 and row numbers int64, on the device of ``rows``.
    """
    graphs, nodes, _ = rows.shape
    at_once = max(1, BLOCK_BYTES // (4 * nodes * nodes))
    rows_at_once = max(1, min(nodes, BLOCK_BYTES // (4 * nodes)))
    stacks = []
    for g in range(0, graphs, at_once):
        stack = rows[g : g + at_once]
        parts = [
            _products(stack[:, first : first + rows_at_once], stack).topk(candidates, dim=2)
            for first in range(0, nodes, rows_at_once)
        ]
        stacks.append([torch.cat(part, dim=1) for part in zip(*parts, strict=True)])
    similarity, index = (torch.cat(part) for part in zip(*stacks, strict=True))
    return similarity, index


def nearest_by_torch(rows: Float32[Tensor, "G B D"], k: int) -> KnnGraph:
    """All similarities by matrix products, and the largest of each row: ``topk`` on CUDA, compiled on a CPU.

    On a CPU one graph, or so many rows of one that their similarities stay within ``BLOCK_BYTES``, are multiplied at a
    time, so that the products are still in the cache when they are read; and by NumPy, which sees that a whole graph's
    product with itself is symmetric and computes half of it (4.1 against 6.6 ms with one thread, B = 512, D = 1,280).

    Args:
        rows: Unit rows, ``[G, B, D]`` float32, any device.
        k: Neighbours per row, from 0 to B - 1.

    Returns:
        The graphs, on the device of ``rows``.
    """
    if rows.device.type != "cpu":
        return by_candidates(search_torch, rows, k)
    graphs, nodes, _ = rows.shape
    neighbors = torch.empty(graphs, nodes, k, dtype=torch.int64)
    similarities = torch.empty(graphs, nodes, k, dtype=torch.float32)
    at_once = max(1, min(nodes, BLOCK_BYTES // (4 * nodes)))
    block = np.empty((at_once, nodes), np.float32)
    for g in range(graphs if k else 0):
        graph = rows[g].numpy()
        for first in range(0, nodes, at_once):
            part = slice(first, min(first + at_once, nodes))
            product = np.matmul(graph[part], graph.T, out=block[: part.stop - first])
            nearest_in_rows(product, first, neighbors[g, part].numpy(), similarities[g, part].numpy())
    return KnnGraph(neighbors=neighbors, similarities=similarities)


BACKENDS: dict[str, Nearest] = {
    "cuda": nearest_by_kernels,
    "faiss-cpu": lambda rows, k: by_candidates(faiss_search.search_faiss_cpu, rows, k),
    "faiss-gpu": lambda rows, k: by_candidates(faiss_search.search_faiss_gpu, rows, k, faiss_search.LARGEST_K),
    "torch": nearest_by_torch,
}


def resolve_backend(name: str, device: torch.device, nodes: int, k: int) -> str:
    """Turn a name into a backend that can run here.

    Args:
        name: ``auto`` or a key of ``BACKENDS``.
        device: Where the embeddings are.
        nodes: Rows of a graph, of the largest one.
        k: Neighbours per row.

    Returns:
        A key of ``BACKENDS``. ``auto`` is, for embeddings on CUDA, cuda up to 8,192 rows and 32 neighbours, else
        faiss-gpu where faiss sees a GPU, else torch; on a CPU torch, which took a quarter to a half of the time of
        faiss (benchmarks/results/knn.json).

    Raises:
        UsageError: If the name is unknown, or cuda or a backend of faiss is asked for by name where it cannot run.
    """  # noqa: DOC501
    if name == "auto":
        if device.type != "cuda":
            return "torch"
        reason = why_not_graphs(device, nodes, k)
        log_fallback(device, reason)
        return ("faiss-gpu" if faiss_search.gpus() > 0 else "torch") if reason else "cuda"
    if name not in BACKENDS:
        raise unknown_name("kNN backend", name, ("auto", *BACKENDS))
    if name.startswith("faiss-"):
        faiss_search.require_faiss(name)
    if name == "cuda" and (reason := why_not_graphs(device, nodes, k)):
        raise UsageError(f"cuda was asked for as kNN backend, which cannot run: {reason}", hint="choose auto")
    return name


def nearest(rows: Float[Tensor, "G B D"], k: int, *, backend: str = "auto") -> KnnGraph:
    """:func:`knn_graph` of rows that have unit length already, as :func:`~.neighbors.normalized_rows` makes them.

    Args:
        rows: Unit rows, ``[G, B, D]`` float32; of any length for the backend cuda.
        k: Neighbours per row, >= 1; clipped to B - 1.
        backend: As :func:`knn_graph` takes it.

    Returns:
        The graphs, on the device of ``rows``.

    Raises:
        UsageError: If ``k`` < 1, or the backend is unknown or cannot run here.
        RuntimeError: A device's memory is too small for a backend other than cuda, of which the CPU takes over; or what
            else fails on a device.
    """
    _require_neighbors(k)
    _, nodes, _ = rows.shape
    name = resolve_backend(backend, rows.device, nodes, k)
    k = min(k, nodes - 1)
    try:
        return BACKENDS[name](rows, k)
    except RuntimeError as error:
        if name != "cuda" or not out_of_memory(error):
            raise
        log_fallback(rows.device, in_words(error))
    return nearest_by_torch(normalized_rows(rows.cpu()), k).to(rows.device)


def _require_neighbors(k: int) -> None:
    if k < 1:
        raise UsageError(f"`k`: got {k}, expected at least 1", hint="neighbours of each row, e.g. `k=10`")


def knn_graph(
    x: Float[Tensor, "*G B D"] | Float[np.ndarray, "*G B D"],
    k: int,
    *,
    backend: str = "auto",
    device: str | None = None,
) -> KnnGraph:
    """Find the ``k`` most similar other rows of every row, by cosine, within each graph.

    A graph's result does not depend on the graphs it is stacked with. Of rows that are equally similar, in the
    backend's float32, the one with the lowest index comes first, also where not all of them fit.

    Args:
        x: Embeddings of G batches, ``[G, B, D]``, or of one, ``[B, D]``; any float dtype, NumPy or torch; normalised
            here in float32. Zero rows have similarity 0 to everything.
        k: Neighbours per row, >= 1; clipped to B - 1.
        backend: ``auto``, ``cuda``, ``torch``, ``faiss-cpu`` or ``faiss-gpu``.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``; where ``x`` is by default.

    Returns:
        Neighbours and similarities, ``[G, B, min(k, B - 1)]``, on that device.

    Raises:
        UsageError: If ``k`` < 1, ``x`` is empty, or the backend is unknown or cannot run here.
        SolverError: If a row holds NaN or Inf.
    """
    _require_neighbors(k)
    stack = as_stack(x, device)
    name = resolve_backend(backend, stack.device, stack.shape[1], k)
    return nearest(stack if name == "cuda" else normalized_rows(stack), k, backend=name)
