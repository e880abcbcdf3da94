"""Reading embeddings, commit records first: zarr itself reads a missing chunk as fill values without a word."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int, Int64, UInt8

from gstds_cache.config import MEMORY_BUDGET
from gstds_cache.data.manifest import DatasetManifest
from gstds_cache.errors import GstdsError, IncompleteError, StoreNotFoundError, UsageError
from gstds_cache.files import mapped
from gstds_cache.files.derived import MIRROR, WritablePath, derived_paths, first_writable
from gstds_cache.files.location import LocationLike
from gstds_cache.seeding import rng_for
from gstds_cache.store import layout
from gstds_cache.store.access import Kind, RowAccess, WholeAccess, WindowAccess, choose, convert_into
from gstds_cache.store.commit_record import Quarantined, counts_of, valid_in, valid_of, without_embedding
from gstds_cache.store.embed_report import EmbedReport
from gstds_cache.store.grown import GrownMetadata, read_metadata
from gstds_cache.store.hidden import read_hidden
from gstds_cache.store.metadata import Problem, StoreMetadata, corrupt
from gstds_cache.store.mirror import ROWS, open_mirror


class EmbeddingStore:
    """A store opened for reading. Any number of threads may read from it.

    It can be pickled to other processes, which open it anew (spawn). A process forked from the one that opened it is
    refused: locks and network connections do not survive a fork.

    Attributes:
        location: Where the store is.
        spec: What it holds.
        commits: Commit record of each committed shard.
        kind: Kind of data set.
        classes: Class names by label.
        dataset_uri: Where the data set was when the store was made; None where that is not recorded.
        fingerprint: SHA-256 of the specification.
        hidden: Rows that selections leave out, ascending, int64 [A]; as they were when the store was opened.
        hidden_digest: Identity of these; empty where there are none.
        memory_budget: Bytes of embeddings that may be held in memory.
        access_asked: How they were asked for, e.g. ``auto``.
        access_kind: How rows are got at: ``memory``, ``mirror`` or ``window``.
        access_reason: Why, in words.
        fell_back: Why rows are not got at as was chosen, once they were; empty where they are.
        report: What the call of :func:`gstds_cache.embed` did that returned this store; None for any other.
    """

    def __init__(
        self,
        where: LocationLike | StoreMetadata,
        *,
        allow_partial: bool = False,
        memory_budget: int = MEMORY_BUDGET,
        access: Kind = "auto",
        mirror: Path | None = None,
        state: str | None = None,
        hidden: str | None = None,
        among: range | None = None,
    ) -> None:
        """Open a store and check its commit records against what is there (sizes, not hashes).

        Args:
            where: The store; or its metadata, whose commit records are not read again.
            allow_partial: Accept a store that is not complete; rows that are missing have ``valid`` 0.
            memory_budget: Bytes of embeddings that may be held in memory.
            access: How to get at rows; ``auto`` chooses by the budget (:mod:`gstds_cache.store.access`). ``device`` has
                a selection hold them on its GPU.
            mirror: The folder of the mirror; ``STORE.mirror`` by default.
            hidden: Digest of the rows that selections leave out, as an earlier selection names it; None for those that
                are hidden now.
            state: The fingerprint that the store had before rows were appended, to open it as it was then.
            among: Of a store that is not complete, the shards to know of: whoever fills a part of a store need not read
                the commit records of all others. None for all; a copy in another process knows all.

        Raises:
            StoreNotFoundError: There is no store at ``where``, or it never had the fingerprint ``state``.
            IncompleteError: The store is not complete and ``allow_partial`` is not set.
            ChunkCorruptError: An object is missing or of another size, or a record was altered.
            UsageError: A mirror was asked for, and the store is not complete.
        """  # noqa: DOC501
        self._metadata = where if isinstance(where, StoreMetadata) else read_metadata(where, state=state)
        self.location, self.spec = self._metadata.location, self._metadata.spec
        self.kind, self.classes, self.dataset_uri = (
            self._metadata.kind,
            self._metadata.classes,
            self._metadata.dataset_uri,
        )
        self.fingerprint = self.spec.fingerprint
        if state is not None and state != self.fingerprint:
            raise StoreNotFoundError(
                f"{self.location} has the fingerprint {self.fingerprint[:12]}, and never had {state[:12]}",
                hint="leave `state` out to open the store as it is",
            )
        self.memory_budget = memory_budget
        mirror = None if mirror is None else Path(mirror).absolute()
        # Whoever opens it anew, in another process, shall have the same rows.
        left_out = read_hidden(self._metadata.transport, self.spec.items, hidden)
        self.hidden: Int64[np.ndarray, " A"] = left_out.rows
        self.hidden_digest = left_out.digest
        self._opening = (
            self.location,
            allow_partial,
            memory_budget,
            access,
            mirror,
            self.fingerprint,
            self.hidden_digest,
        )
        self._process, self._making_access = os.getpid(), threading.Lock()
        record = self._metadata.complete()
        if record is None and not allow_partial:
            committed = len(self._metadata.committed())
            raise IncompleteError(
                f"{self.location} is not complete: {committed} of {self.spec.shards} shards are committed",
                hint=f"finish it with: {self._metadata.finish_command}",
            )
        if record is None and access == "mirror":
            raise UsageError(f"{self.location} is not complete: a mirror is made of whole stores only")
        self.commits = self._metadata.commits(among if record is None else None)
        problems = self._metadata.check_sizes(self.commits)
        if record is not None:
            problems += self._metadata.check_complete(record, self.commits)
        if problems:
            raise corrupt(self.location, problems)
        self._mirror, self.fell_back, self.access_asked = mirror, "", access
        self.report: EmbedReport | None = None
        self.access_kind, self.access_reason = self._choose_access(access, complete=record is not None)
        self._metadata.transport.mark_used()

    def _choose_access(self, access: Kind, *, complete: bool) -> tuple[Kind, str]:
        """Choose how to get at rows, and say why; a place for a mirror is looked for where one may be wanted.

        Raises:
            UsageError: A mirror was asked for, and there is no place for it.
        """
        wanted = access == "mirror" or (access in {"auto", "device"} and self.nbytes > self.memory_budget and complete)
        if wanted and self._mirror is None:
            paths = derived_paths(self.location, MIRROR)
            kept = [path for path in paths if os.path.isfile(path / ROWS)]  # noqa: PTH113 - Path's may raise
            place = WritablePath(kept[0]) if kept else first_writable(paths)
            if place.path is None and access == "mirror":
                raise UsageError(f"there is no place for a mirror: {place.note}", hint="name one: pass `mirror=FOLDER`")
            self._mirror, why = place.path, place.note
        else:
            why = ""
        return choose(
            access,
            nbytes=self.nbytes,
            memory_budget=self.memory_budget,
            mirror=self._mirror,
            complete=complete,
            free=0 if self._mirror is None else _free(self._mirror),
            why_none=why,
        )

    def with_hidden(self, digest: str) -> EmbeddingStore:
        """The same store with the rows hidden that an earlier selection names; "" for none."""
        if digest == self.hidden_digest:
            return self
        location, allow_partial, memory_budget, access, mirror, state, _ = self._opening
        return _reopen(location, allow_partial, memory_budget, access, mirror, state, digest)

    def __reduce__(self) -> tuple[object, ...]:
        return (_reopen, self._opening)

    def __len__(self) -> int:
        return self.spec.items

    def __repr__(self) -> str:
        return f"EmbeddingStore({str(self.location)!r}, {len(self)} x {self.spec.dim}, {self.spec.dtype})"

    @property
    def quarantined(self) -> list[Quarantined]:
        """Items that could not be decoded, in row order."""
        return [item for shard in sorted(self.commits) for item in self.commits[shard].quarantined]

    @cached_property
    def without_embedding(self) -> Int64[np.ndarray, " A"]:
        """Rows that have none, ascending; of a whole store those that could not be decoded. Made when first asked for.

        8 bytes a row: not for a store that is being filled, whose rows are nearly all missing.
        """
        return without_embedding(self.spec, self.commits)

    @cached_property
    def valid(self) -> UInt8[np.ndarray, " N"]:
        """What there is of each row: 0 missing, 1 ok, 2 undecodable; made when first asked for."""
        return valid_of(self.spec, self.commits)

    def valid_in(self, shard: int) -> UInt8[np.ndarray, " R"]:
        """A shard's part of :attr:`valid`."""
        return valid_in(self.spec, self.commits, shard)

    @cached_property
    def labels(self) -> Int[np.ndarray, " N"]:
        """Label of each row, -1 where there is none; in the smallest integers that hold them, so mind sums."""
        return self._metadata.labels()

    @property
    def grown(self) -> bool:
        """Whether rows were appended to the store since it was made."""
        return isinstance(self._metadata, GrownMetadata)

    def manifest(self) -> DatasetManifest:
        """The items that the store was made of, in the order of its rows (:meth:`StoreMetadata.manifest`)."""
        return self._metadata.manifest()

    @property
    def nbytes(self) -> int:
        """Bytes of all embeddings in memory."""
        return self.spec.items * self.spec.dim * np.dtype(self.spec.dtype).itemsize

    def shard(self, shard: int) -> Float[np.ndarray, "R D"]:
        """All rows of one committed shard, in the store's dtype; read-only.

        Raises:
            IncompleteError: The shard is not committed.
            ChunkCorruptError: Its object is missing or does not decode.
            UsageError: This process was forked after the store was opened.
        """  # noqa: DOC501
        self._refuse_fork()
        if shard not in self.commits:
            raise IncompleteError(f"{self.location}: shard {shard} is not committed")
        key = self._metadata.object_key(shard)
        try:
            return layout.read_shard(self.spec, shard, self._metadata.transport.get(key))
        except FileNotFoundError as error:
            raise corrupt(self.location, [Problem(key, f"{key} is missing", shard)]) from error
        except ValueError as error:
            raise corrupt(self.location, [Problem(key, f"{key} does not decode ({error})", shard)]) from error

    def gather(
        self, rows: Int64[np.ndarray, " B"], out: Float[np.ndarray, "B D"] | None = None
    ) -> Float[np.ndarray, "B D"]:
        """The embeddings of ``rows``, in that order.

        Args:
            rows: Rows that have an embedding; may repeat.
            out: Where to put them, float16 or float32 [B, D]; a new array in the store's dtype by default.

        Returns:
            ``out``.

        Raises:
            UsageError: A row is out of range, or has no embedding; or this process was forked after opening.
            ChunkCorruptError: A shard that is read is damaged.
        """
        self._refuse_fork()
        if rows.size and (rows.min() < 0 or rows.max() >= len(self)):
            raise UsageError(f"row {rows.min()}..{rows.max()} asked for, the store has 0..{len(self) - 1}")
        before, upto = (np.searchsorted(self.without_embedding, rows, side=side) for side in ("left", "right"))
        if (without := rows[before < upto]).size:
            raise UsageError(f"row {without[0]} has no embedding (valid = {self.valid[without[0]]})")
        if out is None:
            out = np.empty((len(rows), self.spec.dim), self.spec.dtype)
        self._access.gather(rows, out)
        return out

    def shuffled(
        self, batch_size: int, *, seed: int, epoch: int
    ) -> Iterator[tuple[Int64[np.ndarray, " B"], Float[np.ndarray, "B D"]]]:
        """Every row that has an embedding, exactly once, in an order keyed by (seed, epoch).

        In memory and on a mirror the order is a permutation of all rows. Else shards are shuffled, and then the rows
        inside each window of as many shards as the budget holds: every shard is read once.

        Args:
            batch_size: Rows of a batch (B); the last may be shorter.
            seed: Seed of the order.
            epoch: Which pass.

        Yields:
            Row numbers, and their embeddings as float32 in an array that the next batch overwrites.

        Raises:
            ChunkCorruptError: A shard that is read is damaged.
        """
        self._refuse_fork()
        rng = rng_for(seed, "shuffled", epoch)
        valid = self._rows_with_embedding()
        names = np.empty(batch_size, np.int64)
        batch = np.empty((batch_size, self.spec.dim), np.float32)
        filled = 0
        for rows, block, positions in self._access.windows(valid, rng):
            done = 0
            while done < len(rows):
                take = min(batch_size - filled, len(rows) - done)
                names[filled : filled + take] = rows[done : done + take]
                convert_into(block[positions[done : done + take]], batch[filled : filled + take])
                filled, done = filled + take, done + take
                if filled == batch_size:
                    yield names.copy(), batch
                    filled = 0
        if filled:
            yield names[:filled].copy(), batch[:filled]

    def _rows_with_embedding(self) -> Int64[np.ndarray, " M"]:
        rows, done = mapped.zeros((counts_of(self.spec, self.commits)[0],), np.int64), 0
        for shard in sorted(self.commits):
            found = np.flatnonzero(self.valid_in(shard) == layout.OK) + self.spec.rows_of(shard).start
            rows[done : done + len(found)] = found
            done += len(found)
        return rows

    @property
    def _access(self) -> RowAccess:
        with self._making_access:  # one thread reads the rows into memory, or makes the mirror
            return self._opened_access

    @cached_property
    def _opened_access(self) -> RowAccess:
        if self.access_kind == "mirror" and self._mirror is not None:
            try:
                return WholeAccess("mirror", open_mirror(self._mirror, self.spec, self.commits, self.shard))
            except OSError as error:
                if isinstance(error, GstdsError) or self._opening[3] == "mirror":
                    raise
                self.access_kind = "window"
                self.access_reason = self.fell_back = (
                    f"no mirror could be made in {self._mirror} ({error.strerror or error}): random rows are read "
                    "shard by shard, which is slow; name a place: pass `mirror=FOLDER`"
                )
        if self.access_kind == "window":
            return WindowAccess(self.spec, self.shard, self.memory_budget)
        rows = np.zeros((len(self), self.spec.dim), self.spec.dtype)
        for shard in self.commits:
            span = self.spec.rows_of(shard)
            rows[span.start : span.stop] = self.shard(shard)
        return WholeAccess("memory", rows)

    def _refuse_fork(self) -> None:
        if os.getpid() != self._process:
            raise UsageError(
                f"{self.location} was opened in process {self._process} and is used in {os.getpid()}, forked from it",
                hint="open the store in each process, or start processes with the method 'spawn' (or 'forkserver'), "
                "which pickles the store and opens it anew",
            )


def _reopen(
    where: LocationLike,
    allow_partial: bool,
    memory_budget: int,
    access: Kind,
    mirror: Path | None,
    state: str,
    hidden: str,
) -> EmbeddingStore:
    return EmbeddingStore(
        where,
        allow_partial=allow_partial,
        memory_budget=memory_budget,
        access=access,
        mirror=mirror,
        state=state,
        hidden=hidden,
    )


def _free(folder: Path) -> int:
    absolute = folder.absolute()
    existing = (path for path in (absolute, *absolute.parents) if os.path.isdir(path))  # noqa: PTH112 - Path's may raise
    return shutil.disk_usage(next(existing)).free
