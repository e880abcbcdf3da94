"""The batches of a run's steps with their pixels, which may be decoded ahead of the steps."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
from jaxtyping import Int64, UInt8
from torch import Tensor

from gstds_cache.stream.ranks import rank_positions
from gstds_cache.training.distributed import Ranks
from gstds_cache.training.images import ImageFeed
from gstds_cache.training.steps import StepReader


@dataclass(frozen=True, eq=False)
class TrainingBatch:
    """What one step is taken on.

    Attributes:
        epoch: Epoch, from 0.
        rows: Rows of the data set that this rank takes, int64 [m].
        pixels: Their pixels, uint8 [m, 3, S, S], not augmented, on the CPU; None where the device holds all images, and
            the step takes them there.
        positions: Where those rows stand in the global batch, int64 [m].
        size: Rows of the global batch, over all ranks (M).
        sha: Running hash over the selection's records up to this step, hexadecimal.
        start: Where ``rows`` begin among this rank's rows of the step: not 0 in a piece of it.
    """

    epoch: int
    rows: Int64[np.ndarray, " m"]
    pixels: UInt8[Tensor, "m 3 S S"] | None
    positions: Int64[np.ndarray, " m"]
    size: int
    sha: str
    start: int = 0

    def pieces(self, count: int) -> list[TrainingBatch]:
        """The batch in ``count`` pieces of consecutive rows, alike in size, none of them empty; as it is for one."""
        if count == 1:
            return [self]
        bounds = [number * len(self.rows) // count for number in range(count + 1)]
        return [
            replace(
                self,
                rows=self.rows[first:stop],
                pixels=None if self.pixels is None else self.pixels[first:stop],
                positions=self.positions[first:stop],
                start=self.start + first,
            )
            for first, stop in pairwise(bounds)
            if first < stop
        ]


class BatchLoader:
    """Reads the rows of each step, and gets their pixels.

    Attributes:
        steps: Where the rows come from. It is ahead of the batches given out where workers decode.
    """

    def __init__(self, steps: StepReader, feed: ImageFeed, ranks: Ranks, seconds: dict[str, float]) -> None:
        """Nothing is read before the first batch is asked for.

        Args:
            steps: The rows of each step.
            feed: The pixels.
            ranks: Which rank this is.
            seconds: Time spent waiting is added to its ``indices`` and ``images``.
        """
        self.steps, self._feed, self._ranks, self._seconds = steps, feed, ranks, seconds
        # The batches whose pixels are not given out yet.
        self._ahead: deque[TrainingBatch] = deque()

    def batches(self) -> Generator[TrainingBatch, None, None]:
        """Yield the batches from the reader's position on.

        Yields:
            Each step's batch.

        Raises:
            StreamError: The selection is damaged or truncated.
            IncompleteError: A process that decodes was killed or had no memory.
            UsageError: An image cannot be decoded.
        """
        if self._feed.on_device:
            for rows in self._rows():
                self._feed.require_decodable(rows)
                yield self._batch(None)
            return
        with closing(self._feed.batches(self._rows())) as pixel_batches:
            while True:
                begun, indices = time.perf_counter(), self._seconds["indices"]
                pixels = next(pixel_batches, None)
                waited = time.perf_counter() - begun
                self._seconds["images"] += waited - (self._seconds["indices"] - indices)
                if pixels is None:
                    return
                yield self._batch(pixels)

    def _batch(self, pixels: UInt8[Tensor, "m 3 S S"] | None) -> TrainingBatch:
        batch = self._ahead.popleft()
        return batch if pixels is None else replace(batch, pixels=pixels)

    def all_batches(self) -> Generator[TrainingBatch, None, None]:
        """Yield the batches of all epochs; of candidates, an epoch's begin when the losses of the one before are in.

        Yields:
            Each step's batch.
        """
        while self.steps.position.step < self.steps.total:
            yield from self.batches()

    def _rows(self) -> Iterator[Int64[np.ndarray, " m"]]:
        feedback = self.steps.feedback
        while feedback is None or self.steps.position.epoch <= feedback.epoch:  # may be ahead of the steps
            begun = time.perf_counter()
            batch = next(self.steps, None)
            self._seconds["indices"] += time.perf_counter() - begun
            if batch is None:
                return
            size = len(batch.kept)
            positions = rank_positions(size, self._ranks.rank, self._ranks.world_size, "pad")
            rows, sha = batch.kept[positions], self.steps.position.sha256
            self._ahead.append(TrainingBatch(batch.epoch, rows, None, positions, size, sha))
            yield rows
