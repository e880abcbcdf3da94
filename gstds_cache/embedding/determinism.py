"""The determinism check before a run: does a model's row depend on its image alone?

The same images go through the model twice, at other positions of other batches. Their rows differ with dropout at
inference, with batch statistics in place of learned ones, with noise, and with anything else that changes from call to
call. Such rows are others in every run, and one fingerprint would stand for all of them.
"""

from __future__ import annotations

import time
from contextlib import suppress

import numpy as np
import torch
from jaxtyping import Float32, UInt8

from gstds_cache.data.decode import UndecodableError
from gstds_cache.data.source import ImageSource
from gstds_cache.embedding.decoding import pixels_of
from gstds_cache.encoders.encoder import Encoder
from gstds_cache.errors import EncoderError, IncompleteError, in_words
from gstds_cache.runtime.resources import out_of_memory
from gstds_cache.seeding import rng_for

IMAGES = 16
DECODE_SECONDS = 1.0
TOLERANCE = 1e-4
"""Largest 1 - cosine between two rows of one image, at two positions of two batches of the same shape.
On a CPU the default model gave the same bits, in float32 and with weights of bfloat16; no GPU was measured. The room is
for kernels that work in half precision. Dropout of a half costs 0.1 and more."""
WARNING = 1e-6
"""From here on there is a warning: more than rounding, unless the model works in half precision."""
EQUAL = 1e-6  # largest difference of a component between two rows that count as equal


class DeterminismCheck:
    """Two forward passes over some images of a data set, in batches of the shape that a run will have.

    In the first the images stand at the head of a batch that black images fill up; in the second, in the opposite
    order, at the end of one that noise fills up.
    """

    def __init__(self, source: ImageSource, encoder: Encoder, *, dtype: str) -> None:
        self._source, self._encoder, self._dtype = source, encoder, np.dtype(dtype)
        self._images: tuple[tuple[int, ...], torch.Tensor] | None = None
        self._first: dict[int, torch.Tensor] = {}

    def first_pass(self, batch_size: int) -> Float32[torch.Tensor, "n D"]:
        """Rows of the images from one forward pass of ``batch_size`` images, on the CPU; kept for :meth:`run`."""
        pixels = self._sample(batch_size)
        black = pixels.new_zeros((batch_size - len(pixels), *pixels.shape[1:]))
        with self._encoder.model_errors():
            rows = self._encoder.queue(torch.cat([pixels, black])).cpu()[: len(pixels)]
        self._first = {batch_size: rows}
        return rows

    def run(self, batch_size: int) -> list[str]:
        """Do the passes that were not done yet, and compare.

        Args:
            batch_size: Images per forward pass.

        Returns:
            Warnings about the rows, in sentences.

        Raises:
            EncoderError: Rows differ between the two passes, hold NaN or Inf, or are all zero.
            IncompleteError: Memory ran out.
        """  # noqa: DOC501
        try:
            first = self._first[batch_size] if batch_size in self._first else self.first_pass(batch_size)
            second, noise, pixels = self._second_pass(batch_size)
        except (RuntimeError, MemoryError) as error:
            if out_of_memory(error):
                raise IncompleteError(
                    f"out of memory at batch size {batch_size}: {in_words(error)}",
                    hint="end what else uses that memory, then run the same command again",
                ) from error
            raise
        model = self._encoder.spec.model
        self._encoder.require_numbers(first, self._name)
        if len(self._encoder.require_numbers(second, self._name)) == len(second):
            raise EncoderError(
                f"{model} gives no features: zeros alone for each of the {len(second)} images tried",
                hint="check the weights and the last layer: behind a ReLU that never fires all features are zero",
            )
        # Of rows of length 1, half the squared distance is 1 - cosine, without the rounding of 1.
        distances = (first.double() - second.double()).square().sum(1) / 2
        worst = int(distances.argmax())
        distance, name = float(distances[worst]), self._name(worst)
        if distance > TOLERANCE:
            raise EncoderError(
                f"{model}: {name} gave two different rows in two batches: cosine {1 - distance:.6f}, expected 1. "
                "A row has to depend on its image alone",
                hint="usual causes: dropout at inference (write F.dropout(x, p, training=self.training)); batch "
                "normalisation by the batch (track_running_stats=False, or a train() or eval() that was overridden); "
                "noise, or a mean over the batch, in forward",
            )
        warnings = []
        if distance > WARNING:
            warnings.append(
                f"warning: {model}: {name} gave rows in two batches that differ by 1 - cosine = {distance:.1e}: they "
                "depend a little on chance or on the batch, or the model works in half precision"
            )
        rows = torch.from_numpy(torch.cat([second, noise]).numpy().astype(self._dtype).astype(np.float32))
        if bool((pixels != pixels[0]).any()) and float((rows - rows[0]).abs().max()) < EQUAL:
            warnings.append(
                f"warning: {model} gives the same row for different images: selection cannot tell them apart"
            )
        return warnings

    def _second_pass(self, batch_size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Rows of the images and of the noise beside them, and the pixels of all."""
        pixels = self._sample(batch_size)
        shape = (batch_size - len(pixels), *pixels.shape[1:])
        noise = torch.from_numpy(rng_for(0, "noise").integers(0, 256, shape, np.uint8))
        batch = torch.cat([noise, pixels.flip(0)])
        with self._encoder.model_errors():
            rows = self._encoder.queue(batch).cpu()
        return rows[len(noise) :].flip(0), rows[: len(noise)], batch

    def _name(self, position: int) -> str:
        rows = self._images[0] if self._images is not None else ()
        return f"row {rows[position]} ({self._source.ids[rows[position]]})" if rows else "a test image"

    def _sample(self, batch_size: int) -> UInt8[torch.Tensor, "n 3 H W"]:
        """Evenly spaced images that decode, at most half a batch; a test image where none does."""
        if self._images is None:
            self._images = _decoded(self._source, self._encoder)
        return self._images[1][: max(1, batch_size // 2)]


def _decoded(source: ImageSource, encoder: Encoder) -> tuple[tuple[int, ...], UInt8[torch.Tensor, "n 3 H W"]]:
    spaced = np.unique(np.linspace(0, len(source) - 1, IMAGES).astype(int)).tolist()
    rows: list[int] = []
    pixels, begun = [], time.perf_counter()
    for row in spaced:
        with suppress(UndecodableError):
            pixels.append(pixels_of(source, encoder, row))
            rows.append(row)
        if time.perf_counter() - begun > DECODE_SECONDS:
            break
    if not rows:
        pixels = [torch.from_numpy(rng_for(0, "test image").integers(0, 256, encoder.input_shape, np.uint8))]
    return tuple(rows), torch.stack(pixels)
