"""Data sets that a run on several devices is tried with; in a module that other processes can import."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from images import ArraySource
from PIL import Image


class Slow(ArraySource):
    """So slow to read that another process is there long before this one is done."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.home = os.getpid()

    def image(self, row: int) -> Image.Image:
        time.sleep(0.03)
        return super().image(row)


class Waiting(Slow):
    """From some row on, the workers of the process that made it wait until another makes ``uri`` a file."""

    def image(self, row: int) -> Image.Image:
        if self.home not in {os.getpid(), os.getppid()}:
            Path(self.uri).touch()
        begun = time.monotonic()
        while row >= 120 and os.getppid() == self.home and not Path(self.uri).exists():
            assert time.monotonic() - begun < 120, "no other process"
            time.sleep(0.01)
        return ArraySource.image(self, row)


class Deadly(Slow):
    """Its images end a process that is not the one that made it, nor that one's child."""

    def image(self, row: int) -> Image.Image:
        if self.home not in {os.getpid(), os.getppid()}:
            os.kill(os.getppid(), signal.SIGKILL)
        return super().image(row)


class Buggy(Deadly):
    def image(self, row: int) -> Image.Image:
        if self.home != os.getpid():
            raise KeyError("a bug of mine")
        return Slow.image(self, row)
