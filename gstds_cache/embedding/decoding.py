"""What decodes a data set's images for a model: Pillow in worker processes, or the device, whose worker processes read.

The pixels of the two differ, so the decoder is part of a store's fingerprint (:class:`Preprocessing`). Both go through
the same functions here, and nothing else asks which of them a model has.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, suppress
from typing import Literal

import torch
from jaxtyping import UInt8

from gstds_cache.data.decode import Decoding, UndecodableError, decoding_as
from gstds_cache.data.decoders import PixelDecoder, Workers
from gstds_cache.data.loading import PixelBatches
from gstds_cache.data.source import ImageSource
from gstds_cache.embedding.device_decoding import (
    DeviceBatches,
    device_decoder_version,
    try_device_decoder,
)
from gstds_cache.embedding.jpeg_reader import JpegReader
from gstds_cache.encoders.encoder import Encoder
from gstds_cache.encoders.preprocessing import Preprocessing
from gstds_cache.runtime.notify import log_once

QUEUES, MOST_QUEUES = "CUDA_DEVICE_MAX_CONNECTIONS", "32"
_in_time = {"value": os.environ.get(QUEUES)}  # as CUDA has it, or will have


def decoding_of(preprocessing: Preprocessing) -> Decoding:
    """How image files are decoded for a model."""
    return Decoding(preprocessing.scaled_side, preprocessing.max_pixels)


def start_workers(source: ImageSource, encoder: Encoder, workers: int) -> Workers:
    """Start the processes that decode, or read, the images of a data set for a model.

    Args:
        source: The data set.
        encoder: The model.
        workers: How many; 0 for none beside this one.

    Returns:
        The processes, to be given to :func:`open_batches`, or closed.
    """
    preprocessing, shape = encoder.spec.preprocessing, encoder.input_shape
    if preprocessing.decoder == "pillow":
        return Workers(PixelDecoder(source, preprocessing.pixels, shape, decoding_of(preprocessing)), workers)
    return Workers(JpegReader(source, preprocessing, shape, decoding_of(preprocessing)), workers)


def open_batches(
    workers: Workers, encoder: Encoder, batches: Iterable[Sequence[int]], device: torch.device
) -> PixelBatches:
    """Pixels of batches of rows, for a model on a device.

    Args:
        workers: From :func:`start_workers`; ended with what is returned.
        encoder: The model.
        batches: Rows of each batch; read lazily.
        device: Where the model runs. Pixels of Pillow's come in page-locked memory where it is a GPU, the others lie
            there already.

    Returns:
        One batch of pixels per batch of rows.
    """
    if encoder.spec.preprocessing.decoder == "pillow":
        return PixelBatches(workers, encoder.input_shape, iter(batches), pin=device.type == "cuda")
    return DeviceBatches(workers, encoder.spec.preprocessing, iter(batches), device)


def decode_by(encoder: Encoder, decoder: Literal["pillow", "nvjpeg"], device: torch.device) -> None:
    """Have a model's images decoded by ``decoder``, which becomes part of what identifies its features.

    Args:
        encoder: The model, which is changed.
        decoder: ``pillow`` or ``nvjpeg``.
        device: Where the model will run; it is not touched.

    Raises:
        UsageError: The decoder is none of this device.
        EncoderError: The model's resize filter is one that the device has not.
    """
    if decoder != "pillow":
        encoder.decoded_by(decoder, device_decoder_version(device))


def keep_streams_apart(decoder: str) -> None:
    """Before CUDA begins: have what decodes not wait for what it does not depend on; no result changes.

    CUDA gives all streams of a process 8 queues, unless it is told otherwise, and work in one queue waits for what came
    before in it. nvJPEG's streams shared those of the model: beside the default model an H200 decoded 3,100 images of
    0.2 megapixels a second with 8 queues, and 16,600 with 32 (docs/models.md).

    Args:
        decoder: ``pillow``, for which nothing is done, or ``nvjpeg``.
    """
    if decoder == "pillow":
        return
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        _in_time["value"] = os.environ.setdefault(QUEUES, MOST_QUEUES)
    elif _in_time["value"] is None:
        log_once(
            f"note: CUDA began before this call, with few queues, so decoding waits for the model: set {QUEUES}="
            f"{MOST_QUEUES} in the environment before Python starts"
        )


def streams_are_apart() -> bool:
    """Whether CUDA has as many queues as :func:`keep_streams_apart` asks for, as far as can be told.

    Without, a GPU that always has something to do hardly decodes: 400 images a second beside forward passes that were
    replayed, 3,100 beside such as left gaps.
    """
    with suppress(ValueError):
        return int(_in_time["value"] or 0) >= int(MOST_QUEUES)
    return False


def try_decoder(encoder: Encoder, device: torch.device) -> None:
    """Refuse a device that is to decode, and cannot.

    Raises:
        UsageError: It cannot.
    """
    if encoder.spec.preprocessing.decoder != "pillow":
        try_device_decoder(device)


def pixels_of(source: ImageSource, encoder: Encoder, row: int) -> UInt8[torch.Tensor, "3 H W"]:
    """Pixels of one row, as a run gives them to the model.

    Args:
        source: The data set.
        encoder: The model; the device decodes on the model's device.
        row: The row.

    Returns:
        uint8 [3, H, W] on the CPU.

    Raises:
        UndecodableError: There is no image.
    """
    if encoder.spec.preprocessing.decoder == "pillow":
        with decoding_as(decoding_of(encoder.spec.preprocessing)):
            image = source.image(row)
        return encoder.spec.preprocessing.pixels(image)
    with closing(open_batches(start_workers(source, encoder, 0), encoder, [[row]], encoder.device)) as batches:
        batch = next(batches)
    for _, reason in batch.failures:
        raise UndecodableError(reason)
    return batch.pixels[0].cpu()


def sample_pixels(
    source: ImageSource, encoder: Encoder, rows: Sequence[int], seconds: float
) -> tuple[float, list[UInt8[torch.Tensor, "3 H W"]]]:
    """Pixels of some rows, and how fast they come.

    Args:
        source: The data set.
        encoder: The model.
        rows: The rows, at least one.
        seconds: After which no further image is begun.

    Returns:
        Images per second of this process, or of the device where that decodes; and the pixels of those that decode.
    """
    if encoder.spec.preprocessing.decoder == "pillow":
        return _sample_one_by_one(source, encoder, rows, seconds)
    workers = start_workers(source, encoder, 0)
    with closing(open_batches(workers, encoder, [rows[:1], rows], encoder.device)) as batches:
        next(batches)  # the first image loads codecs, and does not count
        begun = time.perf_counter()
        batch = next(batches)
        pixels, spent = batch.pixels.cpu(), time.perf_counter() - begun
    failed = dict(batch.failures)
    return len(rows) / spent, [pixels[place] for place, row in enumerate(rows) if row not in failed]


def _sample_one_by_one(
    source: ImageSource, encoder: Encoder, rows: Sequence[int], seconds: float
) -> tuple[float, list[UInt8[torch.Tensor, "3 H W"]]]:
    pixels: list[torch.Tensor] = []
    done, begun, spent = 0, time.perf_counter(), 0.0
    for number, row in enumerate(_first_twice(rows)):
        with suppress(UndecodableError):
            pixels.append(pixels_of(source, encoder, row))
        if number == 0:
            begun = time.perf_counter()  # the first image loads codecs, and does not count
            pixels.clear()
            continue
        done, spent = done + 1, time.perf_counter() - begun
        if spent > seconds:
            break
    return done / max(spent, 1e-9), pixels


def _first_twice(rows: Sequence[int]) -> Iterator[int]:
    yield rows[0]
    yield from rows
