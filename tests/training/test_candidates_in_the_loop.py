"""The training loop on candidates: it reports by itself, and what it draws does not depend on how it was run."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import offered
import pytest
import torch
from torch import nn

from gstds_cache.config import TrainConfig
from gstds_cache.errors import TruncatedStreamError, UsageError
from gstds_cache.seeding import rng_for
from gstds_cache.selection.draws import DRAWS, draw_rows
from gstds_cache.stream.reader import open_selection
from gstds_cache.training import loop
from gstds_cache.training.feedback import Feedback
from gstds_cache.training.identity import run_config
from gstds_cache.training.loop import train
from gstds_cache.training.run_dir import RunDir
from gstds_cache.training.step_losses import StepLosses

CONFIG = TrainConfig(arch="timm:test_resnet", image_size=16, augment="crop+flip", lr=0.02, device="cpu", workers=0)


@pytest.fixture
def source(array_source):
    return array_source(offered.ITEMS)


@pytest.fixture
def selection(tmp_path: Path) -> Path:
    return offered.write(tmp_path / "s.arrow")


def run(source, selection: Path, out: Path, config: TrainConfig = CONFIG, **options):
    with open_selection(selection) as stream:
        run_dir = RunDir(out, run_config(config, stream.header, None), provenance={}, resume=True)
        return train(source, stream, config, run_dir, **options)


def checkpoint(out: Path) -> dict:
    return torch.load(out / "checkpoint.pt", weights_only=True)


def assert_same_run(a: Path, b: Path) -> None:
    mine, theirs = checkpoint(a), checkpoint(b)
    assert mine["feedback"] == theirs["feedback"]
    for name, values in mine["network"].items():
        assert torch.equal(values, theirs["network"][name]), name


def test_each_epoch_is_drawn_by_the_losses_that_the_steps_before_had(source, selection, tmp_path, monkeypatch) -> None:
    steps, report = [], Feedback.report

    def watched(self, step, rows, losses):
        steps.append((rows, losses.detach().numpy()))
        report(self, step, rows, losses)

    monkeypatch.setattr(Feedback, "report", watched)
    outcome = run(source, selection, tmp_path / "run")
    assert (outcome.steps, outcome.gradient_samples) == (12, 3 * sum(offered.KEEP))
    table = np.full(offered.ITEMS, np.nan)
    for seq, (rows, _) in enumerate(steps):
        batch = offered.batch(seq)
        if batch.batch_id == 0:
            for before, losses in steps[max(0, seq - 4) : seq]:
                table[before] = losses
        scores = DRAWS["loss-minus-reference"].scores(batch.candidates, table[batch.kept], offered.CHANCE)
        drawn = draw_rows(batch.candidates, scores, rng_for(0, "draw", batch.epoch, batch.batch_id))
        np.testing.assert_array_equal(rows, batch.kept[drawn])
    assert all((losses > 0).all() for _, losses in steps)


@pytest.mark.parametrize("stop_at", [1, 4, 6, 12])
def test_a_stopped_run_resumes_to_the_same_numbers(source, selection, tmp_path, stop_at) -> None:
    run(source, selection, tmp_path / "whole")
    steps = 0

    def stopping() -> bool:
        nonlocal steps
        steps += 1
        return steps == stop_at

    with pytest.raises(KeyboardInterrupt):
        run(source, selection, tmp_path / "stopped", interruptible=lambda: nullcontext(stopping))
    assert checkpoint(tmp_path / "stopped")["step"] == stop_at
    run(source, selection, tmp_path / "stopped")
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")


def test_decoding_ahead_in_workers_trains_the_same_network(source, selection, tmp_path) -> None:
    run(source, selection, tmp_path / "memory")
    run(source, selection, tmp_path / "workers", replace(CONFIG, memory_budget=0, workers=2))
    assert_same_run(tmp_path / "memory", tmp_path / "workers")


def test_a_selection_cut_short_saves_its_losses_too(source, selection, tmp_path) -> None:
    cut = tmp_path / "cut.arrow"
    cut.write_bytes(selection.read_bytes()[: selection.stat().st_size * 6 // 10])
    with pytest.raises(TruncatedStreamError):
        run(source, cut, tmp_path / "run")
    assert 4 < checkpoint(tmp_path / "run")["step"] < 12
    run(source, selection, tmp_path / "run")
    run(source, selection, tmp_path / "whole")
    assert_same_run(tmp_path / "whole", tmp_path / "run")


def test_importance_weights_weight_the_loss_of_each_row(source, selection, tmp_path, monkeypatch) -> None:
    seen, entropy = [], nn.functional.cross_entropy

    def watched(logits, target, **options):
        losses = entropy(logits, target, **options)
        if logits.requires_grad:  # the others are only reported
            seen.append(losses.detach())
        return losses

    monkeypatch.setattr(nn.functional, "cross_entropy", watched)
    weights, weights_of = [], Feedback.weights_of

    def kept(self, rows):
        weights.append(weights_of(self, rows))
        return weights[-1]

    monkeypatch.setattr(Feedback, "weights_of", kept)
    outcome = run(source, selection, tmp_path / "run", replace(CONFIG, importance_weights=True))
    means = [float((losses * torch.from_numpy(w)).mean()) for losses, w in zip(seen, weights, strict=True)]
    assert outcome.loss == pytest.approx(np.mean(means[8:]), rel=1e-5)
    for w in weights:
        assert w.mean() == pytest.approx(1, abs=1e-5)
    assert any(w.std() > 0.1 for w in weights)


def test_repacked_candidates_fill_every_step(source, selection, tmp_path) -> None:
    outcome = run(source, selection, tmp_path / "run", replace(CONFIG, repack=10))
    assert (outcome.steps, outcome.gradient_samples) == (6, 60)


def test_a_run_of_kept_rows_has_no_losses_in_its_checkpoint(source, uneven, tmp_path) -> None:
    run(source, uneven[0], tmp_path / "run")
    assert checkpoint(tmp_path / "run")["feedback"] is None


def test_a_checkpoint_without_its_losses_is_refused(source, selection, tmp_path) -> None:
    run(source, selection, tmp_path / "run")
    state = checkpoint(tmp_path / "run")
    del state["feedback"]
    torch.save(state, tmp_path / "run" / "checkpoint.pt")
    with pytest.raises(UsageError, match="for its losses"):
        run(source, selection, tmp_path / "run")


def test_images_on_the_device_and_losses_read_in_blocks_train_the_same_network(
    source, selection, tmp_path, monkeypatch
) -> None:
    run(source, selection, tmp_path / "host", replace(CONFIG, importance_weights=True))
    monkeypatch.setattr(loop, "StepLosses", partial(StepLosses, deferred=True))
    run(source, selection, tmp_path / "device", replace(CONFIG, importance_weights=True, images="device"))
    assert_same_run(tmp_path / "host", tmp_path / "device")
