"""The arithmetic of a plan, from rates that are given."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from gstds_cache.config import TrainConfig
from gstds_cache.stream.reader import open_selection
from gstds_cache.training import planning
from gstds_cache.training.planning import Rates, plan_run

CONFIG = TrainConfig(arch="conv3", image_size=16, augment="none", device="cpu", workers=0)
ROWS, KEPT = 72, 74  # of the data set; kept in all by the selection


@pytest.fixture
def plan(uneven, array_source, monkeypatch):
    """Plans a run in which decoding an image takes 8 s, a sample of a step 2 s and classifying 1 s; on four cores."""
    asked: list[int] = []

    def measure(*_arguments: Any, per_step: int) -> Rates:
        asked.append(per_step)
        return Rates(decode=8.0, step=2.0, classify=1.0)

    monkeypatch.setattr(planning, "measure", measure)
    monkeypatch.setattr(planning, "cores", lambda: 4)
    with open_selection(uneven[0]) as stream:
        header = stream.header

    def make(config: TrainConfig):
        source, unknown = array_source(ROWS), {"embed": None, "select": None, "select_seconds": None}
        ledger = plan_run(source, source, header, config, **unknown, select_source="")
        return ledger, asked.pop()

    return make


def test_what_is_held_is_decoded_once(plan) -> None:
    ledger, per_step = plan(CONFIG)
    assert (ledger.gradient_samples, per_step) == (KEPT, KEPT // 12)
    assert ledger.seconds == {
        "load": ROWS * 8.0, "images": 0.0, "step": KEPT * 2.0, "norms": ROWS * 1.0,
        "eval": ROWS * 9.0, "total": ROWS * 18.0 + KEPT * 2.0,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("workers", "waiting"),
    [(0, KEPT * 8.0), (1, KEPT * (8.0 - 2.0)), (2, KEPT * (4.0 - 2.0)), (4, 0.0), (1000, 0.0)],
)
def test_steps_wait_for_what_decoding_beside_them_takes_longer(plan, workers: int, waiting: float) -> None:
    ledger, _ = plan(replace(CONFIG, workers=workers, memory_budget=0))
    assert (ledger.seconds["load"], ledger.seconds["images"]) == (0.0, waiting)
    assert ledger.seconds["norms"] == ROWS * (1.0 + 8.0 / max(1, min(workers, 4)))
    assert ledger.seconds["eval"] == ROWS * 9.0  # a few small images are decoded by this process


def test_workers_beyond_the_cores_decode_no_faster(plan, monkeypatch) -> None:
    monkeypatch.setattr(planning, "worth_workers", lambda _source, _side, workers: workers)
    for workers, share in ((2, 2), (4, 4), (64, 4)):
        assert plan(replace(CONFIG, workers=workers))[0].seconds["load"] == ROWS * 8.0 / share


def test_a_repacked_run_takes_full_steps_and_leaves_the_rest(plan) -> None:
    ledger, per_step = plan(replace(CONFIG, repack=16))
    assert (ledger.gradient_samples, per_step) == (KEPT // 16 * 16, 16)
