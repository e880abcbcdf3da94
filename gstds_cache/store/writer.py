"""Making and filling a store. A shard is committed object first, then commit record; COMPLETE comes last of all."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
from jaxtyping import Float, Int64

from gstds_cache.errors import (
    ChunkCorruptError,
    FingerprintMismatchError,
    IncompleteError,
    IntegrityError,
    NondeterminismError,
    UsageError,
    command_line,
)
from gstds_cache.files.digest import canonical_json, sha256_hex
from gstds_cache.files.location import Location, LocationLike
from gstds_cache.runtime.progress import Counted
from gstds_cache.store import layout
from gstds_cache.store.commit_record import CommitRecord, Quarantined, commits_root, counts_of, valid_of
from gstds_cache.store.factory import open_transport
from gstds_cache.store.metadata import METADATA_KEYS, Complete, StoreMetadata, corrupt
from gstds_cache.store.spec import CacheSpec, require_same
from gstds_cache.store.transport import Transport


class StoreWriter:
    """Commits shards to one store, under its writer lock. Made by :func:`open_writer`.

    Attributes:
        location: Where the store is.
        spec: What it holds.
        metadata: What it says of itself; knows every commit record that this writer read or wrote.
    """

    def __init__(self, metadata: StoreMetadata) -> None:
        self.location = metadata.location
        self.spec = metadata.spec
        self.metadata = metadata
        self._transport = metadata.transport

    def recover(self, among: range | None = None) -> dict[int, CommitRecord]:
        """Clear away what an interrupted run left, and return what is committed.

        Temporary files are deleted, and objects without a commit record as well, unless the store has other writers:
        theirs may be just about to get one. (What is left is overwritten when its shard is committed.) A committed
        object that is missing or of another size is not passed over.

        Args:
            among: The shards that this writer is to fill, where others fill the rest; None for all.

        Returns:
            The commit records of these shards, by shard.

        Raises:
            ChunkCorruptError: A committed object is missing or of another size, or a commit record is damaged.
        """  # noqa: DOC501
        self._transport.collect_temporaries()
        commits = self.metadata.commits(among)
        if self._transport.exclusive and among is None:
            committed = {layout.object_key(shard) for shard in commits}
            for key in self._transport.sizes("embeddings/c/"):
                if key not in committed:
                    self._transport.delete(key)
        problems = self.metadata.check_sizes(commits)
        if problems:
            raise corrupt(self.location, problems)
        return commits

    def committed(self, shard: int) -> bool:
        """Whether the shard has a commit record by now; another writer may have given it one."""
        return self._transport.exists(self.spec.names.commit_key(shard))

    def read_commit(self, shard: int) -> CommitRecord:
        """The commit record of a shard that has one."""
        names = self.spec.names
        data = self._transport.get(names.commit_key(shard))
        return CommitRecord.from_bytes(data, names, shard=shard, fingerprint=self.spec.fingerprint)

    def discard(self, shards: Sequence[int]) -> None:
        """Undo the commit of ``shards``: COMPLETE goes first, then each commit record, then its object.

        A note of the shards stays until :meth:`end_repair` or :meth:`finish`. It tells a repair that was killed from a
        run of embedding that did not come so far.
        """
        names = self.spec.names
        note = {names.shards: sorted({*shards, *self.metadata.discarded()})}
        self._transport.put(layout.REPAIR, canonical_json(note))
        self._transport.delete(layout.COMPLETE)
        for shard in shards:
            self._transport.delete(names.commit_key(shard))
            self.metadata.forget(shard)
            self._transport.delete(layout.object_key(shard))

    def end_repair(self) -> None:
        """Forget which shards were discarded: they are committed again."""
        if self._transport.exists(layout.REPAIR):
            self._transport.delete(layout.REPAIR)

    def commit(
        self, shard: int, rows: Float[np.ndarray, "R D"], quarantined: Sequence[Quarantined] = ()
    ) -> CommitRecord:
        """Commit one shard: write the object, read it back, then write the commit record.

        Args:
            shard: The shard.
            rows: Its rows in the store's dtype, [R, D].
            quarantined: Its items that could not be decoded; their rows are zero.

        Returns:
            The commit record, which may be one that was there already with the same content.

        Raises:
            UsageError: ``rows`` has another shape or dtype, or holds NaN or Inf.
            IntegrityError: The object read back is not the one written.
            NondeterminismError: The shard is committed already with other content.
        """
        span = self.spec.rows_of(shard)
        if rows.shape != (len(span), self.spec.dim) or rows.dtype != np.dtype(self.spec.dtype):
            expected = (len(span), self.spec.dim)
            raise UsageError(
                f"shard {shard}: got rows {rows.shape} {rows.dtype}, expected {expected} {self.spec.dtype}"
            )
        if not np.isfinite(rows).all():
            raise UsageError(f"shard {shard}: rows hold NaN or Inf")
        data = layout.shard_object(self.spec, shard, rows)
        return self.commit_object(shard, data, *layout.hashes_of(rows, bytes(data[rows.nbytes :])), quarantined)

    def commit_object(
        self,
        shard: int,
        data: bytes | memoryview,
        content_sha256: str,
        object_sha256: str,
        quarantined: Sequence[Quarantined] = (),
        *,
        read_back: bool = True,
    ) -> CommitRecord:
        """Commit one shard whose object is made and hashed already (:func:`gstds_cache.store.layout.shard_object`).

        Args:
            shard: The shard.
            data: Its object.
            content_sha256: Hash of its rows.
            object_sha256: Hash of ``data``.
            quarantined: Its items that have no embedding; their rows are zero.
            read_back: Whether the object is read back and hashed now. :meth:`finish` hashes every object in any case:
                where making a shard again costs nothing, once is enough.

        Returns:
            The commit record, which may be one that was there already with the same content.

        Raises:
            IntegrityError: The object read back is not the one written.
            NondeterminismError: The shard is committed already with other content.
        """
        span = self.spec.rows_of(shard)
        commit = CommitRecord(
            shard=shard,
            rows=(span.start, span.stop),
            object_sha256=object_sha256,
            content_sha256=content_sha256,
            size=len(data),
            fingerprint=self.spec.fingerprint,
            quarantined=tuple(quarantined),
        )
        if self.committed(shard):
            return self._same_or_refuse(commit)
        # Where several write, an object with these bytes is as good as ours, and is not replaced under a reader.
        if self._transport.exclusive or not self._transport.put_if_absent(layout.object_key(shard), data):
            self._transport.put(layout.object_key(shard), data)
        if read_back and self._transport.sha256(layout.object_key(shard)) != commit.object_sha256:
            raise IntegrityError(
                f"{self.location}: shard {shard} read back differs from what was written; check the disk"
            )
        names = self.spec.names
        if not self._transport.put_if_absent(names.commit_key(shard), commit.to_bytes(names)):
            return self._same_or_refuse(commit)
        self.metadata.remember(commit)
        return commit

    def finish(self, progress: Counted | None = None) -> Complete:
        """Check every object once more, write ``valid`` and COMPLETE.

        Args:
            progress: Called with shards checked and shards in all.

        Returns:
            The completeness record.

        Raises:
            IncompleteError: Shards are not committed yet.
            ChunkCorruptError: A committed object is not what its commit record says (a late write, say).
        """  # noqa: DOC501
        commits = self.metadata.commits()
        missing = [shard for shard in range(self.spec.shards) if shard not in commits]
        if missing:
            raise IncompleteError(
                f"{self.location}: {len(missing)} of {self.spec.shards} shards are not committed, first {missing[:5]}",
                hint="run the same gstds-embed command again",
            )
        problems = self.metadata.check_hashes(commits, progress)
        if problems:
            raise corrupt(self.location, problems)
        self._transport.put(layout.VALID, layout.valid_object(self.spec, valid_of(self.spec, commits)))
        ok, quarantined = counts_of(self.spec, commits)
        record = Complete(
            fingerprint=self.spec.fingerprint,
            items=self.spec.items,
            ok=ok,
            quarantined=quarantined,
            shards=self.spec.shards,
            commits_sha256=commits_root(commits, self.spec.names),
            objects={key: self._transport.sha256(key) for key in METADATA_KEYS},
        )
        self.end_repair()
        self._transport.put(layout.COMPLETE, record.to_bytes(self.spec.names))
        return record

    def _same_or_refuse(self, commit: CommitRecord) -> CommitRecord:
        committed = self.read_commit(commit.shard)
        if committed == commit:
            self.metadata.remember(committed)
            return committed
        hint = "the committed one was kept; embed on one kind of machine with one set of library versions"
        key = layout.object_key(commit.shard)
        if self._transport.sha256(key) != committed.object_sha256:
            # Another writer's commit record came between our object and our commit record. A missing object is found by
            # every reader, one with other rows by none.
            self._transport.delete(key)
            hint = f"neither was kept; make the shard anew with: {command_line('gstds-cache', 'repair', self.location)}"
        raise NondeterminismError(
            f"{self.location}: shard {commit.shard} was embedded twice with different results (content "
            f"{committed.content_sha256[:12]} is committed, {commit.content_sha256[:12]} came now)",
            hint=hint,
        )


@contextmanager
def open_writer(
    where: LocationLike,
    spec: CacheSpec,
    *,
    labels: Int64[np.ndarray, " N"],
    items: bytes | memoryview,
    attributes: dict[str, Any],
    shared: bool = False,
) -> Iterator[StoreWriter]:
    """Open the store at ``where`` for writing, making it first where there is none.

    Args:
        where: The store: a directory, or a URL.
        spec: What it holds; a store with another specification is refused and left alone.
        labels: Label of each row, -1 where there is none.
        items: Bytes of ``items.arrow``.
        attributes: ``kind``, ``classes`` and ``provenance`` of the data set and the run.
        shared: Whether others may write at once that share the lock as well.

    Yields:
        The writer. A directory's is the only one until the block ends unless it is ``shared``; a bucket may have
        several at once.

    Raises:
        UsageError: ``where`` is there and is no store.
        FingerprintMismatchError: The store at ``where`` holds something else.
        IncompleteError: Another process is writing the store.
    """
    location = Location.parse(where).absolute()
    transport = open_transport(location, shared=shared)
    if not transport.exists(layout.GROUP):
        _require_room(location, transport)
    with transport.lock():
        described = {"fingerprint": spec.fingerprint, "spec": spec.to_dict(), **attributes}
        objects = layout.metadata_objects(spec, {"gstds": described}, labels) | {layout.ITEMS: items}
        _make(transport, objects)
        metadata = StoreMetadata(location, transport=transport)  # the lock of this transport is the one that is held
        stored = metadata.spec
        require_same(stored, spec, where=location)
        if stored != spec or attributes.get("provenance", {}) != metadata.provenance:
            # Begun by another run, perhaps of a version that wrote another format.
            described |= {"fingerprint": stored.fingerprint, "spec": stored.to_dict()}
            described["provenance"] = metadata.provenance
            objects |= layout.metadata_objects(stored, {"gstds": described}, labels)
        # What an interrupted run left has no hashes yet, and COMPLETE would vouch for whatever it has become.
        if _write_anew(transport, objects):
            metadata = StoreMetadata(location, transport=transport)
        del items, objects  # Mapped, and no longer needed.
        yield StoreWriter(metadata)


def join_writer(where: LocationLike, fingerprint: str) -> StoreWriter:
    """A writer beside others, of a store that another process has opened for writing and will finish.

    It takes no lock: the process that opened the store has it. Several may commit the same shard.

    Args:
        where: The store.
        fingerprint: What that process writes.

    Returns:
        The writer.

    Raises:
        StoreNotFoundError: This machine sees no store there.
        FingerprintMismatchError: It holds something else.
    """
    location = Location.parse(where).absolute()
    metadata = StoreMetadata(location, transport=open_transport(location, shared=True))
    if metadata.spec.fingerprint != fingerprint:
        raise FingerprintMismatchError(
            f"{location}: on {platform.node()} it has the fingerprint {metadata.spec.fingerprint[:12]}, expected "
            f"{fingerprint[:12]}",
            hint="give a place for the store that every machine sees as the same: a shared folder, or s3://",
        )
    return StoreWriter(metadata)


@contextmanager
def reopen_writer(
    where: LocationLike,
    *,
    labels: Int64[np.ndarray, " N"],
    items: bytes | memoryview,
    attributes: dict[str, Any] | None = None,
) -> Iterator[StoreWriter]:
    """Open a store that is there, to mend it: every small object is written anew from what it describes.

    Args:
        where: The store.
        labels: Label of each row, -1 where there is none.
        items: Bytes of ``items.arrow``.
        attributes: ``kind`` and ``classes`` for a group that is not the one COMPLETE tells of; default: what it says.
            Its provenance is kept.

    Yields:
        The writer, as from :func:`open_writer`.

    Raises:
        StoreNotFoundError: There is no store at ``where``.
        IntegrityError: Its specification is damaged, and no one can say what the store holds.
        IncompleteError: Another process is writing the store.
    """
    metadata = StoreMetadata(where)
    with metadata.transport.lock():
        described = {
            "fingerprint": metadata.spec.fingerprint,
            "spec": metadata.spec.to_dict(),
            **(attributes or {"kind": metadata.kind, "classes": list(metadata.classes)}),
            "provenance": metadata.provenance,
        }
        objects = layout.metadata_objects(metadata.spec, {"gstds": described}, labels) | {layout.ITEMS: items}
        with suppress(ChunkCorruptError):
            record, group = metadata.complete(), metadata.transport.get(layout.GROUP)
            if record is not None and record.objects.get(layout.GROUP) == sha256_hex(group):
                objects[layout.GROUP] = group
        if _write_anew(metadata.transport, objects):
            metadata = StoreMetadata(metadata.location, transport=metadata.transport)
        del items, objects
        yield StoreWriter(metadata)


def _make(transport: Transport, objects: dict[str, bytes | memoryview]) -> None:
    """Write the objects of a new store, the group last: a store is there when its group is."""
    if transport.exists(layout.GROUP):
        return
    for key in sorted(objects, key=lambda key: (key == layout.GROUP, key != layout.ITEMS, key)):
        if transport.exclusive:
            transport.put(key, objects[key])
        else:
            # Several writers may be making the store; all of them go on with the first one's.
            transport.put_if_absent(key, objects[key])


def _write_anew(transport: Transport, objects: dict[str, bytes | memoryview]) -> bool:
    """Replace the small objects that are missing or have other bytes; returns whether there were any."""
    replaced = False
    for key, data in objects.items():
        if not transport.exists(key) or transport.sha256(key) != sha256_hex(data):
            transport.delete(layout.COMPLETE)
            transport.put(key, data)
            replaced = True
    return replaced


def _require_room(location: Location, transport: Transport) -> None:
    """Refuse a location that holds something else.

    Raises:
        UsageError: It does.
    """
    path = location.path
    if path is not None and path.exists() and not path.is_dir():
        raise UsageError(f"`cache`: got the file {path}, expected a directory, or nothing there yet")
    strange = _strange_names(location, transport)
    if strange and not transport.exclusive:
        strange = _strange_names(location, transport)  # another writer made the store while names were listed
    if strange:
        raise UsageError(
            f"`cache`: {location} is not empty and is no store (it holds {strange[0]!r})",
            hint="nothing was changed; give the path of a new directory",
        )


def _strange_names(location: Location, transport: Transport) -> list[str]:
    """What lies at a location and is not of a store."""
    path = location.path
    if path is None:
        names = {key.partition("/")[0] for key in transport.sizes()}
    else:
        entries = path.iterdir() if path.is_dir() else ()
        names = {entry.name for entry in entries if not entry.name.startswith(".")}
    # A creation that was killed has written items.arrow first of all.
    return sorted(names - layout.OWN_NAMES if layout.ITEMS in names else names)
