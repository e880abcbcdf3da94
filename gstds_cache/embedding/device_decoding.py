"""JPEGs decoded by the device: processes read the files, one thread decodes, and this one resizes behind it.

nvJPEG's hardware decoder writes to its output without waiting for what is queued on any stream, and PyTorch hands out
memory as soon as its last user is *queued* (pytorch/vision#9606). So its outputs come from the memory of a stream on
which nothing else happens, and are given back only when what reads them has ended.
"""

from __future__ import annotations

import io
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
from jaxtyping import UInt8
from PIL import Image

from gstds_cache.data.decode import Decoding, UndecodableError, decoding_as
from gstds_cache.data.decoders import Workers
from gstds_cache.data.loading import PendingBatch, PixelBatch, PixelBatches
from gstds_cache.data.workers import Filled, Pool
from gstds_cache.embedding.device_resizing import Decoded, Resizer
from gstds_cache.embedding.jpeg_reader import Item
from gstds_cache.encoders.preprocessing import Preprocessing
from gstds_cache.errors import UsageError
from gstds_cache.runtime.devices import own_stream
from gstds_cache.runtime.resources import out_of_memory

PART = 64
"""Files that the device is given at once: its decoder works on several side by side."""
AHEAD = 16
"""Parts that may be under way of the batches behind the first, whose pixels take memory of the device."""
DECODES_AHEAD = 3
"""Parts that wait for the device's decoder or are in it, while the part before is resized."""
HELD = 2
"""Parts that are being resized on the device while the next is: their images' memory is still in use."""
_one_at_a_time = threading.Lock()
_RGB = 3  # torchvision.io.ImageReadMode.RGB


class DeviceBatches(PixelBatches):
    """Batches of pixels on a device, whose JPEGs it decoded itself."""

    def __init__(
        self, workers: Workers, preprocessing: Preprocessing, batches: Iterator[Sequence[int]], device: torch.device
    ) -> None:
        """Ask for the first batches.

        Args:
            workers: Processes of :class:`JpegReader`.
            preprocessing: What decoded images go through.
            batches: Rows of each batch.
            device: Where.
        """
        self._device, self._preprocessing = device, preprocessing
        self._decoding_stream, self._resizing_stream = _streams(device)
        self._resizer = Resizer(preprocessing, device)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="gstds-decode")
        self._arrived: deque[Filled] = deque()
        self._decoding: deque[tuple[Filled, Future[list[torch.Tensor | None]]]] = deque()
        self._held: deque[tuple[torch.cuda.Event, list[torch.Tensor | None]]] = deque()
        super().__init__(workers, (3, *preprocessing.crop), batches, pin=False)

    def close(self) -> None:
        """End the workers and the thread."""
        super().close()
        self._thread.shutdown()

    def _drop(self) -> None:
        for _, future in self._decoding:
            if not future.cancel():
                wait([future])  # It reads the workers' memory.
        self._arrived.clear()
        self._decoding.clear()
        self._let_go(0)
        super()._drop()

    def _part_rows(self, _pool: Pool, _count: int) -> int:
        return PART

    def _most_ahead(self, _pool: Pool) -> int:
        return AHEAD

    def _take(self, pool: Pool, filled: Filled) -> None:
        """Have a part decoded."""
        if filled.error is not None:
            super()._take(pool, filled)
            return
        batch, start = filled.part.tag
        items, seconds = filled.reply
        batch.seconds += seconds
        rest = filled.part.rows[len(items) :]
        if len(rest):
            pool.ask_rest(filled.part, rest, (batch, start + len(items)))
        self._arrived.append(filled)
        self._submit()

    def _submit(self) -> None:
        while self._arrived and len(self._decoding) < DECODES_AHEAD:
            filled = self._arrived.popleft()
            future = self._thread.submit(self._decode, filled.memory, filled.reply[0])
            self._decoding.append((filled, future))

    def _wait(self, pool: Pool) -> None:
        """Wait for another part: for the device's decoder if it has one, else for a worker."""
        if not self._decoding:
            super()._wait(pool)
            return
        self._collect(pool)
        filled, future = self._decoding.popleft()
        images = future.result()
        self._submit()  # The decoder goes on while this part is resized.
        batch, start = filled.part.tag
        items = filled.reply[0]
        self._place(batch, start, filled.memory, items, images)
        batch.left -= len(items)
        pool.release(filled)
        self._ask()

    def _decode_here(self, rows: Sequence[int]) -> PixelBatch:
        batch, start = PendingBatch(rows, 1, len(rows), self._empty(len(rows))), 0
        while start < len(rows):
            memory: list[torch.Tensor] = [torch.empty(0, dtype=torch.uint8)]

            def room(size: int, memory: list[torch.Tensor] = memory) -> torch.Tensor:
                memory.append(torch.empty(size, dtype=torch.uint8))
                return memory[-1]

            items, seconds = self._workers.decoder(rows[start:], room)
            self._place(batch, start, memory[-1], items, self._decode(memory[-1], items))
            batch.seconds += seconds
            start += len(items)
        return self._done(batch)

    def _decode(self, memory: UInt8[torch.Tensor, " size"], items: Sequence[Item]) -> list[torch.Tensor | None]:
        """Decode the files of a part. Returns when the device has done so; in the decoding thread, without its lock."""
        places = [place for place, item in enumerate(items) if item.orientation]
        files = [memory[item.offset : item.offset + item.size] for item in items if item.orientation]
        images: list[torch.Tensor | None] = [None] * len(items)
        if files:
            with decoding_paused(), _on(self._decoding_stream):
                for place, image in zip(places, decode_jpegs(files, self._device), strict=True):
                    images[place] = image
        return images

    def _place(
        self,
        batch: PendingBatch,
        start: int,
        memory: UInt8[torch.Tensor, " size"],
        items: Sequence[Item],
        images: list[torch.Tensor | None],
    ) -> None:
        """Queue the resizing of a part's images into their batch."""
        with _on(self._resizing_stream):
            if not len(batch.pixels):
                batch.pixels = torch.zeros((len(batch.rows), *self._shape), dtype=torch.uint8, device=self._device)
            by_pillow: dict[int, torch.Tensor] = {}
            decoded: list[Decoded] = []
            for place, (item, image) in enumerate(zip(items, images, strict=True), start):
                row = batch.rows[place]
                if item.reason:
                    batch.failures[row] = item.reason
                elif image is not None:
                    decoded.append((place, image, item.orientation))
                elif item.orientation:  # Its header promised more than the device could decode.
                    try:
                        with decoding_as(Decoding(max_pixels=self._preprocessing.max_pixels)):
                            whole = self._workers.decoder.source.image(row)
                        by_pillow[place] = self._preprocessing.pixels(whole)
                    except UndecodableError as error:
                        batch.failures[row] = error.reason
                else:
                    by_pillow[place] = memory[item.offset : item.offset + item.size].view(self._shape)
            self._resizer.resize(decoded, batch.pixels)
            batch.on_device += len(decoded)
            self._place_pixels(batch, by_pillow)
            if self._resizing_stream is not None:
                self._held.append((self._resizing_stream.record_event(), images))
        self._let_go(HELD)

    def _place_pixels(self, batch: PendingBatch, pixels: dict[int, torch.Tensor]) -> None:
        """Put Pillow's pixels in their places, by one copy to the device."""
        if pixels:
            cuda = self._device.type == "cuda"
            here = torch.empty((len(pixels), *self._shape), dtype=torch.uint8, pin_memory=cuda)
            torch.stack(list(pixels.values()), out=here)
            for place, there in zip(pixels, here.to(self._device, non_blocking=cuda), strict=True):
                batch.pixels[place].copy_(there)

    def _let_go(self, most: int) -> None:
        """Give back decoded images, all but the last ``most`` parts', once they are resized."""
        while len(self._held) > most:
            resized, images = self._held.popleft()
            resized.synchronize()
            images.clear()

    def _empty(self, _count: int) -> UInt8[torch.Tensor, "B 3 H W"]:
        return torch.empty((0, *self._shape), dtype=torch.uint8)  # made on the device when it is needed

    def _done(self, batch: PendingBatch) -> PixelBatch:
        if self._resizing_stream is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_stream(self._resizing_stream)
            batch.pixels.record_stream(current)
        return super()._done(batch)


def decoding_paused() -> AbstractContextManager[Any]:
    """A context in which no other thread has the device decode."""
    return _one_at_a_time


@cache
def _streams(device: torch.device) -> tuple[torch.cuda.Stream | None, torch.cuda.Stream | None]:
    """Streams for decoding, whose memory nothing else may have, and for resizing."""
    return (own_stream(device), own_stream(device)) if device.type == "cuda" else (None, None)


def _on(stream: torch.cuda.Stream | None) -> AbstractContextManager[Any]:
    return nullcontext() if stream is None else torch.cuda.stream(stream)


def decode_jpegs(files: list[torch.Tensor], device: torch.device) -> list[torch.Tensor | None]:
    """Decode JPEGs to RGB on a device; on a CPU with the library's own decoder.

    Args:
        files: Bytes of each file, uint8 on the CPU.
        device: Where the images will be.

    Returns:
        uint8 [3, H, W] each, as stored, whatever EXIF says; None for one that cannot be decoded.

    Raises:
        RuntimeError: The device has no memory for them.
    """
    try:
        return _operator(device)(files)
    except RuntimeError as error:  # It tells of the first that is broken, not which that is, and returns none.
        if out_of_memory(error):
            raise
    return [None] if len(files) == 1 else [image for file in files for image in decode_jpegs([file], device)]


def _operator(device: torch.device) -> Callable[[list[torch.Tensor]], list[torch.Tensor | None]]:
    # The operators below torchvision.io.decode_jpeg, which warns of its deprecation from torchvision 0.29 on.
    import torchvision.io  # noqa: F401 - registers them

    if device.type == "cuda":
        return lambda files: torch.ops.image.decode_jpegs_cuda(files, _RGB, device)
    return lambda files: [torch.ops.image.decode_jpeg(file, _RGB, False) for file in files]


def device_decoder_version(device: torch.device) -> str:
    """The version of a device's decoder: that of the CUDA toolkit it is part of. Touches no device.

    Args:
        device: The device.

    Raises:
        UsageError: It is no GPU.
    """
    if device.type != "cuda":
        raise UsageError(
            f"`decoder`: got 'nvjpeg' with device {device}, expected a CUDA device, which decodes",
            hint="use `decoder='pillow'`, or a `device` that is one",
        )
    return str(torch.version.cuda)


def try_device_decoder(device: torch.device) -> None:
    """Have a device decode an image: what it cannot decode later is for Pillow, and that must not be everything.

    Args:
        device: The device.

    Raises:
        UsageError: torchvision has no decoder for it, or that does not work.
    """
    file = io.BytesIO()
    Image.new("RGB", (64, 64), (200, 100, 50)).save(file, "JPEG")
    try:
        _operator(device)([torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8)])
    except (RuntimeError, AttributeError, ImportError) as error:
        text = str(error).partition("\n")[0][:200]
        raise UsageError(
            f"`decoder`: got 'nvjpeg', but torchvision {_torchvision()} cannot decode a test image on {device}: {text}",
            hint="use `decoder='pillow'`, or install a torchvision built with CUDA",
        ) from error


def _torchvision() -> str:
    import torchvision

    return str(torchvision.__version__)
