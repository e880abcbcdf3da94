"""A run of the trainer on a selection of 72 small images, and what it left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from gstds_cache.config import TrainConfig
from gstds_cache.stream.reader import open_selection
from gstds_cache.training.identity import run_config
from gstds_cache.training.loop import Trainer, never_interrupted
from gstds_cache.training.report import TrainingResult
from gstds_cache.training.run_dir import RunDir

CONFIG = TrainConfig(
    arch="conv3", image_size=16, augment="crop+flip", lr=0.02, device="cpu", workers=0, images="device"
)


def run(
    source: Any, selection: Path, out: Path, config: TrainConfig = CONFIG, kind: type[Trainer] = Trainer, **options: Any
) -> TrainingResult:
    interruptible = options.pop("interruptible", never_interrupted)
    with open_selection(selection) as stream:
        run_dir = RunDir(out, run_config(config, stream.header, None), provenance={}, resume=True)
        with run_dir:
            return kind(source, stream, config, run_dir, **options).run(interruptible)


def state(out: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = torch.load(out / "checkpoint.pt", weights_only=True)
    return loaded
