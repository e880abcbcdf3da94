"""A small case through every kernel, for compute-sanitizer; with --full a large one, for a profiler.

    compute-sanitizer --tool racecheck python benchmarks/gpu_small.py

Products are made on the CPU: the tools look at our kernels, and cuBLAS takes minutes under them.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from batches import made_up
from gpu_kernels import K, arguments_of, changed, device_of, same_graphs, solved
from harness import Measured
from torch import Tensor

from gstds_cache.cuda import launch
from gstds_cache.graph import cuda as graph_cuda
from gstds_cache.graph.cuda import graph_stack

LITTLE = 64 << 10  # bytes of shared memory with which arrays of a small graph lie in global memory, as a large one's do


def products_on_the_cpu(rows: Tensor, out: Tensor) -> None:
    """The same as cuBLAS's."""
    whole = rows.float().cpu()
    out.copy_(torch.bmm(whole, whole.mT))


def run(device: torch.device, graphs: int, nodes: int) -> dict[str, object]:
    """Graphs, the first of them disconnected, and pairs by every variant of the solver."""
    made = torch.from_numpy(made_up(graphs, nodes))
    rows = (made * torch.linspace(1, 8, graphs)[:, None, None]).half()  # clusters further apart than others
    half = rows.shape[2] // 2
    rows[0, : nodes // 2, :half] = 0
    rows[0, nodes // 2 :, half:] = 0  # at a right angle to the others: two components at least
    stack = graph_stack(rows.to(device), min(K, nodes - 1))
    converged = []
    for q, laplacian in ((1, "combinatorial"), (8, "combinatorial"), (8, "normalized")):
        converged += solved(stack, q, laplacian).converged.tolist()
    with changed(launch, "shared_memory_limit", lambda _: LITTLE):
        converged += solved(stack, 8).converged.tolist()
    least = graph_cuda.graph_bytes(nodes, graph_cuda.places(K), spill=True)
    with changed(launch, "shared_memory_limit", lambda _: least):
        spilled = graph_stack(rows.to(device), min(K, nodes - 1))
    return {
        "same_bits_from_global_memory": same_graphs(stack, spilled),
        "components": stack.components.tolist(),
        "converged": float(np.mean([status == 1 for status in converged])),
    }


def measure(arguments: argparse.Namespace, device: torch.device) -> None:
    """One case."""
    measured = Measured("small", arguments)
    if arguments.full:
        measured.case("full", 0, lambda: run(device, 264, 512))
    else:
        with changed(graph_cuda, "_inner_products", products_on_the_cpu):
            measured.case("small", 0, lambda: run(device, 3, 96))
    (case,) = (case for name, case in measured.found.items() if name in {"small", "full"})
    if not case.get("same_bits_from_global_memory"):
        raise SystemExit(1)


def main() -> None:
    arguments = arguments_of(__doc__)
    with device_of(arguments) as device:
        measure(arguments, device)


if __name__ == "__main__":
    main()
