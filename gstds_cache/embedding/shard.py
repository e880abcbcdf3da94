"""The work of embedding: shards in, commit records out. It knows a source, a model and a store, and no cluster.

Three things go on at once: worker processes decode the batches to come, this thread runs the model, and one thread
commits the shard before. On a GPU the model's kernels run behind this thread as well: it queues a batch, and only then
waits for the rows of the batch before; pixels are copied there while the batch before is in the model.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import closing
from dataclasses import dataclass
from itertools import tee

import numpy as np
import torch
from jaxtyping import Float32, UInt8

from gstds_cache.data.decoders import Workers
from gstds_cache.data.loading import PixelBatch, PixelBatches
from gstds_cache.data.source import ImageSource
from gstds_cache.embedding.clock import Clock
from gstds_cache.embedding.commits import CommitThread, ShardWriter
from gstds_cache.embedding.decoding import open_batches, start_workers
from gstds_cache.embedding.forward import ForwardPasses
from gstds_cache.embedding.plan import Known, Plan, ShardWork
from gstds_cache.encoders.encoder import Encoder
from gstds_cache.errors import GstdsError, IncompleteError
from gstds_cache.runtime.devices import own_stream
from gstds_cache.runtime.resources import GO_ON, explain, out_of_memory
from gstds_cache.runtime.threads import limited_threads
from gstds_cache.store.commit_record import CommitRecord, Quarantined

NO_FEATURES = "no features: the model gives zeros alone for this image"
IN_FLIGHT = 1
"""Batches whose rows are not waited for while the next is queued."""


@dataclass(frozen=True)
class _Flight:
    """A batch whose forward pass was queued; ``last`` ends its shard. Without one, the shard had nothing to embed."""

    work: ShardWork
    last: bool
    batch: PixelBatch | None = None
    features: Float32[torch.Tensor, "B D"] | None = None
    copied: torch.cuda.Event | None = None


class EmbedTask:
    """Embeds shards of one store: an :class:`gstds_cache.runtime.executor.Executor` task."""

    def __init__(
        self,
        source: ImageSource,
        encoder: Encoder,
        writer: ShardWriter,
        *,
        device: torch.device,
        workers: int | Workers,
        cuda_graphs: bool = True,
        known: Known | None = None,
        on_batch: Callable[[Clock], None] | None = None,
    ) -> None:
        """Take what shards are made from.

        Args:
            source: The data set.
            encoder: The reference model, which is moved to ``device``.
            writer: The store.
            device: Where the model runs.
            workers: Processes that decode: how many, or those that were started already, for the first call.
            cuda_graphs: Whether forward passes are recorded on a GPU (embedding/forward.py).
            known: For a range of rows, which of them [R] are known already, and those rows' embeddings [K, D] in order;
                they are neither decoded nor embedded. Asked once for each shard, and twice for one that is known whole.
            on_batch: Called after every batch.
        """
        self.source, self.encoder, self.writer = source, encoder.to(device), writer
        self.device, self.known, self.on_batch = device, known, on_batch
        self._started = workers if isinstance(workers, Workers) else None
        self.workers = workers if isinstance(workers, int) else workers.size
        self._forward = ForwardPasses(self.encoder, device, cuda_graphs=cuda_graphs)
        self._upload = _Upload(device) if device.type == "cuda" else None
        self.clock = Clock()

    def __call__(self, shards: Iterable[int]) -> Iterator[CommitRecord]:
        """Embed and commit ``shards`` one after the other.

        Args:
            shards: Shards to embed; read a few ahead.

        Yields:
            The commit record of each shard, once it is durable, in order.

        Raises:
            EncoderError: The model failed, or gave a row that holds NaN or Inf.
            IncompleteError: Memory or the disk ran out, or a decoding process was killed.
            DatasetError: An item is another than the one that was hashed.
        """  # noqa: DOC501
        self.clock = Clock(workers=self.workers)
        try:
            # Beside a GPU this process computes next to nothing, and more threads would wait for cores that decode.
            with limited_threads(1 if self.device.type == "cuda" else 0):
                yield from self._run(shards)
        except (OSError, RuntimeError, MemoryError) as error:
            incomplete = self._incomplete(error, len(shards) if isinstance(shards, Sized) else self.clock.shards)
            if incomplete is None:
                raise
            raise incomplete from error
        finally:
            self.clock.ended = time.perf_counter()

    def _incomplete(self, error: Exception, shards: int) -> IncompleteError | None:
        """The error of a run that ran out of something, which says what is committed; None for any other."""
        if isinstance(error, GstdsError):
            return None
        done = f"{self.clock.shards:,} of the {shards:,} shards of this run are committed, and it goes on from there"
        if out_of_memory(error):
            return IncompleteError(
                f"out of memory after {self.clock.images:,} images of this run, at batch size "
                f"{self.writer.spec.batch_size}: {str(error).partition(chr(10))[0][:200]}",
                hint="end what else uses that memory, then run the same command again: "
                f"{done}. Or embed with a smaller `batch_size` into a new `cache`",
            )
        explained = explain(error)
        if explained is None:
            return None
        again = "" if explained.hint.endswith(GO_ON) else f", {GO_ON}"
        return IncompleteError(explained.message, hint=f"{explained.hint}{again}: {done}")

    def _run(self, shards: Iterable[int]) -> Iterator[CommitRecord]:
        plan = Plan(self.writer.spec, self.known)
        shards, ahead = tee(shards)
        workers, self._started = self._started or start_workers(self.source, self.encoder, self.workers), None
        rows = (rows for shard in ahead for rows in plan.look_ahead(shard))
        batches = open_batches(workers, self.encoder, rows, self.device)
        in_flight: deque[_Flight] = deque()
        # Whatever ends this block (an error, Ctrl-C, a caller who has enough) ends the thread and the workers too. A
        # commit that has begun is finished: it is a whole shard.
        with closing(batches), CommitThread(self.writer, self.clock) as commits:
            for shard in shards:
                work = plan.take(shard)
                for flight in self._launch(work, batches):
                    in_flight.append(flight)
                    while len(in_flight) > IN_FLIGHT:
                        yield from self._land(in_flight.popleft(), commits)
                plan.forget(shard)
            while in_flight:
                yield from self._land(in_flight.popleft(), commits)
            yield from commits.collect()

    def _launch(self, work: ShardWork, batches: PixelBatches) -> Iterator[_Flight]:
        """Queue one shard's forward passes, each as it is asked for.

        Yields:
            One for each batch.
        """
        if not work.batches:
            yield _Flight(work, last=True)
        for rows in work.batches:
            begun = time.perf_counter()
            batch = next(batches)
            loaded = time.perf_counter()
            self.clock.waiting += loaded - begun
            self.clock.decode += batch.seconds
            self.clock.workers = batches.workers
            self.clock.on_device += batch.on_device
            pixels = batch.pixels if self._upload is None else self._upload(batch.pixels)
            features = self._forward(_filled_up(pixels, self.writer.spec.batch_size))
            # For a GPU: into page-locked memory, or the copy would wait for the forward pass.
            here = torch.empty(features.shape, dtype=features.dtype, pin_memory=features.device.type == "cuda")
            here.copy_(features, non_blocking=True)
            copied = torch.cuda.current_stream(features.device).record_event() if features.is_cuda else None
            self.clock.forward += time.perf_counter() - loaded
            yield _Flight(work, rows is work.batches[-1], batch, here, copied)

    def _land(self, flight: _Flight, commits: CommitThread) -> Iterator[CommitRecord]:
        """Put a batch's rows in their shard's block.

        Yields:
            The commit record of the shard before, if it is there by now.
        """
        work, batch = flight.work, flight.batch
        if batch is not None and flight.features is not None:
            begun = time.perf_counter()
            if flight.copied is not None:
                with self.encoder.model_errors():
                    flight.copied.synchronize()
            self._fill_in(work, batch, flight.features[: len(batch.rows)])
            self.clock.forward += time.perf_counter() - begun
            self.clock.images += len(batch.rows)
        if flight.last:
            self.clock.reused += len(work.span) - sum(map(len, work.batches))
            yield from commits.collect()
            commits.begin(work)
        elif commits.done:
            yield from commits.collect()
        if self.on_batch:
            self.on_batch(self.clock)

    def _fill_in(self, work: ShardWork, batch: PixelBatch, features: Float32[torch.Tensor, "n D"]) -> None:
        """Put a batch's features in its shard's block; rows without any are zero, and quarantined."""
        failures = dict(batch.failures)
        for row in failures:
            features[batch.rows.index(row)] = 0  # of a black image: whatever they are, nothing uses them

        def name(position: int) -> str:
            return f"row {batch.rows[position]} ({self.source.ids[batch.rows[position]]})"

        for position in self.encoder.require_numbers(features, name):
            failures.setdefault(batch.rows[position], NO_FEATURES)
        work.block[np.asarray(batch.rows) - work.span.start] = features.numpy()
        work.quarantined += [Quarantined(row, self.source.ids[row], failures[row]) for row in sorted(failures)]


class _Upload:
    """Copies pixels to a GPU beside what it computes, on a stream of their own."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, own_stream(device)

    def __call__(self, pixels: UInt8[torch.Tensor, "n 3 H W"]) -> UInt8[torch.Tensor, "n 3 H W"]:
        """``pixels`` on the device; what the current stream does next waits for them, and this does not."""
        if pixels.is_cuda:
            return pixels
        current = torch.cuda.current_stream(self._device)
        with torch.cuda.stream(self._stream):
            there = pixels.to(self._device, non_blocking=True)
        current.wait_stream(self._stream)
        there.record_stream(current)  # Else their memory would be taken for the next batch while the model reads it.
        return there


def _filled_up(pixels: UInt8[torch.Tensor, "n 3 H W"], batch_size: int) -> UInt8[torch.Tensor, "B 3 H W"]:
    """``pixels``, with black images after the last up to ``batch_size``.

    Libraries choose other kernels for other shapes, and float32 sums differ with the kernel: with one shape alone, a
    row's bytes do not depend on how many images its batch happens to have. Costs one copy, once a shard at most.
    """
    missing = batch_size - len(pixels)
    return torch.cat([pixels, pixels.new_zeros(missing, *pixels.shape[1:])]) if missing else pixels
