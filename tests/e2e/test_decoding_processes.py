"""Processes that decode, in whole runs: the same store and the same training, and no room where there is none."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import handles
import pytest
import torch
from elsewhere import MOUNTED, codes, run_commands
from forked import Forks

from gstds_cache.config import EmbedConfig, SelectConfig, TrainConfig
from gstds_cache.data.manifest import build_manifest
from gstds_cache.data.sources import open_source
from gstds_cache.embedding.repair import repair
from gstds_cache.embedding.run import embed_dataset
from gstds_cache.encoders.factory import open_encoder
from gstds_cache.errors import IncompleteError
from gstds_cache.selection.run import BatchSelector
from gstds_cache.store import layout
from gstds_cache.store.reader import EmbeddingStore
from gstds_cache.stream.deliver import write_file
from gstds_cache.stream.reader import open_selection
from gstds_cache.training.evaluate import evaluate
from gstds_cache.training.identity import run_config
from gstds_cache.training.images import ImageFeed
from gstds_cache.training.loop import train
from gstds_cache.training.run_dir import RunDir

pytestmark = pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current directory of a user with files that data sets keep open, and a module of those data sets."""
    handles.write(tmp_path)
    shutil.copy(handles.__file__, tmp_path)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    handles.forget()


def embed(uri: str, model: str, where: str, workers: int):
    config = EmbedConfig(model=model, batch_size=16, shard_rows=96, workers=workers, device="cpu")
    return embed_dataset(open_source(uri), config, where=Path(where)).report


def select(store: str) -> Path:
    config = SelectConfig(batch_size=60, epochs=2, knn=5, rule="random", schedule="constant:0.5", device="cpu")
    list(write_file(BatchSelector(EmbeddingStore(store), config), Path("s.arrow")))
    return Path("s.arrow")


def shards(store: str) -> dict[str, bytes]:
    return {
        str(path.relative_to(store)): path.read_bytes()
        for path in sorted(Path(store).rglob("*"))
        if path.is_file() and "embeddings" in path.parts
    }


@pytest.mark.parametrize("factory", ["RawFile", "Unbuffered", "Zip", "of_the_module"])
def test_a_store_does_not_depend_on_the_number_of_processes(tiny_model: str, factory: str) -> None:
    reports = [embed(f"handles:{factory}", tiny_model, f"s{workers}", workers) for workers in (0, 1, 4)]
    assert [report.workers for report in reports] == [0, 1, 4]
    assert shards("s0") == shards("s1") == shards("s4")
    assert len(shards("s0")) > 3


def test_a_report_says_how_many_processes_decoded(tiny_model: str) -> None:
    assert embed("handles:once", tiny_model, "s", 3).workers == 0


def test_training_and_accuracy_do_not_depend_on_the_number_of_processes(tiny_model: str, monkeypatch) -> None:
    monkeypatch.setattr("gstds_cache.training.evaluate.worth_workers", lambda _source, _side, workers: workers)
    monkeypatch.setattr("gstds_cache.training.images.worth_workers", lambda _source, _side, workers: workers)
    embed("handles:RawFile", tiny_model, "s", 0)
    selection, found = select("s"), []
    for number, (workers, budget) in enumerate([(0, 0), (4, 0), (2, 1 << 30)]):
        config = TrainConfig(
            arch="timm:test_resnet", image_size=16, augment="crop", device="cpu", workers=workers, memory_budget=budget
        )
        with open_selection(selection) as stream:
            run_dir = RunDir(Path(f"run{number}"), run_config(config, stream.header, None), provenance={}, resume=True)
            source, evaluation = open_source("handles:RawFile"), open_source("handles:Zip")
            build_manifest(source)
            report = train(source, stream, config, run_dir, evaluation=evaluation)
        found.append((report.loss, report.accuracy))
    assert found[0] == found[1] == found[2]


def test_a_killed_worker_ends_every_kind_of_work(tiny_model: str, monkeypatch) -> None:
    """Embedding, repair, training, filling memory, and accuracy; each goes on with the same call."""
    monkeypatch.setattr("gstds_cache.training.evaluate.worth_workers", lambda _source, _side, workers: workers)
    monkeypatch.setattr("gstds_cache.training.images.worth_workers", lambda _source, _side, workers: workers)
    Path("deadly").touch()

    def killed(work) -> None:
        with pytest.raises(IncompleteError, match=r"process that decodes images \(pid \d+\).* was killed by SIGKILL"):
            work()

    killed(lambda: embed("handles:deadly", tiny_model, "s", 2))
    assert sorted(EmbeddingStore("s", allow_partial=True).commits) in ([0], [0, 1])
    Path("deadly").unlink()
    assert embed("handles:deadly", tiny_model, "s", 2).committed_before > 0
    Path("deadly").touch()
    source = open_source("handles:deadly")
    Path("s", layout.object_key(2)).unlink()
    killed(lambda: repair("s", source, open_encoder(tiny_model), device="cpu", workers=1))
    killed(lambda: ImageFeed(source, side=16, memory_budget=1 << 30, workers=2))
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 16 * 16, 4))
    killed(lambda: evaluate(network, source, torch.device("cpu"), side=16, workers=2))
    Path("deadly").unlink()
    repair("s", source, open_encoder(tiny_model), device="cpu", workers=1)


def test_the_command_that_trains_says_how_to_go_on(command, tiny_model: str) -> None:
    embed("handles:deadly", tiny_model, "s", 0)
    select("s")
    words = ["gstds-train", "handles:deadly", "--selection", "s.arrow", "--arch", "timm:test_resnet", "--device", "cpu"]
    words += ["--image-size", "16", "--augment", "none", "--memory-budget", "0", "--workers", "2", "--out", "a run"]
    Path("deadly").touch()
    told = command(*words, code=4).stderr
    assert "Traceback" not in told
    assert "was killed by SIGKILL" in told
    assert "--resume --out 'a run'" in told
    Path("deadly").unlink()
    command(*words, "--resume")
    assert json.loads(Path("a run", "metrics.jsonl").read_text().splitlines()[-1])["final"] is True


MOUNTS = {
    "64 MB, Docker's default": "mount -t tmpfs -o size=64m tmpfs /dev/shm",
    "4 kB": "mount -t tmpfs -o size=4k tmpfs /dev/shm",
    "read-only": "mount -t tmpfs -o ro tmpfs /dev/shm",
    "missing": "mkdir dev && mount -t tmpfs tmpfs dev && for f in null zero full random urandom; do touch dev/$f && "
    "mount --bind /dev/$f dev/$f; done && mount --rbind dev /dev && ! test -e /dev/shm",
}
LARGE = f"""{MOUNTED}
from gstds_cache.data.loading import pixel_batches
from gstds_cache.data.sources import open_source
import torch
shape, rows = (3, 224, 224), [range(256)] * 6
transform = lambda image: torch.full(shape, image.getpixel((0, 0))[0], dtype=torch.uint8)
for workers in (0, 3):
    batches = pixel_batches(open_source("handles:RawFile"), transform, shape, rows, workers=workers, pin=False)
    print([batch.pixels[:, 0, 0, 0].tolist() == list(range(256)) for batch in batches], batches.workers)
"""


@pytest.mark.skipif(
    os.geteuid() != 0 or subprocess.run(["unshare", "-m", "true"], check=False, capture_output=True).returncode != 0,
    reason="needs root, and unshare, for a private mount",
)
@pytest.mark.parametrize("mount", MOUNTS.values(), ids=MOUNTS)
def test_no_shared_memory_of_the_systems_is_needed(here: Path, mount: str, forks: Forks) -> None:
    """Six batches of 256 at 224 pixels are 230 MB, of which several are under way."""
    (here / "large.py").write_text(LARGE)
    process = forks.start([str(here / "large.py"), mount], cwd=here)
    out, errors = process.communicate(120)
    assert (process.returncode, errors) == (0, "")
    assert out.splitlines() == [f"{[True] * 6} 0", f"{[True] * 6} 0"]


@pytest.mark.skipif(
    os.geteuid() != 0 or subprocess.run(["unshare", "-m", "true"], check=False, capture_output=True).returncode != 0,
    reason="needs root, and unshare, for a private mount",
)
def test_the_commands_run_without_shared_memory(tiny_model: str, here: Path) -> None:
    folder = Path(sys.executable).parent
    script = f"""{MOUNTS["missing"]}
set -e
{folder}/gstds-embed handles:Zip --model {tiny_model} --cache s --workers 2 --device cpu
"""
    environment = os.environ | {"GSTDS_CACHE": str(here / "stores"), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(here)}
    run = subprocess.run(
        ["unshare", "-m", "bash", "-c", script],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env=environment,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "300 in = 300 ok" in run.stdout
    shutil.rmtree("dev")
    # Libraries have been loaded without it; from here on they are there.
    select = "gstds-select s --batch-size 60 --epochs 1 --knn 5 --rule random --out s.arrow --device cpu"
    train = (
        "gstds-train handles:Zip --selection s.arrow --arch timm:test_resnet --image-size 16 --memory-budget 0 "
        "--workers 2 --eval handles:RawFile --device cpu --out run"
    )
    ended = run_commands(
        here, select.split(), train.split(), before=MOUNTS["missing"],
        GSTDS_CACHE=environment["GSTDS_CACHE"], PYTHONPATH=environment["PYTHONPATH"],
    )  # fmt: skip
    assert codes(ended) == [0, 0], ended
    assert "test accuracy" in ended[1].stdout
