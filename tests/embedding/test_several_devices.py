"""One run on several devices gives the bytes of one device's run. Two CPUs stand for two GPUs."""

from __future__ import annotations

import multiprocessing
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from images import ArraySource
from slow_images import Buggy, Deadly, Slow, Waiting

from gstds_cache.config import EmbedConfig
from gstds_cache.embedding import several
from gstds_cache.embedding.clock import Clock
from gstds_cache.embedding.run import embed_dataset
from gstds_cache.errors import IncompleteError, UsageError
from gstds_cache.runtime import devices
from gstds_cache.runtime.devices import resolve_device, resolve_devices

BAD = frozenset({7, 33})
FORK = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")


@pytest.fixture
def config(tiny_model: str) -> EmbedConfig:
    return EmbedConfig(model=tiny_model, batch_size=4, shard_rows=8, workers=2, device="cpu", dtype="float32")


def contents(path: Path) -> dict[str, bytes]:
    """All that a store holds, but when and where it was made."""
    parts = ("embeddings/c/", "commits/", "label/", "valid/", "items.arrow")
    files = {file.relative_to(path).as_posix(): file for file in path.rglob("*") if file.is_file()}
    return {name: file.read_bytes() for name, file in files.items() if name.startswith(parts)}


def left_over() -> list[str]:
    return [
        *(process.name for process in multiprocessing.active_children()),
        *(thread.name for thread in threading.enumerate() if thread.name.startswith("gstds-")),
    ]


@pytest.fixture
def forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fork the other processes, which have no GPU here: to import the packages anew takes seconds."""
    monkeypatch.setattr(several, "START", "fork")


def test_two_devices_make_the_store_that_one_makes(config, tmp_path, monkeypatch) -> None:
    embed_dataset(ArraySource(100, bad=BAD), config, where=tmp_path / "small")
    alone = embed_dataset(ArraySource(260, bad=BAD), config, where=tmp_path / "one").report
    clocks, seen = list[Clock](), list[tuple[str, int]]()
    run = several.SeveralDevices.run

    def watched(self, task, shards):
        clocks.extend(self.clocks)
        return run(self, task, shards)

    monkeypatch.setattr(several.SeveralDevices, "run", watched)
    report = embed_dataset(
        Waiting(260, bad=BAD, uri=str(tmp_path / "other")),
        replace(config, device="cpu,cpu"),
        where=tmp_path / "two",
        reuse=[tmp_path / "small"],
        progress=lambda phase, done, _total, _shares: seen.append((phase, done)),
    ).report
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
    (other,) = clocks
    assert other.images > 0, "the other device took no part"
    assert other.shards > 0
    assert (report.reused, report.embedded, report.quarantined) == (98, 162, alone.quarantined)
    assert report.workers == 2
    done = [done for phase, done in seen if phase == "embed"]
    assert done == sorted(done)
    assert done[-1] <= 260
    assert left_over() == []


@FORK
def test_a_device_whose_process_is_killed_ends_the_run_with_a_way_on(forked, config, tmp_path) -> None:
    both = replace(config, device="cpu,cpu", workers=2)
    with pytest.raises(IncompleteError, match="the process that embeds on cpu was killed by SIGKILL") as caught:
        embed_dataset(Deadly(400), both, where=tmp_path / "s")
    assert "the same command goes on" in caught.value.hint
    assert left_over() == []
    report = embed_dataset(ArraySource(400), config, where=tmp_path / "s").report
    assert report.committed_before > 0
    assert report.embedded == 400 - report.committed_before


@FORK
def test_an_error_in_another_process_keeps_its_kind(forked, config, tmp_path) -> None:
    with pytest.raises(KeyError, match="a bug of mine"):
        embed_dataset(Buggy(400), replace(config, device="cpu,cpu", workers=0), where=tmp_path / "s")
    assert left_over() == []


@FORK
def test_ctrl_c_ends_all_processes(forked, config, tmp_path) -> None:
    def interrupt(phase: str, done: int, _total: int, _shares: object) -> None:
        if phase == "embed" and done >= 12:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        embed_dataset(Slow(200), replace(config, device="cpu,cpu"), where=tmp_path / "s", progress=interrupt)
    assert left_over() == []


def test_a_shard_that_is_being_given_out_is_waited_for() -> None:
    helper = object.__new__(several._Helper)

    class Shards:
        """Whoever asks, while a shard is taken, whether there is anything to wait for."""

        def __next__(self) -> int:
            assert helper._under_way == 1
            raise StopIteration

    helper._under_way, helper._shards = 0, Shards()
    assert helper._next_shard() is None
    assert helper._under_way == 0


def test_a_data_set_that_does_not_pickle_is_told(config, tmp_path) -> None:
    source = ArraySource(50)
    source.lock = threading.Lock()  # type: ignore[attr-defined]
    with pytest.raises(UsageError, match="`device`: got 2 devices, but the data set 'memory' cannot be handed"):
        embed_dataset(source, replace(config, device="cpu,cpu"), where=tmp_path / "s")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("cpu", ["cpu"]),
        ("cuda", ["cuda"]),
        ("cuda:1", ["cuda:1"]),
        ("cuda:0,1", ["cuda:0", "cuda:1"]),
        ("cuda:2,cuda:0", ["cuda:2", "cuda:0"]),
        ("cpu,cpu", ["cpu", "cpu"]),
    ],
)
def test_names_of_several_devices(monkeypatch, name: str, expected: list[str]) -> None:
    monkeypatch.setattr(devices.torch.cuda, "device_count", lambda: 3)
    assert [str(device) for device in resolve_devices(name)] == expected


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("cuda:0,3", "got 'cuda:0,3', but torch sees 3 CUDA devices"),
        ("cuda:0,0", "got 'cuda:0,0', expected different GPUs"),
        ("cuda,0", "got 'cuda,0', expected different GPUs"),
        ("cpu,cuda", "got 'cpu,cuda', expected different GPUs"),
        ("0,1", "got '0,1', expected auto, cpu, cuda, cuda:N or cuda:N,M"),
        ("cuda:0,", "got 'cuda:0,', expected auto, cpu"),
        ("mps,cpu", "got 'mps,cpu', expected auto, cpu"),
    ],
)
def test_what_names_no_devices_is_told(monkeypatch, name: str, told: str) -> None:
    monkeypatch.setattr(devices.torch.cuda, "device_count", lambda: 3)
    with pytest.raises(UsageError, match=told):
        resolve_devices(name)


def test_one_device_is_asked_for_where_only_one_can_be(monkeypatch) -> None:
    monkeypatch.setattr(devices.torch.cuda, "device_count", lambda: 3)
    with pytest.raises(UsageError, match="got 'cuda:0,1', expected auto, cpu, cuda or cuda:N"):
        resolve_device("cuda:0,1")
    assert resolve_device("cuda:2") == torch.device("cuda:2")
