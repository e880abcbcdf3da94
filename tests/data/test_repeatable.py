"""Data sets whose items differ from one reading to the next: refused before anything is hashed, or told of later."""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner
from gstds_cache.cli.embed_command import main as embed_main
from gstds_cache.cli.select_command import main as select_main
from gstds_cache.cli.train_command import main as train_main
from PIL import Image
from torchvision import datasets

from gstds_cache.data.mapstyle import MapStyleSource
from gstds_cache.data.repeatable import ITEMS, READS, require_repeatable, why_items_differ
from gstds_cache.data.sources import open_source
from gstds_cache.embedding.check import check_sample
from gstds_cache.encoders.factory import open_encoder
from gstds_cache.errors import DatasetError
from gstds_cache.store.reader import EmbeddingStore

MODULE = """
import os, random
import numpy as np, torch
from PIL import Image
from torchvision import transforms as T

X = np.random.default_rng(1).integers(0, 255, (64, 16, 16, 3)).astype("uint8")
random.seed(0), np.random.seed(0), torch.manual_seed(0)  # as scripts do: each reading draws on from there


class Still:
    def __init__(self, rows=64):
        self.rows, self.reads, self.kept = int(rows), 0, {}

    def __len__(self):
        return self.rows

    def __getitem__(self, row):
        if row >= self.rows:
            raise IndexError(row)
        self.reads += 1
        return self.of(row, Image.fromarray(X[row % 64]))

    def of(self, row, image):
        return image, row % 4


class Flips(Still):
    def of(self, row, image):
        return (image.transpose(0) if random.random() < 0.5 else image), row % 4


class FlipsByNumpy(Still):
    def of(self, row, image):
        return (image.transpose(0) if np.random.rand() < 0.5 else image), row % 4


class FlipsByTorch(Still):
    flip = T.RandomHorizontalFlip()

    def of(self, row, image):
        return self.flip(image), row % 4


class Erases(Still):
    erase = T.Compose([T.PILToTensor(), T.RandomErasing(p=0.1)])

    def of(self, row, image):
        return self.erase(image), row % 4


class Jitters(Still):
    jitter = T.ColorJitter(0.2, 0.2)

    def of(self, row, image):
        return self.jitter(image), row % 4


class Crops(Still):
    crop = T.RandomCrop(16, padding=2)

    def of(self, row, image):
        return self.crop(image), row % 4


class NoisyLabels(Still):
    def of(self, row, image):
        return image, row % 4 if random.random() < 0.9 else random.randrange(4, 99)


class Shuffles(Still):
    def of(self, row, image):
        return Image.fromarray(X[random.randrange(64)]), row % 4


class LastOnly(Still):
    def of(self, row, image):
        return (Flips.of if row == self.rows - 1 else Still.of)(self, row, image)


class AfterSeventy(Still):
    def of(self, row, image):
        return (Flips.of if self.reads > 70 else Still.of)(self, row, image)


class KeepsTheLast(Flips):
    # A cache of one image: read twice in a row it is the same.
    def __getitem__(self, row):
        if row not in self.kept:
            self.kept = {row: super().__getitem__(row)}
        return self.kept[row]


class Damaged(Flips):
    def of(self, row, image):
        if row % 2:
            raise OSError("damaged")
        return super().of(row, image)


class Seeded(Still):
    # Random, and the same each time: drawn by the row.
    def of(self, row, image):
        return (image.transpose(0) if np.random.default_rng(row).random() < 0.5 else image), row % 4


class AnotherOrder(Still):
    # Made anew, it is shuffled anew: what one object gives is the same each time.
    def __init__(self):
        super().__init__()
        self.order = np.random.default_rng(int.from_bytes(os.urandom(4), "big")).permutation(64)

    def of(self, row, image):
        return Image.fromarray(X[self.order[row]]), row % 4
"""


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "sets_that_draw.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    yield
    sys.modules.pop("sets_that_draw", None)


@pytest.mark.parametrize(
    "name",
    [
        *("Flips", "FlipsByNumpy", "FlipsByTorch", "Erases", "Jitters", "Crops", "Shuffles", "LastOnly"),
        *("AfterSeventy", "KeepsTheLast", "Damaged", "Flips?rows=1", "Flips?rows=2", "Flips?rows=5"),
    ],
)
def test_images_that_are_drawn_are_refused_every_time(name: str) -> None:
    for _ in range(3):
        with pytest.raises(
            DatasetError, match=r"item '00000\d\d' \(row \d+\): got two different images for it"
        ) as caught:
            open_source(f"sets_that_draw:{name}")
        assert "augmentation comes after the cache" in caught.value.hint


def test_labels_that_are_drawn_are_refused() -> None:
    for _ in range(3):
        with pytest.raises(DatasetError, match=r"\(row \d+\): got two different labels for it, \d+ \(int\) and \d+ \("):
            open_source("sets_that_draw:NoisyLabels")


def test_what_is_the_same_each_time_is_read_no_more_than_it_takes() -> None:
    for name, rows in (("Still", 64), ("Seeded", 64), ("Still?rows=3", 3)):
        source = open_source(f"sets_that_draw:{name}")
        assert len(source) == rows
        before = source._dataset.reads
        require_repeatable(source)
        assert source._dataset.reads - before <= READS


def test_a_torchvision_class_that_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    def draws(_self: object, row: int) -> tuple[Image.Image, int]:
        return Image.new("RGB", (8, 8), (random.randrange(256), 0, 0)), row

    monkeypatch.setattr(datasets.FakeData, "__getitem__", draws)
    with pytest.raises(DatasetError, match="got two different images"):
        open_source("torchvision:FakeData?size=5")


def test_items_that_take_long_are_read_for_a_while_only(monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow:
        reads = 0

        def __len__(self) -> int:
            return 1000

        def __getitem__(self, row: int) -> tuple[Image.Image, int]:
            self.reads += 1
            return Image.new("L", (2, 2), row % 256), 0

    slow = Slow()
    slow.targets = [0] * 1000  # type: ignore[attr-defined]
    source = MapStyleSource(slow, uri="slow", kind="module:slow")
    clock = iter(range(0, 10_000, 3))
    monkeypatch.setattr(time, "monotonic", lambda: float(next(clock)))
    before = slow.reads
    require_repeatable(source)
    assert 8 <= slow.reads - before < 12
    assert ITEMS * 4 == READS


def embed(tiny_model: str, dataset: str, code: int) -> str:
    words = [dataset, "--model", tiny_model, "--cache", "store", "--workers", "0", "--device", "cpu"]
    done = CliRunner().invoke(embed_main, [*words, "--batch-size", "16"])
    assert done.exit_code == code, done.output
    return done.output


def test_a_later_mismatch_says_that_items_may_be_random(tiny_model: str) -> None:
    embed(tiny_model, "sets_that_draw:AnotherOrder", 0)
    said = embed(tiny_model, "sets_that_draw:AnotherOrder", 3)
    assert "have other bytes, 0 another label; the ids are the same" in said
    assert "the items of sets_that_draw:AnotherOrder may be random" in said

    select = ["store", "--batch-size", "16", "--knn", "4", "--epochs", "1", "--out", "s.arrow", "--device", "cpu"]
    done = CliRunner().invoke(select_main, select)
    assert done.exit_code == 0, done.output
    train = ["sets_that_draw:AnotherOrder", "--selection", "s.arrow", "--arch", "conv3", "--device", "cpu"]
    done = CliRunner().invoke(train_main, train)
    assert done.exit_code == 3, done.output
    assert "the items of sets_that_draw:AnotherOrder may be random" in done.output

    source = open_source("sets_that_draw:AnotherOrder")
    found = check_sample(EmbeddingStore("store"), source, open_encoder(tiny_model), rows=8, device="cpu")
    assert found.problems
    assert "may be random" in str(found.problems[0])
    assert why_items_differ(open_source("digits")) == why_items_differ(open_source("digits?split=test")) == ""
