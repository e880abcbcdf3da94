"""Which lines of the kernels' texts the CPU tests' cases run, by gcov; the report prints the others.

python -m pytest tests/cuda/test_coverage.py -s
"""

from __future__ import annotations

import json
import shutil
import subprocess

import pytest
import torch
from emulated import WHY_NOT, cells_launch, compile_emulated, finish_launch, graph_launch, resize_launch, solve_launch

from gstds_cache.cuda import build
from gstds_cache.embedding.device_resizing import REACH
from gstds_cache.graph.cuda import stack_of
from gstds_cache.graph.laplacian import SparseGraph

pytestmark = pytest.mark.skipif(
    bool(WHY_NOT) or shutil.which("gcov") is None, reason=WHY_NOT or "needs gcov, which is not installed"
)


def graph_launches():
    gen = torch.Generator().manual_seed(0)
    clusters = torch.eye(4).repeat_interleave(5, 0) + 0.01 * torch.randn(20, 4, generator=gen)
    x = torch.nn.functional.normalize(torch.stack([clusters, torch.randn(20, 4, generator=gen)]), dim=2)
    products = x @ x.mT
    return [
        graph_launch(products, torch.ones(2, 20), 3, threads=8),
        graph_launch(products, None, 3, edges=40, threads=8),
        graph_launch(products, None, 3, bridges=1, threads=8),
    ]


def solve_launches():
    near = torch.arange(39)
    path = stack_of(SparseGraph.from_edges(near, near + 1, torch.ones(39, dtype=torch.float64), (1, 40)))
    near, far = torch.triu_indices(40, 40, 1)
    complete = stack_of(SparseGraph.from_edges(near, far, torch.ones(len(near), dtype=torch.float64), (1, 40)))
    full = [
        solve_launch(g.crow, g.col, g.weight, 1, m=2, normalized=kind, threads=8)
        for g in (path, complete)
        for kind in (False, True)
    ]
    few = solve_launch(path.crow, path.col[:, 1:].contiguous(), path.weight[:, 1:].contiguous(), 1, m=2)
    return [*full, solve_launch(path.crow, path.col, path.weight, 1, m=2, most=1, tolerance=1e-9), few]


def cells_launches():
    sizes = ((12, 70), (1, 70), (5, 300))
    return [(cells_launch(keep, threads=8, nodes=nodes), None) for keep, nodes in sizes]


KERNELS = {
    "graph.cu": [("graph_block", ("KNN=10",), graph_launches)],
    "solve.cu": [("fiedler_block", ("M=2",), solve_launches)],
    "rule.cu": [("finish_block", (), lambda: [(finish_launch(threads=8), None)]), ("cells_block", (), cells_launches)],
    "resize.cu": [
        ("resize_block", (f"REACH={reach}",), lambda: [(resize_launch(threads=8), None)]) for reach in REACH.values()
    ],
}


@pytest.mark.parametrize("source", list(KERNELS))
def test_every_line_is_run(source, tmp_path):
    for function, defines, launches in KERNELS[source]:
        name = "-".join((function, *defines))
        flags = ("--coverage", "-O0", "-fno-inline", "-dumpbase", name)
        program = compile_emulated(tmp_path, source, function, defines, flags=flags, program=True)
        for number, (launch, _) in enumerate(launches()):
            launch.write(tmp_path / f"arguments{number}")
            subprocess.run([program, tmp_path / f"arguments{number}"], check=True, timeout=60)
    found = subprocess.run(
        ["gcov", "--json-format", "--stdout", *map(str, tmp_path.glob("*.gcda"))],
        cwd=tmp_path, capture_output=True, text=True, check=True,
    )  # fmt: skip
    counts: dict[str, dict[int, int]] = {}
    for report in map(json.loads, found.stdout.splitlines()):
        for file in report["files"]:
            if file["file"].startswith(str(build.FOLDER)):
                lines = counts.setdefault(file["file"].rsplit("/", 1)[1], {})
                for line in file["lines"]:
                    if line.get("function_name", "").endswith("_bytes"):
                        continue  # for the host, which the kernels of other tests ask
                    lines[line["line_number"]] = lines.get(line["line_number"], 0) + line["count"]
    for name, lines in counts.items():
        missed = [number for number, count in sorted(lines.items()) if not count]
        print(f"{name}: {len(lines) - len(missed)} of {len(lines)} lines run; not run: {missed or 'none'}")
    assert set(counts) >= {source}
    text = (build.FOLDER / source).read_text().splitlines()
    missed = [f"{number}: {text[number - 1].strip()}" for number, count in counts[source].items() if not count]
    assert not missed
