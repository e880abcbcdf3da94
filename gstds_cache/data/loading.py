"""Decoding ahead of whoever consumes it: batches of pixels in a given order, from worker processes."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

import torch
from jaxtyping import UInt8

from gstds_cache.data.copies import NotCopiedError
from gstds_cache.data.decode import Decoding, current_decoding
from gstds_cache.data.decoders import PixelDecoder, PixelTransform, Workers
from gstds_cache.data.source import ImageSource
from gstds_cache.data.workers import AHEAD, Filled, Pool
from gstds_cache.runtime.threads import cores

_log = logging.getLogger(__name__)
PART = 16
"""Rows of a part: a batch of no more is not cut; one that is cut has a part for each worker, of so many at least."""
PART_SECONDS = 0.25
"""What a part should take beside a GPU, where there is always somebody to ask for the next."""
FIRST_PART = 4
"""Rows of a part there, until it is known how long one takes."""


@dataclass(frozen=True)
class PixelBatch:
    """Pixels of some rows.

    Attributes:
        rows: The rows.
        pixels: uint8 [B, 3, H, W]; an undecodable item's are zero.
        failures: Row and reason of each undecodable item.
        seconds: Time it took to read and decode them, in whichever process did.
        on_device: How many of them the device decoded.
    """

    rows: tuple[int, ...]
    pixels: UInt8[torch.Tensor, "B 3 H W"]
    failures: tuple[tuple[int, str], ...]
    seconds: float = 0.0
    on_device: int = 0


@dataclass(eq=False)
class PendingBatch:
    """A batch of which some parts are not there yet.

    Attributes:
        rows: Its rows.
        parts: How many parts it was cut into.
        left: Rows that are not there yet.
        pixels: uint8 [B, 3, H, W], filled in as parts come.
        failures: Reason by row of each undecodable item.
        on_device: Images that the device decoded.
        seconds: Time it took to read and decode what is there.
        errors: What went wrong in a part, by the number of the part.
    """

    rows: Sequence[int]
    parts: int
    left: int
    pixels: torch.Tensor
    failures: dict[int, str] = field(default_factory=dict)
    on_device: int = 0
    seconds: float = 0.0
    errors: dict[int, Exception] = field(default_factory=dict)


class PixelBatches(Iterator[PixelBatch]):
    """Batches of pixels, one after the other, from :func:`pixel_batches`.

    Every batch is cut into parts, which the workers decode side by side: the first batch is there after a fraction of
    the time that one worker takes for it, and none waits for a batch of slow images.

    Attributes:
        workers: Processes that decode; 0 where this one does, also if others were to.
    """

    def __init__(
        self, workers: Workers, shape: tuple[int, int, int], batches: Iterator[Sequence[int]], *, pin: bool
    ) -> None:
        """Ask for the first batches.

        Args:
            workers: The processes; ended with these batches.
            shape: Shape [3, H, W] of one image's pixels.
            batches: Rows of each batch.
            pin: Whether pixels go into page-locked memory, for a GPU.
        """
        self._workers, self._shape, self._batches, self._pin = workers, shape, batches, pin
        self._pending: deque[PendingBatch] = deque()
        self._left: deque[Sequence[int]] = deque()
        self._timed, self._seconds = 0, 0.0  # rows decoded by workers, and how long they took
        self.workers = 0 if workers.pool is None else workers.pool.size
        self._ask()

    def __iter__(self) -> PixelBatches:
        return self

    def __next__(self) -> PixelBatch:
        """The next batch.

        Raises:
            StopIteration: There are no more.
        """
        if self._workers.pool is not None:
            try:
                self._collect(self._workers.pool)
                if self._pending:
                    return self._first(self._workers.pool)
                self.close()
            except NotCopiedError as error:
                self._left.extend(batch.rows for batch in self._pending)
                self._drop()
                self._workers.give_up(error)
                self.workers = 0
            except BaseException:
                self.close()  # Whoever looks at the error may keep this alive.
                raise
        rows = self._left.popleft() if self._left else next(self._batches)
        return self._decode_here(rows)

    def close(self) -> None:
        """End the workers."""
        self.workers = 0
        self._drop()
        self._workers.close()

    def _drop(self) -> None:
        """Forget what is under way."""
        self._pending.clear()

    def _ask(self) -> None:
        """Ask for as many batches as may be under way."""
        pool = self._workers.pool
        while pool is not None and pool.has_room and self._parts_ahead() < self._most_ahead(pool):
            rows = next(self._batches, None)
            if rows is None:
                return
            size = self._part_rows(pool, len(rows))
            starts = range(0, len(rows), size)
            batch = PendingBatch(rows, len(starts), len(rows), self._empty(len(rows)))
            self._pending.append(batch)
            for start in starts:
                pool.ask(rows[start : start + size], (batch, start))

    def _parts_ahead(self) -> int:
        """Parts of the batches behind the first: while one takes long, the workers go on with those, up to a limit."""
        return sum(batch.parts for batch in islice(self._pending, 1, None))

    def _most_ahead(self, pool: Pool) -> int:
        return 2 * AHEAD * pool.size

    def _part_rows(self, pool: Pool, count: int) -> int:
        """Rows of a part of a batch of so many."""
        most = max(PART, -(-count // pool.size))
        if not self._pin or count <= PART:
            # Who asks may be away for as long as a forward pass takes on a CPU: two parts are what a worker has then.
            return most
        if not self._timed:
            return FIRST_PART
        return min(most, max(1, round(PART_SECONDS * self._timed / max(self._seconds, 1e-9))))

    def _collect(self, pool: Pool) -> None:
        """Take what is there."""
        while self._pending and (filled := pool.wait(block=False)) is not None:
            self._take(pool, filled)

    def _first(self, pool: Pool) -> PixelBatch:
        """Wait for the rest of the first batch.

        Raises:
            Exception: What went wrong in the first of its parts in which something did.
        """
        batch = self._pending[0]
        while batch.left:
            self._wait(pool)
        for number in sorted(batch.errors):
            raise batch.errors[number]
        self._pending.popleft()
        self._ask()
        return self._done(batch)

    def _wait(self, pool: Pool) -> None:
        """Wait for another part."""
        filled = pool.wait()
        assert filled is not None
        self._take(pool, filled)

    def _take(self, pool: Pool, filled: Filled) -> None:
        """Put a part in its batch."""
        batch, start = filled.part.tag
        if filled.error is not None:
            batch.errors[filled.part.number] = filled.error
        else:
            failures, seconds = filled.reply
            stop = start + len(filled.part.rows)
            # By NumPy, in this thread alone: torch's would wait for cores, all of which decode.
            batch.pixels[start:stop].numpy().reshape(-1)[:] = filled.memory.numpy()
            batch.failures.update(failures)
            batch.seconds += seconds
            self._timed, self._seconds = self._timed + stop - start, self._seconds + seconds
        batch.left -= len(filled.part.rows)
        pool.release(filled)
        self._ask()

    def _done(self, batch: PendingBatch) -> PixelBatch:
        """A batch, all of which is there."""
        failures = tuple((row, batch.failures[row]) for row in batch.rows if row in batch.failures)
        return PixelBatch(tuple(batch.rows), batch.pixels, failures, batch.seconds, batch.on_device)

    def _empty(self, count: int) -> UInt8[torch.Tensor, "B 3 H W"]:
        return torch.empty((count, *self._shape), dtype=torch.uint8, pin_memory=self._pin)

    def _decode_here(self, rows: Sequence[int]) -> PixelBatch:
        pixels = self._empty(len(rows))
        failures, seconds = self._workers.decoder(rows, lambda size: pixels.view(-1)[:size])
        return PixelBatch(tuple(rows), pixels, failures, seconds)


def pixel_batches(
    source: ImageSource,
    transform: PixelTransform,
    shape: tuple[int, int, int],
    batches: Iterable[Sequence[int]],
    *,
    workers: int,
    pin: bool,
    how: Decoding | None = None,
) -> PixelBatches:
    """Decode ``batches`` of rows, in order. Workers start at once, not with the first batch asked for.

    ``close()`` of what is returned stops the workers; so does the last reference to it that goes away.

    Args:
        source: The data set.
        transform: Image to pixels.
        shape: Shape [3, H, W] of one image's pixels.
        batches: Rows of each batch; read lazily, a few batches ahead, in the thread that asks for the pixels.
        workers: Worker processes; 0 decodes in this one.
        pin: Whether batches go into page-locked memory, for a GPU.
        how: How image files are decoded; None as in this thread now.

    Returns:
        An iterator of one batch of pixels per batch of rows. It raises what the source raises, with a worker's trace as
        a note, and IncompleteError where a worker is killed or has no memory.
    """
    decoder = PixelDecoder(source, transform, shape, how or current_decoding())
    return PixelBatches(Workers(decoder, workers), shape, iter(batches), pin=pin)


def default_workers(device: torch.device) -> int:
    """How many processes decode where the user gave no number.

    Args:
        device: Where the model runs. A CPU shares its cores between decoding and the model, which takes some three
            times as long an image with the default model: a worker for every four cores. Beside a GPU every core
            decodes: the thread that feeds the GPU needs a tenth of one, and the system lets it go first.

    Returns:
        At least 1.
    """
    return max(1, cores() if device.type == "cuda" else cores() // 4)


def worth_workers(source: ImageSource, side: int, workers: int) -> int:
    """``workers``, or 0 for a few small images, which are decoded before a worker has started."""
    return workers if len(source) * side * side > 1 << 21 else 0
