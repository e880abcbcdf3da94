"""A data set object passed from Python: taken as it is, with a factory's guarantees, or refused with a remedy."""

from __future__ import annotations

import pickle
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Subset, TensorDataset
from torchvision import datasets

from gstds_cache.data.loading import pixel_batches
from gstds_cache.data.manifest import build_manifest
from gstds_cache.data.python_object import open_object
from gstds_cache.data.source import ImageSource
from gstds_cache.data.sources import open_source
from gstds_cache.errors import DatasetError, UsageError


def image(shade: int) -> Image.Image:
    return Image.new("RGB", (8, 8), (shade, 255 - shade, 7))


@pytest.fixture
def pairs() -> list[tuple[Image.Image, int]]:
    return [(image(10 * row), row % 3) for row in range(20)]


@pytest.fixture
def cifar(tmp_path: Path) -> datasets.CIFAR10:
    """A CIFAR10 object of 40 images in one batch file, without a download."""
    made = datasets.CIFAR10.__new__(datasets.CIFAR10)
    made.root, made.train, made.transform, made.target_transform, made.transforms = (
        str(tmp_path),
        True,
        None,
        None,
        None,
    )
    made.data = np.random.default_rng(0).integers(0, 256, (40, 32, 32, 3), np.uint8)
    made.targets = [row % 10 for row in range(40)]
    made.classes = [f"class {number}" for number in range(10)]
    return made


def test_a_list_of_images_and_labels(pairs) -> None:
    source = open_source(pairs)
    assert isinstance(source, ImageSource)
    assert (source.uri, source.kind, source.mirror_safe) == ("python:list", "python:list", True)
    assert (len(source), source.labels.tolist()) == (20, [row % 3 for row in range(20)])
    assert source.image(4).tobytes() == pairs[4][0].tobytes()
    assert source.payload(4) == b"RGB|8x8|" + pairs[4][0].tobytes()
    assert build_manifest(source).root == build_manifest(open_source(list(pairs))).root
    assert build_manifest(source).root != build_manifest(open_source(pairs[::-1])).root


def test_a_torchvision_data_set(cifar) -> None:
    source = open_source(cifar)
    assert source.uri == source.kind == "python:torchvision.datasets.CIFAR10"
    assert (source.labels.tolist(), source.classes) == (cifar.targets, tuple(cifar.classes))
    assert source.image(11).tobytes() == cifar.data[11].tobytes()
    part = open_source(Subset(cifar, [5, 3]))
    assert part.labels.tolist() == [5, 3]
    assert part.image(1).tobytes() == cifar.data[3].tobytes()


def test_an_image_folder_object_gives_what_it_transforms(tmp_path: Path) -> None:
    for row in range(6):
        path = tmp_path / "ab"[row % 2] / f"{row}.png"
        path.parent.mkdir(exist_ok=True)
        image(row).save(path)
    shrunk = datasets.ImageFolder(str(tmp_path), transform=lambda whole: whole.resize((4, 4)))
    source = open_source(shrunk)
    assert (source.image(0).size, source.classes, source.labels.tolist()) == ((4, 4), ("a", "b"), [0, 0, 0, 1, 1, 1])


def test_mirroring_is_not_safe_for_characters() -> None:
    digits = datasets.MNIST.__new__(datasets.MNIST)
    digits.data, digits.targets = torch.zeros(4, 28, 28, dtype=torch.uint8), torch.arange(4)
    digits.train, digits.transform, digits.target_transform = True, None, None
    assert open_source(digits).mirror_safe is False
    assert open_source(Subset(digits, [0, 2])).mirror_safe is False


def test_a_source_is_returned_as_it_is(array_source) -> None:
    source = array_source(5)
    assert open_source(source) is source


class Counted:
    """Items that do not pickle if asked not to."""

    def __init__(self, pickles: bool) -> None:
        self.connection = None if pickles else (number for number in ())

    def __len__(self) -> int:
        return 12

    def __getitem__(self, row: int) -> tuple[Image.Image, int]:
        if row >= len(self):
            raise IndexError(row)
        return image(row), row % 2


@pytest.mark.parametrize("pickles", [True, False])
def test_processes_that_decode_have_a_copy_or_leave_it_to_this_one(pickles: bool) -> None:
    source = open_source(Counted(pickles))
    build_manifest(source)

    def pixels(shown: Image.Image) -> torch.Tensor:
        return torch.from_numpy(np.asarray(shown).transpose(2, 0, 1).copy())

    batches = pixel_batches(source, pixels, (3, 8, 8), [range(6), range(6, 12)], workers=2, pin=False)
    assert batches.workers == (2 if pickles else 0)
    decoded = torch.cat([batch.pixels for batch in batches])
    assert decoded[:, 0, 0, 0].tolist() == list(range(12))
    batches.close()


def test_it_pickles_with_its_object(pairs) -> None:
    source = open_source(pairs)
    assert build_manifest(pickle.loads(pickle.dumps(source))).root == build_manifest(source).root


class Augmented(Counted):
    def __getitem__(self, row: int) -> tuple[Image.Image, int]:
        return image(random.randrange(256)), 0


def test_items_drawn_at_random_are_refused() -> None:
    with pytest.raises(DatasetError, match="got two different images"):
        open_source(Augmented(pickles=True))


@pytest.mark.parametrize(
    ("dataset", "message", "hint"),
    [
        (42, "got a int, expected the name of a data set, or an object", "list of (image, label)"),
        (None, "got a NoneType", "list of (image, label)"),
        (iter([]), "got a list_iterator", "list of (image, label)"),
        (Path("photos"), "got the path 'photos'", "did you mean 'imagefolder:photos'?"),
        (datasets.CIFAR10, "got the class CIFAR10", "pass an object of it: CIFAR10(...)"),
        ({"train": []}, "got a dict", "data['train']"),
        (DataLoader([1, 2]), "got a DataLoader", "loader.dataset"),
        ([], "got 0 items", ""),
        ([image(0)], "not a pair: got Image", ""),
        (TensorDataset(torch.zeros(4, 3, 8, 8), torch.arange(4)), "a tensor of float32 3x8x8", "come after the cache"),
        ([("cat.png", 1)], "an image that is a value of str", ""),
    ],
)
def test_what_is_no_data_set(dataset: Any, message: str, hint: str) -> None:
    with pytest.raises(DatasetError) as caught:
        open_object(dataset)
    assert message in caught.value.message
    assert hint in caught.value.hint


def test_no_command_opens_an_object_by_its_class(pairs) -> None:
    with pytest.raises(UsageError, match="object in a Python program") as caught:
        open_source(open_source(pairs).uri)
    assert "pass the object itself" in caught.value.hint
