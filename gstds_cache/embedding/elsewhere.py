"""Embedding shards in other processes and on other machines: what such a process loads, checks, and sends back.

It opens the store itself and commits there, so that no embedding travels; what comes back is the commit record. A shard
that is committed already is not embedded again, so that any shard may be given out a second time.
"""

from __future__ import annotations

import hashlib
import os
import platform
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import UInt8

from gstds_cache.data.hashed import as_hashed
from gstds_cache.data.hashing import REACHABLE, UNREADABLE
from gstds_cache.data.manifest import DatasetManifest
from gstds_cache.data.source import ImageSource
from gstds_cache.embedding.clock import SPENT, Clock
from gstds_cache.embedding.decoding import decode_by, keep_streams_apart, try_decoder
from gstds_cache.embedding.job import EmbedJob
from gstds_cache.embedding.reuse import KnownRows
from gstds_cache.embedding.settle import prepare_as_stored
from gstds_cache.embedding.shard import EmbedTask
from gstds_cache.encoders.encoder import Encoder
from gstds_cache.encoders.factory import open_encoder
from gstds_cache.errors import DatasetError, EncoderError
from gstds_cache.files.digest import digest_of
from gstds_cache.files.location import Location, LocationLike
from gstds_cache.runtime.executor import Executor
from gstds_cache.store import layout
from gstds_cache.store.commit_record import CommitRecord
from gstds_cache.store.metadata import StoreMetadata
from gstds_cache.store.spec import CacheSpec
from gstds_cache.store.writer import StoreWriter, join_writer


@dataclass(frozen=True)
class EmbeddedShard:
    """What another process sends back.

    Attributes:
        commit: The commit record, which is durable.
        clock: What this shard took there.
        process: Which process that was.
    """

    commit: CommitRecord
    clock: Clock
    process: str


@dataclass(frozen=True)
class EmbedRecipe:
    """What another process needs to embed shards of a store (:class:`gstds_cache.runtime.executor.Recipe`).

    Attributes:
        source: The data set, with its list of items: no process lists it again.
        model: The model's URI.
        allow_untrained: Whether it may have random weights.
        decoder: What decodes.
        cuda_graphs: Whether forward passes are recorded.
        location: The store.
        spec: What it holds.
        gpu: Whether the model runs on a GPU.
        workers: Processes that decode.
        reuse: Stores of which rows are taken over.
        samples: Of each shard, an item and its SHA-256: whether another machine sees the data set.
    """

    source: ImageSource
    model: str
    allow_untrained: bool
    decoder: Literal["pillow", "nvjpeg"]
    cuda_graphs: bool
    location: Location
    spec: CacheSpec
    gpu: bool
    workers: int
    reuse: tuple[Location, ...]
    samples: dict[int, tuple[int, bytes]]
    counted = "shards"

    @property
    def key(self) -> str:
        """What tells this recipe from others: the store, and what it holds."""
        return digest_of(["embed", str(self.location), self.spec.fingerprint, list(map(str, self.reuse))])

    @property
    def cpus(self) -> int:
        """A core for each process that decodes, and on a CPU one for the model."""
        return max(1, self.workers) if self.gpu else self.workers + 1

    def open(self) -> ShardsElsewhere:
        """Load the model, open the store, and check both."""
        keep_streams_apart(self.decoder)
        device = torch.device("cuda" if self.gpu else "cpu")
        encoder = open_same_encoder(self.model, self.allow_untrained, self.decoder, self.spec, device, _here())
        try_decoder(encoder, device)
        return ShardsElsewhere(self, encoder, join_writer(self.location, self.spec.fingerprint), device)


class EmbedAnywhere:
    """An :class:`EmbedTask` that other processes can run as well (:class:`gstds_cache.runtime.executor.PortableTask`).

    Where they do, this process embeds nothing: it takes note of what they committed.
    """

    def __init__(self, task: EmbedTask, recipe: EmbedRecipe, metadata: StoreMetadata) -> None:
        """Take the task, and how it is made elsewhere.

        Args:
            task: The task; its clock counts what comes back.
            recipe: Makes it in another process.
            metadata: Of the store: takes note of commit records.
        """
        self._task, self._recipe, self._metadata = task, recipe, metadata
        self._processes: set[str] = set()
        self._spent = Clock(started=0.0)

    def __call__(self, shards: Sequence[int]) -> Iterator[CommitRecord]:
        """Embed and commit ``shards`` in this process.

        Args:
            shards: Shards of the store.

        Yields:
            Their commit records.
        """
        yield from self._task(shards)

    def recipe(self) -> EmbedRecipe:
        """How it is made in another process."""
        return self._recipe

    def receive(self, result: EmbeddedShard) -> CommitRecord:
        """Count a shard that another process committed."""
        self._processes.add(result.process)
        for name in SPENT:
            setattr(self._spent, name, getattr(self._spent, name) + getattr(result.clock, name))
        clock, processes = self._task.clock, len(self._processes)
        for name in SPENT:
            setattr(clock, name, getattr(self._spent, name))
        # Shares of the time are those of one process, on average.
        clock.workers = processes
        for name in ("waiting", "forward", "commit", "commit_wait"):
            setattr(clock, name, getattr(clock, name) / processes)
        clock.ended = time.perf_counter()
        self._metadata.remember(result.commit)
        if self._task.on_batch is not None:
            self._task.on_batch(clock)
        return result.commit


@dataclass(frozen=True)
class Anywhere:
    """Has shards embedded by an executor that may use other processes and machines.

    Attributes:
        executor: Where they are embedded.
        sha256: Hashes of the data set's items.
        reuse: Stores of which rows are taken over.
    """

    executor: Executor
    sha256: UInt8[np.ndarray, "N 32"]
    reuse: Sequence[LocationLike]

    def run(self, job: EmbedJob, task: EmbedTask, writer: StoreWriter, shards: Sequence[int]) -> Iterator[CommitRecord]:
        """Embed and commit ``shards``.

        Args:
            job: What is embedded, and how.
            task: The task in this process.
            writer: The store.
            shards: Its shards.

        Yields:
            The commit record of each.
        """
        config = job.config
        recipe = EmbedRecipe(
            source=job.source,
            model=config.model,
            allow_untrained=config.allow_untrained,
            decoder=config.decoder,
            cuda_graphs=config.cuda_graphs,
            location=writer.location,
            spec=writer.spec,
            gpu=job.device.type == "cuda",
            workers=config.workers or 0,
            reuse=tuple(Location.parse(where, "`reuse`").absolute() for where in self.reuse),
            samples=samples_of(writer.spec, self.sha256, shards),
        )
        yield from self.executor.run(EmbedAnywhere(task, recipe, writer.metadata), shards)


class ShardsElsewhere:
    """In another process: embeds shards and commits them; a task of units."""

    def __init__(self, recipe: EmbedRecipe, encoder: Encoder, writer: StoreWriter, device: torch.device) -> None:
        self._recipe, self._writer = recipe, writer
        self._as_it_is = as_hashed(recipe.source, None)  # What is not the same is told in other words here.
        known = None
        if recipe.reuse:
            manifest = DatasetManifest.from_arrow(writer.metadata.transport.get(layout.ITEMS))
            known = KnownRows(recipe.reuse, manifest.sha256, recipe.spec.encoder, recipe.spec.dtype)
        self._task = EmbedTask(
            recipe.source,
            encoder,
            writer,
            device=device,
            workers=recipe.workers,
            cuda_graphs=recipe.cuda_graphs,
            known=known,
        )

    def __call__(self, shards: Sequence[int]) -> Iterator[EmbeddedShard]:
        """Embed and commit ``shards``; those that are committed are read.

        Args:
            shards: Shards of the store.

        Yields:
            For each its commit record, and what it took.
        """
        before = Clock(started=0.0)
        todo = []
        for shard in shards:
            if self._writer.committed(shard):
                commit = self._writer.read_commit(shard)
                yield EmbeddedShard(
                    commit, Clock(started=0.0, images=commit.rows[1] - commit.rows[0], shards=1), _process()
                )
            else:
                self._require_item(shard)
                todo.append(shard)
        if not todo:
            return
        for commit in self._task(todo):
            now = replace(self._task.clock)
            yield EmbeddedShard(commit, now.since(before), _process())
            before = now

    def _require_item(self, shard: int) -> None:
        """Refuse to embed where the data set is not what was hashed: its images would all be quarantined.

        Raises:
            DatasetError: It is not.
        """
        if shard not in self._recipe.samples:
            return
        row, expected = self._recipe.samples[shard]
        name = f"{self._recipe.source.uri}: item {self._recipe.source.ids[row]}"
        try:
            got = hashlib.sha256(self._as_it_is.payload(row)).digest()
        except OSError as error:
            raise DatasetError(f"{name} cannot be read on {_here()}: {error}", hint=REACHABLE) from error
        if got != expected:
            raise DatasetError(
                f"{name} is on {_here()} another than the one that was hashed: got {got.hex()[:12]}, expected "
                f"{expected.hex()[:12]}",
                hint=REACHABLE,
            )


def open_same_encoder(
    model: str,
    allow_untrained: bool,
    decoder: Literal["pillow", "nvjpeg"],
    spec: CacheSpec,
    device: torch.device,
    where: str,
) -> Encoder:
    """The model of a store, loaded in another process.

    Args:
        model: The model's URI.
        allow_untrained: Whether it may have random weights.
        decoder: What decodes.
        spec: What the store holds.
        device: Where the model will run.
        where: The process, for the error.

    Returns:
        The model.

    Raises:
        EncoderError: It is another model than the first process has, or has other weights.
    """
    encoder = open_encoder(model, allow_untrained=allow_untrained)
    decode_by(encoder, decoder, device)
    prepare_as_stored(encoder, spec.encoder)
    got = encoder.spec.to_dict()
    if got != spec.encoder:
        names = sorted(name for name in {*got, *spec.encoder} if got.get(name) != spec.encoder.get(name))
        lines = [f"{name}: got {got.get(name)!r:.80}, expected {spec.encoder.get(name)!r:.80}" for name in names]
        raise EncoderError(
            f"{model}: {where} has another model than the store is made with:\n    " + "\n    ".join(lines),
            hint=f"the file of {model.partition('?')[0]} has to be the same on every machine: copy it there"
            if names == ["source"]
            else "every process needs the same weights, and a factory has to give the same ones each time",
        )
    return encoder


def samples_of(spec: CacheSpec, sha256: UInt8[np.ndarray, "N 32"], shards: Sequence[int]) -> dict[int, Any]:
    """The first item of each shard that could be read, with its SHA-256: by shard, (row, digest)."""
    samples: dict[int, Any] = {}
    for shard in shards:
        span = spec.rows_of(shard)
        for row in span:
            digest = sha256[row].tobytes()
            if digest != UNREADABLE:
                samples[shard] = (row, digest)
                break
    return samples


def _here() -> str:
    return f"machine {platform.node()}"


def _process() -> str:
    return f"{platform.node()}:{os.getpid()}"
