"""Augmentation of a whole batch at once, on its device, keyed by the step so that a resumed run repeats it."""

from __future__ import annotations

from typing import TypedDict

import numpy as np
import torch
from jaxtyping import Float32, Int64, UInt8

from gstds_cache.config import TrainConfig
from gstds_cache.runtime.devices import to_device
from gstds_cache.seeding import torch_seed_of_step


class Augmentation(TypedDict):
    """How the images of a step are augmented: arguments of :func:`augment` and of those that do the same elsewhere."""

    shift: int
    mirror: bool
    seed: int
    step: int
    part: tuple[Int64[np.ndarray, " m"], int]


def augment(
    pixels: UInt8[torch.Tensor, "M 3 S S"],
    *,
    shift: int,
    mirror: bool,
    seed: int,
    step: int,
    part: tuple[Int64[np.ndarray, " M"], int] | None = None,
) -> UInt8[torch.Tensor, "M 3 S S"]:
    """Shift each image by up to ``shift`` pixels (reflected at the edges) and mirror half of them.

    Args:
        pixels: uint8 [M, 3, S, S].
        shift: Largest shift in each direction, in pixels; 0 for none.
        mirror: Whether to mirror horizontally with probability 1/2.
        seed: The run's seed.
        step: The step, so that each has numbers of its own.
        part: Where these images stand in a larger batch, and how many that holds, so that an image is augmented in the
            same way on one rank and on several; None for a batch of its own.

    Returns:
        uint8 [M, 3, S, S] on the same device.
    """
    count, _, side, _ = pixels.shape
    positions, drawn = part or (np.arange(count), count)
    draws = draw(positions, drawn, shift=shift, mirror=mirror, seed=seed, step=step)
    top, left, flipped = to_device(draws, pixels.device)
    pixel = torch.arange(side, device=pixels.device)
    rows = pixel + top[:, None]
    columns = torch.where(flipped[:, None] != 0, side - 1 - pixel, pixel) + left[:, None]
    # float16 holds 0..255 exactly; reflection padding has no uint8 kernel.
    padded = torch.nn.functional.pad(pixels.half(), (shift,) * 4, mode="reflect").to(torch.uint8) if shift else pixels
    image = torch.arange(count, device=pixels.device)[:, None, None]
    return padded.permute(0, 2, 3, 1)[image, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def draw(
    positions: Int64[np.ndarray, " M"], drawn: int, *, shift: int, mirror: bool, seed: int, step: int
) -> Int64[torch.Tensor, "3 M"]:
    """The random numbers of one step's augmentation, the same on every device.

    Args:
        positions: Where the images stand in the step's batch.
        drawn: Images in that batch, over all ranks.
        shift: As for :func:`augment`, as are the others.
        mirror: Whether to mirror.
        seed: The run's seed.
        step: The step.

    Returns:
        Rows and columns that each image is moved by, 0 to ``2 * shift``, and 1 where it is mirrored, on the CPU.
    """
    rng = torch.Generator().manual_seed(torch_seed_of_step(seed, "augment", step))
    draws = torch.empty((3, drawn), dtype=torch.int64)
    draws[:2] = torch.randint(0, 2 * shift + 1, (drawn, 2), generator=rng).T
    draws[2] = torch.rand(drawn, generator=rng) < 0.5 if mirror else 0
    return draws if len(positions) == drawn and _in_order(positions) else draws[:, positions]


def _in_order(positions: Int64[np.ndarray, " M"]) -> bool:
    return bool((positions == np.arange(len(positions))).all())


def largest_shift(config: TrainConfig) -> int:
    """By how many pixels at most a run shifts its images: an eighth of their side."""
    return 0 if config.augment == "none" else max(1, config.image_size // 8)


def to_input(pixels: UInt8[torch.Tensor, "M 3 S S"]) -> Float32[torch.Tensor, "M 3 S S"]:
    """Pixels 0..255 to float32 of about zero mean and unit deviation, channels last."""
    return pixels.to(dtype=torch.float32, memory_format=torch.channels_last).sub_(127.5).div_(63.75)
