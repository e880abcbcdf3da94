"""Cosine nearest neighbours within each batch. The only file that imports faiss.

A backend is a function from unit rows ``[B, D]`` and a count to the similarities and row numbers of that many most
similar rows of each row, itself among them. Everything else (refusals, normalisation, self, ties) is here, once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import faiss
import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor

from gstds_cache.errors import UsageError, unknown_name
from gstds_cache.graph.neighbors import KnnGraph, check_rows, unit_rows

SearchResult = tuple[Float32[Tensor, "B k"], Int64[Tensor, "B k"]]
Search = Callable[[Float32[Tensor, "B D"], int], SearchResult]

FAISS_GPU_LARGEST_K = 2048  # GPU_MAX_SELECTION_K of faiss


def search_faiss_cpu(rows: Float32[Tensor, "B D"], k: int) -> SearchResult:
    """The ``k`` largest inner products by ``faiss.knn``.

    Args:
        rows: Unit rows, ``[B, D]`` float32, any device.
        k: Rows to find, self included, at most B.

    Returns:
        Similarities ``[B, k]`` float32 and row numbers ``[B, k]`` int64, on the device of ``rows``.
    """
    host = rows.cpu().numpy()
    similarity, index = faiss.knn(host, host, k, metric=faiss.METRIC_INNER_PRODUCT)
    return torch.from_numpy(similarity).to(rows.device), torch.from_numpy(index).to(rows.device)


@functools.cache
def _gpu_resources(device: int) -> Any:  # noqa: ARG001 - the cache's key
    """One set of faiss scratch memory per CUDA device, for the life of the process."""
    return faiss.StandardGpuResources()


def search_faiss_gpu(rows: Float32[Tensor, "B D"], k: int) -> SearchResult:
    """The ``k`` largest inner products by ``faiss.knn_gpu``, without a copy through the host.

    Args:
        rows: Unit rows, ``[B, D]`` float32; moved to the current CUDA device if they are elsewhere.
        k: Rows to find, self included, at most B and at most 2048.

    Returns:
        Similarities ``[B, k]`` float32 and row numbers ``[B, k]`` int64, on the device of ``rows``.

    Raises:
        UsageError: If ``k`` is more than faiss's GPU selection can hold.
    """
    import faiss.contrib.torch_utils  # from here on knn_gpu takes tensors

    if k > FAISS_GPU_LARGEST_K:
        raise UsageError(
            f"faiss-gpu finds at most {FAISS_GPU_LARGEST_K - 1} neighbours, got k={k - 1}",
            hint="lower --knn, or pass --knn-backend faiss-cpu",
        )
    on_gpu = rows if rows.is_cuda else rows.to("cuda")
    device = on_gpu.device.index
    similarity, index = faiss.knn_gpu(
        _gpu_resources(device), on_gpu, on_gpu, k, metric=faiss.METRIC_INNER_PRODUCT, device=device
    )
    return similarity.to(rows.device), index.to(rows.device)


BACKENDS: dict[str, Search] = {"faiss-cpu": search_faiss_cpu, "faiss-gpu": search_faiss_gpu}


def resolve_backend(name: str, device: torch.device) -> str:
    """Turn a ``--knn-backend`` value into a backend that can run here.

    Args:
        name: ``auto`` or a key of ``BACKENDS``.
        device: Where the embeddings are.

    Returns:
        A key of ``BACKENDS``; ``auto`` is faiss-gpu for embeddings on CUDA where faiss sees a GPU, else faiss-cpu.

    Raises:
        UsageError: If the name is unknown, or faiss-gpu is asked for where faiss sees no GPU.
    """  # noqa: DOC501
    if name == "auto":
        return "faiss-gpu" if device.type == "cuda" and faiss.get_num_gpus() > 0 else "faiss-cpu"
    if name not in BACKENDS:
        raise unknown_name("kNN backend", name, ("auto", *BACKENDS))
    if name == "faiss-gpu" and faiss.get_num_gpus() == 0:
        raise UsageError(
            "faiss-gpu was asked for, but faiss sees no GPU on this machine",
            hint="pass --knn-backend auto or faiss-cpu; with a GPU, check that faiss-gpu is the faiss installed",
        )
    return name


def drop_self(
    similarity: Float32[Tensor, "B k"], index: Int64[Tensor, "B k"]
) -> tuple[Float32[Tensor, "B K"], Int64[Tensor, "B K"]]:
    """Order each row by (largest similarity, lowest index) and take out the row itself, by index.

    Exact duplicates can stand before the row itself, and can push it off the list altogether: then the last goes.

    Args:
        similarity: Similarities, ``[B, k]`` float32, in any order.
        index: Row numbers, ``[B, k]`` int64.

    Returns:
        Similarities ``[B, k - 1]`` clipped to [-1, 1] and row numbers ``[B, k - 1]``.
    """
    similarity = similarity.clamp(-1, 1)
    index, by_index = index.sort(dim=1)
    similarity, by_similarity = similarity.gather(1, by_index).sort(dim=1, descending=True, stable=True)
    index = index.gather(1, by_similarity)
    out = index == torch.arange(len(index), device=index.device)[:, None]
    out[:, -1] |= ~out.any(dim=1)
    shape = (index.shape[0], index.shape[1] - 1)
    return similarity[~out].view(shape), index[~out].view(shape)


def knn_graph(x: Float[Tensor, "G B D"], k: int, *, backend: str = "auto") -> KnnGraph:
    """Find the ``k`` most similar other rows of every row, by cosine, within each graph.

    A graph's result does not depend on the graphs it is stacked with. Which of several rows tied for the last place
    is taken is the backend's choice; what is returned is ordered by (largest similarity, lowest index).

    Args:
        x: Embeddings, ``[G, B, D]``, any float dtype and device; normalised here in float32. Zero rows have
            similarity 0 to everything.
        k: Neighbours per row, >= 1; clipped to B - 1.
        backend: ``auto``, ``faiss-cpu`` or ``faiss-gpu``.

    Returns:
        Neighbours and similarities, ``[G, B, min(k, B - 1)]``, on the device of ``x``.

    Raises:
        UsageError: If ``k`` < 1, ``x`` is empty, or the backend is unknown or cannot run here.
        SolverError: If a row holds NaN or Inf.
    """
    if k < 1:
        raise UsageError(f"neighbours per row: got {k}, expected at least 1", hint="pass --knn 10")
    search = BACKENDS[resolve_backend(backend, x.device)]
    check_rows(x)
    k = min(k, x.shape[1] - 1)
    found = [drop_self(*search(unit_rows(graph), k + 1)) for graph in x]
    return KnnGraph(
        neighbors=torch.stack([index for _, index in found]),
        similarities=torch.stack([similarity for similarity, _ in found]),
    )
