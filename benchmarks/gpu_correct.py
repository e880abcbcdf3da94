"""Are the kernels right on this card? Against float64, against the CPU, and against themselves in other stacks.

    python benchmarks/gpu_correct.py --rows cifar16.npy --out correct.json [--seconds 75]

``checks`` in the JSON holds each statement that should be true; the numbers behind them stand beside.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from batches import made_up
from gpu_kernels import (
    TOLERANCE,
    K,
    arguments_of,
    changed,
    dense_laplacian,
    device_of,
    draw,
    part_of,
    rows_of,
    same_graphs,
    same_pairs,
    solved,
    threads_of,
)
from harness import Measured
from torch import Tensor

from gstds_cache.config import DEFAULT_RULE, SelectConfig
from gstds_cache.cuda import build
from gstds_cache.cuda.launch import Kernel
from gstds_cache.graph.components import bridge_components
from gstds_cache.graph.cuda import GraphStack, graph_kernel, graph_stack, inverse_lengths, products
from gstds_cache.graph.knn import nearest
from gstds_cache.graph.laplacian import symmetrise
from gstds_cache.graph.neighbors import normalized_rows
from gstds_cache.selection.cuda_rule import why_not_ruled
from gstds_cache.selection.rules import RULES
from gstds_cache.spectral.block import solve_kernel
from gstds_cache.spectral.compiled import block_size

ALONE = 5  # this graph is also made and solved without the others


def variants(device: torch.device) -> list[tuple[str, str, tuple[str, ...]]]:
    """Source, function and defines of every kernel that this script runs."""
    asked: list[tuple[str, str, tuple[str, ...]]] = []

    def ask(source: str, function: str, defines: tuple[str, ...] = (), *, device: torch.device) -> Kernel:  # noqa: ARG001
        asked.append((source, function, tuple(defines)))
        return Kernel.__new__(Kernel)  # which nobody launches

    with changed(build, "kernel", ask):
        graph_kernel(device, 512, K)
        for q in (1, 8):
            for spill in (False, True):
                solve_kernel(device, block_size(q), spill=spill)
        why_not_ruled(device, RULES[DEFAULT_RULE], 512, 384)
    return asked


def compile_all(device: torch.device) -> dict[str, Any]:
    """Compile every kernel at once, on as many cores; what the compiler made of each."""
    major, minor = torch.cuda.get_device_capability(device)
    wanted = variants(device)
    begun = time.perf_counter()
    with ThreadPoolExecutor(len(wanted)) as pool:
        texts = {(source, defines) for source, _, defines in wanted}
        list(pool.map(lambda text: build.cubin(text[0], f"sm_{major}{minor}", text[1]), texts))
    seconds = time.perf_counter() - begun
    made = {" ".join([what[1], *what[2]]): build.kernel(*what, device=device) for what in wanted}
    registers = {name: {"registers": one.registers, "local_bytes": one.local_bytes} for name, one in made.items()}
    return {"seconds": seconds, "kernels": registers}


def cosines(rows: Tensor) -> Tensor:
    """All cosines of one graph's rows in float64, the diagonal below all others."""
    unit = rows.double() / rows.double().norm(dim=1, keepdim=True)
    return (unit @ unit.T).fill_diagonal_(-9)


def check_products(x: Tensor, checks: dict[str, bool]) -> dict[str, Any]:
    """Products on tensor cores: as exact as float32, symmetric to the bit, and the same in every stack."""
    made, again = products(x), products(x)
    inverse = inverse_lengths(x)
    errors = []
    for g in range(min(4, len(x))):
        own = (made[g] * inverse[g][:, None] * inverse[g]).double().fill_diagonal_(-9)
        errors.append(float((own - cosines(x[g])).abs().max()))
    checks |= {
        "products: within 1e-5 of float64": max(errors) < 1e-5,  # a tensor core rounds its sums: 4.5e-6 on an H100
        "products: symmetric to the bit": torch.equal(made, made.mT),
        "products: the same bits again": torch.equal(made, again),
        "products: the same bits alone": torch.equal(products(x[ALONE : ALONE + 1])[0], made[ALONE]),
        "products: the same bits in a part of the stack": torch.equal(products(x[2:])[ALONE - 2], made[ALONE]),
    }
    return {"largest_error": max(errors)}


def check_graph(name: str, x: Tensor, checks: dict[str, bool]) -> dict[str, Any]:
    """Neighbours against float64, everything against the CPU, and the same bits however it is launched."""
    k = min(K, x.shape[1] - 1)
    stack = graph_stack(x, k)
    alone = slice(ALONE, ALONE + 1)
    other = [threads for threads in (64, 256) if threads <= x.shape[1]]
    with_other = []
    for threads in other:
        with threads_of("graph", threads):
            with_other.append(same_graphs(graph_stack(x, k), stack))
    neighbors = stack.knn().neighbors
    differing = [
        float(
            (cosines(x[g]).topk(k, dim=1)[1].sort(dim=1)[0] != neighbors[g].sort(dim=1)[0]).any(dim=1).double().mean()
        )
        for g in range(min(8, len(x)))
    ]
    rows = normalized_rows(x[:8].cpu())
    theirs, components = bridge_components(symmetrise(nearest(rows, k, backend="torch")), rows)
    ours = stack.on_cpu(range(len(rows)))
    same_edges = len(ours.col) == len(theirs.col) and torch.equal(ours.col, theirs.col)
    checks |= {
        f"{name}: neighbours are float64's in 99.9 % of rows": float(np.mean(differing)) <= 1e-3,
        f"{name}: the same bits again": same_graphs(graph_stack(x, k), stack),
        f"{name}: the same bits alone": same_graphs(graph_stack(x[alone].contiguous(), k), stack.part(alone)),
        f"{name}: the same bits with {other} threads": all(with_other),
        f"{name}: as many components as on the CPU": torch.equal(stack.components[: len(rows)].cpu(), components.int()),
        f"{name}: edges have room": bool((stack.components > 0).all()),
    }
    return {
        "graphs": len(x),
        "rows_with_other_neighbours_than_float64": float(np.mean(differing)),
        "edges_of_the_cpu": same_edges,
        "largest_difference_of_weights": float((ours.weight - theirs.weight).abs().max()) if same_edges else None,
        "components": stack.components[:8].tolist(),
    }


def check_solve(name: str, stack: GraphStack, q: int, checks: dict[str, bool], laplacian: str) -> dict[str, Any]:
    """Values against a dense float64 solve, residuals from scratch, and the same bits however it is launched."""
    pairs = solved(stack, q, laplacian)
    errors, beyond, residuals = [], [], []
    for g in range(min(3, stack.graphs)):
        matrix = dense_laplacian(stack, g, laplacian)
        exact = torch.linalg.eigvalsh(matrix)
        error, exact, largest = (pairs.values[g] - exact[1 : q + 1]).abs(), exact[1 : q + 1], exact[-1]
        errors.append(float((error / exact).max()))
        beyond.append(float((error / (exact + 1e-4 * largest)).max()))  # eigh's own is a share of the largest
        basis = pairs.basis[g].T
        residuals.append(float(((matrix @ basis - basis * pairs.values[g]).norm(dim=0) / pairs.values[g]).max()))
    alone = slice(min(ALONE, stack.graphs - 1), min(ALONE, stack.graphs - 1) + 1)
    with_other = []
    for threads in (64, 128):
        with threads_of("solve", threads):
            with_other.append(same_pairs(solved(stack, q, laplacian), pairs))
    converged = float((pairs.converged == 1).double().mean())
    one = solved(stack.part(alone), q, laplacian)
    checks |= {
        f"{name}: values within 1e-9 of eigh's": max(beyond) < 1e-9,
        f"{name}: residuals within the tolerance": max(residuals) <= 1.01 * TOLERANCE,
        f"{name}: all converge": converged == 1,
        f"{name}: the same bits again": same_pairs(solved(stack, q, laplacian), pairs),
        f"{name}: the same bits alone": same_pairs(one, part_of(pairs, alone)),
        f"{name}: the same bits with 64 and 128 threads": all(with_other),
    }
    return {
        "largest_relative_error_of_values": max(errors),
        "largest_residual": max(residuals),
        "converged": converged,
        "iterations": {"median": int(pairs.iterations.median()), "max": int(pairs.iterations.max())},
    }


def kept_rows(rows: Tensor, rule: str, size: int, batches: int, device: torch.device) -> list[np.ndarray]:
    """Rows that the selection keeps of the first batches of a store, each batch's ascending."""
    from bench_store import Ours

    from gstds_cache.selection.run import BatchSelector
    from gstds_cache.store.reader import EmbeddingStore

    config = SelectConfig(
        batch_size=size, epochs=1 + batches * size // (len(rows) // 2), batch_assignments=0, device=str(device),
        rule=rule, guidance="none",
    )  # fmt: skip
    kept: list[np.ndarray] = []
    with tempfile.TemporaryDirectory() as folder:
        Ours().write(Path(folder) / "rows.store", rows.cpu().numpy(), labels=np.zeros(len(rows), np.int64))
        running = BatchSelector(EmbeddingStore(Path(folder) / "rows.store", access="memory"), config).run()
        for selection in running:
            kept.append(np.sort(selection.kept))
            if len(kept) == batches:
                break
        running.close()
    return kept


def check_kept(rows: Tensor, size: int, batches: int, device: torch.device, checks: dict[str, bool]) -> dict[str, Any]:
    """The rows kept on the device and on the CPU."""
    same = {}
    for rule in ("coverage", DEFAULT_RULE):
        ours, theirs = (kept_rows(rows, rule, size, batches, torch.device(where)) for where in (device, "cpu"))
        same[rule] = float(np.mean([np.isin(a, b).mean() for a, b in zip(ours, theirs, strict=True)]))
        checks[f"{rule}: keeps 99 % of the rows the CPU keeps"] = same[rule] >= 0.99
    return same


def measure(arguments: argparse.Namespace, device: torch.device) -> bool:
    """All cases, the most telling first; whether every check holds."""
    measured, checks = Measured("correct", arguments), dict[str, bool]()
    measured.found["checks"] = checks
    rows = rows_of(arguments, device)
    sizes, graphs = ((48,), 7) if arguments.smoke else ((512, 256, 1024), 67)
    data = {f"rows, B={size}": draw(rows, graphs, size, seed=size) for size in sizes}
    clusters = (
        torch.from_numpy(made_up(graphs, sizes[0])).half().to(device)
        * torch.linspace(1, 3, graphs, device=device)[:, None, None]
    )
    data[f"clusters, B={sizes[0]}"] = clusters.half()
    first = data[f"rows, B={sizes[0]}"]
    if device.type == "cuda":
        measured.case("compile", 1, lambda: compile_all(device))
    measured.case("products", 1, lambda: check_products(first, checks))
    for name, x in data.items():
        stack = graph_stack(x, K)
        for q in (1, 8):
            what = f"solve, {name}, Q={q}"
            measured.case(
                what, 3, lambda what=what, stack=stack, q=q: check_solve(what, stack, q, checks, "combinatorial")
            )
    stack = graph_stack(first, K)
    what = "solve, normalized, Q=8"
    measured.case(what, 3, lambda: check_solve(what, stack, 8, checks, "normalized"))
    if not arguments.smoke:
        large = graph_stack(draw(rows, 6, 2048), K)  # does not fit into shared memory
        what = "solve, rows, B=2048, Q=1"
        measured.case(what, 5, lambda: check_solve(what, large, 1, checks, "combinatorial"))
    # What follows needs the CPU's compiled functions, which may still be in the making.
    for name, x in data.items():
        measured.case(f"graph, {name}", 3, lambda name=name, x=x: check_graph(f"graph, {name}", x, checks))
    size, batches = (48, 2) if arguments.smoke else (512, 40)
    measured.case("kept_rows", 10, lambda: check_kept(rows, size, batches, device, checks))
    measured.save()
    wrong = [name for name, good in checks.items() if not good] + measured.errors()
    print(f"{len(checks)} checks; do not hold or ended with an error: {wrong or 'none'}", file=sys.stderr)
    return not wrong


def main() -> None:
    arguments = arguments_of(__doc__)
    with device_of(arguments) as device:
        right = measure(arguments, device)
    sys.exit(0 if right else 1)


if __name__ == "__main__":
    main()
