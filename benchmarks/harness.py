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
import sys
import time
import traceback
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("gstds-cache", "torch", "faiss-gpu", "zarr", "numpy", "scipy", "pillow", "timm")


def environment() -> dict[str, Any]:
    """Commit, machine and versions."""
    import threadpoolctl
    import torch

    cpu = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.machine(),
    )
    return {
        "commit": os.environ.get("BENCHMARK_COMMIT") or commit(),
        "cpu": cpu,
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch_threads": torch.get_num_threads(),
        # OpenBLAS's kernels are chosen by the machine, or by OPENBLAS_CORETYPE: the products' speed depends on them.
        "blas": sorted({str(lib["architecture"]) for lib in threadpoolctl.threadpool_info() if "architecture" in lib}),
        "python": platform.python_version(),
        **{package: version_of(package) for package in PACKAGES},
    }


def commit() -> str:
    """The commit of this checkout, and whether files differ from it; empty where it is no repository."""
    return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain") else "")


def git(*words: str) -> str:
    """What git says of this checkout; nothing where there is no git, or no repository."""
    try:
        done = subprocess.run(
            ["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True, check=False, timeout=20
        )
    except OSError:
        return ""
    return done.stdout.strip()


def version_of(package: str) -> str | None:
    """Version of an installed package; None where it is not there."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


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
    """Print ``result``, and write it; after a smoke run only where ``--out`` says."""
    text = json.dumps({"benchmark": name, "environment": environment(), **result}, indent=1)
    print(text)
    if arguments.out or not arguments.smoke:
        write(arguments.out or RESULTS / f"{name}.json", text + "\n")


def write(path: Path, text: str) -> None:
    """Write a file that has its name only when it is whole: whoever reads it may be about to kill the writer."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(text)
    beside.replace(path)


class Measured:
    """What a part of ``on_gpu.py`` has measured so far, on the disk after every case: its time may end at any moment.

    Attributes:
        found: The result, a JSON object.
    """

    def __init__(self, name: str, arguments: argparse.Namespace) -> None:
        self._name, self._arguments, self._begun = name, arguments, time.monotonic()
        self.found: dict[str, Any] = {"seconds": {}, "not_measured": []}
        self._environment = environment()

    def left(self) -> float:
        """Seconds until ``--seconds`` have passed."""
        return float(self._arguments.seconds - (time.monotonic() - self._begun))

    def case(self, name: str, expected: float, measure: Callable[[], Any]) -> Any:
        """Measure one case and keep it, or the error it ended with, if at least ``expected`` seconds are left."""
        if self.left() < expected:
            self.found["not_measured"].append(name)
            return None
        begun = time.monotonic()
        try:
            result = measure()
        except Exception as error:
            traceback.print_exc()
            result = {"error": f"{type(error).__name__}: {error}"[:2000]}
        self.found[name] = result
        self.found["seconds"][name] = round(time.monotonic() - begun, 2)
        print(f"{name}: {json.dumps(result)}"[:1500], file=sys.stderr, flush=True)
        self.save()
        return result

    def save(self) -> None:
        """Write what there is, where ``--out`` says."""
        if self._arguments.out:
            whole = {"benchmark": self._name, "environment": self._environment, **self.found}
            write(self._arguments.out, json.dumps(whole, indent=1) + "\n")

    def errors(self) -> list[str]:
        """Names of the cases that failed."""
        return [name for name, case in self.found.items() if isinstance(case, dict) and "error" in case]


def limit_threads(threads: int) -> None:
    """Let this process use at most ``threads`` CPU threads from now on: torch, faiss and SciPy's BLAS."""
    import threadpoolctl
    import torch

    torch.set_num_threads(threads)
    threadpoolctl.threadpool_limits(threads)
