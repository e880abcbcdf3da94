"""CUDA kernels compiled by g++ and run on CPU tensors: the same text, called by the same lines of host code."""

from __future__ import annotations

import ctypes
import os
import shutil
import struct
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gstds_cache.cuda import build
from gstds_cache.cuda.launch import Kernel
from gstds_cache.embedding.device_resizing import resize_bytes
from gstds_cache.errors import KernelError
from gstds_cache.graph.cuda import graph_bytes, lists_bytes
from gstds_cache.selection.cuda_rule import cells_bytes, finish_bytes
from gstds_cache.spectral.block import solve_bytes

HERE = Path(__file__).parents[1] / "cuda"
COMPILER = shutil.which("g++")
WHY_NOT = "" if COMPILER else "needs g++, which is not installed"
H100_SHARED_MEMORY = 227 << 10
SCHEDULES = {"ascending": 0, "descending": 1, "shuffled": 2}
PROBLEMS = {1: "threads stopped at different barriers", 2: "wrote beyond its shared memory", 3: "wrong arguments"}


class EmulatedKernel(Kernel):
    """Stands in for its parent class, and takes tensors on the CPU.

    Attributes:
        threads: Emulated threads of a block, whatever a launch asks for: one runs as plain C++, as fast as that; None
            takes those that were asked for.
        schedule: Order in which they run between two barriers, a key of ``SCHEDULES``.
        barriers: Barriers that the last launch's blocks passed, summed.
        launches: Launches so far: grid, threads and shared bytes of each.
    """

    registers, local_bytes = 0, 0

    def __init__(self, library: Path, function: str) -> None:
        self.function, self.device = function, torch.device("cpu")
        self.threads: int | None = 1
        self.schedule = "ascending"
        self.barriers = 0
        self.launches: list[tuple[int, int, int]] = []
        self.library = ctypes.CDLL(str(library))

    def __call__(self, grid: int, threads: int, shared_bytes: int, *arguments: Any) -> None:
        if grid == 0:
            return
        self.launches.append((grid, threads, shared_bytes))
        held: list[Any] = []
        for argument in arguments:
            if isinstance(argument, torch.Tensor):
                if argument.device.type != "cpu" or not argument.is_contiguous():
                    raise ValueError(f"{self.function}: got {argument.device}, expected contiguous tensors on the CPU")
                held.append(ctypes.c_void_p(argument.data_ptr()))
            elif argument is None:
                held.append(ctypes.c_void_p(None))
            else:
                held.append(ctypes.c_double(argument) if isinstance(argument, float) else ctypes.c_int(argument))
        pointers = (ctypes.c_void_p * len(held))(*(ctypes.addressof(value) for value in held))
        barriers = ctypes.c_long()
        problem = self.library.launch(
            grid, self.threads or threads, shared_bytes, SCHEDULES[self.schedule], len(held), pointers,
            ctypes.byref(barriers)
        )  # fmt: skip
        self.barriers = barriers.value
        if problem:
            raise KernelError(f"{self.function}: {PROBLEMS[problem]}")

    def run(self, launch: Launch, threads: int | None = None, schedule: str = "ascending") -> None:
        """Launch with so many emulated threads."""
        self.threads, self.schedule = threads, schedule
        self(launch.grid, threads or launch.threads, launch.shared, *launch.arguments)


def compile_emulated(
    folder: Path,
    source: str,
    function: str,
    defines: tuple[str, ...] = (),
    *,
    texts: Path = build.FOLDER,
    flags: tuple[str, ...] = (),
    program: bool = False,
) -> Path:
    """A kernel as a shared library, or as a program, in ``folder``; compiled unless it is there.

    Args:
        folder: Where it goes.
        source: Name of the kernel's text.
        function: Its name.
        defines: Macros, as for the GPU.
        texts: The folder of the texts.
        flags: More for g++, e.g. ``-fsanitize=thread``.
        program: Whether to make a program that reads its arguments from a file.

    Returns:
        The file.
    """
    sources = [*sorted(texts.glob("*.cu*")), *sorted(HERE.glob("emulate*"))]
    key = build.digest_of_texts([*(p.read_text() for p in sources), source, function, *defines, *flags, str(program)])
    out = folder / f"{function}-{key[:16]}{'' if program else '.so'}"
    if out.exists():
        return out
    kind = ["-DPROGRAM"] if program else ["-shared", "-fPIC"]
    making = out.with_name(f"{out.name}.{os.getpid()}.making")
    subprocess.run(
        [
            COMPILER, "-std=c++20", "-O1", "-w", "-pthread", *kind, *flags, "-DEMULATE", f'-DSOURCE="{source}"',
            f"-DFUNCTION={function}", *(f"-D{define}" for define in defines), f"-I{texts}", f"-I{HERE}",
            str(HERE / "emulate.cpp"), "-o", str(making),
        ],
        check=True,
    )  # fmt: skip
    making.replace(out)
    return out


class EmulatedKernels:
    """Gives kernels in place of :func:`gstds_cache.cuda.build.kernel`, each compiled once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.kernels: dict[tuple[str, str, tuple[str, ...]], EmulatedKernel] = {}

    def __call__(
        self, source: str, function: str, defines: tuple[str, ...] = (), *, device: torch.device | None = None
    ) -> EmulatedKernel:
        key = (source, function, tuple(defines))
        if key not in self.kernels:
            self.kernels[key] = EmulatedKernel(compile_emulated(self.folder, *key), function)
        return self.kernels[key]


@dataclass
class Launch:
    """A launch of a kernel, for a kernel or as a file for a program (``compile_emulated(program=True)``).

    Attributes:
        grid: Blocks.
        threads: Threads of a block.
        shared: Bytes of shared memory.
        arguments: In the kernel's order.
    """

    grid: int
    threads: int
    shared: int
    arguments: list[Any]

    def write(self, path: Path) -> None:
        """Write it as tests/cuda/emulate.cpp reads it."""
        data = [struct.pack("=iiiii", self.grid, self.threads, self.shared, 0, len(self.arguments))]
        for argument in self.arguments:
            if argument is None or isinstance(argument, torch.Tensor):
                held = b"" if argument is None else argument.numpy().tobytes()
                data.append(struct.pack("=iq", 1, len(held)) + held)
            else:
                held = struct.pack("=d" if isinstance(argument, float) else "=i", argument)
                data.append(struct.pack("=iq", 0, len(held)) + held)
        path.write_bytes(b"".join(data))


def finish_launch(*, threads: int) -> Launch:
    """A launch of finish_block (cuda/rule.cu), of two graphs of 70 nodes and 3 eigenvectors."""
    return Launch(2, threads, finish_bytes(3), [70, 3, _eigenvectors()])


def cells_launch(keep: int, *, threads: int, far: bool = False, nodes: int = 70) -> Launch:
    """A launch of cells_block (cuda/rule.cu) that keeps so many of the rows of such graphs, at random weights."""
    gen = torch.Generator().manual_seed(1)
    return Launch(
        2,
        threads,
        cells_bytes(nodes, 3, keep, far=far),
        [
            nodes,
            3,
            keep,
            1,
            _eigenvectors(nodes),
            torch.rand(2, 3, dtype=torch.float64, generator=gen),
            None if far else torch.rand(2, nodes, dtype=torch.float64, generator=gen),
            torch.arange(4).view(2, 2),
            torch.rand(2, dtype=torch.float64, generator=gen),
            torch.tensor([keep, max(1, keep - 1)], dtype=torch.int32),
            torch.zeros(2, 3, nodes + 1 + keep, dtype=torch.float64) if far else None,
            torch.zeros(2, keep, dtype=torch.int16),
            torch.zeros(2, keep),
        ],
    )


def resize_launch(*, threads: int) -> Launch:
    """A launch of resize_block (cuda/resize.cu): two images of other sizes, the second turned, with black around it."""
    height, width = 21, 19
    images = torch.randint(256, (3 * 50 * 40 + 3 * 12 * 30,), generator=torch.Generator().manual_seed(0)).to(
        torch.uint8
    )
    table = torch.tensor(
        [
            [0, 2000, 40, 1, 50, 40, 30, 24, 4, 2, 1],
            [6000 + 11 * 30, 360, 1, -30, 30, 12, 35, 14, 7, -2, 0],
        ]
    )
    taps, lines = 10, 50
    arguments = [height, width, taps, lines, images, table, torch.zeros(2, 3, height, width, dtype=torch.uint8)]
    return Launch(2 * 3 * 2, threads, resize_bytes(width, taps, lines), arguments)


def _eigenvectors(nodes: int = 70) -> torch.Tensor:
    x = torch.randn(2, 3, nodes, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return (x * 4).round() / 4  # ties


def graph_launch(
    products: torch.Tensor,
    inverse: torch.Tensor | None,
    k: int,
    *,
    held: int = 10,
    edges: int | None = None,
    bridges: int | None = None,
    spill: bool = False,
    threads: int = 64,
) -> tuple[Launch, dict[str, torch.Tensor]]:
    """A launch of graph_block, and its outputs by name."""
    graphs, nodes, _ = products.shape
    edges = 2 * nodes * k if edges is None else edges
    bridges = nodes - 1 if bridges is None else bridges
    out = {
        "neighbors": torch.zeros(graphs, nodes, k, dtype=torch.int16),
        "similarities": torch.zeros(graphs, nodes, k),
        "crow": torch.zeros(graphs, nodes + 1, dtype=torch.int32),
        "col": torch.zeros(graphs, edges, dtype=torch.int16),
        "weight": torch.zeros(graphs, edges),
        "components": torch.zeros(graphs, dtype=torch.int32),
        "label": torch.zeros(graphs, nodes, dtype=torch.int16),
    }
    room = [torch.zeros(graphs, bridges, 2, dtype=torch.int32), torch.zeros(graphs, bridges)]
    if spill:
        room.append(torch.full((graphs * lists_bytes(nodes, held),), 0xFF, dtype=torch.uint8))
    shared = graph_bytes(nodes, held, spill=spill)
    arguments = [nodes, k, edges, bridges, products, inverse, *out.values(), *room]
    return Launch(graphs, threads, shared, arguments), out


def solve_launch(
    crow: torch.Tensor,
    col: torch.Tensor,
    weight: torch.Tensor,
    q: int,
    *,
    m: int,
    normalized: bool = False,
    tolerance: float = 1e-6,
    most: int = 500,
    shared: int | None = None,
    threads: int = 64,
) -> tuple[Launch, dict[str, torch.Tensor]]:
    """A launch of fiedler_block, and its outputs by name; ``shared`` leaves the rest to a workspace (SPILL)."""
    graphs, nodes, edges = len(crow), crow.shape[1] - 1, col.shape[1]
    needed = solve_bytes(nodes, edges, m, normalized=normalized)
    start = torch.randn(nodes, m, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    out = {
        "values": torch.zeros(graphs, q, dtype=torch.float64),
        "basis": torch.zeros(graphs, q, nodes, dtype=torch.float64),
        "residual": torch.zeros(graphs, q, dtype=torch.float64),
        "second": torch.zeros(graphs, dtype=torch.float64),
        "iterations": torch.zeros(graphs, dtype=torch.int32),
        "converged": torch.zeros(graphs, dtype=torch.int32),
    }
    far = None if shared is None else torch.full((graphs * needed,), 0xFF, dtype=torch.uint8)
    shared = needed if shared is None else shared
    arguments = [
        nodes,
        q,
        edges,
        int(normalized),
        tolerance,
        most,
        shared,
        far,
        crow,
        col,
        weight,
        start,
        *out.values(),
    ]
    return Launch(graphs, threads, shared, arguments), out
