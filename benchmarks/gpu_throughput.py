"""How fast are the kernels? Microseconds a graph, beside all CPU cores of the machine and beside other libraries.

    python benchmarks/gpu_throughput.py --rows cifar16.npy --out throughput.json [--seconds 100]

Ways are timed in turn, in one run, on the same graphs and rows. Each computes as many graphs as it takes to be busy:
the kernels a stack of hundreds, the CPU a few per core, a library that solves one graph at a time a few.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Callable
from typing import Any

os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # threads that spin would take the cores from the next in turn

import torch
from gpu_kernels import TOLERANCE, K, arguments_of, dense_laplacian, device_of, draw, rows_of, solved
from gpu_peers import Solvers, how_many, searches, wait
from harness import Measured, interleaved, limit_threads, spread
from torch import Tensor

from gstds_cache.graph.components import bridge_components
from gstds_cache.graph.cuda import GraphStack, graph_stack, inverse_lengths, products
from gstds_cache.graph.knn import nearest
from gstds_cache.graph.laplacian import SparseGraph, symmetrise
from gstds_cache.graph.neighbors import normalized_rows
from gstds_cache.runtime.allocator import keep_freed_memory
from gstds_cache.runtime.threads import cores
from gstds_cache.spectral.fiedler import fiedler_of_graph

GRAPHS = {256: 4224, 512: 2112, 1024: 528, 2048: 264}  # several blocks of each multiprocessor, a few GB
PEER_GRAPHS = 16  # dense float64 Laplacians, and as many sparse ones


class Timed:
    """Ways to do the same, by name: how many graphs a call of each does, and the call."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.graphs = device, dict[str, int]()
        self.calls: dict[str, Callable[[], object]] = {}
        self.left_out: dict[str, str] = {}

    def add(self, name: str, graphs: int, call: Callable[[], object]) -> None:
        """A way that does ``graphs`` of them in a call."""
        self.graphs[name] = graphs
        self.calls[name] = call

    def add_peer(self, name: str, most: int, way: Callable[[int], object]) -> int:
        """A way that is asked for so many as take a fraction of a second; how many, 0 where it cannot be taken."""
        found = how_many(way, most, self.device)
        if isinstance(found, str):
            self.left_out[name] = found
            return 0
        self.add(name, found, lambda: way(found))
        return found

    def run(self, trials: int, over: str) -> dict[str, Any]:
        """Time all in turn; ``over`` names the way that the others are compared with."""

        def waited(call: Callable[[], object]) -> Callable[[], None]:
            return lambda: (call(), wait(self.device))[1]

        seconds = interleaved(trials, **{name: waited(call) for name, call in self.calls.items()})
        micro = {name: [1e6 * s / self.graphs[name] for s in spent["trials"]] for name, spent in seconds.items()}
        return {
            "us_per_graph": {name: spread(values) for name, values in micro.items()},
            f"over_{over}": {
                name: spread([a / b for a, b in zip(values, micro[over], strict=True)])
                for name, values in micro.items()
                if name != over
            },
            "graphs_of_a_trial": self.graphs,
            "left_out": self.left_out,
        }


def on_cpu(stack: GraphStack, graphs: int) -> SparseGraph:
    """The first graphs of a stack, as the compiled solver takes them."""
    return stack.on_cpu(range(min(graphs, stack.graphs)))


def solve(stack: GraphStack, q: int, trials: int, device: torch.device) -> dict[str, Any]:
    """The kernel, a graph alone, and the compiled solver on all cores."""
    timed = Timed(device)
    timed.add("kernel", stack.graphs, lambda: solved(stack, q))
    one = stack.part(slice(0, 1))
    timed.add("kernel, one graph alone", 1, lambda: solved(one, q))
    theirs = on_cpu(stack, min(256, 16 * cores()))
    timed.add(
        "cpu, all cores", theirs.graphs, lambda: fiedler_of_graph(theirs, q=q, tolerance=TOLERANCE, threads=cores())
    )
    few = on_cpu(stack, 8)
    timed.add("cpu, one core", few.graphs, lambda: fiedler_of_graph(few, q=q, tolerance=TOLERANCE, threads=1))
    found = timed.run(trials, "kernel")
    pairs = solved(stack, q)
    return found | {
        "iterations": {"median": int(pairs.iterations.median()), "max": int(pairs.iterations.max())},
        "converged": float((pairs.converged == 1).double().mean()),
    }


def solve_by_peers(stack: GraphStack, q: int, trials: int, device: torch.device) -> dict[str, Any]:
    """Other libraries on the same graphs, the kernel beside them, and the residuals each reached."""
    few = min(PEER_GRAPHS, stack.graphs)
    pairs = solved(stack.part(slice(0, few)), q)
    peers = Solvers(
        torch.stack([dense_laplacian(stack, g) for g in range(few)]), q, TOLERANCE, pairs.values[:, 0].tolist()
    )
    timed = Timed(device)
    timed.add("kernel", stack.graphs, lambda: solved(stack, q))
    residuals = {"kernel": peers.residual(pairs.basis.mT)}
    for name, way in peers.ways().items():
        count = timed.add_peer(name, few, way)
        if count:
            residuals[name] = peers.residual(way(min(count, 4)))
    return timed.run(trials, "kernel") | {"largest_residual": residuals}


def neighbours(x: Tensor, trials: int, device: torch.device) -> dict[str, Any]:
    """Products and graph by kernels; beside them searches that make no graph of what they find, and the CPU."""
    graphs = len(x)
    inverse = inverse_lengths(x)
    timed = Timed(device)
    timed.add("kernels", graphs, lambda: graph_stack(x, K, inverse=inverse))
    part = x[: max(1, min(graphs, (1 << 30) // (4 * x.shape[1] ** 2)))]
    timed.add("products alone", len(part), lambda: products(part))
    few = x[: min(graphs, 256)]
    rows32 = few.float() / few.float().norm(dim=2, keepdim=True)
    for name, way in searches(few, rows32, K).items():
        timed.add_peer(name, len(few), way)
    for backend in ("faiss-gpu", "torch") if device.type == "cuda" else ():
        timed.add_peer(f"our {backend}", len(few), lambda n, b=backend: nearest(rows32[:n], K, backend=b))
    host = normalized_rows(x[: min(graphs, max(4, 16384 // x.shape[1]))].cpu())

    def cpu() -> object:
        return bridge_components(symmetrise(nearest(host, K, backend="torch")), host)

    timed.add("cpu, all cores", len(host), cpu)
    return timed.run(trials, "kernels")


def measure(arguments: argparse.Namespace, device: torch.device) -> bool:
    """All cases, those with a target first; whether none ended with an error."""
    measured, trials = Measured("throughput", arguments), arguments.trials
    rows = rows_of(arguments, device)
    sizes, main = ({64: 3}, 64) if arguments.smoke else (GRAPHS, 512)
    stacks: dict[int, GraphStack] = {}

    def stack_of(size: int) -> GraphStack:
        if size not in stacks:
            parts = [
                graph_stack(draw(rows, min(264, sizes[size]), size, seed=s), K) for s in range(-(-sizes[size] // 264))
            ]
            names = ("crow", "col", "weight", "components", "label", "neighbors", "similarities")
            joined = {name: torch.cat([getattr(part, name) for part in parts])[: sizes[size]] for name in names}
            stacks[size] = GraphStack(**joined, finite=parts[0].finite)
        return stacks[size]

    def solve_case(size: int, q: int) -> None:
        name = f"solve, B={size}, Q={q}"
        measured.case(name, 4, lambda: solve(stack_of(size), q, trials, device))

    def neighbours_case(size: int) -> None:
        count = min(sizes[size], max(1, (1 << 30) // (2 * size * rows.shape[1])))
        name = f"neighbours, B={size}"
        measured.case(name, 4, lambda: neighbours(draw(rows, count, size), trials, device))

    solve_case(main, 1)
    solve_case(main, 8)
    neighbours_case(main)
    for q in (1, 8):
        name = f"peers, B={main}, Q={q}"
        measured.case(name, 15, lambda q=q: solve_by_peers(stack_of(main), q, max(1, trials - 2), device))
    for size in sizes:
        if size != main:
            solve_case(size, 1)
            solve_case(size, 8)
            neighbours_case(size)
            stacks.pop(size, None)
    measured.save()
    print(f"ended with an error: {measured.errors() or 'none'}", file=sys.stderr)
    return not measured.errors()


def main() -> None:
    arguments = arguments_of(__doc__)
    if arguments.smoke:
        arguments.trials = 1
    keep_freed_memory()  # as our commands do; it holds for everyone in this process
    limit_threads(cores())
    warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta state")
    with device_of(arguments) as device:
        right = measure(arguments, device)
    sys.exit(0 if right else 1)


if __name__ == "__main__":
    main()
