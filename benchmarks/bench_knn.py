"""Nearest neighbours within batches: every backend that runs here, beside bare products and other searches.

    python benchmarks/bench_knn.py STORE... [--batch-sizes 128 256 512 1024 2048 4096]
    python benchmarks/bench_knn.py --rows ROWS.npy          an array [N, D], float16 or float32, in place of stores

Microseconds a graph, of a stack of graphs; interleaved trials. On a CPU the stack has up to 16 graphs, one is found
after the other with all cores, and the limit is ``torch.bmm`` of the stack, which computes the similarities and keeps
none. On CUDA the stack has 65,536 rows, and these stand beside the backends:

    product float32, float16        ``torch.bmm`` of unit rows, and of float16 rows on tensor cores
    cuda, float16                   the cuda backend given float16 rows as a store has them; else it is given unit rows
    bmm and topk                    the product in float32, and the 12 largest of each row; ties are left as they come
    torch's search                  what the torch backend does, with ties settled
    faiss.knn_gpu                   faiss's own call, one graph after the other on one stream, results stacked
    faiss-gpu, ... streams          the backend's search without ties settled, by number of streams and threads
    faiss-gpu, float16              the same of float16 rows, which are unit length only to three digits
    ties                            what settling ties takes of faiss-gpu and torch
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # threads that spin would take the cores from the next in turn

import numpy as np
import torch
from batches import batches_of
from harness import interleaved, limit_threads, parser, report

from gstds_cache.graph import faiss_search
from gstds_cache.graph.cuda import why_not_graphs
from gstds_cache.graph.faiss_search import STREAMS, SearchStreams
from gstds_cache.graph.knn import BACKENDS, by_candidates, nearest, resolve_backend, search_torch, top_k
from gstds_cache.graph.neighbors import normalized_rows
from gstds_cache.runtime.allocator import keep_freed_memory
from gstds_cache.runtime.threads import cores

ROWS_ON_CUDA = 1 << 16
STREAMS_AND_THREADS = ((1, 1), (4, 1), (STREAMS, 1), (4, 4), (STREAMS, 4), (STREAMS, STREAMS))
Way = Callable[[], object]


def batches_of_rows(path: Path, count: int, size: int) -> np.ndarray:
    """``[count, size, D]``: rows of an array in a file, drawn without replacement within a batch."""
    rows, rng = np.load(path, mmap_mode="r"), np.random.default_rng(0)
    return np.stack([rows[np.sort(rng.permutation(len(rows))[:size])] for _ in range(count)])


def products(rows: torch.Tensor) -> dict[str, Way]:
    """The bare products, without a place in memory for each new stack."""
    out, half = torch.empty(*rows.shape[:2], rows.shape[1], device=rows.device), rows.half()
    ways: dict[str, Way] = {"product float32": lambda: torch.bmm(rows, rows.mT, out=out)}
    if rows.is_cuda:
        out16 = torch.empty_like(out, dtype=torch.float16)
        ways["product float16"] = lambda: torch.bmm(half, half.mT, out=out16)
    return ways


def searches(rows: torch.Tensor, knn: int) -> dict[str, Way]:
    """Other ways to find neighbours on CUDA, ours in parts among them."""
    candidates = min(knn + 2, rows.shape[1])
    ways: dict[str, Way] = {
        "bmm and topk": lambda: torch.bmm(rows, rows.mT).topk(candidates, dim=2),
        "torch's search": lambda: by_candidates(search_torch, rows, knn),
    }
    if not faiss_search.gpus():
        return ways
    import faiss
    import faiss.contrib.torch_utils  # noqa: F401 - from here on knn_gpu takes tensors

    resources, device = faiss.StandardGpuResources(), rows.device.index
    half = rows.half()
    similarity = torch.empty(*rows.shape[:2], candidates, device=rows.device)
    index = torch.empty_like(similarity, dtype=torch.int64)

    def knn_gpu() -> object:
        options: dict[str, Any] = {"metric": faiss.METRIC_INNER_PRODUCT, "device": device}
        found = [faiss.knn_gpu(resources, graph, graph, candidates, **options) for graph in rows]
        return [torch.stack(part) for part in zip(*found, strict=True)]

    ways["faiss.knn_gpu"] = knn_gpu
    for number, threads in STREAMS_AND_THREADS:
        streams = SearchStreams(rows.device, number, threads)
        ways[f"faiss-gpu, {number} streams, {threads} threads"] = lambda streams=streams: streams.search(
            rows, similarity, index
        )
    ways["faiss-gpu, float16"] = lambda: faiss_search.search_faiss_gpu(half, candidates)
    ways["ties"] = lambda: top_k(similarity, index, knn)
    return ways


def main() -> None:
    made = parser(__doc__)
    made.add_argument("stores", type=Path, nargs="*", help="stores of real images; not needed with --rows or --smoke")
    made.add_argument("--rows", type=Path, help="an array of rows in a .npy file, in place of stores")
    made.add_argument("--batch-sizes", type=int, nargs="+", default=[128, 256, 512, 1024, 2048, 4096])
    made.add_argument("--knn", type=int, default=10)
    made.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = made.parse_args()
    if not arguments.stores and arguments.rows is None and not arguments.smoke:
        made.error("give a STORE, --rows, or --smoke")
    if arguments.smoke:
        arguments.batch_sizes, arguments.trials = [64], 1
    keep_freed_memory()  # as our commands do; it holds for everyone in this process
    device, by_size = torch.device(arguments.device), {}
    on_cuda = device.type == "cuda"
    faiss_search.gpus()  # loads faiss, so that its libraries are given their threads as well
    limit_threads(cores())

    def waited(way: Way) -> Way:
        return lambda: (way(), torch.cuda.synchronize() if on_cuda else None)

    for size in arguments.batch_sizes:
        count = max(1, ROWS_ON_CUDA // size if on_cuda else min(16, 4096 // size))
        count = min(count, 2) if arguments.smoke else count
        batches = batches_of_rows(arguments.rows, count, size) if arguments.rows else None
        batches = batches_of(arguments.stores, count, size) if batches is None else batches
        rows = normalized_rows(torch.from_numpy(batches)).to(device)
        names = [name for name in BACKENDS if not why_not(name, device, size, arguments.knn)]
        ways = products(rows) | {
            name: lambda name=name, rows=rows: nearest(rows, arguments.knn, backend=name) for name in names
        }
        if on_cuda:
            ways |= searches(rows, arguments.knn)
        if "cuda" in names:
            stored = torch.from_numpy(batches).to(device, torch.float16)
            ways["cuda, float16"] = lambda stored=stored: nearest(stored, arguments.knn, backend="cuda")
        timed = interleaved(arguments.trials, **{name: waited(way) for name, way in ways.items()})
        first = nearest(rows, arguments.knn, backend="torch").neighbors
        by_size[size] = {
            "graphs": count,
            "dim": rows.shape[2],
            "us_per_graph": {name: 1e6 * spent["median"] / count for name, spent in timed.items()},
            "seconds": timed,
            "over_the_product": {
                name: spent["median"] / timed["product float32"]["median"] for name, spent in timed.items()
            },
            "same_neighbours_as_torch": {
                name: float(np.mean((nearest(rows, arguments.knn, backend=name).neighbors == first).cpu().numpy()))
                for name in names
            },
        }
    auto = {size: resolve_backend("auto", device, size, arguments.knn) for size in arguments.batch_sizes}
    report("knn", {"knn": arguments.knn, "auto": auto, "by_batch_size": by_size}, arguments)


def why_not(name: str, device: torch.device, size: int, knn: int) -> str:
    """Why a backend is left out; empty where it is not."""
    if name == "cuda":
        return why_not_graphs(device, size, knn)
    if name == "faiss-gpu":
        return "" if device.type == "cuda" and faiss_search.gpus() else "no GPU"
    return "copies to the host" if name == "faiss-cpu" and device.type == "cuda" else ""


if __name__ == "__main__":
    main()
