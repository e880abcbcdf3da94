"""The same images looked at twice, in other company, before a run: does a model's row depend on its image alone?

It does not with dropout at inference, with batch statistics in the place of learned ones, with noise, or with anything
that changes from call to call. Such rows are other ones in every run, and one fingerprint would stand for all of them.
"""

from __future__ import annotations

import time
from contextlib import suppress

import numpy as np
import torch
from jaxtyping import Float32, UInt8

from gstds_cache.data.decode import UndecodableError
from gstds_cache.data.source import ImageSource
from gstds_cache.encoders.encoder import Encoder
from gstds_cache.errors import EncoderError, IncompleteError, in_words
from gstds_cache.runtime.resources import out_of_memory
from gstds_cache.seeding import rng_for

IMAGES = 16
DECODE_SECONDS = 1.0
TOLERANCE = 1e-4
"""Largest 1 - cosine between a row and the row of the same image from another place of another batch of the same shape.
On a CPU the default model gave the same bits, in float32 and with weights of bfloat16; no GPU was measured. The room is
for kernels that work in half precision. Dropout of a half costs 0.1 and more."""
NOTED = 1e-6
"""From here on it is said: more than rounding, unless the model works in half precision."""
SAME = 1e-6  # largest difference of a component between two rows that are the same


class TwoLooks:
    """Two forward passes over some images of a data set, in batches of the shape that a run will have.

    The first look stands at the head of a batch that black images fill up; the second, in the opposite order, at the
    end of one filled up with noise.
    """

    def __init__(self, source: ImageSource, encoder: Encoder, *, dtype: str) -> None:
        self._source, self._encoder, self._stored = source, encoder, np.dtype(dtype)
        self._images: tuple[tuple[int, ...], torch.Tensor] | None = None
        self._first: dict[int, torch.Tensor] = {}

    def first(self, batch_size: int) -> Float32[torch.Tensor, "n D"]:
        """The first look: rows of the images, from one forward pass of ``batch_size`` images, on the CPU."""
        pixels = self._chosen(batch_size)
        company = pixels.new_zeros((batch_size - len(pixels), *pixels.shape[1:]))
        with self._encoder.its_errors():
            rows = self._encoder.queue(torch.cat([pixels, company])).cpu()[: len(pixels)]
        self._first = {batch_size: rows}
        return rows

    def compare(self, batch_size: int) -> list[str]:
        """Look a second time, for the first time too where that was not done, and compare.

        Args:
            batch_size: Images per forward pass.

        Returns:
            What the user should know of these rows, in sentences.

        Raises:
            EncoderError: Rows differ between the two looks, hold NaN or Inf, or are all zero.
            IncompleteError: Memory ran out.
        """  # noqa: DOC501
        try:
            first = self._first[batch_size] if batch_size in self._first else self.first(batch_size)
            other, alone, seen = self._second(batch_size)
        except (RuntimeError, MemoryError) as error:
            if out_of_memory(error):
                raise IncompleteError(
                    f"out of memory at batch size {batch_size}: {in_words(error)}",
                    hint="end what else uses that memory, then run the same command again",
                ) from error
            raise
        model = self._encoder.spec.model
        self._encoder.require_numbers(first, self._name)
        if len(self._encoder.require_numbers(other, self._name)) == len(other):
            raise EncoderError(
                f"{model} gives no features: zeros alone for each of {len(other)} images looked at",
                hint="check the weights and the last layer: behind a ReLU that never fires all features are zero",
            )
        # Of rows of length 1, half the squared distance is 1 - cosine, without the rounding of 1.
        apart = (first.double() - other.double()).square().sum(1) / 2
        worst = int(apart.argmax())
        far, name = float(apart[worst]), self._name(worst)
        if far > TOLERANCE:
            raise EncoderError(
                f"{model}: {name}, looked at twice beside other images, gave two different rows: cosine "
                f"{1 - far:.6f}, expected 1. A row has to depend on its image alone",
                hint="usual causes: dropout at inference (write F.dropout(x, p, training=self.training)); batch "
                "normalisation by the batch (track_running_stats=False, or a train() or eval() that was overridden); "
                "noise, or a mean over the batch, in forward",
            )
        said = []
        if far > NOTED:
            said.append(
                f"warning: {model}: {name}, looked at twice beside other images, gave rows that differ by 1 - cosine = "
                f"{far:.1e}: they depend a little on chance or on the batch, or the model works in half precision"
            )
        rows = torch.from_numpy(torch.cat([other, alone]).numpy().astype(self._stored).astype(np.float32))
        if bool((seen != seen[0]).any()) and float((rows - rows[0]).abs().max()) < SAME:
            said.append(f"warning: {model} gives the same row for different images: selection cannot tell them apart")
        return said

    def _second(self, batch_size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The second look: rows of the images and of the noise beside them, and the pixels of all."""
        pixels = self._chosen(batch_size)
        shape = (batch_size - len(pixels), *pixels.shape[1:])
        noise = torch.from_numpy(rng_for(0, "company").integers(0, 256, shape, np.uint8))
        batch = torch.cat([noise, pixels.flip(0)])
        with self._encoder.its_errors():
            rows = self._encoder.queue(batch).cpu()
        return rows[len(noise) :].flip(0), rows[: len(noise)], batch

    def _name(self, place: int) -> str:
        rows = self._images[0] if self._images is not None else ()
        return f"row {rows[place]} ({self._source.ids[rows[place]]})" if rows else "a test image"

    def _chosen(self, batch_size: int) -> UInt8[torch.Tensor, "n 3 H W"]:
        """Images to look at: evenly spaced ones that decode, at most half a batch; a test image where none does."""
        if self._images is None:
            self._images = _decoded(self._source, self._encoder)
        return self._images[1][: max(1, batch_size // 2)]


def _decoded(source: ImageSource, encoder: Encoder) -> tuple[tuple[int, ...], UInt8[torch.Tensor, "n 3 H W"]]:
    spaced = np.unique(np.linspace(0, len(source) - 1, IMAGES).astype(int)).tolist()
    rows: list[int] = []
    pixels, begun = [], time.perf_counter()
    for row in spaced:
        with suppress(UndecodableError):
            pixels.append(encoder.spec.preprocessing.pixels(source.image(row)))
            rows.append(row)
        if time.perf_counter() - begun > DECODE_SECONDS:
            break
    if not rows:
        pixels = [torch.from_numpy(rng_for(0, "looked-at").integers(0, 256, encoder.input_shape, np.uint8))]
    return tuple(rows), torch.stack(pixels)
