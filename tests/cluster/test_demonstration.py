"""The demonstration of docs/ray.md, on a few images; and the benchmark, on made-up ones."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.ray, pytest.mark.faults]
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def run(*words: str) -> str:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "AWS_"))}
    done = subprocess.run(
        [sys.executable, *words], env=environment, capture_output=True, text=True, timeout=1200, check=False
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def test_a_worker_and_the_driver_are_killed(photos: Path) -> None:
    words = [str(photos), "--model", "cluster_tasks:build_slower", "--shard-rows", "4"]
    result = json.loads(run(str(BENCHMARKS / "demo_scale.py"), *words).splitlines()[-1])
    assert result["shards"] == 15
    assert 10 <= result["committed_when_killed"] < 15
    assert (result["embed"], result["verify"], result["different"]) == (0, 0, [])


def test_the_benchmark(tmp_path: Path) -> None:
    run(str(BENCHMARKS / "bench_scale.py"), "--smoke", "--out", str(tmp_path / "scale.json"))
    result = json.loads((tmp_path / "scale.json").read_text())  # Ray prints between the lines of what is printed
    assert result["same rows from both engines"]
    assert result["a worker killed"]["ours, Ray"]["finished_shards_made_again"] == 0
