"""What may happen to a cluster: a run completes, or goes on from what is committed, with the same bytes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from cluster_tasks import Folder, SquareRecipe, Squares
from ray_cluster import SHARED, LoopbackCluster
from s3_api import FaultProxy

import gstds_cache
from gstds_cache.cluster.executor import Limits, RayExecutor
from gstds_cache.errors import IncompleteError
from gstds_cache.store.reader import EmbeddingStore

pytestmark = [pytest.mark.ray, pytest.mark.faults]
QUICK = Limits(task=0.5, tick=0.05, nodes=0.5, told=0.5, silent=1.0, no_node=2.0, slow=2.0, pause=0.05)
SETTINGS: dict[str, Any] = {"batch_size": 4, "shard_rows": 4, "device": "cpu", "dtype": "float32", "progress": False}


def squares(count: int) -> list[int]:
    return [unit * unit for unit in range(count)]


def contents(path: Path) -> dict[str, bytes]:
    parts = ("embeddings/c/", "commits/", "label/", "valid/", "items.arrow")
    files = {file.relative_to(path).as_posix(): file for file in path.rglob("*") if file.is_file()}
    return {name: file.read_bytes() for name, file in files.items() if name.startswith(parts)}


def hashes(store: EmbeddingStore) -> dict[int, str]:
    return {shard: commit.object_sha256 for shard, commit in store.commits.items()}


@pytest.mark.parametrize("ordered", [False, True])
def test_a_killed_worker_costs_what_it_was_at(cluster: LoopbackCluster, tmp_path: Path, ordered: bool) -> None:
    told: list[str] = []
    executor = RayExecutor(notify=told.append, limits=QUICK)
    task = Squares(SquareRecipe(tmp_path, seconds=0.02, faults={20: "kill"}))
    results = list(executor.run(task, range(60), ordered=ordered))
    assert (results if ordered else sorted(results)) == squares(60)
    again = [unit for unit in range(60) if Folder(tmp_path).count(unit) > 1]
    # Units of the task that was under way, and of no other: a task takes half a second at most.
    assert 20 in again
    assert len(again) <= 0.5 / 0.02 + 1
    assert executor.retries == 1
    assert any("will be tried again (try 2 of 4)" in line for line in told)


def test_a_unit_that_kills_every_worker_ends_the_run(cluster: LoopbackCluster, tmp_path: Path) -> None:
    executor = RayExecutor(notify=lambda _line: None, limits=QUICK)
    task = Squares(SquareRecipe(tmp_path, faults={3: "always kill"}))
    with pytest.raises(IncompleteError, match=r"squares 3 failed 4 times on the Ray cluster(.|\n)*goes on"):
        list(executor.run(task, range(5)))
    assert Folder(tmp_path).count(3) == 4


def test_what_may_pass_is_tried_again(cluster: LoopbackCluster, tmp_path: Path) -> None:
    executor = RayExecutor(notify=lambda _line: None, limits=QUICK)
    assert sorted(executor.run(Squares(SquareRecipe(tmp_path, faults={2: "busy"})), range(5))) == squares(5)
    assert executor.retries == 1


def test_a_worker_that_stands_still_is_not_waited_for(cluster: LoopbackCluster, tmp_path: Path) -> None:
    told: list[str] = []
    executor = RayExecutor(notify=told.append, limits=QUICK)
    task = Squares(SquareRecipe(tmp_path, seconds=0.02, faults={5: "stop"}))
    assert sorted(executor.run(task, range(30))) == squares(30)
    assert executor.second_tries >= 1
    assert any("another worker tries them as well" in line for line in told)
    for path in tmp_path.glob("unit-5.0.*"):
        os.kill(int(path.suffix[1:]), signal.SIGKILL)


def test_a_node_that_goes(cluster: LoopbackCluster, tmp_path: Path) -> None:
    node = cluster.nodes[-1]
    task = Squares(SquareRecipe(tmp_path, seconds=0.1))
    executor, results = RayExecutor(notify=lambda _line: None, limits=QUICK), []
    for result in executor.run(task, range(60)):
        results.append(result)
        if len(results) == 10:
            threading.Thread(target=cluster.remove, args=(node,)).start()
    assert sorted(results) == squares(60)
    cluster.nodes.append(cluster.add())


def test_nothing_is_waited_for_in_silence(cluster: LoopbackCluster, tmp_path: Path) -> None:
    told: list[str] = []
    executor = RayExecutor(notify=told.append, limits=QUICK)
    list(executor.run(Squares(SquareRecipe(tmp_path, seconds=3.0)), [1]))
    assert any(line.startswith("ray: nothing has finished for 1 s; 1 tasks are under way, on 2 nodes") for line in told)
    with pytest.raises(IncompleteError, match="no node of the Ray cluster has the 64 CPUs that a task needs, for 2 s"):
        list(executor.run(Squares(SquareRecipe(tmp_path, cpus=64)), [1]))


def test_parts_of_a_gpu(cluster: LoopbackCluster, tmp_path: Path) -> None:
    # A node that says it has a GPU: what is tested is what tasks ask for.
    node = cluster.add(num_gpus=1)
    told: list[str] = []
    executor = RayExecutor(notify=told.append, gpus_per_task=0.5, limits=QUICK)
    assert sorted(executor.run(Squares(SquareRecipe(tmp_path, gpu=True)), range(6))) == squares(6)
    cluster._cluster.remove_node(node, allow_graceful=False)
    with pytest.raises(IncompleteError, match=r"has the 1 CPUs and 0\.5 GPUs that a task needs"):
        list(executor.run(Squares(SquareRecipe(tmp_path, gpu=True)), range(6)))


def test_embedding_goes_on_when_a_worker_is_killed(
    cluster: LoopbackCluster, photos: Path, marks: Path, tmp_path: Path
) -> None:
    gstds_cache.embed(f"imagefolder:{photos}", tmp_path / "here", model="cluster_tasks:build", workers=0, **SETTINGS)
    (marks / "kill").touch()
    told: list[str] = []
    store = gstds_cache.embed(
        f"imagefolder:{photos}", tmp_path / "ray", engine="ray", model="cluster_tasks:build_killed", notify=told.append,
        **SETTINGS,
    )  # fmt: skip
    assert not (marks / "kill").exists()
    assert any("will be tried again" in line for line in told)
    assert hashes(store) == hashes(EmbeddingStore(tmp_path / "here"))
    assert gstds_cache.verify_store(tmp_path / "ray", level="full").problems == ()


def test_a_bucket_that_answers_503_for_a_while(
    cluster: LoopbackCluster, photos: Path, bucket: str, proxy: FaultProxy, tmp_path: Path
) -> None:
    model = "cluster_tasks:build"
    gstds_cache.embed(f"imagefolder:{photos}", tmp_path / "here", model=model, workers=0, **SETTINGS)
    fault = proxy.inject("slow_down", method="PUT", key="/embeddings/", times=25)
    store = gstds_cache.embed(f"imagefolder:{photos}", bucket, engine="ray", model=model, **SETTINGS)
    assert fault.hits == 25
    assert hashes(store) == hashes(EmbeddingStore(tmp_path / "here"))


def test_a_driver_that_is_killed_goes_on(cluster: LoopbackCluster, photos: Path, tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "ray"
    model = "cluster_tasks:build_slow"
    words = [sys.executable, "-m", "gstds_cache.cli.embed_command", f"imagefolder:{photos}", "--cache", str(there)]
    words += ["--model", model, "--batch-size", "4", "--shard-rows", "4", "--device", "cpu", "--dtype", "float32"]
    words += ["--engine", f"ray:{cluster.address}"]
    environment = os.environ | {"PYTHONPATH": str(SHARED), "PYTHONWARNINGS": "ignore"}
    driver = subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    give_up = time.monotonic() + 240
    while len(list(there.glob("commits/*"))) < 3 and driver.poll() is None and time.monotonic() < give_up:
        time.sleep(0.05)
    driver.kill()
    out, _ = driver.communicate()
    assert driver.returncode == -signal.SIGKILL, out
    assert not (there / "COMPLETE").exists()
    time.sleep(1)  # what was under way ends with the driver's tasks
    before = len(list(there.glob("commits/*")))
    assert 3 <= before < 15
    done = subprocess.run([*words, "--json"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    gstds_cache.embed(f"imagefolder:{photos}", here, model=model, workers=0, **SETTINGS)
    assert contents(there) == contents(here)
    assert gstds_cache.verify_store(there, level="full").problems == ()


def test_a_cluster_of_this_machine_is_started_and_ended(photos: Path, tmp_path: Path) -> None:
    words = [sys.executable, "-m", "gstds_cache.cli.embed_command", f"imagefolder:{photos}", "--cache"]
    words += [str(tmp_path / "ray"), "--model", "cluster_tasks:build", "--device", "cpu", "--engine", "ray"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"PYTHONPATH": str(SHARED)}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "60 in = 58 ok" in done.stdout
    assert "Traceback" not in done.stderr
    assert "WARNING" not in done.stderr
    assert EmbeddingStore(tmp_path / "ray").spec.items == 60
