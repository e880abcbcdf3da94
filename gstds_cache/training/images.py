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

from gstds_cache.data.decode import TOO_MANY, UndecodableError, current_decoding
from gstds_cache.data.loading import PixelBatches, default_workers, pixel_batches, worth_workers
from gstds_cache.data.source import ImageSource
from gstds_cache.encoders.preprocessing import without_ends
from gstds_cache.errors import UsageError
from gstds_cache.runtime.devices import to_device
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
            pin: Whether batches go into page-locked memory, for a GPU.
            progress: Called with images decoded and images in all while memory is filled.
        """
        self._set_up(source, side, workers, pin=pin)
        self.in_memory = len(source) * 3 * side * side <= memory_budget
        if self.in_memory:
            self._fill(torch.empty((len(source), 3, side, side), dtype=torch.uint8), progress)

    def _set_up(self, source: ImageSource, side: int, workers: int, *, pin: bool) -> None:
        self.side, self._source, self._workers, self._pin = side, source, workers, pin
        self.in_memory, self._how = True, current_decoding()  # batches may be asked for in another thread
        self._failed: dict[int, str] = {}
        self._fine = torch.ones(len(source), dtype=torch.bool)

    def _fill(self, pixels: UInt8[torch.Tensor, "N 3 S S"], progress: Counted) -> None:
        """Decode every image into ``pixels``, which may be on any device."""
        self._pixels, count = pixels, len(self._source)
        spans = [range(start, min(start + AHEAD, count)) for start in range(0, count, AHEAD)]
        with closing(self._decode(spans, worth_workers(self._source, self.side, self._workers), pin=False)) as batches:
            for span, batch in zip(spans, batches, strict=True):
                pixels[span.start : span.stop] = batch.pixels
                self._failed.update(batch.failures)
                progress(span.stop, count)
        self._fine[list(self._failed)] = False

    @property
    def on_device(self) -> bool:
        """Whether the images are where the network is."""
        return False

    @property
    def decodable(self) -> Bool[np.ndarray, " N"]:
        """Which images could be decoded, where all are held in memory; else nobody knows yet, and all are True."""
        return self._fine.numpy()

    def require_decodable(self, rows: Int64[np.ndarray, " M"]) -> None:
        """Refuse rows that could not be decoded; where images are not held, nobody knows yet.

        Raises:
            UsageError: One of them could not.
        """
        if self._failed and not bool(self.decodable[rows].all()):
            self._refuse((row, self._failed[row]) for row in rows.tolist() if row in self._failed)

    def pixels(self, rows: Int64[np.ndarray, " M"]) -> UInt8[torch.Tensor, "M 3 S S"]:
        """Pixels of rows, where all images are held: on the device that holds them, page-locked for another one."""
        index = to_device(torch.from_numpy(rows), self._pixels.device)
        if not self._pin:
            return self._pixels[index]
        taken = torch.empty((len(rows), *self._pixels.shape[1:]), dtype=torch.uint8, pin_memory=True)
        return torch.index_select(self._pixels, 0, index, out=taken)

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
                self.require_decodable(batch)
                yield self.pixels(batch)
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
                yield self.pixels(batch[self.decodable[batch]])
        else:
            with closing(self._decode((batch.tolist() for batch in rows), self._workers, pin=self._pin)) as batches:
                for decoded in batches:
                    failed = {row for row, _ in decoded.failures}
                    yield decoded.pixels[torch.tensor([row not in failed for row in decoded.rows])]

    def _decode(self, rows: Iterable[Sequence[int]], workers: int, *, pin: bool) -> PixelBatches:
        shape = (3, self.side, self.side)
        return pixel_batches(
            self._source, SquarePixels(self.side), shape, rows, workers=workers, pin=pin, how=self._how
        )

    def _refuse(self, failures: Iterable[tuple[int, str]]) -> None:
        for row, reason in failures:
            changed = "the data set changed since it was embedded: run gstds-embed and gstds-select again"
            larger = "give the `max_pixels` that it was embedded with"
            raise UsageError(
                f"item {self._source.ids[row]!r} (row {row}) is to be trained on, but cannot be decoded: {reason}",
                hint=larger if reason.startswith(TOO_MANY) else changed,
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


def decoding_workers(workers: int | None, device: torch.device) -> int:
    """Processes that decode for a run: as many as were asked for, else 1 on a CPU, whose cores the steps need."""
    if workers is not None:
        return workers
    return default_workers(device) if device.type == "cuda" else 1
