"""Decoding ahead of whoever consumes it: batches of pixels in a given order, from worker processes."""

from __future__ import annotations

import signal
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import UInt8
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from gstds_cache.data.decode import UndecodableError
from gstds_cache.data.source import ImageSource

PixelTransform = Callable[[Image.Image], torch.Tensor]


@dataclass(frozen=True)
class PixelBatch:
    """Pixels of some rows.

    Attributes:
        rows: The rows.
        pixels: uint8 [B, 3, H, W]; an undecodable item's are zero.
        failures: Row and reason of each undecodable item.
    """

    rows: tuple[int, ...]
    pixels: UInt8[torch.Tensor, "B 3 H W"]
    failures: tuple[tuple[int, str], ...]

    def pin_memory(self) -> PixelBatch:
        """The batch in page-locked memory (called by DataLoader)."""
        return PixelBatch(self.rows, self.pixels.pin_memory(), self.failures)


class _Rows(Dataset[tuple[torch.Tensor, str | None]]):
    def __init__(self, source: ImageSource, transform: PixelTransform, shape: tuple[int, int, int]) -> None:
        self.source, self.transform, self.shape = source, transform, shape

    def __getitem__(self, row: int) -> tuple[torch.Tensor, str | None]:
        try:
            return self.transform(self.source.image(row)), None
        except UndecodableError as error:
            return torch.zeros(self.shape, dtype=torch.uint8), error.reason

    def __getitems__(self, rows: Sequence[int]) -> PixelBatch:
        decoded = [self[row] for row in rows]
        failures = tuple((row, reason) for row, (_, reason) in zip(rows, decoded, strict=True) if reason is not None)
        return PixelBatch(tuple(rows), torch.stack([pixels for pixels, _ in decoded]), failures)


def _whole(batch: Any) -> Any:
    return batch


def quiet_worker(_worker: int) -> None:
    """Leave Ctrl-C to the parent, which stops its workers itself."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def pixel_batches(
    source: ImageSource,
    transform: PixelTransform,
    shape: tuple[int, int, int],
    batches: Iterable[Sequence[int]],
    *,
    workers: int,
    pin: bool,
) -> Iterator[PixelBatch]:
    """Decode ``batches`` of rows, in order. Workers start at once, not with the first batch asked for.

    Args:
        source: The data set.
        transform: Image to pixels.
        shape: Shape [3, H, W] of one image's pixels.
        batches: Rows of each batch; read lazily, a few batches ahead.
        workers: Worker processes; 0 decodes in this one.
        pin: Whether batches go into page-locked memory, for a GPU.

    Returns:
        An iterator of one batch of pixels per batch of rows.
    """
    loader: DataLoader[PixelBatch] = DataLoader(
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
        return iter(loader)


def worth_workers(source: ImageSource, side: int, workers: int) -> int:
    """``workers``, or 0 for a few small images, which are decoded before a worker has started."""
    return workers if len(source) * side * side > 1 << 21 else 0
