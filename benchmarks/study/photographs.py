"""Photographs whose labels or splits are not those of one folder; what ``unpack.py`` made is read here.

    gstds-embed 'benchmarks.study.photographs:clothing14_corrected?root=.data' --cache clothing14.store

Data sets that are one folder are read as such: ``imagefolder:$DATA/cifar10/train``.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int64
from PIL import Image

from benchmarks.study.labels import confused, imbalanced, noisy
from benchmarks.study.unpack import CORRECTED
from gstds_cache.errors import DatasetError
from gstds_cache.seeding import rng_for

# The usual "asymmetric noise" of CIFAR-10 (Patrini et al. 2017, "Making Deep Neural Networks Robust to Label Noise").
CONFUSED = {"truck": "automobile", "bird": "airplane", "deer": "horse", "cat": "dog", "dog": "cat"}


@dataclass(frozen=True)
class Photographs:
    """A map-style data set of (image, label), as ``module:factory`` expects it.

    Attributes:
        root: The data set's folder.
        ids: Path of each image below it.
        targets: Classes, int64 [N].
        classes: Names of the classes.
        mirror_safe: True: a mirrored photograph has its label.
    """

    root: Path
    ids: tuple[str, ...]
    targets: Int64[np.ndarray, " N"]
    classes: tuple[str, ...]
    mirror_safe: bool = True

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, row: int) -> tuple[Image.Image, int]:
        with Image.open(self.root / self.ids[row]) as image:
            return image.convert("RGB"), int(self.targets[row])


def flowers89_evaluation(root: str) -> Photographs:
    """The official training and validation parts of Oxford Flowers in one: what runs on its test part are tested on.

    Args:
        root: The data folder.

    Returns:
        The data set, 1,434 images of 89 classes.
    """
    return _listed(Path(root) / "flowers89", ("train", "val"))


def clothing14_corrected(root: str, split: str = "train") -> Photographs:
    """Clothing14 with the labels that a later release corrected (23 of the training part; val and test have them).

    Args:
        root: The data folder.
        split: ``train``, ``val`` or ``test``.

    Returns:
        The data set; its rows are those of ``imagefolder:ROOT/clothing14/SPLIT``.
    """
    photographs = _listed(Path(root) / "clothing14", (split,))
    label_of = {name: label for label, name in enumerate(photographs.classes)}
    row_of = {Path(name).stem: row for row, name in enumerate(photographs.ids)}
    path = photographs.root / CORRECTED
    with path.open(newline="") as file:
        for line in csv.DictReader(file):
            if line["split"] != split:
                continue
            if line["image"] not in row_of or line["corrected_label"] not in label_of:
                raise DatasetError(f"{path}: {line}: no such image or class in {photographs.root / split}")
            photographs.targets[row_of[line["image"]]] = label_of[line["corrected_label"]]
    return photographs


def cifar10(root: str, part: str = "all", noise: str = "0", confusion: str = "0", imbalance: str = "1") -> Photographs:
    """CIFAR-10's training set with wrong labels, or with rare classes. Arguments are strings, as those of a URI are.

    Args:
        root: The data folder.
        part: ``all``; or ``train``, and ``held-out`` with a fifth of the images, to choose settings by.
        noise: Share of the labels that are changed to another class.
        confusion: Share of the labels of :data:`CONFUSED` that are changed to that of the class beside it.
        imbalance: How many times as frequent the most frequent class is as the rarest.

    Returns:
        The data set; the same arguments give the same one.

    Raises:
        DatasetError: There is no such part.
    """
    whole = _listed(Path(root) / "cifar10", ("train",))
    order = rng_for(0, "held out").permutation(len(whole))
    fifth = len(whole) // 5
    parts = {"all": order, "held-out": order[:fifth], "train": order[fifth:]}
    if part not in parts:
        raise DatasetError(f"`part`: got {part!r}, expected one of {', '.join(parts)}")
    rows = np.sort(parts[part])
    rows = rows[imbalanced(whole.targets[rows], len(whole.classes), float(imbalance))] if float(imbalance) > 1 else rows
    targets = noisy(whole.targets[rows], len(whole.classes), float(noise))
    if float(confusion):
        pairs = {whole.classes.index(one): whole.classes.index(other) for one, other in CONFUSED.items()}
        targets = confused(targets, pairs, float(confusion))
    return Photographs(whole.root, tuple(whole.ids[row] for row in rows), targets, whole.classes)


def _listed(folder: Path, splits: Iterable[str]) -> Photographs:
    """All images of some splits, sorted by path in each; classes are the sorted names of their folders."""
    names = [
        path.relative_to(folder).as_posix() for split in splits for path in sorted((folder / split).glob("*/*.jpg"))
    ]
    if not names:
        raise DatasetError(
            f"{folder}: no images", hint="unpack the archives: python -m benchmarks.study.unpack FOLDER --to DATA"
        )
    classes = tuple(sorted({name.split("/")[1] for name in names}))
    targets = np.array([classes.index(name.split("/")[1]) for name in names], np.int64)
    return Photographs(folder, tuple(names), targets, classes)
