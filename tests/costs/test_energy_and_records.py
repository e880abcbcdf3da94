from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from gstds_cache.costs import energy
from gstds_cache.costs.energy import EnergyMeter
from gstds_cache.costs.records import Cost, recall, record, selection_costs, store_costs


def zone(powercap: Path, folder: str, name: str, microjoules: int, wraps_at: int = 10_000_000) -> Path:
    """A counter as Linux shows it."""
    path = powercap / folder
    path.mkdir(parents=True)
    (path / "name").write_text(f"{name}\n")
    (path / "max_energy_range_uj").write_text(f"{wraps_at}\n")
    (path / "energy_uj").write_text(f"{microjoules}\n")
    return path / "energy_uj"


def test_rapl_counts_packages_alone_and_across_a_wrap(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(energy, "EVERY", 0.0)
    first = zone(tmp_path, "intel-rapl:0", "package-0", 9_000_000)
    second = zone(tmp_path, "intel-rapl:1", "package-1", 0)
    part = zone(tmp_path, "intel-rapl:0:0", "core", 0)
    whole = zone(tmp_path, "intel-rapl:2", "psys", 0)
    meter = EnergyMeter(powercap=tmp_path)
    assert meter.source == "counted by package-0, package-1"
    first.write_text("9500000")
    part.write_text("5000000")
    whole.write_text("5000000")
    meter.add("load")
    first.write_text("1000000")  # 0.5 J to the end of its range, and 1 J from its start
    second.write_text("2000000")
    meter.add("train")
    assert meter.joules == pytest.approx({"load": 0.5, "train": 3.5})
    meter.resume({"train": 10.0})
    assert meter.joules == pytest.approx({"load": 0.5, "train": 13.5})


def test_without_a_counter_there_is_no_figure(tmp_path) -> None:
    (tmp_path / "intel-rapl:0").mkdir()  # its files are missing, as they are unreadable to most users
    meter = EnergyMeter(powercap=tmp_path)
    meter.add("train")
    assert meter.joules is None
    assert "no RAPL counter" in meter.source


def test_an_earlier_session_that_could_not_count_makes_the_whole_unknown(tmp_path) -> None:
    zone(tmp_path, "intel-rapl:0", "package-0", 0)
    meter = EnergyMeter(powercap=tmp_path)
    meter.resume(None)
    assert meter.joules is None
    assert "earlier session" in meter.source


def test_inside_a_phase_counters_are_read_once_a_second(tmp_path) -> None:
    counter = zone(tmp_path, "intel-rapl:0", "package-0", 0)
    meter = EnergyMeter(powercap=tmp_path)
    meter.add("train")
    counter.unlink()  # reading it now would raise
    begun = time.perf_counter()
    for _ in range(1000):
        meter.add("train")
    assert time.perf_counter() - begun < 0.5
    assert meter.joules == {"train": 0.0}


def test_nvml_counts_the_gpu_that_is_used(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(energy, "EVERY", 0.0)
    millijoules, asked = [5000, 7500], []
    nvml = SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=asked.append,
        nvmlDeviceGetTotalEnergyConsumption=lambda _handle: millijoules.pop(0),
        NVMLError=type("NVMLError", (Exception,), {}),
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _device: SimpleNamespace(uuid="ab-cd"))
    meter = EnergyMeter(torch.device("cuda", 1), powercap=tmp_path)
    meter.add("train")
    assert (asked, meter.joules, meter.source) == (["GPU-ab-cd"], {"train": 2.5}, "counted by gpu-1")


COST = Cost(of="a" * 64, samples=10, reused=2, seconds=3.0, joules=7.0, device="cpu")


def test_costs_of_sessions_add_up_and_of_another_thing_do_not(tmp_path) -> None:
    path = store_costs(tmp_path / "photos.store")[0]
    assert path == tmp_path / "photos.store.cost.json"
    assert recall(path) is None
    record(path, COST)
    record(path, COST)
    assert recall(path, COST.of) == replace(COST, samples=20, reused=4, seconds=6.0, joules=14.0)
    record(path, replace(COST, joules=None))
    assert recall(path).joules is None
    other = replace(COST, of="b" * 64)
    record(path, other)
    assert recall(path, COST.of) is None
    assert recall(path) == other
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_a_damaged_record_is_an_unknown_cost(tmp_path) -> None:
    path = selection_costs(tmp_path / "s.arrow")
    for text in ("", "[]", "{}", '{"of": 1, "more": 2}'):
        path.write_text(text)
        assert recall(path) is None
    path.unlink()
    path.mkdir()
    assert recall(path) is None
