"""What docs/scale.md shows is run: array tasks, pods and hosts are processes of this machine."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
from pathlib import Path

import pytest
import yaml
from forked import Forks

from gstds_cache.files.location import Location
from gstds_cache.store import layout
from gstds_cache.store.factory import open_transport

DOCUMENT = (Path(__file__).parents[2] / "docs" / "scale.md").read_text()
NODES = {
    "ssh": 'shift; exec bash -c "$*"',  # the first word is the host
    "srun": 'for node in $(seq "$SLURM_NNODES"); do "$@" & done; wait',
    "scontrol": "echo localhost; echo node2",
}
RUN_DIR = "/data/runs/photos"


def blocks(kind: str) -> list[str]:
    return re.findall(rf"```{kind}\n(.*?)```", DOCUMENT, flags=re.S)


def block(containing: str) -> str:
    (found,) = [text for text in blocks("sh") if containing in text]
    return found


@pytest.fixture
def run(image_folder: Path, tiny_model: str, tmp_path: Path, forks: Forks):
    """Runs a shell script of the document, with this machine's paths and a small model."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, body in NODES.items():
        (programs / name).write_text(f"#!/bin/bash\n{body}\n")
        (programs / name).chmod(0o755)

    def small(text: str) -> str:
        text = text.replace("/data/photos.store", str(tmp_path / "photos.store"))
        embedded = f"imagefolder:{image_folder} --model {tiny_model} --batch-size 4 --shard-rows 8"
        text = re.sub(r"imagefolder:/data/photos(?! --selection)", embedded, text)
        return text.replace("imagefolder:/data/photos", f"imagefolder:{image_folder}")

    def begin(script: str, **environment: str):
        variables = os.environ | {"GSTDS_CACHE": str(tmp_path / "stores")} | environment
        path = os.pathsep.join((str(programs), str(forks.executable().parent), os.environ["PATH"]))
        return subprocess.Popen(
            ["bash", "-euc", small(script)],
            cwd=tmp_path,
            env=variables | {"PATH": path},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def wait(*processes) -> list[str]:
        ends = [(process.communicate(timeout=280), process.returncode) for process in processes]
        assert [code for _, code in ends] == [0] * len(ends), ends
        return [out + errors for (out, errors), _ in ends]

    return begin, wait


def complete(where: str | Path) -> bool:
    return open_transport(Location.parse(where)).exists(layout.COMPLETE)


@pytest.mark.faults
def test_parts_side_by_side_and_the_end(run, tmp_path) -> None:
    begin, wait = run
    (text,) = wait(begin(block("--shard 0/3 &")))
    assert complete(tmp_path / "photos.store")
    assert "cache hit" in text
    assert "no problem found" in text


@pytest.mark.faults
def test_a_slurm_array(run, tmp_path) -> None:
    script = block("SLURM_ARRAY_TASK_ID")
    first, last = map(int, re.findall(r"#SBATCH --array=(\d+)-(\d+)", script)[0])
    assert first == 0, "parts are counted from 0"
    begin, wait = run
    tasks, count = range(first, last + 1), {"SLURM_ARRAY_TASK_COUNT": str(last + 1)}
    texts = wait(*[begin(script, SLURM_ARRAY_TASK_ID=str(task), **count) for task in tasks])
    assert complete(tmp_path / "photos.store")
    assert all(f"{task}/{last + 1} of the store's shards" in text for task, text in zip(tasks, texts, strict=True))


@pytest.mark.faults
def test_hosts_by_ssh(run, tmp_path) -> None:
    begin, wait = run
    (text,) = wait(begin(block("hosts=(node1 node2 node3)")))
    assert complete(tmp_path / "photos.store")
    assert text.count("of the store's shards") == 3


@pytest.mark.faults
def test_a_kubernetes_indexed_job(run, s3_prefix) -> None:
    (text,) = blocks("yaml")
    job = yaml.safe_load(text)
    count = job["spec"]["completions"]
    assert (job["apiVersion"], job["kind"], job["spec"]["completionMode"]) == ("batch/v1", "Job", "Indexed")
    (container,) = job["spec"]["template"]["spec"]["containers"]
    assert container["args"][-1] == f"$(JOB_COMPLETION_INDEX)/{count}"
    begin, wait = run
    # Kubernetes puts the variable's value in the place of $(NAME), and a shell would run a program of that name.
    words = " ".join([*container["command"], *container["args"]]).replace("s3://bucket/photos.store", s3_prefix)
    wait(*[begin(words.replace("$(JOB_COMPLETION_INDEX)", str(index))) for index in range(count)])
    assert complete(s3_prefix)


@pytest.mark.faults
@pytest.mark.parametrize("how", ["by hand", "srun"])
def test_training_on_two_nodes(run, tmp_path, how) -> None:
    begin, wait = run
    wait(begin("gstds-embed imagefolder:/data/photos --cache /data/photos.store"))
    select = "gstds-select /data/photos.store --batch-size 20 --epochs 2 --knn 5 --guidance none --keep 0.5"
    wait(begin(f"{select} --out {tmp_path / 'selection.arrow'}"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = block("srun torchrun" if how == "srun" else "--rdzv-endpoint node1:29500")
    for written, here in (
        ("--nproc-per-node 8", "--nproc-per-node 1"),
        ("node1:29500", f"localhost:{port}"),
        (":29500", f":{port}"),
        ("/data/selection.arrow", str(tmp_path / "selection.arrow")),
        (RUN_DIR, f"{tmp_path / 'run'} --device cpu --arch timm:test_convnext --image-size 32 --json"),
    ):
        script = script.replace(written, here)
    if how == "srun":
        told = wait(begin(script, SLURM_JOB_NODELIST="node[1-2]", SLURM_NNODES="2", SLURM_JOB_ID="7"))
    else:
        told = wait(begin(script), begin(script))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line.get("epoch") for line in lines] == [0, 1, None]
    # Two processes that knew nothing of each other would have trained twice, and each would have told of it.
    assert sum(line.startswith("{") for text in told for line in text.splitlines()) == 1
