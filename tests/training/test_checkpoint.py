"""What a run is resumed from is validated when it is read, and may be of an earlier version."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch

from gstds_cache.config import TrainConfig
from gstds_cache.errors import IntegrityError
from gstds_cache.stream.reader import open_selection
from gstds_cache.training.checkpoint import Checkpoint
from gstds_cache.training.identity import run_config
from gstds_cache.training.loop import train
from gstds_cache.training.run_dir import RunDir

CONFIG = TrainConfig(arch="conv3", image_size=16, augment="crop+flip", lr=0.02, device="cpu", workers=0)


def run(source: Any, selection: Path, out: Path, **options: Any) -> dict[str, Any]:
    with open_selection(selection) as stream:
        run_dir = RunDir(out, run_config(CONFIG, stream.header, None), provenance={}, resume=True)
        train(source, stream, CONFIG, run_dir, **options)
    return torch.load(out / "checkpoint.pt", weights_only=True)


@pytest.fixture
def stopped(uneven, array_source, tmp_path) -> Path:
    """A run that was stopped after its fifth step."""
    asked = iter([False] * 4 + [True])
    with pytest.raises(KeyboardInterrupt):
        run(array_source(72), uneven[0], tmp_path / "run", interruptible=lambda: nullcontext(lambda: next(asked)))
    return tmp_path / "run"


def test_a_checkpoint_of_an_earlier_version_goes_on_to_the_same_numbers(
    stopped, uneven, array_source, tmp_path
) -> None:
    whole = run(array_source(72), uneven[0], tmp_path / "whole")
    state = torch.load(stopped / "checkpoint.pt", weights_only=True)
    # The entries that training wrote from the first version on; the others came later.
    assert set(state) - {"joules", "forward_samples", "feedback"} == {
        "network", "optimizer", "step", "samples", "loss_sum", "loss", "sha", "seconds"
    }  # fmt: skip
    del state["joules"], state["forward_samples"], state["feedback"]
    torch.save(state | {"method": {}, "forward_samples": 0}, stopped / "checkpoint.pt")  # as the study's had as well
    resumed = run(array_source(72), uneven[0], stopped)
    assert resumed["step"] == whole["step"] == 12
    assert (resumed["samples"], resumed["loss"], resumed["sha"]) == (whole["samples"], whole["loss"], whole["sha"])
    for name, tensor in whole["network"].items():
        assert torch.equal(tensor, resumed["network"][name]), name


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"step": "5"}, "`step` is '5'"),
        ({"step": -1}, "-1 steps"),
        ({"seconds": [1.0]}, "`seconds` is"),
        ({"network": None}, "network is missing"),
        ({"network": {"0.weight": torch.zeros(1)}}, "is of another network"),
    ],
)
def test_one_that_is_none_is_refused_by_name(stopped, uneven, array_source, change, text) -> None:
    state = torch.load(stopped / "checkpoint.pt", weights_only=True) | change
    torch.save({name: value for name, value in state.items() if value is not None}, stopped / "checkpoint.pt")
    with pytest.raises(IntegrityError, match=text):
        run(array_source(72), uneven[0], stopped)


def test_what_is_written_is_what_is_read() -> None:
    checkpoint = Checkpoint(
        network={"w": torch.ones(2)}, optimizer={}, step=3, samples=4, loss_sum=0.5, loss=float("inf"), sha="ab",
        seconds={"step": 1.0}, joules={"train": 2.0},
    )  # fmt: skip
    assert list(checkpoint.to_state()) == [field.name for field in fields(Checkpoint)]
    assert Checkpoint.from_state(checkpoint.to_state()) == checkpoint
    with pytest.raises(IntegrityError, match="got list"):
        Checkpoint.from_state([])
