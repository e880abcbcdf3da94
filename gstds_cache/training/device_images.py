"""Decoded images on the device: a step takes its rows there, augmented, in one indexing operation.

The random numbers are those of :func:`~gstds_cache.training.augment.augment`, drawn on the host by the step's key: rows
are moved and mirrored as they are without this, whatever the device, the ranks and the batches that a run was resumed
at. Only they and the rows cross to the device, 32 bytes an image.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, Unpack

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from gstds_cache.data.source import ImageSource
from gstds_cache.errors import UsageError
from gstds_cache.runtime.devices import free_memory, to_device
from gstds_cache.runtime.progress import Counted
from gstds_cache.training.augment import Augmentation, draw
from gstds_cache.training.images import ImageFeed

SHARE = 0.5
"""Share of a GPU's free memory that images may take; the rest is for network, activations and optimiser."""

Gather = Callable[[UInt8[Tensor, "N S S 3"], Int64[Tensor, "4 m"], int], UInt8[Tensor, "m 3 S S"]]


def held_on_device(where: Literal["auto", "device", "host"], items: int, side: int, device: torch.device) -> bool:
    """Whether a run's images are held on its device.

    Args:
        where: The setting ``images``.
        items: Images.
        side: Their side in pixels.
        device: The device; a CPU holds them on request alone, in which case its memory is not asked.

    Returns:
        Whether they are.

    Raises:
        UsageError: They are to be, and take more than ``SHARE`` of the memory that is free.
    """
    if where == "host" or (where == "auto" and device.type != "cuda"):
        return False
    if device.type != "cuda":
        return True
    room, needed = int(SHARE * free_memory(device)), items * 3 * side * side
    if where == "device" and needed > room:
        raise UsageError(
            f"`images`: got device, but {items:,} images of {side} x {side} take {needed >> 20:,} MiB, expected at "
            f"most {room >> 20:,}, half of what is free on {device}",
            hint="pass `images='host'`, or a smaller `image_size`",
        )
    return needed <= room


class DeviceImages(ImageFeed):
    """All images of a data set, decoded, on the device.

    Attributes:
        images: uint8 [N, S, S, 3], so that a pixel's colours are read together.
        gather: What takes rows out of them: :func:`gather`, or the same compiled.
    """

    gather: Gather

    def __init__(
        self,
        source: ImageSource,
        *,
        side: int,
        workers: int,
        device: torch.device,
        progress: Counted = lambda _done, _total: None,
    ) -> None:
        """Decode everything, and copy it to the device in parts.

        Args:
            source: The data set.
            side: Side of the square images in pixels.
            workers: Processes that decode.
            device: Where the images are held.
            progress: Called with images decoded and images in all.
        """
        self.images = torch.empty((len(source), side, side, 3), dtype=torch.uint8, device=device)
        self.gather = gather
        self._set_up(source, side, workers, pin=False)
        self._fill(self.images.permute(0, 3, 1, 2), progress)

    @property
    def on_device(self) -> bool:
        """True: a step takes its images itself."""
        return True

    def augmented(
        self, rows: Int64[np.ndarray, " m"], **how: Unpack[Augmentation]
    ) -> tuple[UInt8[torch.Tensor, "m 3 S S"], Int64[torch.Tensor, " m"]]:
        """Images of a step, moved and mirrored as by :func:`~gstds_cache.training.augment.augment`.

        Args:
            rows: The step's rows, int64 [m].
            how: How they are augmented.

        Returns:
            uint8 [m, 3, S, S] and ``rows``, int64 [m], both on the device, which the host does not wait for.
        """
        packed = to_device(self.packed(rows, **how), self.images.device)
        return self.gather(self.images, packed, how["shift"]), packed[0]

    def packed(self, rows: Int64[np.ndarray, " m"], **how: Unpack[Augmentation]) -> Int64[torch.Tensor, "4 m"]:
        """What :func:`gather` needs to know of a step's images, on the host; arguments as above."""
        draws = draw(*how["part"], shift=how["shift"], mirror=how["mirror"], seed=how["seed"], step=how["step"])
        return torch.cat([torch.from_numpy(rows)[None], draws])


def gather(images: UInt8[Tensor, "N S S 3"], packed: Int64[Tensor, "4 m"], shift: int) -> UInt8[Tensor, "m 3 S S"]:
    """Rows of ``images``, each moved and mirrored; reflected at the edges as ``torch.nn.functional.pad`` does it.

    Args:
        images: All images.
        packed: Of each image of the batch: row, pixels down and to the right (0 to ``2 * shift``), 1 where mirrored.
        shift: Pixels by which ``packed``'s are too many.

    Returns:
        uint8 [m, 3, S, S], channels last in memory.
    """
    rows, top, left, flipped = packed
    last = images.shape[1] - 1
    pixel = torch.arange(last + 1, device=images.device)
    down = pixel + (top[:, None] - shift)
    right = torch.where(flipped[:, None] != 0, last - pixel, pixel) + (left[:, None] - shift)
    down, right = (last - (last - index.abs()).abs() for index in (down, right))
    return images[rows[:, None, None], down[:, :, None], right[:, None, :]].permute(0, 3, 1, 2)
