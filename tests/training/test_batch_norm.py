"""Running statistics of batch normalisation: those of random rows once training on hard ones is done."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Subset, TensorDataset

from gstds_cache.api.train import train as train_by_name
from gstds_cache.config import TrainConfig
from gstds_cache.errors import FingerprintMismatchError, UsageError
from gstds_cache.selection.selected_batch import SelectedBatch
from gstds_cache.spectral.status import Status
from gstds_cache.stream.reader import open_selection
from gstds_cache.stream.schema import Header
from gstds_cache.stream.writer import SelectionWriter
from gstds_cache.training.augment import to_input
from gstds_cache.training.batch_norm import (
    has_running_norms,
    random_batches,
    random_inputs,
    reestimate_batch_norm,
    running_norms,
)
from gstds_cache.training.identity import resolve_auto, run_config
from gstds_cache.training.images import ImageFeed
from gstds_cache.training.loop import train
from gstds_cache.training.network import build_network, conv3
from gstds_cache.training.report import TrainingResult
from gstds_cache.training.run_dir import RunDir

TRAINERS = Path(__file__).parents[2] / "docs" / "trainers.md"
CONFIG = TrainConfig(arch="conv3", image_size=16, augment="none", lr=0.1, device="cpu", workers=0)
ITEMS = 240


@pytest.fixture
def shifted(array_source):
    """Two classes told apart by colour; one row in four is brighter, and those are the hard ones."""

    class Shifted(array_source):
        def _pixels(self, row: int) -> np.ndarray:
            pixels = np.random.default_rng(row).integers(0, 60, (20, 20, 3)) + (140 if row % 4 == 0 else 60)
            pixels[..., 2 * int(self.labels[row])] += 10
            return pixels.astype(np.uint8)

    source = Shifted(ITEMS)
    source.labels[:] = np.arange(ITEMS) // 4 % 2
    return source


@pytest.fixture
def hard(tmp_path: Path) -> Path:
    """A selection of bright rows alone: four epochs of six batches."""
    epochs, batches, size = 4, 6, 10
    kept = [batches * size] * epochs
    header = Header(
        "c" * 64, "d" * 64, ITEMS, "r" * 64, 0, epochs, batches, epochs * batches, sum(kept), kept, {}
    )  # fmt: skip
    rng = np.random.default_rng(0)
    with (tmp_path / "hard.arrow").open("wb") as file, SelectionWriter(file, header) as writer:
        for epoch in range(epochs):
            rows = 4 * rng.permutation(ITEMS // 4)
            for batch in range(batches):
                mine = rows[batch * size : (batch + 1) * size]
                seq = epoch * batches + batch
                writer.write(SelectedBatch(seq, epoch, batch, 40, mine, None, Status.CONVERGED, 0.5, 0.0))
    return tmp_path / "hard.arrow"


def run(source: Any, selection: Path, out: Path, config: TrainConfig = CONFIG, **options: Any) -> TrainingResult:
    with open_selection(selection) as stream:
        run_dir = RunDir(out, run_config(config, stream.header, None), provenance={}, resume=True)
        return train(source, stream, config, run_dir, **options)


def checkpoint(out: Path) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(out / "checkpoint.pt", weights_only=True)
    return state


def statistics(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: values for name, values in state.items() if "running_" in name}


# The function


def test_it_is_the_naive_mean_over_the_batches_and_nothing_else_moves() -> None:
    network = nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.5), nn.BatchNorm1d(6, momentum=0.3)).train()
    network[1].eval()
    network[2](torch.randn(9, 6))
    batches = list(torch.randn(5, 32, 4) + 3)
    parameters = [parameter.clone() for parameter in network.parameters()]
    assert reestimate_batch_norm(network, iter(batches)) == 160
    with torch.no_grad():
        inner = [network[0](batch) for batch in batches]  # dropout is off
    torch.testing.assert_close(network[2].running_mean, torch.stack([values.mean(0) for values in inner]).mean(0))
    torch.testing.assert_close(network[2].running_var, torch.stack([values.var(0) for values in inner]).mean(0))
    assert [module.training for module in network] == [True, False, True]
    assert network[2].momentum == 0.3
    for before, parameter in zip(parameters, network.parameters(), strict=True):
        assert torch.equal(before, parameter)
        assert parameter.grad is None


def test_layers_deep_in_a_network_get_the_batch_statistics_of_what_reaches_them() -> None:
    torch.manual_seed(0)
    network = conv3(3).eval()
    pixels = torch.randn(64, 3, 16, 16)
    reestimate_batch_norm(network, [pixels])
    tested = network(pixels)
    network.train()
    # With one batch the running statistics are the batch's, but for the variance's n / (n - 1).
    torch.testing.assert_close(tested, network(pixels), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("training", [False, True])
def test_a_network_without_running_statistics_is_left_alone_and_nothing_is_read(training: bool) -> None:
    network = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.BatchNorm1d(6, track_running_stats=False))
    network.train(training)

    def batches():
        raise AssertionError("read")
        yield

    assert reestimate_batch_norm(network, batches()) == 0
    assert network.training is network[2].training is training


@pytest.mark.parametrize(
    ("batches", "error"),
    [
        ([], UsageError),
        ([torch.zeros(8, 4), torch.zeros(8, 5)], RuntimeError),
        ([torch.zeros(8, 4), torch.zeros(1, 4)], ValueError),
    ],
    ids=["none", "of another shape", "of one row"],
)
def test_an_error_leaves_the_statistics_and_modes_as_they_were(batches, error) -> None:
    network = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6))
    network(torch.randn(9, 4))
    before = {name: values.clone() for name, values in network.state_dict().items()}
    with pytest.raises(error):
        reestimate_batch_norm(network, batches)
    assert all(torch.equal(values, before[name]) for name, values in network.state_dict().items())
    assert network[1].training
    assert network[1].momentum == 0.1


def test_the_lines_of_the_document_do_it_for_a_loop_of_ones_own() -> None:
    code = TRAINERS.read_text().partition("## Before testing")[2].partition("```python\n")[2].partition("```")[0]
    rng = torch.Generator().manual_seed(0)
    dataset = TensorDataset(torch.randn(600, 3, 8, 8, generator=rng) * 2 + 5, torch.zeros(600))
    network = conv3(3).train()
    names = {"dataset": dataset, "network": network, "torch": torch, "DataLoader": DataLoader, "Subset": Subset}
    lines = [line for line in code.splitlines() if line and not line.startswith(("import", "from"))]
    assert len(lines) == 3
    exec(code, names)
    first = network[0](dataset.tensors[0])
    torch.testing.assert_close(network[1].running_mean, first.mean((0, 2, 3)).detach(), rtol=1e-2, atol=1e-2)


# Which rows


def test_rows_are_drawn_by_the_seed_once_each_in_batches_of_nearly_one_size() -> None:
    batches = random_batches(10_000, 4096, 3)
    rows = np.concatenate(batches)
    assert len(set(rows.tolist())) == 4096
    assert {len(batch) for batch in batches} == {256}
    assert np.array_equal(rows, np.concatenate(random_batches(10_000, 4096, 3)))
    assert not np.array_equal(rows, np.concatenate(random_batches(10_000, 4096, 4)))
    few = random_batches(600, 4096, 0)
    assert sorted(np.concatenate(few).tolist()) == list(range(600))
    assert [len(batch) for batch in few] == [200, 200, 200]


def test_images_that_cannot_be_decoded_are_left_out_however_images_are_held(array_source) -> None:
    source = array_source(9, bad=frozenset({2, 6, 7}))
    batches = [np.array([0, 2, 5]), np.array([6, 7, 8]), np.array([1, 3, 4])]
    held, decoded = (
        list(random_inputs(ImageFeed(source, side=8, memory_budget=budget, workers=0), batches))
        for budget in (1 << 20, 0)
    )
    assert [len(batch) for batch in held] == [2, 3]  # one row alone has no batch statistics
    assert all(torch.equal(a, b) for a, b in zip(held, decoded, strict=True))


# In the training loop


def test_a_run_on_hard_rows_tests_with_the_statistics_of_all_rows(shifted, hard, tmp_path) -> None:
    result = run(shifted, hard, tmp_path / "with", evaluation=shifted)
    without = run(shifted, hard, tmp_path / "without", replace(CONFIG, norm_samples=0), evaluation=shifted)
    assert result.accuracy.value > 0.95
    assert without.accuracy.value < 0.75
    assert (result.forward_samples, without.forward_samples) == (ITEMS, 0)
    assert (result.gradient_samples, result.loss) == (without.gradient_samples, without.loss)
    assert result.seconds["norms"] > 0
    assert "norms" not in without.seconds
    assert result.seconds["total"] == pytest.approx(
        sum(seconds for phase, seconds in result.seconds.items() if phase != "total"), abs=0.01
    )
    # The saved weights are those that were tested, and differ from the others in the statistics alone.
    state, raw = (checkpoint(tmp_path / name)["network"] for name in ("with", "without"))
    for name in state:
        assert torch.equal(state[name], raw[name]) == ("running_" not in name and "tracked" not in name), name
    network = build_network("conv3", classes=3, side=16, seed=0)
    network.load_state_dict(raw)
    feed = ImageFeed(shifted, side=16, memory_budget=1 << 24, workers=0)
    reestimate_batch_norm(network, (to_input(p) for p in feed.batches(random_batches(ITEMS, 4096, CONFIG.seed))))
    for name, values in statistics(network.state_dict()).items():
        torch.testing.assert_close(values, state[name])


@pytest.mark.parametrize("stop_at", [4, 24])
def test_a_stopped_run_resumes_to_the_same_statistics_and_passes_once(shifted, hard, tmp_path, stop_at) -> None:
    whole = run(shifted, hard, tmp_path / "whole", evaluation=shifted)
    asked = iter([False] * (stop_at - 1) + [True])
    with pytest.raises(KeyboardInterrupt):
        run(shifted, hard, tmp_path / "run", interruptible=lambda: nullcontext(lambda: next(asked)))
    assert checkpoint(tmp_path / "run")["forward_samples"] == 0  # statistics of training, which it goes on from
    workers = replace(CONFIG, memory_budget=0)
    for _ in range(2):  # the second finds the run done
        result = run(shifted, hard, tmp_path / "run", workers, evaluation=shifted)
        assert (result.accuracy, result.forward_samples) == (whole.accuracy, ITEMS)
        mine, theirs = (checkpoint(tmp_path / name)["network"] for name in ("run", "whole"))
        assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    assert result.seconds["norms"] == round(checkpoint(tmp_path / "run")["seconds"]["norms"], 3)


def test_a_network_without_batch_normalisation_is_as_before(shifted, hard, tmp_path) -> None:
    config = replace(CONFIG, arch="timm:test_convnext", image_size=32)
    results = [
        run(shifted, hard, tmp_path / str(samples), replace(config, norm_samples=samples), evaluation=shifted)
        for samples in (0, 4096)
    ]
    files = [tmp_path / name for name in ("0", "4096")]
    states = [checkpoint(path) for path in files]
    assert all(torch.equal(states[0]["network"][name], values) for name, values in states[1]["network"].items())
    assert results[0].accuracy == results[1].accuracy
    assert results[1].forward_samples == states[1]["forward_samples"] == 0
    assert set(results[0].seconds) == set(results[1].seconds) == {
        "load", "indices", "images", "warm-up", "step", "eval", "total"
    }  # fmt: skip


# What makes it another run


def test_the_setting_is_part_of_the_identity_only_where_it_changes_something(array_source) -> None:
    source = array_source(72)

    def resolved(**settings: Any) -> int:
        return resolve_auto(TrainConfig(image_size=16, **settings), source).norm_samples

    assert resolved(arch="conv3") == resolved(arch="conv3", norm_samples=72) == 72
    assert resolved(arch="conv3", norm_samples=50) == 50
    assert resolved(arch="conv3", norm_samples=0) == 0
    assert resolved(arch="vit_b_16") == resolved(arch="timm:test_convnext?weights=x.pth") == 0
    source = array_source(1)
    assert resolved(arch="conv3") == 0  # and not 1, of which there is no variance, and which is refused


@pytest.mark.parametrize(
    "arch", ["conv3", "resnet18", "timm:test_resnet", "timm:test_convnext", "timm:test_vit", "mobilenet_v3_small"]
)
def test_a_network_on_the_meta_device_has_the_same_layers(arch: str) -> None:
    network = build_network(arch, classes=3, side=32, seed=0)
    assert has_running_norms(arch, 32) == bool(running_norms(network))


@pytest.fixture
def named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[..., Any]) -> Callable[..., Any]:
    """Calls ``gstds_cache.train`` on the digits by name, in a directory of its own."""
    from gstds_cache.data.manifest import build_manifest
    from gstds_cache.data.sources import open_source

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GSTDS_CACHE", str(tmp_path / "cache"))
    manifest = build_manifest(open_source("digits?split=test"))
    header = Header("c" * 64, "d" * 64, len(manifest), manifest.root, 0, 1, 2, 2, 40, [40], {})
    with Path("s.arrow").open("wb") as file, SelectionWriter(file, header) as writer:
        for seq in range(2):
            rows = np.arange(20) + 20 * seq
            writer.write(SelectedBatch(seq, 0, seq, 80, rows, None, Status.CONVERGED, 0.5, 0.0))

    def call(arch: str = "conv3", **settings: Any) -> Any:
        return train_by_name(
            "digits?split=test", "s.arrow", evaluation="digits?split=test", arch=arch, device="cpu", progress=False,
            **settings,
        )  # fmt: skip

    return call


def as_before(run_dir: Path) -> None:
    """Make a run's files those of a version that did not know the setting, nor those that came after it."""
    config = json.loads((run_dir / "config.json").read_text())
    for later in ("norm_samples", "label_smoothing", "precision"):
        del config["config"][later]
    (run_dir / "config.json").write_text(json.dumps(config))
    state = checkpoint(run_dir)
    del state["forward_samples"]
    torch.save(state, run_dir / "checkpoint.pt")


def test_a_run_of_before_goes_on_as_without_and_says_so(named) -> None:
    without = named(norm_samples=0, out="old")
    as_before(Path("old"))
    lines: list[str] = []
    again = named(out="old", resume=True, notify=lines.append)
    assert (again.accuracy, again.forward_samples) == (without.accuracy, 0)
    assert len(lines) == 1
    assert "old is a run of before batch-norm statistics were re-estimated, and goes on without" in lines[0]
    new = named(notify=lines.append)
    assert new.forward_samples == new.ledger.forward_samples == new.to_dict()["forward_samples"] == 385
    assert len(lines) == 1
    assert named(norm_samples=0).run_dir.name == f"{new.run_dir.name}-norm0"
    with pytest.raises(FingerprintMismatchError, match="norm_samples: the run has 385, now 0"):
        named(out=new.run_dir, norm_samples=0, resume=True)


def test_a_run_of_before_of_a_network_without_batch_normalisation_is_the_same_run(named) -> None:
    settings = {"arch": "timm:test_convnext", "image_size": 32}
    before = named(**settings)
    as_before(before.run_dir)
    lines: list[str] = []
    again = named(**settings, resume=True, notify=lines.append)
    assert (again.run_dir, again.accuracy, lines) == (before.run_dir, before.accuracy, [])
