"""What the parts of ``on_gpu.py`` share: the device, rows and batches of them, and the kernels with other launches."""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from batches import made_up
from harness import parser
from torch import Tensor

from gstds_cache.config import SelectConfig
from gstds_cache.cuda import build, launch
from gstds_cache.graph import cuda as graph_cuda
from gstds_cache.graph.cuda import GraphStack
from gstds_cache.spectral import block
from gstds_cache.spectral.block import BlockRitz, solve_stack

K = SelectConfig.knn
TOLERANCE = 1e-6
SHARED_BYTES = 227 << 10  # of a block, of the GPU that a smoke run emulates


def arguments_of(text: str | None) -> argparse.Namespace:
    """The command line of a part."""
    made = parser(text)
    made.add_argument("--seconds", type=float, default=300, help="after which no further case is begun")
    made.add_argument("--rows", type=Path, help="float16 [N, D] as numpy.save writes them [default: made-up clusters]")
    made.add_argument("--full", action="store_true", help="the small case at full size, for a profiler")
    made.add_argument("--graphs", type=int, default=3, help="of the small case")
    made.add_argument("--nodes", type=int, default=96, help="of each of them")
    return made.parse_args()


@contextlib.contextmanager
def device_of(arguments: argparse.Namespace) -> Iterator[torch.device]:
    """The GPU; in a smoke run the CPU, on which the kernels are emulated as in the tests."""
    if not arguments.smoke:
        yield torch.device("cuda", torch.cuda.current_device())
        return
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "shared"))
    from emulated import WHY_NOT, EmulatedKernels

    if WHY_NOT:
        raise SystemExit(f"--smoke emulates the kernels: {WHY_NOT}")
    folder = build.place_of_cubins().path or Path(tempfile.mkdtemp())
    with (
        changed(build, "kernel", EmulatedKernels(folder)),
        changed(launch, "shared_memory_limit", lambda _: SHARED_BYTES),
    ):
        yield torch.device("cpu")


def rows_of(arguments: argparse.Namespace, device: torch.device) -> Tensor:
    """All rows, ``[N, D]`` float16, on the device."""
    rows = (
        made_up(1, 600)[0].astype(np.float16) if arguments.rows is None or arguments.smoke else np.load(arguments.rows)
    )
    return torch.from_numpy(rows).to(device)


def draw(rows: Tensor, graphs: int, nodes: int, seed: int = 0) -> Tensor:
    """``[graphs, nodes, D]``: batches of rows, none of them twice in a batch."""
    generator = torch.Generator(rows.device).manual_seed(seed)
    key = torch.rand(graphs, len(rows), generator=generator, device=rows.device)
    return rows[key.argsort(dim=1)[:, :nodes]]


def solved(stack: GraphStack, q: int, laplacian: str = "combinatorial") -> BlockRitz:
    """The kernel's pairs, as the selection asks for them."""
    return solve_stack(
        stack, q, laplacian=laplacian, tolerance=TOLERANCE, max_iterations=SelectConfig.max_iterations, seed=0
    )


@contextlib.contextmanager
def changed(thing: Any, name: str, value: Any) -> Iterator[None]:
    """Another value of a module's constant or function while the block lasts."""
    before = getattr(thing, name)
    setattr(thing, name, value)
    try:
        yield
    finally:
        setattr(thing, name, before)


def threads_of(kernel: str, threads: int) -> contextlib.AbstractContextManager[None]:
    """Another number of threads in a block."""
    return changed(graph_cuda if kernel == "graph" else block, "THREADS", threads)


def same_graphs(ours: GraphStack, theirs: GraphStack) -> bool:
    """Whether two stacks hold the same bits; of edges, so many as there are."""
    whole = ("crow", "components", "label", "neighbors", "similarities")
    if not all(torch.equal(getattr(ours, name), getattr(theirs, name)) for name in whole):
        return False
    held = torch.arange(ours.col.shape[1], device=ours.col.device) < ours.crow[:, -1:]
    return all(torch.equal(getattr(ours, name)[held], getattr(theirs, name)[held]) for name in ("col", "weight"))


def same_pairs(ours: BlockRitz, theirs: BlockRitz) -> bool:
    """Whether two solutions hold the same bits."""
    names = ("values", "basis", "residual", "second", "iterations", "converged")
    return all(torch.equal(getattr(ours, name), getattr(theirs, name)) for name in names)


def part_of(pairs: BlockRitz, graphs: slice) -> BlockRitz:
    """Some graphs' pairs."""
    names = ("values", "basis", "residual", "second", "iterations", "converged")
    return BlockRitz(**{name: getattr(pairs, name)[graphs] for name in names})


def dense_laplacian(stack: GraphStack, g: int, laplacian: str = "combinatorial") -> Tensor:
    """One graph's Laplacian, ``[B, B]`` float64, on the device."""
    nodes, device = stack.nodes, stack.crow.device
    crow = stack.crow[g].long()
    row = torch.arange(nodes, device=device).repeat_interleave(crow.diff())
    matrix = torch.zeros(nodes, nodes, dtype=torch.float64, device=device)
    edges = int(crow[-1])
    matrix[row, graph_cuda.unsigned(stack.col[g, :edges])] = -stack.weight[g, :edges].double()
    degree = -matrix.sum(dim=1)
    matrix += torch.diag(degree)
    if laplacian == "normalized":
        matrix /= degree.sqrt()[:, None] * degree.sqrt()
    return matrix
