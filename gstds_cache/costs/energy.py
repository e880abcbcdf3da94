"""Joules by phase, from the counters that the hardware keeps: RAPL for CPU packages, NVML for an NVIDIA GPU.

Both count the whole device, whoever uses it. Where neither can be read there is no figure, never a zero.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

POWERCAP = Path("/sys/class/powercap")
EVERY = 1.0  # seconds between readings inside a phase; a RAPL counter of 262 kJ wraps after some minutes at full power


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
        source: The counters, or why there is none, in words.
    """

    def __init__(self, device: torch.device | None = None, *, powercap: Path = POWERCAP) -> None:
        """Find the counters, and start them.

        Args:
            device: The GPU that is used, if one is.
            powercap: Where Linux shows RAPL's counters.
        """
        self._counters = _rapl(powercap)
        self.source = f"no RAPL counter can be read under {powercap}"
        if device is not None and device.type == "cuda":
            gpu = _nvml(device)
            self._counters += gpu
            self.source += "" if gpu else ", and NVML does not answer (pip install nvidia-ml-py)"
        if self._counters:
            self.source = "counted by " + ", ".join(counter.name for counter in self._counters)
        self._joules: dict[str, float] = {}
        self._last, self._phase = time.monotonic(), ""

    def add(self, phase: str) -> None:
        """Count what was spent since the last reading to ``phase``. Cheap to call after every step.

        Inside a phase the counters are read once a second, so up to a second of one phase is counted to the next.
        """
        now = time.monotonic()
        if not self._counters or (phase == self._phase and now - self._last < EVERY):
            return
        self._last, self._phase = now, phase
        self._joules[phase] = self._joules.get(phase, 0.0) + sum(counter.spent() for counter in self._counters)

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


def _nvml(device: torch.device) -> list[_Counter]:
    """The GPU's counter, in millijoules since the driver was loaded (Volta and later)."""
    try:
        import pynvml
    except ImportError:
        return []
    try:
        pynvml.nvmlInit()
        uuid = str(torch.cuda.get_device_properties(device).uuid)
        handle = pynvml.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith("GPU-") else f"GPU-{uuid}")

        def read() -> float:
            return float(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)) / 1000

        return [_Counter(f"gpu-{device.index or 0}", read, float("inf"), read())]
    except pynvml.NVMLError:
        return []
