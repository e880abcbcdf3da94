"""A store of rows that another tool computed: looked at once for what they are, then written shard by shard.

The fingerprint is known before anything is written, as for every store, so the rows are read twice: first to be judged
and hashed, then to be written. What was judged is compared, by a CRC-32C of each shard, with what is written.
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float32, Int64

from gstds_cache.data.manifest import DatasetManifest
from gstds_cache.data.vectors import StoredAs, Vectors
from gstds_cache.embedding.estimate import require_disk
from gstds_cache.encoders.encoder import normalized_rows
from gstds_cache.errors import DatasetError, IncompleteError, StoreNotFoundError, UsageError
from gstds_cache.files.digest import digest_of
from gstds_cache.files.location import Location
from gstds_cache.runtime.progress import Progress
from gstds_cache.runtime.threads import cores, in_threads
from gstds_cache.store import layout
from gstds_cache.store.commit_record import Quarantined
from gstds_cache.store.factory import open_transport
from gstds_cache.store.metadata import StoreMetadata
from gstds_cache.store.reader import EmbeddingStore
from gstds_cache.store.spec import IMPORTED, CacheSpec, require_same
from gstds_cache.store.writer import StoreWriter, open_writer

SHARD_BYTES = 16 << 20
"""Of a shard, four times that of a store that is embedded: nothing is lost with one that was not committed."""
UNIT = 4e-3
"""How far from 1 a row's length may be to be taken for 1: a unit row rounded to bfloat16 is off by 0.002 at most."""
LENGTHS_AT_ONCE = 1024
THREADS = 4
MOST_NAMED = 5

NOT_FINITE = "not a number: the imported vector holds NaN or Inf"
NO_LENGTH = "no features: the imported vector is zeros alone"
NO_VECTOR = "no vector: the imported table has null there"


@dataclass(frozen=True)
class JudgedShard:
    """What a shard's rows are.

    Attributes:
        content_sha256: Hash of the rows as they are stored.
        object_sha256: Hash of the shard's object.
        crc: CRC-32C in the object.
        bad: Rows that get no embedding, and why, ascending.
        scaled: Rows that were divided by their lengths.
        shortest: Smallest length of those.
        longest: Largest length of those.
    """

    content_sha256: str
    object_sha256: str
    crc: bytes
    bad: tuple[tuple[int, str], ...]
    scaled: int
    shortest: float
    longest: float


@dataclass(eq=False)
class VectorImport:
    """One import: vectors, the items that they belong to, and how they are stored.

    Attributes:
        vectors: The vectors.
        order: Which vector is of each item, int64 [N]; None where vector i is of item i.
        manifest: The items.
        dtype: How rows are stored.
        model: What made them, in the user's words; empty where nobody says.
        shard_rows: Rows of a shard; None takes about :data:`SHARD_BYTES`.
        notes: What the user should be told.
    """

    vectors: Vectors
    order: Int64[np.ndarray, " N"] | None
    manifest: DatasetManifest
    dtype: StoredAs
    model: str
    shard_rows: int | None
    notes: list[str] = field(default_factory=list)

    def sized(self) -> CacheSpec:
        """The specification, but for the digests of vectors and items: it has all sizes."""
        row_bytes = self.vectors.dim * np.dtype(self.dtype).itemsize
        return CacheSpec(
            items=len(self.manifest),
            items_root="",
            encoder={},
            dim=self.vectors.dim,
            dtype=self.dtype,
            batch_size=1,
            # No more than there are: the last shard's object is filled up to whole shards.
            shard_rows=min(self.shard_rows or max(1, SHARD_BYTES // row_bytes), len(self.manifest)),
        )

    def read(self, span: range) -> Float[torch.Tensor, "R D"]:
        """The vectors of a shard's items, as they are."""
        given = self.vectors.read(span if self.order is None else self.order[span.start : span.stop])
        self.vectors.release()
        return torch.from_numpy(given)

    def stored_rows(self, span: range) -> tuple[Float[np.ndarray, "R D"], JudgedShard]:
        """The rows of a shard as they are stored, and what they are but for the hashes.

        A row that has unit length is kept to the last bit; others are divided by their lengths, as the rows of every
        store are. A row that cannot be is zeros.
        """
        tensor = self.read(span)
        lengths = _lengths(tensor)
        odd = torch.nonzero(~((lengths - 1).abs() <= UNIT)).flatten()
        stored = tensor.to(getattr(torch, self.dtype), copy=bool(len(odd)))
        bad: list[tuple[int, str]] = []
        kept = odd[:0]
        if len(odd):
            scaled = normalized_rows(tensor[odd])
            finite = torch.isfinite(tensor[odd]).all(dim=1)
            zero = (tensor[odd] == 0).all(dim=1)
            fine = finite & ~zero
            stored[odd] = torch.where(fine[:, None], scaled, 0.0).to(stored.dtype)
            null = np.isin(self._source_rows(span, odd.numpy()), self.vectors.without)
            for place, number, empty, none in zip(odd.tolist(), finite.tolist(), zero.tolist(), null, strict=True):
                if none or empty or not number:
                    bad.append((span.start + place, NO_VECTOR if none else NO_LENGTH if empty else NOT_FINITE))
            kept = odd[fine]
        length = lengths[kept].double()
        extreme = ~torch.isfinite(length) | (length == 0)  # in float32
        length[extreme] = torch.linalg.vector_norm(tensor[kept[extreme]].double(), dim=1)
        ends = (float(length.min()), float(length.max())) if len(length) else (1.0, 1.0)
        return stored.numpy(), JudgedShard("", "", b"", tuple(bad), len(kept), *ends)

    def _source_rows(self, span: range, places: Int64[np.ndarray, " B"]) -> Int64[np.ndarray, " B"]:
        rows = places + span.start
        return rows if self.order is None else self.order[rows]


def import_vectors(
    job: VectorImport, where: Location, *, attributes: dict[str, Any], progress: Progress
) -> tuple[EmbeddingStore, int, dict[str, float]]:
    """Make a complete store of vectors, or find that this was done already.

    Args:
        job: What to import.
        where: The store.
        attributes: ``kind``, ``classes`` and ``provenance``.
        progress: Called with phase, shards done, shards in all, and no shares of the time.

    Returns:
        The store; the rows that were committed before; and seconds by phase.

    Raises:
        UsageError: No vector can be used, or ``where`` is no place for a store.
        FingerprintMismatchError: The store there holds something else.
        DatasetError: The vectors changed while they were read.
        IncompleteError: The disk is too small, or another process writes the store.
    """
    begun, seconds = time.perf_counter(), {}
    spec, judged = _judge(job, progress)
    seconds["judge"] = time.perf_counter() - begun
    stored = _find(where)
    if stored is not None:
        require_same(stored.spec, spec, where=stored.location)
        with suppress(StoreNotFoundError, IncompleteError):
            store = EmbeddingStore(stored)
            return store, spec.items, seconds | {"total": time.perf_counter() - begun}
    need = sum(len(spec.rows_of(shard)) for shard in range(spec.shards)) * spec.dim * np.dtype(spec.dtype).itemsize
    if stored is None:
        require_disk(need, open_transport(where).free_bytes(), location=str(where))
    writing = time.perf_counter()
    manifest = job.manifest
    with open_writer(where, spec, labels=manifest.labels, items=manifest.to_arrow(), attributes=attributes) as writer:
        committed = writer.recover()
        before = sum(len(spec.rows_of(shard)) for shard in committed)
        _write(job, writer, judged, [shard for shard in range(spec.shards) if shard not in committed], progress)
        finishing = time.perf_counter()
        seconds["write"] = finishing - writing
        writer.finish(lambda done, total: progress("check", done, total, {}))
        metadata = writer.metadata
    store = EmbeddingStore(metadata)
    ended = time.perf_counter()
    return store, before, seconds | {"finish": ended - finishing, "total": ended - begun}


def _lengths(tensor: Float[torch.Tensor, "R D"]) -> Float32[torch.Tensor, " R"]:
    """The rows' lengths in float32.

    Few calls: each gives up Python's lock, and waits 5 ms for it beside a thread that computes in Python, as the items'
    root is. Of all rows at once torch would hold a copy in float32.
    """
    parts = []
    for start in range(0, len(tensor), LENGTHS_AT_ONCE):
        part = tensor[start : start + LENGTHS_AT_ONCE]
        part = part.float() if part.dtype == torch.float64 else part  # vector_norm widens, and never narrows
        parts.append(torch.linalg.vector_norm(part, dim=1, dtype=torch.float32))
    return torch.cat(parts)


def _find(where: Location) -> StoreMetadata | None:
    try:
        return StoreMetadata(where)
    except StoreNotFoundError:
        return None


def _threads() -> int:
    return min(THREADS, cores())


def _judge(job: VectorImport, progress: Progress) -> tuple[CacheSpec, list[JudgedShard]]:
    """Look at every row: the specification, and what each shard is; what was found is noted for the user.

    Raises:
        UsageError: No row can be used.
    """
    sized = job.sized()

    def judge(shard: int) -> JudgedShard:
        rows, found = job.stored_rows(sized.rows_of(shard))
        end = layout.shard_end(sized, shard, rows)
        content, whole = layout.hashes_of(rows, end)
        return replace(found, content_sha256=content, object_sha256=whole, crc=end[-4:])

    judged = []
    with ThreadPoolExecutor(1, thread_name_prefix="gstds-root") as beside:  # a second for a million items, in Python
        root = beside.submit(lambda: job.manifest.root)
        for found in in_threads(judge, range(sized.shards), _threads()):
            judged.append(found)
            progress("judge", len(judged), sized.shards, {})
    bad = [row for found in judged for row in found.bad]
    if len(bad) == sized.items:
        raise UsageError(
            f"{job.vectors.name}: no row can be used: {bad[0][1]}",
            hint="check how the vectors were saved",
        )
    _tell(job, judged, bad)
    # The hashes of the rows as stored, shard by shard: the same vectors give the same digest from any file.
    encoder = {
        "model": f"{IMPORTED}:{job.model}" if job.model else IMPORTED,
        "vectors": digest_of([found.content_sha256 for found in judged]),
        "normalisation": "l2",
    }
    return replace(sized, encoder=encoder, items_root=root.result()), judged


def _tell(job: VectorImport, judged: list[JudgedShard], bad: list[tuple[int, str]]) -> None:
    scaled = [found for found in judged if found.scaled]
    if scaled:
        low, high = min(found.shortest for found in scaled), max(found.longest for found in scaled)
        job.notes.append(
            f"{sum(found.scaled for found in scaled):,} of {len(job.manifest):,} vectors had lengths of {low:.4g} to "
            f"{high:.4g} and were divided by them: the rows of a store have length 1, and only directions count"
        )
    for reason in dict.fromkeys(reason for _, reason in bad):
        rows = [row for row, why in bad if why == reason]
        named = ", ".join(f"{row} ({job.manifest.ids[row]})" for row in rows[:MOST_NAMED])
        more = f" and {len(rows) - MOST_NAMED:,} more" if len(rows) > MOST_NAMED else ""
        job.notes.append(f"{len(rows):,} rows are quarantined, {reason}: {named}{more}")


def _write(
    job: VectorImport, writer: StoreWriter, judged: list[JudgedShard], shards: list[int], progress: Progress
) -> None:
    """Commit ``shards``, several at a time.

    Raises:
        DatasetError: A shard's rows are not what they were when they were judged.
    """
    spec, ids = writer.spec, job.manifest.ids

    def commit(shard: int) -> int:
        found = judged[shard]
        span = spec.rows_of(shard)
        kept = not found.bad and not found.scaled  # as they are; nobody has to look at them again
        rows = job.read(span).to(getattr(torch, job.dtype)).numpy() if kept else job.stored_rows(span)[0]
        data = layout.shard_object(spec, shard, rows)
        if data[-4:] != found.crc:
            raise DatasetError(
                f"{job.vectors.name} changed while it was imported: rows {span.start:,} and following",
                hint="import again when nothing writes to it",
            )
        quarantined = [Quarantined(row, ids[row], reason) for row, reason in found.bad]
        writer.commit_object(shard, data, found.content_sha256, found.object_sha256, quarantined, read_back=False)
        return shard

    for done, _ in enumerate(in_threads(commit, shards, _threads()), 1):
        progress("write", done, len(shards), {})
