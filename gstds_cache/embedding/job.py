"""One call of embedding: what it works on, and the specification of the store that it fills."""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass, field

import torch

from gstds_cache.config import EmbedConfig
from gstds_cache.data.manifest import DatasetManifest
from gstds_cache.data.source import ImageSource
from gstds_cache.embedding.determinism import DeterminismCheck
from gstds_cache.embedding.estimate import fitting_batch_size, row_bytes
from gstds_cache.embedding.mismatch import explained
from gstds_cache.embedding.part import Part, parse_part
from gstds_cache.embedding.reuse import KnownRows
from gstds_cache.encoders.encoder import Encoder
from gstds_cache.errors import IncompleteError, StoreNotFoundError, UsageError, command_line
from gstds_cache.files.location import Location
from gstds_cache.runtime.devices import resolve_devices
from gstds_cache.runtime.notify import Notify
from gstds_cache.store.format import CURRENT
from gstds_cache.store.grown import read_metadata
from gstds_cache.store.metadata import StoreMetadata
from gstds_cache.store.reader import EmbeddingStore
from gstds_cache.store.spec import CacheSpec, require_same

BATCH_SIZE = {"cpu": 16, "cuda": 256}
SHARD_BYTES = 4 << 20


@dataclass
class EmbedJob:
    """One call: what it works on, and the time it took so far."""

    source: ImageSource
    config: EmbedConfig
    device: torch.device
    encoder: Encoder
    notify: Notify
    looks_at: str = ""
    known: KnownRows | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    determinism: DeterminismCheck = field(init=False)

    def __post_init__(self) -> None:
        """Prepare the determinism check."""
        self.determinism = DeterminismCheck(self.source, self.encoder, dtype=self.config.dtype)

    def fitting(self, batch_size: int, notify: Notify | None = None) -> int:
        """The largest of ``batch_size``, a half, a quarter, ... that fits; the pass that shows it is not wasted."""
        return fitting_batch_size(self.encoder, self.device, batch_size, notify, self.determinism.first_pass)

    @property
    def devices(self) -> tuple[torch.device, ...]:
        """All devices; ``device`` is the first."""
        return resolve_devices(self.config.device)

    @property
    def batch_size(self) -> int | None:
        """The batch size asked for, or that of the store whose rows are taken over: then they are what we'd compute."""
        return self.config.batch_size or (self.known.batch_size if self.known else None)

    @property
    def part(self) -> Part | None:
        """Which part of the store's shards this call is to embed; None for all."""
        return parse_part(self.config.shard)

    def shards(self, spec: CacheSpec) -> range:
        """The shards that this call is to embed where they are not committed."""
        return range(spec.shards) if self.part is None else self.part.shards(spec.shards)

    def missing(self, stored: StoreMetadata | None, spec: CacheSpec) -> list[range]:
        """Rows of each shard that is this call's to embed and is not committed."""
        committed = set() if stored is None else set(stored.committed())
        return [spec.rows_of(shard) for shard in self.shards(spec) if shard not in committed]

    def row_bytes(self) -> int:
        """Bytes of one row of the store."""
        return row_bytes(self.encoder, self.config)


def resolve_store(
    job: EmbedJob, stored: StoreMetadata | None, manifest: DatasetManifest
) -> tuple[CacheSpec, EmbeddingStore | None]:
    """What the store will hold; and the store if it is complete and holds this: a hit takes no lock and writes nothing.

    Raises:
        FingerprintMismatchError: The store holds something else.
    """
    begun = time.perf_counter()
    spec = resolve_spec(job, len(manifest), manifest.root, stored)
    if stored is not None:
        with explained(stored, manifest, job.source):
            require_same(stored.spec, spec, where=stored.location)
        with suppress(StoreNotFoundError, IncompleteError):
            return spec, EmbeddingStore(stored)
        require_fit(job, stored)
    if stored is None or stored.spec == spec:  # else open_writer says in what they differ
        check_determinism(job, spec)
    job.seconds["fit"] = time.perf_counter() - begun
    return spec, None


def check_determinism(job: EmbedJob, spec: CacheSpec) -> None:
    """Refuse a model whose rows do not depend on their images alone; warn of what else is odd about them."""
    for line in job.determinism.run(spec.batch_size):
        job.notify(line)


def require_fit(job: EmbedJob, stored: StoreMetadata) -> None:
    """Refuse a store that was begun with a batch size that does not fit.

    Raises:
        UsageError: It does not.
    """
    batch_size = stored.spec.batch_size
    fits = job.fitting(batch_size)
    if fits < batch_size:
        again = embed_command(job.source.uri, job.config)
        begin = command_line(*again, "--cache", f"{stored.location}-b{fits}", "--batch-size", fits)
        raise UsageError(
            f"{stored.location} was begun with batch size {batch_size}, and {fits} is the largest that fits the memory "
            f"of {job.device}; all rows of a store are made with one batch size",
            hint="end what else uses that memory and run the same command again, which goes on from what is committed, "
            f"or begin a new store: {begin}",
        )


def resolve_spec(job: EmbedJob, items: int, items_root: str, stored: StoreMetadata | None) -> CacheSpec:
    """The specification this run asks for; sizes that were not given are the store's own where there is one.

    The batch size of a new store is one that fits the device. It is part of the store's identity: hence before all
    else.
    """
    batch_size, shard_rows = job.batch_size, job.config.shard_rows
    if stored is not None:
        shard_rows = shard_rows or stored.spec.shard_rows
        batch_size = _stored_batch_size(job, stored.spec.batch_size)
    else:
        wanted = batch_size or BATCH_SIZE[job.device.type]
        batch_size = job.fitting(wanted, job.notify)
        if batch_size < wanted:
            job.notify(f"the new store's batch size is {batch_size}")
    shard_rows = shard_rows or max(1, SHARD_BYTES // job.row_bytes())
    return CacheSpec(
        items=items,
        items_root=items_root,
        encoder=job.encoder.spec.to_dict(),
        dim=job.encoder.spec.dim,
        dtype=job.config.dtype,
        batch_size=batch_size,
        shard_rows=-(-shard_rows // batch_size) * batch_size,
        format=CURRENT.version if stored is None else stored.spec.format,
    )


def _stored_batch_size(job: EmbedJob, stored: int) -> int:
    """The store's own batch size, unless another was given.

    The given one may be what the store's was halved from, since it did not fit: then the same command goes on.
    """
    given = job.config.batch_size
    if given is None or given == stored:
        return stored
    halves, size = set(), given
    while size > 1:
        size //= 2
        halves.add(size)
    if stored in halves and job.fitting(given, job.notify) == stored:
        return stored
    return given


def find_store(location: Location) -> StoreMetadata | None:
    """What the store at ``location`` says of itself, or None where there is no store."""
    try:
        return read_metadata(location)
    except StoreNotFoundError:
        return None


def embed_command(dataset: str, config: EmbedConfig) -> list[str]:
    """The command that embeds this in this way, without where and with what sizes."""
    command = ["gstds-embed", dataset]
    default = EmbedConfig()
    command += ["--model", config.model] if config.model != default.model else []
    command += ["--dtype", config.dtype] if config.dtype != default.dtype else []
    command += ["--decoder", config.decoder] if config.decoder != default.decoder else []
    command += ["--decode", config.decode] if config.decode == "scaled" else []
    command += ["--max-pixels", str(config.max_pixels)] if config.max_pixels != default.max_pixels else []
    return command + (["--allow-untrained"] if config.allow_untrained else [])
