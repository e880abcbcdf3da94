from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from gstds_cache.costs import energy
from gstds_cache.costs.energy import EnergyMeter, UsedDevice, used_device
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
    monkeypatch.setattr(energy, "INTERVAL", 0.0)
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
    counter.write_text("5000000")
    begun = time.perf_counter()
    for _ in range(1000):
        meter.add("train")
    assert time.perf_counter() - begun < 0.5
    assert meter.joules == {"train": 0.0}


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """A machine with three GPUs, as NVML knows them, by UUID: millijoules so far. CUDA sees two, in another order."""
    counters = {"GPU-a": 1000, "GPU-b": 2000, "GPU-c": 3000}

    class NVMLError(Exception):
        pass

    def handle(uuid: str) -> str:
        if uuid not in counters:
            raise NVMLError("Not Found")
        return uuid

    nvml = ModuleType("pynvml")
    vars(nvml).update(
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=handle,
        nvmlDeviceGetTotalEnergyConsumption=counters.__getitem__,
        NVMLError=NVMLError,
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    visible = ["c", "GPU-b"]  # CUDA_VISIBLE_DEVICES=2,1; torch tells UUIDs without the prefix
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=visible[device.index]))
    monkeypatch.setattr(energy, "INTERVAL", 0.0)
    return counters


def test_every_gpu_in_use_is_counted_and_no_other(tmp_path, gpus) -> None:
    meter = EnergyMeter(torch.device("cuda", 0), torch.device("cuda", 1), torch.device("cuda", 0), powercap=tmp_path)
    gpus |= {"GPU-a": 9_999_000, "GPU-b": 2500, "GPU-c": 7000}
    meter.add("train")
    assert (meter.joules, meter.total) == ({"train": 4.5}, 4.5)
    assert meter.source.startswith("counted by GPU-b, GPU-c; not counted: the CPU, as no RAPL counter")


def test_devices_that_cannot_be_counted_are_named(tmp_path, gpus, monkeypatch) -> None:
    zone(tmp_path, "intel-rapl:0", "package-0", 0)
    here = used_device(torch.device("cuda", 1))
    ranks = [
        here,
        here._replace(uuid="MIG-x"),
        UsedDevice("another-host", "GPU-b"),
        UsedDevice("another-host", "GPU-z"),
    ]
    meter = EnergyMeter(*ranks, powercap=tmp_path)
    assert meter.source == (
        "counted by package-0, GPU-b; not counted: MIG-x, as NVML says: Not Found, the devices of another-host"
    )
    gpus["GPU-b"] += 1500
    meter.add("train")
    assert meter.joules == {"train": 1.5}
    monkeypatch.setitem(sys.modules, "pynvml", None)  # not installed
    assert "not counted: GPU-b, as NVML's bindings are not installed" in EnergyMeter(here, powercap=tmp_path).source


def test_a_counter_that_fails_later_ends_the_figure_and_not_the_run(tmp_path, gpus) -> None:
    meter = EnergyMeter(torch.device("cuda", 1), powercap=tmp_path)
    del gpus["GPU-b"]
    meter.add("train")
    meter.add("train")
    assert meter.joules is None
    assert "a counter failed meanwhile" in meter.source


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
