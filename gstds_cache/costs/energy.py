"""Joules by phase, from the counters that the hardware keeps: RAPL for CPU packages, NVML for NVIDIA GPUs.

Both count a whole device, whoever uses it. Where no counter can be read there is no figure, never a zero; a device in
use whose counter cannot be read is named in :attr:`EnergyMeter.source`.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch

POWERCAP = Path("/sys/class/powercap")
INTERVAL = 1.0  # seconds between readings inside a phase; a RAPL counter of 262 kJ wraps after minutes at full power


class UsedDevice(NamedTuple):
    """A device that computes, by names that hold in every process.

    Attributes:
        host: The machine.
        uuid: A GPU's, as NVML knows it; empty for a CPU. Not its number: ``CUDA_VISIBLE_DEVICES`` renumbers GPUs for
            CUDA alone, and ``cuda:0`` of each of several processes may be another one.
    """

    host: str
    uuid: str = ""


def used_device(device: torch.device) -> UsedDevice:
    """The name of this process's ``device`` for :class:`EnergyMeter`, in this process or another."""
    if device.type != "cuda":
        return UsedDevice(socket.gethostname())
    uuid = str(torch.cuda.get_device_properties(device).uuid)
    return UsedDevice(socket.gethostname(), uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}")


@dataclass
class _Counter:
    """One rising counter.

    Attributes:
        name: What it counts, e.g. ``package-0``.
        read: Its value now, in joules.
        wraps_at: Where it starts again from 0, in joules; infinite where it does not.
        last: The value read last.
    """

    name: str
    read: Callable[[], float]
    wraps_at: float
    last: float

    def spent(self) -> float:
        now = self.read()
        spent = now - self.last if now >= self.last else now - self.last + self.wraps_at
        self.last = now
        return spent


class EnergyMeter:
    """Adds up the joules of each phase.

    Attributes:
        source: What is counted, and what is in use and not counted, in words.
    """

    def __init__(self, *devices: torch.device | UsedDevice, powercap: Path = POWERCAP) -> None:
        """Find the counters, and start them.

        Args:
            devices: Every device that is used: this process's, or :func:`used_device` of those of other processes.
                Two that are the same count once.
            powercap: Where Linux shows RAPL's counters.
        """
        used = {used_device(device) if isinstance(device, torch.device) else device for device in devices}
        here = socket.gethostname()
        self._counters, missing = _rapl(powercap), []
        if not self._counters:
            missing.append(f"the CPU, as no RAPL counter can be read under {powercap}")
        gpus, why = _nvml(sorted(device.uuid for device in used if device.uuid and device.host == here))
        self._counters += gpus
        missing += why
        if elsewhere := sorted({device.host for device in used} - {here}):
            missing.append(f"the devices of {', '.join(elsewhere)}")
        parts = [f"counted by {', '.join(counter.name for counter in self._counters)}"] if self._counters else []
        self.source = "; ".join(parts + ([f"not counted: {', '.join(missing)}"] if missing else []))
        self._joules: dict[str, float] = {}
        self._last, self._phase = time.monotonic(), ""

    def add(self, phase: str) -> None:
        """Count what was spent since the last reading to ``phase``. Cheap to call after every step.

        Inside a phase the counters are read once a second, so up to a second of one phase is counted to the next.
        """
        now = time.monotonic()
        if not self._counters or (phase == self._phase and now - self._last < INTERVAL):
            return
        self._last, self._phase = now, phase
        try:
            spent = sum(counter.spent() for counter in self._counters)
        except Exception as error:  # NVML's own, OSError: a counter that fails must not end hours of work
            self._counters, self.source = [], f"a counter failed meanwhile: {error}"
            return
        self._joules[phase] = self._joules.get(phase, 0.0) + spent

    def resume(self, joules: dict[str, float] | None) -> None:
        """Go on from what an earlier session counted; None, where it could not count, makes the whole unknown."""
        if joules is None and self._counters:
            self._counters = []
            self.source = "an earlier session of this run counted none"
        for phase, value in (joules or {}).items():
            self._joules[phase] = self._joules.get(phase, 0.0) + value

    @property
    def joules(self) -> dict[str, float] | None:
        """Joules by phase so far; None where there is no counter."""
        return {phase: round(value, 3) for phase, value in self._joules.items()} if self._counters else None

    @property
    def total(self) -> float | None:
        """Joules of all phases so far; None where there is no counter."""
        return None if self.joules is None else sum(self.joules.values())


def _rapl(powercap: Path) -> list[_Counter]:
    """The packages' counters. Their parts (``intel-rapl:0:1``) and ``psys``, which holds them all, are left out."""
    counters = []
    for zone in sorted(powercap.glob("intel-rapl:*")) if powercap.is_dir() else []:
        try:
            name = (zone / "name").read_text().strip()
            if zone.name.count(":") == 1 and name.startswith("package"):
                read = partial(_microjoules, zone / "energy_uj")
                counters.append(_Counter(name, read, _microjoules(zone / "max_energy_range_uj"), read()))
        except (OSError, ValueError):  # energy_uj is root's alone on most systems
            continue
    return counters


def _microjoules(file: Path) -> float:
    return int(file.read_text()) / 1e6


def _nvml(uuids: Iterable[str]) -> tuple[list[_Counter], list[str]]:
    """The GPUs' counters, in millijoules since the driver was loaded (Volta and later), and those without one."""
    counters: list[_Counter] = []
    missing: list[str] = []
    for uuid in uuids:
        try:
            import pynvml
        except ImportError:
            missing.append(f"{uuid}, as NVML's bindings are not installed (pip install nvidia-ml-py)")
            continue
        try:
            pynvml.nvmlInit()
            handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
            read = partial(_millijoules, pynvml, handle)
            counters.append(_Counter(uuid, read, float("inf"), read()))
        except pynvml.NVMLError as error:
            missing.append(f"{uuid}, as NVML says: {error}")
    return counters, missing


def _millijoules(pynvml: ModuleType, handle: object) -> float:
    return float(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)) / 1000
