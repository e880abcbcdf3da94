"""No two threads touch the same memory without a barrier between them: ThreadSanitizer over real threads.

The slow test takes each barrier out in turn, and expects the sanitizer to notice. It shows that the check sees races,
and that no barrier is there for nothing:

    python -m pytest -m faults tests/cuda/test_races.py
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from emulated import (
    WHY_NOT,
    Launch,
    cells_launch,
    compile_emulated,
    finish_launch,
    graph_launch,
    resize_launch,
    solve_launch,
)

from gstds_cache.cuda import build
from gstds_cache.graph.cuda import stack_of
from gstds_cache.graph.laplacian import SparseGraph

pytestmark = pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)
SANITIZER = ("-fsanitize=thread", "-DEMULATE_THREADS")
THREADS = 7  # of no relation to the sizes of arrays: a thread meets what others wrote
RACE = 66  # exit code
KERNELS = {
    "graph.cu": {"graph_block": ("KNN=4",)},
    "solve.cu": {"fiedler_block": ("M=2",)},
    "rule.cu": {"finish_block": (), "cells_block": ()},
    "resize.cu": {"resize_block": ("REACH=2",)},
}


def graph_launches() -> list[Launch]:
    gen = torch.Generator().manual_seed(0)
    clusters = torch.eye(4).repeat_interleave(10, 0) + 0.01 * torch.randn(40, 4, generator=gen)
    x = torch.stack([clusters, torch.randn(40, 4, generator=gen)])
    x = torch.nn.functional.normalize(x, dim=2)
    products = x @ x.mT
    return [
        graph_launch(products, torch.ones(2, 40), 3, held=4, threads=THREADS)[0],
        graph_launch(products, None, 3, held=4, edges=80, threads=THREADS)[0],
        graph_launch(products, None, 3, held=4, bridges=1, threads=THREADS)[0],
    ]


def solve_launches() -> list[Launch]:
    near = torch.arange(40)  # more than the 32 parts of a sum
    far = (near * 7 + 3) % 40
    path = (near[:-1], near[1:])
    ends = (torch.cat([path[0], near]), torch.cat([path[1], far]))
    weight = (0.1 + torch.arange(79) % 5 / 5).float().double()
    stack = stack_of(SparseGraph.from_edges(*ends, weight, (1, 40)))
    return [
        solve_launch(stack.crow, stack.col, stack.weight, 1, m=2, normalized=kind, threads=THREADS)[0]
        for kind in (False, True)
    ]


LAUNCHES = {
    "graph_block": graph_launches,
    "fiedler_block": solve_launches,
    "finish_block": lambda: [finish_launch(threads=THREADS)],
    "cells_block": lambda: [
        cells_launch(keep, threads=THREADS, far=far) for keep, far in ((12, False), (1, False), (70, True))
    ],
    "resize_block": lambda: [resize_launch(threads=THREADS)],
}


def races(source: str, folder: Path, texts: Path = build.FOLDER) -> str:
    """What the sanitizer reports; empty for nothing."""
    environment = {**os.environ, "TSAN_OPTIONS": f"halt_on_error=1 exitcode={RACE}"}
    for function, defines in KERNELS[source].items():
        program = compile_emulated(folder, source, function, defines, texts=texts, flags=SANITIZER, program=True)
        for launch in LAUNCHES[function]():
            arguments = folder / "arguments"
            launch.write(arguments)
            done = subprocess.run(
                [program, arguments], env=environment, capture_output=True, text=True, timeout=60, check=False
            )
            if done.returncode == RACE:
                return done.stderr
            assert done.returncode == 0, done.stderr
    return ""


@pytest.mark.parametrize("source", list(KERNELS))
def test_no_race(source, tmp_path):
    assert not races(source, tmp_path)


def barriers(source: str) -> list[tuple[str, int]]:
    """File and offset of each barrier in a kernel's texts."""
    found = []
    for name, text in build.source_texts(source).items():
        if source != "solve.cu" and name == "block.cuh":
            continue  # its sums, which are solve.cu's
        found += [(name, match.start()) for match in re.finditer(r"(?<!define )\bSYNC\(\);", text)]
    return found


@pytest.mark.faults
@pytest.mark.parametrize("source", list(KERNELS))
def test_each_barrier_is_missed(source, tmp_path):
    texts = tmp_path / "texts"
    shutil.copytree(build.FOLDER, texts)
    assert not races(source, tmp_path, texts)
    silent = []
    for name, start in barriers(source):
        whole = (build.FOLDER / name).read_text()
        (texts / name).write_text(whole[:start] + whole[start:].replace("SYNC();", "", 1))
        try:
            if not races(source, tmp_path, texts):
                silent.append(f"{name}:{whole[:start].count(chr(10)) + 1}")
        except (AssertionError, subprocess.TimeoutExpired):
            pass  # it went on with garbage, which is noticed as well
        (texts / name).write_text(whole)
    assert not silent, f"nothing notices that these are gone: {silent}"
