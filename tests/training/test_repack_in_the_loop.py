"""Re-packed batches in the training loop: full steps, known beforehand, and the same numbers after a stop."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from gstds_cache.config import TrainConfig
from gstds_cache.errors import FingerprintMismatchError, UsageError
from gstds_cache.stream.reader import open_selection
from gstds_cache.training.identity import run_config
from gstds_cache.training.loop import train
from gstds_cache.training.run_dir import RunDir

CONFIG = TrainConfig(
    arch="timm:test_resnet", image_size=16, augment="crop+flip", lr=0.02, device="cpu", workers=0, repack=16
)


def run(source, selection: Path, out: Path, config: TrainConfig = CONFIG, **options):
    with open_selection(selection) as stream:
        run_dir = RunDir(out, run_config(config, stream.header, None), provenance={}, resume=True)
        return train(source, stream, config, run_dir, **options)


def test_a_repacked_run_takes_full_steps_and_resumes_to_the_same_numbers(uneven, array_source, tmp_path) -> None:
    source, totals, shares = array_source(72), set(), []

    def progress(phase, _done, total, waited):
        if phase == "train":
            totals.add(total)
            shares.append(waited)

    report = run(source, uneven[0], tmp_path / "whole", progress=progress)
    assert (report.steps, report.gradient_samples, totals) == (74 // 16, 64, {74 // 16})
    assert set(report.waited) == {"indices", "images"}
    assert all(0 <= share < 1 for share in report.waited.values())
    assert set(shares[0]) == {"waiting for indices", "waiting for images"}
    asked = iter([False, True])
    with pytest.raises(KeyboardInterrupt):
        run(source, uneven[0], tmp_path / "stopped", interruptible=lambda: nullcontext(lambda: next(asked)))
    run(source, uneven[0], tmp_path / "stopped")
    a, b = (
        torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)["network"] for name in ("whole", "stopped")
    )
    assert all(torch.equal(a[name], b[name]) for name in a)
    with pytest.raises(FingerprintMismatchError, match="repack: the run has 16, now 8"):
        run(source, uneven[0], tmp_path / "whole", replace(CONFIG, repack=8))
    with pytest.raises(UsageError, match="not one batch would be full"):
        run(source, uneven[0], tmp_path / "never", replace(CONFIG, repack=75))
