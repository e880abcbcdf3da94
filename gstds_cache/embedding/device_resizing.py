"""Decoded images on a GPU to pixels of a model: images of any sizes by one launch of a kernel (cuda/resize.cu).

torch's ``interpolate`` gives the same pixels up to rounding, a size at a time: images that differ cost the host as many
operations each, and of photographs of 0.2 megapixels its kernel took a fifth of the time that the model took beside it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import UInt8

from gstds_cache.cuda import build, launch
from gstds_cache.encoders.preprocessing import Preprocessing
from gstds_cache.errors import KernelError
from gstds_cache.runtime.devices import to_device

Decoded = tuple[int, UInt8[torch.Tensor, "3 _ _"], int]
"""Place in the batch, image as it is stored, and EXIF's orientation (1 to 8)."""
REACH = {"bilinear": 1, "bicubic": 2}
"""Pixels of the resized image to each side that a filter looks at."""
TILE = 16
"""Rows of pixels that a block makes (cuda/resize.cu)."""
THREADS = 256
TRIED = 16
"""Images on which the kernel is tried, of other sizes each."""
SEARCHED = 1024
"""Sizes among which those are looked for."""
HARD = 2e-7
"""How near to a whole number, as a share of it: float32 rounds to 6e-8 of it."""
MOST_SIZES = 4096
"""Sizes of which is remembered what the kernel is told: a data set of photographs from the web has many more."""


class Resizer:
    """Resizes decoded images into batches of pixels."""

    def __init__(self, preprocessing: Preprocessing, device: torch.device) -> None:
        """Find the kernel, or compile it, and try it.

        Args:
            preprocessing: What images go through.
            device: Where they are; torch resizes them on one that runs no kernels, or not to torch's pixels.
        """
        self._preprocessing, self._device = preprocessing, device
        self._kernel: launch.Kernel | None = None
        self._tables: dict[tuple[int, int, int], tuple[list[int], int, int]] = {}
        reason = build.why_not(device)
        try:
            if not reason:
                defines = (f"REACH={REACH[preprocessing.interpolation]}",)
                self._kernel = build.kernel("resize.cu", "resize_block", defines, device=device)
                self._room = launch.shared_memory_limit(device)
                reason = self._other_pixels()
        except KernelError as error:
            reason = error.message
        if reason:
            self._kernel = None
        build.log_fallback(device, reason)

    def resize(self, decoded: Sequence[Decoded], pixels: UInt8[torch.Tensor, "B 3 h w"]) -> None:
        """Queue the resizing of images on the current stream; they have to stay until it has been done.

        What is resized together changes no bit of it.

        Args:
            decoded: Images on the device.
            pixels: Their places are filled.
        """
        height, width = self._preprocessing.crop
        together: list[list[int]] = []
        taps = lines = 0
        for place, image, orientation in decoded:
            row, image_taps, image_lines = self._row(image, orientation)
            most = (max(taps, image_taps), max(lines, image_lines))
            fits = self._kernel is not None and resize_bytes(width, image_taps, image_lines) <= self._room
            if not fits or not image.is_contiguous():
                self._by_torch(place, image, orientation, pixels)
                continue
            if resize_bytes(width, *most) > self._room:
                self._launch(together, taps, lines, pixels)
                together, most = [], (image_taps, image_lines)
            together.append([image.data_ptr() + row[0], *row[1:], place])
            taps, lines = most
        self._launch(together, taps, lines, pixels)

    def _other_pixels(self) -> str:
        """Why the kernel is not to be used, in words: on some images it was tried on, its pixels are not torch's."""
        side, sizes = 4 * _longest(self._preprocessing), hard_sizes(self._preprocessing)
        generator = torch.Generator(self._device).manual_seed(0)
        whole = torch.randint(256, (3, side, side), generator=generator, dtype=torch.uint8, device=self._device)
        decoded = [
            (place, whole[:, :height, :width].contiguous(), place % 8 + 1)
            for place, (height, width) in enumerate(sizes)
        ]
        mine, theirs = torch.zeros((2, TRIED, 3, *self._preprocessing.crop), dtype=torch.uint8, device=self._device)
        self.resize(decoded, mine)
        for one in decoded:
            self._by_torch(*one, theirs)
        levels = int((mine.int() - theirs.int()).abs().max())
        return "" if levels <= 1 else f"resized images are up to {levels} of 255 levels from torch's on {self._device}"

    def _launch(self, together: list[list[int]], taps: int, lines: int, pixels: UInt8[torch.Tensor, "B 3 h w"]) -> None:
        if together:
            assert self._kernel is not None
            height, width = self._preprocessing.crop
            self._kernel(
                len(together) * 3 * -(-height // TILE),
                min(THREADS, -(-width // 32) * 32),
                resize_bytes(width, taps, lines),
                height,
                width,
                taps,
                lines,
                None,
                to_device(torch.tensor(together), self._device),
                pixels,
            )

    def _row(self, image: UInt8[torch.Tensor, "3 H W"], orientation: int) -> tuple[list[int], int, int]:
        """What the kernel is told of images of this size: all but address and place; and the room that it needs."""
        _, stored_height, stored_width = image.shape
        key = (stored_height, stored_width, orientation)
        if key not in self._tables:
            if len(self._tables) >= MOST_SIZES:
                self._tables.clear()
            start, row, column = strides(stored_height, stored_width, orientation)
            turned = (stored_height, stored_width) if orientation < 5 else (stored_width, stored_height)
            at = self._preprocessing.placing(*turned)
            start += at.cut[0] * row + at.cut[1] * column
            reach = REACH[self._preprocessing.interpolation]
            (down, across) = (kept / size for kept, size in zip(at.kept, at.size, strict=True))
            taps = min(at.kept[1], math.ceil(2 * reach * max(across, 1)) + 2)
            lines = min(at.kept[0], math.ceil((TILE - 1) * down + 2 * reach * max(down, 1)) + 2)
            self._tables[key] = (
                [start, stored_height * stored_width, row, column, *at.kept, *at.size, *at.corner],
                taps,
                lines,
            )
        return self._tables[key]

    def _by_torch(
        self, place: int, image: UInt8[torch.Tensor, "3 H W"], orientation: int, pixels: UInt8[torch.Tensor, "B 3 h w"]
    ) -> None:
        (values,) = self._preprocessing.resized(upright(image, orientation)[None])
        pixels[place].copy_(values.round_().clamp_(0, 255))


def hard_sizes(preprocessing: Preprocessing) -> list[tuple[int, int]]:
    """Heights and widths, up to four times those that images are resized to, that are hard to resize.

    Where the rows that a pixel is a mean of end next to a whole number, but not at it, how a sum is rounded decides
    whether there is one more.

    Returns:
        ``TRIED``: hard ones, and as many others as are missing.
    """
    reach, rng = REACH[preprocessing.interpolation], np.random.default_rng(0)
    found: list[tuple[int, int]] = []
    others: list[tuple[int, int]] = []
    for height, width in rng.integers(1, 4 * _longest(preprocessing) + 1, (SEARCHED, 2)).tolist():
        at = preprocessing.placing(height, width)
        hard = any(_is_hard(kept, size, reach) for kept, size in zip(at.kept, at.size, strict=True))
        (found if hard else others).append((height, width))
        if len(found) == TRIED:
            break
    return [*found, *others][:TRIED]


def _is_hard(length: int, size: int, reach: int) -> bool:
    scale = length / size
    center, wide = scale * (np.arange(size) + 0.5) + 0.5, max(scale, 1.0) * reach
    ends = np.concatenate([center - wide, center + wide])
    off = np.abs(ends - np.round(ends))
    return bool(((off > 0) & (off < HARD * np.abs(ends))).any())


def _longest(preprocessing: Preprocessing) -> int:
    resize = preprocessing.resize
    return resize if isinstance(resize, int) else max(resize)


def resize_bytes(width: int, taps: int, lines: int) -> int:
    """Bytes of shared memory of a block (cuda/resize.cu: resize_bytes).

    Args:
        width: Of the crop.
        taps: Columns that a pixel is a mean of, at most.
        lines: Rows that ``TILE`` rows of pixels are means of, at most.
    """
    return 4 * (taps * width + lines * TILE) + 8 * (width + TILE)


def strides(height: int, width: int, orientation: int) -> tuple[int, int, int]:
    """Where an upright image begins in one that is stored, and how far it is to its next row and column.

    Args:
        height: Of the image as it is stored, row by row.
        width: Likewise.
        orientation: EXIF's, 1 to 8.
    """
    down, right = (-1 if orientation in {3, 4, 6, 7} else 1), (-1 if orientation in {2, 3, 7, 8} else 1)
    start = (width * (height - 1) if down < 0 else 0) + (width - 1 if right < 0 else 0)
    row, column = down * width, right
    return (start, column, row) if orientation >= 5 else (start, row, column)


def upright(images: UInt8[torch.Tensor, "*n 3 H W"], orientation: int) -> UInt8[torch.Tensor, "*n 3 h w"]:
    """Turn images as EXIF's ``orientation`` (1 to 8) says: what Pillow's ``exif_transpose`` does, on any device."""
    if orientation in {5, 7}:
        images = images.transpose(-2, -1)
    if orientation in {2, 4}:
        return images.flip(-1 if orientation == 2 else -2)
    turns = {3: 2, 6: 3, 7: 2, 8: 1}.get(orientation, 0)
    return torch.rot90(images, turns, (-2, -1)) if turns else images
