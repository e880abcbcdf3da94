from __future__ import annotations

import json
from dataclasses import replace

import pytest

from gstds_cache.costs.records import Cost
from gstds_cache.training.flops import flops_per_sample
from gstds_cache.training.ledger import Ledger

EMBED = Cost(of="a" * 64, samples=800, reused=200, seconds=100.0, joules=None, device="cpu")
SELECT = Cost(of="b" * 64, samples=4000, reused=0, seconds=5.0, joules=12.0, device="cpu")
LEDGER = Ledger(
    planned=False,
    embed=EMBED,
    select=SELECT,
    select_seconds=5.0,
    select_source="by gstds-select",
    gradient_samples=1000,
    all_samples=4000,
    seconds={
        "load": 3.0,
        "images": 2.0,
        "step": 28.0,
        "eval": 1.0,
        "total": 34.0,
    },  # 20 s to warm up
    joules=None,
    joules_from="no counter",
    flops_per_sample=2e6,
    step_seconds_per_sample=8e-3,
)


def table(ledger: Ledger) -> dict[str, str]:
    return dict(ledger.rows())


def test_what_selection_saves_and_when_the_cache_has_paid() -> None:
    assert LEDGER.saved_samples == 3000
    assert LEDGER.saved_seconds == pytest.approx(30.0)  # 10 s for 1,000 gradients, so 30 s for 3,000
    assert (LEDGER.net_seconds, LEDGER.pays, LEDGER.break_even) == (pytest.approx(25.0), True, 4)
    words = table(LEDGER)
    assert "800 samples embedded, 200 reused, 100.0 s" in words["embedding"]
    assert words["gradients"] == "1,000 samples spent, 3,000 of 4,000 saved (75.0%)"
    assert words["FLOPs"].startswith("2e+09 in training")
    assert words["break-even"].startswith("after 4 experiments")
    stored = json.loads(json.dumps(LEDGER.to_dict()))
    assert (stored["break_even"], stored["training_flops"], stored["embed"]["reused"]) == (4, 2e9, 200)


def test_a_selection_that_costs_more_than_it_saves_never_pays() -> None:
    ledger = replace(LEDGER, select_seconds=31.0)
    assert (ledger.pays, ledger.break_even) == (False, None)
    assert table(ledger)["break-even"].startswith("never: selection takes 31.0 s and saves 30.0 s")
    assert str(ledger.warning).startswith(
        "selection takes 31.0 s and saves 30.0 s of training: without it (gstds-select "
    )
    assert (LEDGER.warning, replace(LEDGER, select_seconds=None).warning) == (None, None)


@pytest.mark.parametrize(
    ("change", "row"),
    [
        ({"embed": None}, "embedding"),
        ({"embed": None}, "break-even"),
        ({"select_seconds": None}, "selection"),
        ({"select_seconds": None}, "break-even"),
        ({"all_samples": None}, "break-even"),
    ],
)
def test_what_is_not_known_is_said_so_and_is_no_zero(change, row) -> None:
    ledger = replace(LEDGER, **change)
    assert table(ledger)[row].startswith("unknown")
    assert ledger.to_dict()["break_even"] is None
    assert table(replace(LEDGER, flops_per_sample=None))["FLOPs"].startswith("unknown")
    assert "saved: unknown" in table(replace(LEDGER, all_samples=None))["gradients"]


def test_energy_is_a_figure_or_not_available() -> None:
    assert table(LEDGER)["energy"] == "not available: no counter"
    words = table(replace(LEDGER, joules={"train": 50.0}, joules_from="counted by package-0"))["energy"]
    assert words == "training: train 50 J; embedding unknown, selection 12 J (counted by package-0)"


def test_flops_of_a_resnet_are_three_times_its_forward_pass() -> None:
    # He et al. 2016, table 1: 1.8e9 multiply-adds forward at 224 pixels; backward is about twice that.
    assert flops_per_sample("resnet18", classes=1000, side=224) == pytest.approx(3 * 2 * 1.8e9, rel=0.05)
    assert flops_per_sample("resnet18", classes=1000, side=112) == pytest.approx(3 * 2 * 1.8e9 / 4, rel=0.1)
