"""Decoding ahead of whoever consumes it: batches of pixels in a given order, from worker processes."""

from __future__ import annotations

import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from jaxtyping import UInt8
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from gstds_cache.data.decode import UndecodableError
from gstds_cache.data.source import ImageSource
from gstds_cache.devices import cores
from gstds_cache.errors import GstdsError

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

    def pin_memory(self) -> PixelBatch:
        """The batch in page-locked memory (called by DataLoader)."""
        return PixelBatch(self.rows, self.pixels.pin_memory(), self.failures, self.seconds)


class _Rows(Dataset[tuple[torch.Tensor, str | None]]):
    def __init__(self, source: ImageSource, transform: PixelTransform, shape: tuple[int, int, int]) -> None:
        self.source, self.transform, self.shape = source, transform, shape

    def __getitem__(self, row: int) -> tuple[torch.Tensor, str | None]:
        try:
            return self.transform(self.source.image(row)), None
        except UndecodableError as error:
            return torch.zeros(self.shape, dtype=torch.uint8), error.reason

    def __getitems__(self, rows: Sequence[int]) -> PixelBatch | GstdsError:
        begun = time.perf_counter()
        try:
            decoded = [self[row] for row in rows]
        except GstdsError as error:
            return error  # Raised in a worker it would arrive as its traceback, in one text.
        failures = tuple((row, reason) for row, (_, reason) in zip(rows, decoded, strict=True) if reason is not None)
        pixels = torch.stack([pixels for pixels, _ in decoded])
        return PixelBatch(tuple(rows), pixels, failures, time.perf_counter() - begun)


def _whole(batch: Any) -> Any:
    return batch


def quiet_worker(_worker: int) -> None:
    """Leave Ctrl-C to the parent, which stops its workers itself; when it has gone, go without a word."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    tell = sys.excepthook

    def unless_gone(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        # The thread that hands tensors over (multiprocessing.resource_sharer) tells of a parent that hung up.
        if not issubclass(kind, EOFError | ConnectionError):
            tell(kind, error, trace)

    sys.excepthook = unless_gone


def pixel_batches(
    source: ImageSource,
    transform: PixelTransform,
    shape: tuple[int, int, int],
    batches: Iterable[Sequence[int]],
    *,
    workers: int,
    pin: bool,
) -> Generator[PixelBatch, None, None]:
    """Decode ``batches`` of rows, in order. Workers start at once, not with the first batch asked for.

    ``close()`` of what is returned stops the workers; so does the last reference to it that goes away.

    Args:
        source: The data set.
        transform: Image to pixels.
        shape: Shape [3, H, W] of one image's pixels.
        batches: Rows of each batch; read lazily, a few batches ahead, in the thread that asks for the pixels.
        workers: Worker processes; 0 decodes in this one.
        pin: Whether batches go into page-locked memory, for a GPU.

    Returns:
        An iterator of one batch of pixels per batch of rows. It raises the GstdsError that reading an item ended with.
    """
    loader: DataLoader[PixelBatch | GstdsError] = DataLoader(
        _Rows(source, transform, shape),  # type: ignore[arg-type]
        batch_sampler=batches,  # type: ignore[arg-type]
        num_workers=workers,
        collate_fn=_whole,
        pin_memory=pin,
        worker_init_fn=quiet_worker,
    )
    with warnings.catch_warnings():
        # Python 3.12 warns of fork in a process with threads. Workers decode and do nothing else.
        warnings.filterwarnings("ignore", message=".*fork\\(\\) may lead to deadlocks", category=DeprecationWarning)
        with _interrupt_afterwards():
            started = iter(loader)
        return _until_closed(started)


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


def _until_closed(batches: Iterator[PixelBatch | GstdsError]) -> Generator[PixelBatch, None, None]:
    # The loader's iterator stops its workers when the last reference goes. A traceback would keep one to a plain
    # iterator for as long as the exception is looked at; this one's goes with close().
    for batch in batches:
        if isinstance(batch, GstdsError):
            raise batch
        yield batch


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
