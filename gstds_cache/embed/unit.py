"""The work of embedding: units in, receipts out. It knows a source, a model and a store, and no cluster."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from gstds_cache.data.loading import PixelBatch, pixel_batches
from gstds_cache.data.source import ImageSource
from gstds_cache.encoders.encoder import Encoder
from gstds_cache.store.receipt import Quarantined, Receipt
from gstds_cache.store.writer import StoreWriter


@dataclass
class Clock:
    """Seconds spent in each part of embedding, and images done."""

    waiting: float = 0.0
    forward: float = 0.0
    commit: float = 0.0
    images: int = 0
    started: float = field(default_factory=time.perf_counter)

    def elapsed(self) -> float:
        """Seconds since the clock was made."""
        return time.perf_counter() - self.started


class EmbedTask:
    """Embeds units of one store: an :class:`gstds_cache.executor.Executor` task."""

    def __init__(
        self,
        source: ImageSource,
        encoder: Encoder,
        writer: StoreWriter,
        *,
        device: torch.device,
        workers: int,
        on_batch: Callable[[Clock], None] | None = None,
    ) -> None:
        self.source, self.encoder, self.writer = source, encoder.to(device), writer
        self.device, self.workers, self.on_batch = device, workers, on_batch
        self.clock = Clock()

    def __call__(self, units: Sequence[int]) -> Iterator[Receipt]:
        """Embed and commit ``units`` one after the other; inner batches never cross a unit.

        Args:
            units: Units to embed.

        Yields:
            The receipt of each unit, once it is durable.
        """
        self.clock = Clock()
        if not units:
            return
        spec = self.writer.spec
        plan = [(unit, rows) for unit in units for rows in _inner_batches(spec.rows_of(unit), spec.batch_size)]
        batches = pixel_batches(
            self.source,
            self.encoder.spec.preprocessing.pixels,
            self.encoder.input_shape,
            [rows for _, rows in plan],
            workers=self.workers,
            pin=self.device.type == "cuda",
        )
        block, quarantined = np.empty((0, spec.dim)), list[Quarantined]()
        for unit, rows in plan:
            span = spec.rows_of(unit)
            if rows.start == span.start:
                block, quarantined = np.zeros((len(span), spec.dim), spec.dtype), []
            begun = time.perf_counter()
            batch = next(batches)
            self.clock.waiting += time.perf_counter() - begun
            self._embed_into(block[rows.start - span.start : rows.stop - span.start], batch, quarantined)
            if rows.stop == span.stop:
                begun = time.perf_counter()
                receipt = self.writer.commit(unit, block, quarantined)
                self.clock.commit += time.perf_counter() - begun
                yield receipt
            if self.on_batch:
                self.on_batch(self.clock)

    def _embed_into(self, rows: np.ndarray, batch: PixelBatch, quarantined: list[Quarantined]) -> None:
        begun = time.perf_counter()
        rows[:] = self.encoder.embed(batch.pixels).cpu().numpy()
        for row, reason in batch.failures:
            rows[row - batch.rows[0]] = 0
            quarantined.append(Quarantined(row, self.source.ids[row], reason))
        self.clock.forward += time.perf_counter() - begun
        self.clock.images += len(batch.rows)


def _inner_batches(rows: range, batch_size: int) -> Iterator[range]:
    for start in range(rows.start, rows.stop, batch_size):
        yield range(start, min(start + batch_size, rows.stop))
