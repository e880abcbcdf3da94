"""Decoding ahead of whoever consumes it: batches of pixels in a given order, from worker processes."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
from jaxtyping import UInt8
from PIL import Image

from gstds_cache.data.copies import NotCopiedError
from gstds_cache.data.decode import UndecodableError
from gstds_cache.data.source import ImageSource
from gstds_cache.data.workers import Pool
from gstds_cache.runtime.threads import cores

_log = logging.getLogger(__name__)
PixelTransform = Callable[[Image.Image], torch.Tensor]


@dataclass(frozen=True)
class PixelBatch:
    """Pixels of some rows.

    Attributes:
        rows: The rows.
        pixels: uint8 [B, 3, H, W]; an undecodable item's are zero.
        failures: Row and reason of each undecodable item.
        seconds: Time it took to read and decode them, in whichever process did.
    """

    rows: tuple[int, ...]
    pixels: UInt8[torch.Tensor, "B 3 H W"]
    failures: tuple[tuple[int, str], ...]
    seconds: float = 0.0


@dataclass(frozen=True)
class _Decoder:
    """What decodes: in this process, or, once it was :meth:`prepared` there, in another."""

    source: ImageSource
    transform: PixelTransform

    def for_workers(self) -> Callable[[], _Decoder]:
        """Called in another process, what this returns gives a decoder with a source of that process's own.

        Raises:
            NotCopiedError: There can be no such source.
        """
        make = getattr(self.source, "for_workers", None)
        return (lambda: self) if make is None else partial(_with_source, self, make())

    def __call__(self, rows: Sequence[int], pixels: UInt8[torch.Tensor, "B 3 H W"]) -> _Rest:
        begun = time.perf_counter()
        failures = []
        for place, row in enumerate(rows):
            try:
                pixels[place] = self.transform(self.source.image(row))
            except UndecodableError as error:
                pixels[place] = 0
                failures.append((row, error.reason))
        return tuple(failures), time.perf_counter() - begun


_Rest = tuple[tuple[tuple[int, str], ...], float]
"""Failures, and seconds."""


def _with_source(decoder: _Decoder, make: Callable[[], ImageSource]) -> _Decoder:
    return replace(decoder, source=make())


class PixelBatches(Iterator[PixelBatch]):
    """Batches of pixels, one after the other, from :func:`pixel_batches`.

    Attributes:
        workers: Processes that decode; 0 where this one does, also if others were to.
    """

    def __init__(
        self,
        decoder: _Decoder,
        shape: tuple[int, int, int],
        batches: Iterator[Sequence[int]],
        *,
        workers: int,
        pin: bool,
    ) -> None:
        """Start the workers, and ask for the first batches."""
        self.workers = 0
        self._decoder, self._shape, self._batches, self._pin = decoder, shape, batches, pin
        self._pool: Pool | None = None
        self._left: deque[Sequence[int]] = deque()
        if workers and not hasattr(os, "memfd_create"):
            workers = 0  # Not Linux.
        try:
            prepare = decoder.for_workers() if workers else None
        except NotCopiedError as error:
            self._alone(error)
            return
        if prepare is not None:
            with _interrupt_afterwards():
                self._pool = Pool(prepare, shape, workers)
            self.workers = workers
            self._ask()

    def __iter__(self) -> PixelBatches:
        return self

    def __next__(self) -> PixelBatch:
        """The next batch.

        Raises:
            StopIteration: There are no more.
        """
        if self._pool is not None:
            if not self._pool.pending:
                self.close()
                raise StopIteration
            try:
                rows, pixels, (failures, seconds) = self._pool.take(pin=self._pin)
                self._ask()
                return PixelBatch(tuple(rows), pixels, failures, seconds)
            except NotCopiedError as error:
                self._left.extend(self._pool.pending)
                self._alone(error)
            except BaseException:
                self.close()  # Whoever looks at the error may keep this alive.
                raise
        rows = self._left.popleft() if self._left else next(self._batches)
        pixels = torch.empty((len(rows), *self._shape), dtype=torch.uint8, pin_memory=self._pin)
        failures, seconds = self._decoder(rows, pixels)
        return PixelBatch(tuple(rows), pixels, failures, seconds)

    def _ask(self) -> None:
        """Ask for as many batches as may be under way."""
        while self._pool is not None and self._pool.has_room:
            rows = next(self._batches, None)
            if rows is None:
                return
            self._pool.ask(rows)

    def _alone(self, why: NotCopiedError) -> None:
        """Go on in this process, whose object the data set is."""
        self.close()
        _log.warning(
            "note: data set %r is read by one process, this one, whatever `workers` says: an object of its own for "
            "each process cannot be made (%s)",
            self._decoder.source.uri,
            why.message,
        )

    def close(self) -> None:
        """End the workers."""
        pool, self._pool, self.workers = self._pool, None, 0
        if pool is not None:
            pool.close()


def pixel_batches(
    source: ImageSource,
    transform: PixelTransform,
    shape: tuple[int, int, int],
    batches: Iterable[Sequence[int]],
    *,
    workers: int,
    pin: bool,
) -> PixelBatches:
    """Decode ``batches`` of rows, in order. Workers start at once, not with the first batch asked for.

    ``close()`` of what is returned stops the workers; so does the last reference to it that goes away. What is decoded
    does not depend on the number of workers: a data set object of a user's own is never shared between processes
    (:mod:`gstds_cache.data.copies`); where it cannot be had more than once, this process decodes, and says so.

    Args:
        source: The data set.
        transform: Image to pixels.
        shape: Shape [3, H, W] of one image's pixels.
        batches: Rows of each batch; read lazily, a few batches ahead, in the thread that asks for the pixels.
        workers: Worker processes; 0 decodes in this one.
        pin: Whether batches go into page-locked memory, for a GPU.

    Returns:
        An iterator of one batch of pixels per batch of rows. It raises what the source raises, with a worker's trace as
        a note, and IncompleteError where a worker is killed or has no memory.
    """
    return PixelBatches(_Decoder(source, transform), shape, iter(batches), workers=workers, pin=pin)


@contextmanager
def _interrupt_afterwards() -> Iterator[None]:
    """Put off a Ctrl-C until the block ends: one that arrives inside a hook of fork() is printed, and forgotten.

    Yields:
        Nothing.

    Raises:
        KeyboardInterrupt: It arrived meanwhile.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    arrived = False

    def note(_signal: int, _frame: object) -> None:
        nonlocal arrived
        arrived = True

    before = signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if arrived:
        raise KeyboardInterrupt


def default_workers(device: torch.device) -> int:
    """How many processes decode where the user gave no number.

    Args:
        device: Where the model runs. A CPU shares its cores between decoding and the model, which takes some three
            times as long an image with the default model: a worker for every four cores. Beside a GPU, every core but
            two decodes: one is for the thread that feeds the GPU, one for the commits and for page-locking.

    Returns:
        At least 1.
    """
    return max(1, cores() - 2 if device.type == "cuda" else cores() // 4)


def worth_workers(source: ImageSource, side: int, workers: int) -> int:
    """``workers``, or 0 for a few small images, which are decoded before a worker has started."""
    return workers if len(source) * side * side > 1 << 21 else 0
