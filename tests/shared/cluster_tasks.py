"""Work for clusters in tests: models and tasks in a module that workers import."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gstds_cache.encoders.preprocessing import Preprocessing


class Tiny(nn.Module):
    """Mean colour of a 4 x 4 grid: real features, no weights to learn."""

    preprocessing = Preprocessing(resize=16, crop=(16, 16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.adaptive_avg_pool2d(x, 4).flatten(1)


def build(**_: Any) -> nn.Module:
    return Tiny()


class Slow(Tiny):
    """Waits in each pass."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        time.sleep(0.1)
        return super().forward(x)


def build_slow(**_: Any) -> nn.Module:
    return Slow()


class Slower(Tiny):
    """Waits in each pass, in workers of Ray for longer: a test has the time to kill them."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        time.sleep(1.0 if in_worker() else 0.0)
        return super().forward(x)


def build_slower(**_: Any) -> nn.Module:
    return Slower()


class ByProcess(Tiny):
    """Other weights in a worker of Ray than in the process that began."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(48))
        if in_worker():
            self.bias.data += 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + self.bias


def build_by_process(**_: Any) -> nn.Module:
    return ByProcess()


@dataclass
class Folder:
    """What tasks wrote, for a test to see: a file for each time that a unit was begun."""

    path: Path

    def begun(self, unit: int) -> int:
        """Note that a unit is begun; returns how often it was before."""
        before = len(list(self.path.glob(f"unit-{unit}.*")))
        (self.path / f"unit-{unit}.{before}.{os.getpid()}").touch()
        return before

    def count(self, unit: int) -> int:
        return len(list(self.path.glob(f"unit-{unit}.*")))

    def processes(self) -> set[int]:
        return {int(path.suffix[1:]) for path in self.path.glob("unit-*")}

    def opened(self) -> int:
        return len(list(self.path.glob("opened-*")))


@dataclass(frozen=True)
class SquareRecipe:
    """Squares numbers; what befalls a unit is told in ``faults``."""

    path: Path
    seconds: float = 0.0
    faults: dict[int, str] = field(default_factory=dict)
    cpus: int = 1
    gpu: bool = False
    counted = "squares"

    @property
    def key(self) -> str:
        return str(self.path)

    def open(self) -> Any:
        (self.path / f"opened-{os.getpid()}-{time.time_ns()}").touch()
        return Squares(self)


class Squares:
    """The task: in this process by itself, and in others by its recipe."""

    def __init__(self, recipe: SquareRecipe) -> None:
        self._recipe = recipe
        self.received: list[Any] = []

    def __call__(self, units: Sequence[int]) -> Iterator[int]:
        for unit in units:
            before = Folder(self._recipe.path).begun(unit)
            fault = self._recipe.faults.get(unit, "")
            if fault == "kill" and before == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            if fault == "stop" and before == 0:
                os.kill(os.getpid(), signal.SIGSTOP)
            if fault == "always kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if fault == "wrong":
                raise ValueError(f"unit {unit} is wrong")
            if fault == "busy" and before == 0:
                raise ConnectionResetError("the service did not answer")
            time.sleep(self._recipe.seconds * (20 if fault == "slow" and before == 0 else 1))
            yield unit * unit

    def recipe(self) -> SquareRecipe:
        return self._recipe

    def receive(self, result: int) -> int:
        self.received.append(result)
        return result


class Killed(Tiny):
    """In a worker of Ray: ends its process by SIGKILL in its third pass, once, while there is a file "kill"."""

    calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        Killed.calls += 1
        path = Path(os.environ.get("GSTDS_TEST_FOLDER", "."), "kill")
        if in_worker() and Killed.calls >= 3 and path.exists():
            path.unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(x)


def build_killed(**_: Any) -> nn.Module:
    return Killed()


def in_worker() -> bool:
    """Whether this is a worker of Ray."""
    return any(name.endswith("default_worker.py") for name in sys.argv)
