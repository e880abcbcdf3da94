"""Small images, as files and in memory, and a small real encoder in a module of the user's own."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from gstds_cache.data.decode import UndecodableError

TINY_ENCODER = '''
import os
import time
import torch
from torch import nn
from gstds_cache.encoders.preprocessing import Preprocessing

class Tiny(nn.Module):
    """Mean colour of a 4 x 4 grid: real features, no weights to learn."""
    preprocessing = Preprocessing(resize=16, crop=(16, 16))

    def forward(self, x):
        return nn.functional.adaptive_avg_pool2d(x, 4).flatten(1)

def build(**_):
    return Tiny()

class Slow(Tiny):
    """Slow; and while there is a file "hold", it goes no further than eleven passes: a test can take its time."""
    calls = 0

    def forward(self, x):
        Slow.calls += 1
        time.sleep(0.05)
        while Slow.calls > 11 and os.path.exists("hold"):
            time.sleep(0.01)
        return super().forward(x)

def build_slow(**_):
    return Slow()
'''


def make_images(root: Path) -> Path:
    """60 real PNGs in three class folders, two of which do not decode."""
    for label, name in enumerate(("cats", "dogs", "owls")):
        (root / name).mkdir(parents=True)
        for number in range(20):
            rng = np.random.default_rng([label, number])
            colour = np.zeros(3)
            colour[label] = 120
            pixels = np.clip(rng.normal(colour + 60, 25, (24, 24, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / name / f"{number:02d}.png")
    (root / "cats" / "07.png").write_bytes(b"")
    (root / "owls" / "03.png").write_bytes((root / "owls" / "04.png").read_bytes()[:80])
    return root


@dataclass
class ArraySource:
    """An in-memory data set: random 20 x 20 images, or undecodable ones."""

    count: int = 50
    bad: frozenset[int] = frozenset()
    seed: int = 0
    uri: str = "memory"
    kind: str = "memory"
    classes: tuple[str, ...] = ("a", "b", "c")
    mirror_safe: bool = True
    notes: tuple[str, ...] = ()
    files: None = None
    ids: list[str] = field(init=False)
    labels: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.ids = [f"item/{row:04d}" for row in range(self.count)]
        self.labels = np.arange(self.count, dtype=np.int64) % 3

    def __len__(self) -> int:
        return self.count

    def _pixels(self, row: int) -> np.ndarray:
        rng = np.random.default_rng([self.seed, row])
        return rng.integers(0, 256, (20, 20, 3), dtype=np.uint8)

    def payload(self, row: int) -> bytes:
        return self._pixels(row).tobytes()

    def image(self, row: int) -> Image.Image:
        if row in self.bad:
            raise UndecodableError("made to fail")
        return Image.fromarray(self._pixels(row))
