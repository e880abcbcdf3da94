"""CUDA kernels compiled by g++ and run on CPU tensors: the same text, called by the same lines of host code."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch

from gstds_cache.cuda import build
from gstds_cache.cuda.launch import Kernel
from gstds_cache.errors import KernelError

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

    def blocks_at_once(self, threads: int, shared_bytes: int) -> int:
        return 1


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
    making = out.with_name(f"{out.name}.{torch.initial_seed() & 0xFFFF}.making")
    subprocess.run(
        [
            COMPILER, "-std=c++20", "-O2", "-w", "-pthread", *kind, *flags, "-DEMULATE", f'-DSOURCE="{source}"',
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
