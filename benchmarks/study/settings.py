"""What a data set's runs have in common: one JSON file each in ``settings/``, parsed here and nowhere else."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from gstds_cache.config import DEFAULT_MODEL, SelectConfig, TrainConfig
from gstds_cache.errors import UsageError

FOLDER = Path(__file__).parent / "settings"


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A data set, a network and a budget.

    Attributes:
        name: The file's name without ``.json``.
        about: One line for people.
        train: The training set's URI; ``$NAME`` in it is the environment's.
        test: The test set's URI.
        epochs: Passes over the training set.
        batch: Rows of a batch before selection at filter ratio 0.75; a step has a quarter of them at every ratio, so
            that all runs of a setting take steps of one size.
        arch: The network.
        order: Of an epoch's rows, for everything and for methods that keep rows of a batch.
        lr: Peak learning rate.
        lrs: Another one for some methods, by name: each has the best of the same rates, tried on validation data.
        image_size: Side of the images in pixels.
        momentum: SGD momentum.
        weight_decay: SGD weight decay.
        augment: How images are augmented.
        model: The reference model whose embeddings are selected from.
        same_images_as: Another setting whose store holds the same images with other labels: nothing is embedded again.
        against: Another setting of the same images and labels, whose runs those of this one are compared with.
        audited: Whether rows whose labels an audit doubts are hidden before anything is trained.
        knn: Neighbours per row of a batch's graph.
        norm_samples: Random rows that re-estimate the statistics of batch normalisation before testing.
    """

    name: str
    about: str
    train: str
    test: str
    epochs: int
    batch: int
    arch: str
    lr: float
    image_size: int
    momentum: float = 0.9
    weight_decay: float = 5e-4
    augment: Literal["none", "crop", "crop+flip"] = "crop"
    model: str = DEFAULT_MODEL
    same_images_as: str = ""
    against: str = ""
    audited: bool = False
    knn: int = 10
    order: str = SelectConfig.order
    norm_samples: int = TrainConfig.norm_samples
    lrs: dict[str, float] = field(default_factory=dict)

    @property
    def step(self) -> int:
        """Samples of a training step."""
        return self.batch // 4

    def rows_before(self, ratio: float) -> int:
        """Rows of a batch before the share ``ratio`` is removed, for steps of :attr:`step` samples."""
        return round(self.step / (1 - ratio))

    def lr_of(self, method: str) -> float:
        """Peak learning rate of a method."""
        return self.lrs.get(method, self.lr)

    def train_config(self, seed: int, *, arch: str = "") -> TrainConfig:
        """How a run trains, but for the method's own learning rate."""
        return TrainConfig(
            arch=arch or self.arch,
            seed=seed,
            lr=self.lr,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            image_size=self.image_size,
            augment=self.augment,
            workers=0,
            threads=1,
            norm_samples=self.norm_samples,
        )


def load_setting(name: str) -> Setting:
    """The setting of that name.

    Raises:
        UsageError: There is none, its file is no setting, or a variable in it is not set.
    """
    path = FOLDER / f"{name}.json"
    if not path.exists():
        raise UsageError(f"no setting {name!r}: there is {', '.join(names())}")
    try:
        fields: dict[str, Any] = json.loads(path.read_text())
        setting = Setting(name=name, **fields)
    except (ValueError, TypeError) as error:
        raise UsageError(f"{path} is no setting: {error}") from error
    if setting.batch % 4:
        raise UsageError(f"{path}: batch must be a multiple of 4, got {setting.batch}")
    return setting


def names() -> list[str]:
    """All settings."""
    return sorted(path.stem for path in FOLDER.glob("*.json"))


def resolved(uri: str) -> str:
    """``uri`` with the environment's variables filled in.

    Raises:
        UsageError: One of them is not set.
    """
    filled = os.path.expandvars(uri)
    if "$" in filled:
        raise UsageError(f"data set {uri!r}: set {filled[filled.index('$') :].partition('/')[0]} to where the data are")
    return filled
