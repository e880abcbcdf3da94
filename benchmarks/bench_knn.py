"""Nearest neighbours within batches: every backend that runs here, beside the bare matrix product.

    python benchmarks/bench_knn.py STORE... [--batch-sizes 128 256 512 1024 2048 4096]

Milliseconds per graph, one graph at a time, all cores; interleaved trials. The limit is ``torch.bmm`` of the stacked
batches, which computes the similarities and keeps none.
"""

from __future__ import annotations

import os
from pathlib import Path

os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # threads that spin would take the cores from the next in turn

import faiss
import numpy as np
import torch
from batches import batches_of
from harness import interleaved, limit_threads, parser, report

from gstds_cache.graph.cuda import why_not_graphs
from gstds_cache.graph.knn import BACKENDS, by_candidates, nearest, resolve_backend, search_torch
from gstds_cache.graph.neighbors import normalized_rows
from gstds_cache.runtime.allocator import keep_freed_memory
from gstds_cache.runtime.threads import cores


def main() -> None:
    made = parser(__doc__)
    made.add_argument("stores", type=Path, nargs="*", help="stores of real images; not needed with --smoke")
    made.add_argument("--batch-sizes", type=int, nargs="+", default=[128, 256, 512, 1024, 2048, 4096])
    made.add_argument("--knn", type=int, default=10)
    made.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = made.parse_args()
    if not arguments.stores and not arguments.smoke:
        made.error("give a STORE, or --smoke")
    if arguments.smoke:
        arguments.batch_sizes, arguments.trials = [64], 1
    keep_freed_memory()  # as our commands do; it holds for everyone in this process
    limit_threads(cores())
    device, by_size = torch.device(arguments.device), {}
    largest = max(arguments.batch_sizes)
    refused = {"faiss-gpu"} if faiss.get_num_gpus() == 0 else set()
    refused |= {"cuda"} if why_not_graphs(device, largest, arguments.knn) else set()
    names = [name for name in BACKENDS if name not in refused]

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    for size in arguments.batch_sizes:
        count = max(1, min(16, 4096 // size))
        rows = normalized_rows(torch.from_numpy(batches_of(arguments.stores, count, size))).to(device)
        out = torch.empty(count, size, size, device=device)

        def limit(rows: torch.Tensor = rows, out: torch.Tensor = out) -> None:
            torch.bmm(rows, rows.transpose(1, 2), out=out)
            wait()

        def search(name: str, rows: torch.Tensor = rows) -> None:
            nearest(rows, arguments.knn, backend=name)
            wait()

        ways = {name: lambda name=name: search(name) for name in names}
        ways["torch, bmm and topk"] = lambda rows=rows: (by_candidates(search_torch, rows, arguments.knn), wait())
        timed = interleaved(arguments.trials, limit=limit, **ways)
        first = nearest(rows, arguments.knn, backend="torch").neighbors
        by_size[size] = {
            "graphs": count,
            "dim": rows.shape[2],
            "ms_per_graph": {name: 1e3 * spent["median"] / count for name, spent in timed.items()},
            "seconds": timed,
            "over_the_product": {
                name: spent["median"] / timed["limit"]["median"] for name, spent in timed.items() if name != "limit"
            },
            "same_neighbours_as_torch": {
                name: float(np.mean((nearest(rows, arguments.knn, backend=name).neighbors == first).cpu().numpy()))
                for name in names
            },
        }
    report(
        "knn",
        {
            "knn": arguments.knn,
            "auto": resolve_backend("auto", device, largest, arguments.knn),
            "by_batch_size": by_size,
        },
        arguments,
    )


if __name__ == "__main__":
    main()
