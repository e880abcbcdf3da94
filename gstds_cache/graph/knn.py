"""Cosine nearest neighbours within each batch. The only file that imports faiss.

A backend is a function from unit rows ``[G, B, D]`` and k to the k nearest other rows of each row: largest similarity
first, ties by lowest index, also at the last place. What it takes to be equal is its own float32.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import faiss
import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int64
from torch import Tensor

from gstds_cache.errors import UsageError, in_words, unknown_name
from gstds_cache.graph.compiled import nearest_in_rows
from gstds_cache.graph.cuda import log_fallback, nearest_by_kernels, why_not_graphs
from gstds_cache.graph.neighbors import KnnGraph, as_stack, normalized_rows

Candidates = tuple[Float32[Tensor, "G B c"], Int64[Tensor, "G B c"]]
Search = Callable[[Float32[Tensor, "G B D"], int], Candidates]
Nearest = Callable[[Float32[Tensor, "G B D"], int], KnnGraph]

FAISS_GPU_LARGEST_K = 2048  # GPU_MAX_SELECTION_K of faiss
BLOCK_BYTES = 256 << 20
"""Of similarities at once, in the torch backend."""


def top_k(
    similarity: Float32[Tensor, "G B c"], index: Int64[Tensor, "G B c"], k: int
) -> tuple[KnnGraph, Bool[Tensor, " G"]]:
    """The k nearest of more candidates: ordered by (largest similarity, lowest index), without the row itself.

    Exact duplicates can stand before the row itself, and can push it off the list altogether.

    Args:
        similarity: Similarities of each row's candidates, ``[G, B, c]`` float32, in any order; k < c.
        index: Their row numbers, ``[G, B, c]`` int64.
        k: How many to take.

    Returns:
        The graphs, similarities clipped to [-1, 1]; and in which of them the last candidate of a row is equal to the
        last one taken, so that rows that are no candidates may be as near.
    """
    similarity = similarity.clamp(-1, 1)
    index, by_index = index.sort(dim=2)
    similarity, by_similarity = similarity.gather(2, by_index).sort(dim=2, descending=True, stable=True)
    index = index.gather(2, by_similarity)
    graphs, nodes, candidates = index.shape
    own = index == torch.arange(nodes, device=index.device)[:, None]
    own[..., -1] |= ~own.any(dim=2)
    last = similarity[..., -1]
    others = (graphs, nodes, candidates - 1)
    similarity, index = similarity[~own].view(others)[..., :k], index[~own].view(others)[..., :k]
    open_end = (similarity[..., -1] == last).any(dim=1) if k else torch.zeros_like(last[:, 0], dtype=torch.bool)
    return KnnGraph(neighbors=index.contiguous(), similarities=similarity.contiguous()), open_end


def by_candidates(search: Search, rows: Float32[Tensor, "G B D"], k: int, largest: int | None = None) -> KnnGraph:
    """The k nearest by a search that chooses among equals as it likes.

    It is asked for one candidate more than are needed, to see whether that is equal to the last one taken; if it is,
    for twice as many, until all equals are there.

    Args:
        search: The search, itself included among a row's candidates.
        rows: Unit rows, ``[G, B, D]`` float32.
        k: Neighbours per row, from 0 to B - 1.
        largest: More candidates than this the search cannot find; then all similarities are computed.

    Returns:
        The graphs.
    """
    graphs, nodes, _ = rows.shape
    neighbors = torch.empty(graphs, nodes, k, dtype=torch.int64, device=rows.device)
    similarities = torch.empty(graphs, nodes, k, dtype=torch.float32, device=rows.device)
    unresolved = torch.arange(graphs, device=rows.device)
    candidates = min(nodes, k + 2)
    while len(unresolved):
        if largest is not None and candidates > largest:
            search, largest = search_torch, None
        taken, open_end = top_k(*search(rows[unresolved], candidates), k)
        neighbors[unresolved], similarities[unresolved] = taken.neighbors, taken.similarities
        unresolved = unresolved[open_end] if candidates < nodes else unresolved[:0]
        candidates = min(2 * candidates, nodes)
    return KnnGraph(neighbors=neighbors, similarities=similarities)


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


def search_faiss_cpu(rows: Float32[Tensor, "G B D"], candidates: int) -> Candidates:
    """The largest inner products by ``faiss.knn``.

    Args:
        rows: Unit rows, ``[G, B, D]`` float32, any device.
        candidates: Rows to find, self included, at most B.

    Returns:
        Similarities ``[G, B, candidates]`` float32 and row numbers int64, on the device of ``rows``.
    """
    host = rows.cpu().numpy()
    results = [faiss.knn(graph, graph, candidates, metric=faiss.METRIC_INNER_PRODUCT) for graph in host]
    similarity, index = (torch.from_numpy(np.stack(part)).to(rows.device) for part in zip(*results, strict=True))
    return similarity, index


@functools.cache
def _gpu_resources(device: int) -> Any:  # noqa: ARG001 - the cache's key
    """One set of faiss scratch memory per CUDA device, for the life of the process."""
    return faiss.StandardGpuResources()


def search_faiss_gpu(rows: Float32[Tensor, "G B D"], candidates: int) -> Candidates:
    """The largest inner products by ``faiss.knn_gpu``, without a copy through the host.

    Args:
        rows: Unit rows, ``[G, B, D]`` float32; moved to the current CUDA device if they are elsewhere.
        candidates: Rows to find, self included, at most B and at most 2048.

    Returns:
        Similarities ``[G, B, candidates]`` float32 and row numbers int64, on the device of ``rows``.
    """
    import faiss.contrib.torch_utils  # from here on knn_gpu takes tensors

    on_gpu = rows if rows.is_cuda else rows.to("cuda")
    device = on_gpu.device.index
    resources = _gpu_resources(device)
    results = [
        faiss.knn_gpu(resources, graph, graph, candidates, metric=faiss.METRIC_INNER_PRODUCT, device=device)
        for graph in on_gpu
    ]
    similarity, index = (torch.stack(part).to(rows.device) for part in zip(*results, strict=True))
    return similarity, index


BACKENDS: dict[str, Nearest] = {
    "cuda": nearest_by_kernels,
    "faiss-cpu": lambda rows, k: by_candidates(search_faiss_cpu, rows, k),
    "faiss-gpu": lambda rows, k: by_candidates(search_faiss_gpu, rows, k, FAISS_GPU_LARGEST_K),
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
        UsageError: If the name is unknown, or cuda or faiss-gpu is asked for where it cannot run.
    """  # noqa: DOC501
    if name == "auto":
        if device.type != "cuda":
            return "torch"
        reason = why_not_graphs(device, nodes, k)
        log_fallback(device, reason)
        return ("faiss-gpu" if faiss.get_num_gpus() > 0 else "torch") if reason else "cuda"
    if name not in BACKENDS:
        raise unknown_name("kNN backend", name, ("auto", *BACKENDS))
    if name == "faiss-gpu" and faiss.get_num_gpus() == 0:
        raise UsageError(
            "faiss-gpu was asked for, but faiss sees no GPU on this machine",
            hint="choose auto, torch or faiss-cpu; with a GPU, check that faiss-gpu is the faiss installed",
        )
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
        OutOfMemoryError: A device's memory is too small for a backend other than cuda, of which the CPU takes over.
    """
    _require_neighbors(k)
    _, nodes, _ = rows.shape
    name = resolve_backend(backend, rows.device, nodes, k)
    k = min(k, nodes - 1)
    try:
        return BACKENDS[name](rows, k)
    except torch.OutOfMemoryError as error:
        if name != "cuda":
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
