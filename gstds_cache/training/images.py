"""Images for training: held decoded in memory where they fit, else decoded by workers as the batches come."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Int64, UInt8
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as tvf

from gstds_cache.data.decode import UndecodableError
from gstds_cache.data.loading import PixelBatches, pixel_batches, worth_workers
from gstds_cache.data.source import ImageSource
from gstds_cache.encoders.preprocessing import without_ends
from gstds_cache.errors import UsageError
from gstds_cache.runtime.progress import Counted

MAX_ASPECT = 16  # beyond it the ends are cut off before resizing: they would not be seen, and take memory
AHEAD = 64  # images decoded per batch while memory is filled


@dataclass(frozen=True)
class SquarePixels:
    """Image -> uint8 [3, side, side]: the shorter side resized to ``side``, centre crop."""

    side: int

    def __call__(self, image: Image.Image) -> UInt8[torch.Tensor, "3 S S"]:
        """Pixels of one RGB image."""
        if image.size != (self.side, self.side):
            image = tvf.resize(without_ends(image, MAX_ASPECT), [self.side], InterpolationMode.BILINEAR, antialias=True)
            image = tvf.center_crop(image, [self.side, self.side])
        pixels: torch.Tensor = tvf.pil_to_tensor(image)
        return pixels


class ImageFeed:
    """Gives pixels for batches of rows, in the order asked for.

    Attributes:
        side: Side of the square images in pixels.
        in_memory: Whether all images are held decoded.
    """

    def __init__(
        self,
        source: ImageSource,
        *,
        side: int,
        memory_budget: int,
        workers: int,
        pin: bool = False,
        progress: Counted = lambda _done, _total: None,
    ) -> None:
        """Decode everything now if it fits ``memory_budget`` bytes.

        Args:
            source: The data set.
            side: Side of the square images in pixels.
            memory_budget: Bytes of decoded images that may be held.
            workers: Processes that decode.
            pin: Whether batches that are not held go into page-locked memory, for a GPU.
            progress: Called with images decoded and images in all while memory is filled.
        """
        self.side, self._source, self._workers, self._pin = side, source, workers, pin
        self.in_memory = len(source) * 3 * side * side <= memory_budget
        self._failed: dict[int, str] = {}
        self._fine = torch.ones(len(source), dtype=torch.bool)
        if self.in_memory:
            self._pixels = torch.empty((len(source), 3, side, side), dtype=torch.uint8)
            spans = [range(start, min(start + AHEAD, len(source))) for start in range(0, len(source), AHEAD)]
            with closing(self._decode(spans, worth_workers(source, side, workers), pin=False)) as batches:
                for batch in batches:
                    self._pixels[list(batch.rows)] = batch.pixels
                    self._failed.update(batch.failures)
                    progress(batch.rows[-1] + 1, len(source))
            self._fine[list(self._failed)] = False

    @property
    def decodable(self) -> Bool[np.ndarray, " N"]:
        """Which images could be decoded, where all are held in memory; else nobody knows yet, and all are True."""
        return self._fine.numpy()

    def batches(self, rows: Iterable[Int64[np.ndarray, " M"]]) -> Generator[UInt8[torch.Tensor, "M 3 S S"], None, None]:
        """Pixels for each batch of rows.

        Args:
            rows: Rows of each batch, int64 [M]; read a few batches ahead where workers decode.

        Yields:
            uint8 [M, 3, side, side] for each batch.

        Raises:
            UsageError: An image cannot be decoded.
        """
        if self.in_memory:
            for batch in rows:
                index = torch.from_numpy(batch)
                if not bool(self._fine[index].all()):
                    self._refuse((row, self._failed[row]) for row in batch.tolist() if row in self._failed)
                yield self._pixels[index]
        else:
            with closing(self._decode((batch.tolist() for batch in rows), self._workers, pin=self._pin)) as batches:
                for decoded in batches:
                    self._refuse(decoded.failures)
                    yield decoded.pixels

    def decodable_batches(
        self, rows: Iterable[Int64[np.ndarray, " _"]]
    ) -> Generator[UInt8[torch.Tensor, "m 3 S S"], None, None]:
        """Pixels for each batch of rows, less those of images that cannot be decoded; the same however they are held.

        Args:
            rows: Rows of each batch, int64.

        Yields:
            uint8 [m, 3, side, side] for each batch.
        """
        if self.in_memory:
            for batch in rows:
                index = torch.from_numpy(batch)
                yield self._pixels[index[self._fine[index]]]
        else:
            with closing(self._decode((batch.tolist() for batch in rows), self._workers, pin=self._pin)) as batches:
                for decoded in batches:
                    failed = {row for row, _ in decoded.failures}
                    yield decoded.pixels[torch.tensor([row not in failed for row in decoded.rows])]

    def _decode(self, rows: Iterable[Sequence[int]], workers: int, *, pin: bool) -> PixelBatches:
        shape = (3, self.side, self.side)
        return pixel_batches(self._source, SquarePixels(self.side), shape, rows, workers=workers, pin=pin)

    def _refuse(self, failures: Iterable[tuple[int, str]]) -> None:
        for row, reason in failures:
            raise UsageError(
                f"item {self._source.ids[row]!r} (row {row}) is to be trained on, but cannot be decoded: {reason}",
                hint="the data set changed since it was embedded: run gstds-embed and gstds-select again",
            )


def default_side(source: ImageSource) -> int:
    """The images' own size where the first ones are small squares of one size, else 64 pixels."""
    sizes = set()
    for row in range(min(8, len(source))):
        try:
            sizes.add(source.image(row).size)
        except UndecodableError:
            continue
    width, height = min(sizes, default=(64, 64))
    return width if len(sizes) == 1 and width == height and 8 <= width <= 64 else 64
