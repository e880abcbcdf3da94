"""What a data set is to the rest of the package."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int64
from PIL import Image

from gstds_cache.data.files import Files

KINDS = (
    "digits",
    "imagefolder:PATH",
    "folder:PATH",
    "list:FILE.csv",
    "parquet:PATH",
    "webdataset:SHARDS.tar",
    "hf:PATH_OR_NAME",
    "torchvision:CLASS?root=PATH",
    "module:factory",
)
"""How the kinds of data sets are named."""


@runtime_checkable
class ImageSource(Protocol):
    """An ordered, indexed set of images. Row i is item i for ever: a bad item is an item still.

    Sources are read-only, cheap to hold, and can be pickled to the processes that decode.
    """

    @property
    def uri(self) -> str:
        """The data set as the user named it."""
        ...

    @property
    def kind(self) -> str:
        """What sort of source this is, e.g. ``digits`` or ``torchvision:CIFAR10``; holds no paths."""
        ...

    @property
    def ids(self) -> Sequence[str]:
        """Name of every item, unique, in order."""
        ...

    @property
    def labels(self) -> Int64[np.ndarray, " N"]:
        """Class index of every item, -1 where there is none."""
        ...

    @property
    def classes(self) -> Sequence[str]:
        """Class names by label; may be empty."""
        ...

    @property
    def mirror_safe(self) -> bool:
        """Whether an image keeps its label when it is mirrored left to right."""
        ...

    @property
    def notes(self) -> Sequence[str]:
        """What the user should be told, e.g. about files that were ignored."""
        ...

    @property
    def files(self) -> Files | None:
        """The items' files, in order, where every item's payload is all bytes of one file; else None."""
        ...

    def __len__(self) -> int: ...

    def payload(self, row: int) -> bytes:
        """The item's bytes: what is hashed, and so what makes it the same item elsewhere.

        Raises:
            OSError: The item cannot be read.
        """
        ...

    def image(self, row: int) -> Image.Image:
        """The item as an RGB image.

        Raises:
            UndecodableError: The item cannot be read, or is not an image.
        """
        ...
