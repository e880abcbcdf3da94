"""What decodes, in this process or in others, and the processes that do."""

from __future__ import annotations

import logging
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from PIL import Image

from gstds_cache.data.ahead import expect_rows
from gstds_cache.data.copies import NotCopiedError
from gstds_cache.data.decode import EXACT, Decoding, UndecodableError, decoding_as
from gstds_cache.data.source import ImageSource
from gstds_cache.data.workers import Pool, Room

_log = logging.getLogger(__name__)
PixelTransform = Callable[[Image.Image], torch.Tensor]


@runtime_checkable
class Decoder(Protocol):
    """What decodes: in this process, or, once :func:`for_workers` made it anew there, in another."""

    @property
    def source(self) -> ImageSource:
        """The data set."""
        ...

    def __call__(self, rows: Sequence[int], room: Room) -> Any:
        """Fill ``room`` with what ``rows`` hold; see :class:`gstds_cache.data.workers.Pool`."""
        ...


@dataclass(frozen=True)
class PixelDecoder:
    """Images to pixels of one shape, by Pillow.

    Attributes:
        source: The data set.
        transform: Image to pixels.
        shape: Shape [3, H, W] of one image's pixels.
        how: How image files are decoded.
    """

    source: ImageSource
    transform: PixelTransform
    shape: tuple[int, int, int]
    how: Decoding = EXACT

    def __call__(self, rows: Sequence[int], room: Room) -> Decoded:
        """Fill ``room`` with the pixels of ``rows``, uint8 [n, 3, H, W]; an undecodable item's are zero."""
        begun = time.perf_counter()
        pixels = room(len(rows) * math.prod(self.shape)).view(len(rows), *self.shape)
        failures = []
        expect_rows(self.source, rows)
        for place, row in enumerate(rows):
            try:
                with decoding_as(self.how):
                    image = self.source.image(row)
                pixels[place] = self.transform(image)
            except UndecodableError as error:
                pixels[place] = 0
                failures.append((row, error.reason))
        return tuple(failures), time.perf_counter() - begun


Decoded = tuple[tuple[tuple[int, str], ...], float]
"""Failures, and seconds."""

D = TypeVar("D", bound=Decoder)


def for_workers(decoder: D) -> Callable[[], D]:
    """Called in another process, what this returns gives a decoder with a source of that process's own.

    Raises:
        NotCopiedError: There can be no such source.
    """
    make = getattr(decoder.source, "for_workers", None)
    return (lambda: decoder) if make is None else partial(_with_source, decoder, make())


def _with_source(decoder: D, make: Callable[[], ImageSource]) -> D:
    return replace(decoder, source=make())  # type: ignore[type-var]  # a dataclass, as every decoder is


class Workers:
    """Processes that decode, started before it is known what; :class:`PixelBatches` makes use of them.

    What they decode does not depend on their number: a data set object of a user's own is never shared between
    processes (:mod:`gstds_cache.data.copies`); where it cannot be had more than once, there are none, and it is said.

    Attributes:
        decoder: What each of them runs.
        size: How many were asked for.
        pool: The processes; None where this one decodes.
    """

    def __init__(self, decoder: Decoder, workers: int) -> None:
        """Start the processes.

        Args:
            decoder: What each of them runs; a dataclass.
            workers: How many; 0 decodes in this one.
        """
        self.decoder, self.size = decoder, workers
        self.pool: Pool | None = None
        if workers and not hasattr(os, "memfd_create"):
            workers = 0  # Not Linux.
        try:
            prepare = for_workers(decoder) if workers else None
        except NotCopiedError as error:
            self.give_up(error)
            return
        if prepare is not None:
            with _interrupt_afterwards():
                self.pool = Pool(prepare, workers)

    def give_up(self, why: NotCopiedError) -> None:
        """Go on in this process, whose object the data set is."""
        self.close()
        _log.warning(
            "note: data set %r is read by one process, this one, whatever `workers` says: an object of its own for "
            "each process cannot be made (%s)",
            self.decoder.source.uri,
            why.message,
        )

    def close(self) -> None:
        """End the processes."""
        pool, self.pool = self.pool, None
        if pool is not None:
            pool.close()


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
