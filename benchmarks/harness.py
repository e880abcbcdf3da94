"""What every benchmark shares: where it ran, repeated trials, one JSON file per result.

A result names commit, machine, versions, trials and spread, and shows correctness beside time. Absolute times are noise
on shared machines; ratios of interleaved trials in one run are not, so every speed here has its peer in the same run.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("gstds-cache", "torch", "faiss-gpu", "zarr", "numpy", "scipy", "pillow", "timm")


def environment() -> dict[str, Any]:
    """Commit, machine and versions."""
    import threadpoolctl
    import torch

    here = Path(__file__).parent
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=False)
    dirty = subprocess.run(["git", "status", "--porcelain"], cwd=here, capture_output=True, text=True, check=False)
    cpu = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.machine(),
    )
    return {
        "commit": commit.stdout.strip() + ("+changes" if dirty.stdout.strip() else ""),
        "cpu": cpu,
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch_threads": torch.get_num_threads(),
        # OpenBLAS's kernels are chosen by the machine, or by OPENBLAS_CORETYPE: the products' speed depends on them.
        "blas": sorted({str(lib["architecture"]) for lib in threadpoolctl.threadpool_info() if "architecture" in lib}),
        "python": platform.python_version(),
        **{package: version(package) for package in PACKAGES},
    }


def interleaved(trials: int, **functions: Callable[[], object]) -> dict[str, dict[str, Any]]:
    """Time functions in turn, A B A B ..., after one round that is not counted.

    Returns:
        For each, its seconds: median, min, max and all trials.
    """
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for trial in range(trials + 1):
        for name, function in functions.items():
            begun = time.perf_counter()
            function()
            if trial:
                seconds[name].append(time.perf_counter() - begun)
    return {name: spread(values) for name, values in seconds.items()}


def spread(values: list[float]) -> dict[str, Any]:
    """Median, min, max and all of ``values``."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "trials": values}


def parser(text: str | None) -> argparse.ArgumentParser:
    """Argument parser with the flags every benchmark has."""
    made = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--smoke", action="store_true", help="a few seconds on made-up data; nothing is written")
    made.add_argument("--trials", type=int, default=5)
    made.add_argument("--out", type=Path, help="where the JSON goes [default: benchmarks/results/NAME.json]")
    return made


def report(name: str, result: dict[str, Any], arguments: argparse.Namespace) -> None:
    """Print ``result``, and write it unless this was a smoke run."""
    whole = {"benchmark": name, "environment": environment(), **result}
    text = json.dumps(whole, indent=1)
    print(text)
    if not arguments.smoke:
        path = arguments.out or RESULTS / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")


def limit_threads(threads: int) -> None:
    """Let this process use at most ``threads`` CPU threads from now on: torch, faiss and SciPy's BLAS."""
    import threadpoolctl
    import torch

    torch.set_num_threads(threads)
    threadpoolctl.threadpool_limits(threads)
