"""Trainers that share one service: as commands, as a sampler, and as an iterable data set."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import pytest
import torch
from forked import ALWAYS, Forks
from torch.utils.data import DataLoader

from gstds_cache import SelectedBatchSampler, SelectedDataset
from gstds_cache.errors import UsageError
from gstds_cache.stream.reader import open_selection

DATASET, EPOCHS = "digits?split=test", 60
TRAIN = ["gstds-train", DATASET, "--arch", "conv3", "--lr", "0.02", "--device", "cpu", "--threads", "1"]


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, forks: Forks) -> Iterator[tuple[Path, str]]:
    """A folder with digits embedded by a tiny encoder, and the address of a service on it."""
    folder = tmp_path_factory.mktemp("service")
    (folder / "mean_colours.py").write_text(
        "import torch\n"
        "from gstds_cache.encoders.preprocessing import Preprocessing\n"
        "class Colours(torch.nn.Module):\n"
        "    preprocessing = Preprocessing(resize=16, crop=(16, 16))\n"
        "    def forward(self, x):\n"
        "        return torch.nn.functional.adaptive_avg_pool2d(x, 8).flatten(1)\n"
    )
    words = ["gstds-embed", DATASET, "--cache", "digits.store", "--model", "mean_colours:Colours", "--device", "cpu"]
    embed = forks.start(words, cwd=folder)
    _, errors = embed.communicate(120)
    assert embed.returncode == 0, errors
    process = subprocess.Popen(
        [forks.executable("gstds-select"), "digits.store", "--batch-size", "64", "--epochs", str(EPOCHS), "--knn", "5",
         "--guidance", "none", "--schedule", "linear:0.3:0.7", "--device", "cpu", "--serve", "127.0.0.1:0"],
        cwd=folder, env=os.environ | ALWAYS, text=True, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        lines = (json.loads(line) for line in process.stderr if line.startswith("{"))
        yield folder, next(event["location"] for event in lines if event["event"] == "serving")
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=30)
        assert process.returncode == 0
    finally:
        process.kill()
        process.wait()


def same(one: object, other: object) -> bool:
    """Whether two trees of tensors and numbers are equal to the bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def test_of_two_trainers_on_one_service_the_killed_one_ends_with_the_others_weights(service, forks: Forks) -> None:
    folder, where = service
    words = [*TRAIN, "--selection", where, "--out"]
    killed, whole = (forks.start([*words, run], cwd=folder) for run in ("killed", "whole"))
    try:
        metrics, deadline = folder / "killed" / "metrics.jsonl", time.monotonic() + 120
        while not metrics.exists() or metrics.read_text().count("\n") < 3:
            assert killed.poll() is None, killed.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.002)
        killed.send_signal(signal.SIGKILL)
        killed.communicate()
        assert killed.returncode == -signal.SIGKILL
        saved = torch.load(folder / "killed" / "checkpoint.pt", weights_only=True)
        resumed = forks.start([*words, "killed", "--resume"], cwd=folder)
        for process in (resumed, whole):
            _, errors = process.communicate(120)
            assert process.returncode == 0, errors
    finally:
        for process in (killed, whole):
            process.kill()
            process.wait()
    ended, never_killed = (torch.load(folder / run / "checkpoint.pt", weights_only=True) for run in ("killed", "whole"))
    assert 0 < saved["step"] < ended["step"] == never_killed["step"]
    for part in ("network", "optimizer", "step", "samples", "loss", "sha"):
        assert same(ended[part], never_killed[part]), part
    assert not same(saved["network"], ended["network"])


def test_a_sampler_reads_a_service_and_goes_on_from_its_state(service) -> None:
    _, where = service
    with open_selection(where) as stream:
        reference = [selection.kept.tolist() for selection in stream]
    sampler = SelectedBatchSampler(where)
    assert sampler.total_steps == len(reference)
    seen = [rows for _ in range(2) for rows in sampler]
    assert seen == reference[: len(seen)]
    state = json.loads(json.dumps(sampler.state_dict()))
    sampler.close()
    again = SelectedBatchSampler(where)
    again.load_state_dict(state)
    assert seen + [rows for _ in range(again.epoch, again.epochs) for rows in again] == reference


def test_two_ranks_on_a_service_miss_nothing_and_take_nothing_twice(service) -> None:
    _, where = service
    with open_selection(where) as stream:
        epochs = [[] for _ in range(stream.header.epochs)]
        for selection in stream:
            epochs[selection.epoch].extend(selection.kept.tolist())
    assert all(len(set(rows)) == len(rows) for rows in epochs)
    flat = list(chain(*epochs))
    ranks = [SelectedBatchSampler(where, rank=rank, world_size=2, batch_size=32) for rank in range(2)]
    steps = [pair for _ in epochs for pair in zip(*ranks, strict=True)]
    assert {len(rows) for pair in steps for rows in pair} == {16}
    assert list(chain(*(rows for pair in steps for rows in pair))) == flat[: len(flat) // 32 * 32]


def test_an_iterable_data_set_over_a_service_and_workers(service) -> None:
    _, where = service
    with open_selection(where) as stream:
        reference = [selection.kept.tolist() for selection in stream]
    items = list(range(stream.header.items))
    batches = SelectedDataset(items, where)
    # gRPC does not survive a fork: a worker that would wait for ever says so instead.
    forked = DataLoader(batches, batch_size=None, num_workers=1, multiprocessing_context="fork", timeout=60)
    with pytest.raises(UsageError, match="spawn"):
        next(iter(forked))
    spawned = DataLoader(batches, batch_size=None, num_workers=1, multiprocessing_context="spawn", timeout=60)
    assert [batch.tolist() for batch in spawned] == reference
    assert [batch.tolist() for batch in DataLoader(batches, batch_size=None)] == reference


def test_forked_workers_load_the_items_of_a_sampler_on_a_service(service) -> None:
    _, where = service
    sampler = SelectedBatchSampler(where)
    items = torch.arange(sampler.header.items)
    loader = DataLoader(items, batch_sampler=sampler, num_workers=1, multiprocessing_context="fork", timeout=60)
    first = [batch.tolist() for batch in loader]
    with open_selection(where) as stream:
        assert first == [selection.kept.tolist() for selection, _ in zip(stream, first, strict=False)]
