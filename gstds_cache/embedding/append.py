"""Rows added to a store that is whole: new items are embedded into a part, and one record makes them count.

What is in DATASET and in the store is found by id. An item that is there with the same bytes and label is passed over;
one that is there with others is refused. New items are appended in the order of the data set; where their bytes are in
the store under another id, the row is taken over and nothing is computed.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Int64
from PIL import Image

from gstds_cache.config import EmbedConfig
from gstds_cache.data.align import rows_by_id
from gstds_cache.data.decode import UndecodableError
from gstds_cache.data.files import Files
from gstds_cache.data.hash_cache import HashCache
from gstds_cache.data.hashed import as_hashed
from gstds_cache.data.manifest import DatasetManifest, build_manifest
from gstds_cache.data.names import AT_ONCE, Names
from gstds_cache.data.source import ImageSource
from gstds_cache.data.subset import Subset, taken
from gstds_cache.embedding.decoding import decode_by, try_decoder
from gstds_cache.embedding.estimate import disk_bytes, require_disk
from gstds_cache.embedding.job import EmbedJob
from gstds_cache.embedding.reuse import KnownRows, count_readable_among
from gstds_cache.embedding.run import fill, provenance_of
from gstds_cache.embedding.settle import prepare_as_stored
from gstds_cache.encoders.encoder import Encoder
from gstds_cache.encoders.factory import open_encoder
from gstds_cache.errors import FingerprintMismatchError, IncompleteError, UsageError
from gstds_cache.files.location import Location
from gstds_cache.runtime.devices import resolve_devices
from gstds_cache.runtime.notify import Notify
from gstds_cache.runtime.progress import Progress
from gstds_cache.store import layout
from gstds_cache.store.grown import GrownMetadata, Growth, joined, read_metadata
from gstds_cache.store.metadata import StoreMetadata
from gstds_cache.store.reader import EmbeddingStore
from gstds_cache.store.remove import remove_store
from gstds_cache.store.spec import CacheSpec, code_changed
from gstds_cache.store.writer import open_writer

LOST = "the store has no embedding for this image"


@dataclass(frozen=True)
class AppendReport:
    """What an append did.

    Attributes:
        location: The store, as a user names it.
        fingerprint_before: Its fingerprint before.
        fingerprint: Its fingerprint now: that of a store of all its items that was made at once.
        items_before: Rows before.
        items: Rows now.
        appended: New rows; the last of the store.
        already_there: Items of the data set that the store had, with the same bytes and label.
        not_in_dataset: Items of the store that the data set does not have; their rows stay.
        in_order: Whether the data set has all rows of the store in their order: a selection from it trains on it.
        embedded: Images put through the model.
        reused: New rows whose bytes the store had under another id.
        quarantined: New items without an embedding.
        seconds: Time by phase.
    """

    location: str
    fingerprint_before: str
    fingerprint: str
    items_before: int
    items: int
    appended: int
    already_there: int
    not_in_dataset: int
    in_order: bool
    embedded: int
    reused: int
    quarantined: int
    seconds: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON-able values."""
        return asdict(self)


@dataclass(frozen=True)
class _NewItems:
    """What of a data set a store does not have.

    Attributes:
        rows: Its rows in the data set, int64 [n], ascending.
        already_there: How many items the store has.
        in_order: Whether the data set begins with the store's items, in their order.
    """

    rows: Int64[np.ndarray, " n"]
    already_there: int
    in_order: bool


@dataclass(frozen=True, eq=False, kw_only=True)
class PartSource(Subset):
    """The items of a part: some that are in the store already, whose images are not needed, and then new ones.

    Attributes:
        before: How many are in the store already.
        reasons: Why those that have no embedding have none, by position.
    """

    before: int
    reasons: dict[int, str]

    @property
    def files(self) -> Files | None:
        """None: not every item is a file of this data set."""
        return None

    def image(self, row: int) -> Image.Image:
        """A new item in RGB.

        Raises:
            UndecodableError: It is one of those before: the store has no embedding for it either.
        """
        if row < self.before:
            raise UndecodableError(self.reasons.get(row, LOST))
        return super().image(row)


def append_dataset(
    where: Location,
    source: ImageSource,
    config: EmbedConfig,
    *,
    progress: Progress,
    notify: Notify,
    hash_cache: HashCache,
) -> AppendReport:
    """Append what is new in ``source`` to the store at ``where``.

    Args:
        where: The store, which is whole.
        source: The data set.
        config: How to embed; model, dtype and sizes are the store's own.
        progress: Called with phase, images done, images in all, and shares of the time.
        notify: Called with lines for the user.
        hash_cache: Hashes of files remembered from earlier runs.

    Returns:
        What was done.

    Raises:
        UsageError: The rows of the store were imported.
        FingerprintMismatchError: The model, or how it is used, is not the store's; or an item or class of the data set
            is another than in the store.
        ChunkCorruptError: The store is damaged.
        IncompleteError: It is not complete, or another process writes it; or something ran out, and the same call goes
            on.
        IntegrityError: A file changed, or came back, since it was hashed.
    """
    begun = time.perf_counter()
    transport = read_metadata(where).transport
    with transport.lock():
        transport.collect_temporaries()
        metadata = read_metadata(where, transport=transport)
        store = EmbeddingStore(metadata)
        if store.spec.imported:
            raise UsageError(
                f"{where} holds imported rows: no model here makes others like them",
                hint="import all vectors, old and new, into a new store",
            )
        manifest = build_manifest(
            source, hash_cache=hash_cache, progress=lambda done, total: progress("hash", done, total, {})
        )
        old = store.manifest()
        new = _new_items(old, manifest, str(where))
        seconds = {"hash": time.perf_counter() - begun}
        if not len(new.rows):
            seconds["total"] = time.perf_counter() - begun
            return _report(store, store, old, new, 0, 0, seconds)
        encoder = open_encoder(config.model, allow_untrained=True)
        device = resolve_devices(config.device)[0]
        decode_by(encoder, config.decoder, device)
        prepare_as_stored(encoder, store.spec.encoder, notify)
        _require_same_encoder(store, encoder)
        part, spec, kept = _part_of(store, old, manifest, source, new)
        job = EmbedJob(part, config, device, encoder, notify)
        growth = _growth(metadata, store, old, part_manifest=kept, spec=spec, new=new, uri=source.uri)
        folder = where.below(layout.PARTS, growth.part)
        _clear_leftovers(where, store, growth)
        need = disk_bytes(part, len(kept), spec.shard_rows, job.row_bytes())
        require_disk(need, transport.free_bytes(), location=str(where))
        try_decoder(encoder, device)
        job.known = KnownRows([store.location], kept.sha256, encoder.spec.to_dict(), store.spec.dtype)
        attributes = {
            "kind": kept.kind,
            "classes": list(kept.classes),
            "provenance": provenance_of(source.uri, config, job.devices),
        }
        embedding = time.perf_counter()
        with open_writer(folder, spec, labels=kept.labels, items=kept.to_arrow(), attributes=attributes) as writer:
            task, _ = fill(job, writer, None, None, progress)
            writer.finish(lambda done, total: progress("check", done, total, {}))
        seconds["embed"] = time.perf_counter() - embedding
        # The one step that makes all of it count. Where several writers may be at work, the first one's record stays.
        if not transport.put_if_absent(growth.key, growth.to_bytes()):
            raise IncompleteError(
                f"{where}: another process appended to it meanwhile", hint="run the same command again: it goes on"
            )
        grown = EmbeddingStore(read_metadata(where, transport=transport))
    seconds["total"] = time.perf_counter() - begun
    # Rows that the part has from the store are known, but for those that have no embedding, which fail again.
    known, failed = part.before - len(part.reasons), len(part.reasons)
    return _report(
        store, grown, old, new, max(0, task.clock.images - failed), max(0, task.clock.reused - known), seconds
    )


def _new_items(old: DatasetManifest, manifest: DatasetManifest, where: str) -> _NewItems:
    """What of a data set a store does not have.

    Raises:
        FingerprintMismatchError: An item that the store has is another in the data set, or its classes are others; or
            the data set has all images of the store, each under another id.
    """
    if manifest.classes and not old.classes and old.labels.max(initial=-1) >= 0:
        raise FingerprintMismatchError(
            f"labels in {where} are numbers without names, and the data set has the classes {manifest.classes[0]!r} to "
            f"{manifest.classes[-1]!r}: labels would mean something else",
            hint="nothing was changed; append a data set whose labels are the same numbers, without names",
        )
    if tuple(manifest.classes[: len(old.classes)]) != tuple(old.classes):
        theirs = next((n for n, m in zip(manifest.classes, old.classes, strict=False) if n != m), "none more")
        place = next((i for i, n in enumerate(old.classes) if manifest.classes[i : i + 1] != (n,)), 0)
        raise FingerprintMismatchError(
            f"class {place} is {old.classes[place]!r} in {where} and {theirs!r} in the data set: labels would mean "
            "something else",
            hint="nothing was changed; append a data set whose classes begin with the store's, in their order",
        )
    at = rows_by_id(manifest.ids, old.ids)
    there = np.flatnonzero(at >= 0)
    if not len(there):
        _refuse_renumbered(old, manifest, where)
        _refuse_another_way_in(old, manifest, where)
    other = (manifest.sha256[there] != old.sha256[at[there]]).any(axis=1)
    relabelled = manifest.labels[there] != old.labels[at[there]]
    for changed, what in ((other, "other bytes"), (relabelled, "another label")):
        if changed.any():
            first = int(there[np.flatnonzero(changed)[0]])
            raise FingerprintMismatchError(
                f"{int(changed.sum()):,} items have {what} here than in {where}, first {manifest.ids[first]!r} "
                f"(row {at[first]} of the store)",
                hint="nothing was changed; a row stays what it is: give changed images new names, or embed into a new "
                "store with `reuse`, which computes only what changed",
            )
    in_order = len(there) == len(old) and bool((at[: len(old)] == np.arange(len(old))).all())
    return _NewItems(np.flatnonzero(at < 0), len(there), in_order)


def _refuse_another_way_in(old: DatasetManifest, manifest: DatasetManifest, where: str) -> None:
    """Refuse files to a store of a Python object's items, and the reverse: the same images would not be recognised.

    Raises:
        FingerprintMismatchError: One of both is a Python object.
    """
    ours, theirs = (one.kind.startswith("python:") for one in (old, manifest))
    if ours != theirs:
        kinds = ("a data set that is a Python object", "files")
        raise FingerprintMismatchError(
            f"{where} is of {kinds[not ours]}, and has none of these items, which are of {kinds[not theirs]}: an image "
            "that is in both would be there twice, as it has another id and another hash",
            hint="nothing was changed; append the way the store was made, or embed into a new store",
        )


def _refuse_renumbered(old: DatasetManifest, manifest: DatasetManifest, where: str) -> None:
    """Refuse a data set that has every image of the store and none of its ids: all rows would be there twice.

    Raises:
        FingerprintMismatchError: It is one.
    """
    readable, found = count_readable_among(old.sha256, manifest.sha256)
    if readable and found == readable:
        raise FingerprintMismatchError(
            f"the bytes of all {found:,} images of {where} are in the data set, but under other ids, as "
            f"{manifest.ids[0]!r} (the store has {old.ids[0]!r}): each would be there twice",
            hint="nothing was changed; ids of tables and shards are numbered by file unless a column is named "
            "(`id=COLUMN`): append the new files alone, or embed all into a new store with `reuse`",
        )


def _require_same_encoder(store: EmbeddingStore, encoder: Encoder) -> None:
    """Refuse a model, or a way to use it, that is not the store's.

    Raises:
        FingerprintMismatchError: It is not; what differs is named.
    """
    stored, now = store.spec.encoder, encoder.spec.to_dict()
    lines = [
        f"encoder.{name}: the store has {stored.get(name)!r}, this run has {now.get(name)!r}"
        for name in sorted(stored.keys() | now.keys())
        if stored.get(name) != now.get(name)
    ]
    if lines:
        raise FingerprintMismatchError(
            f"rows for {store.location} would be made in another way than those it has:\n    " + "\n    ".join(lines),
            hint=code_changed(stored["model"], lines)
            or "nothing was changed; all rows of a store are of one model: leave `model` out to take the store's own",
        )


def _part_of(
    store: EmbeddingStore, old: DatasetManifest, manifest: DatasetManifest, source: ImageSource, new: _NewItems
) -> tuple[PartSource, CacheSpec, DatasetManifest]:
    """The items of the part, as a source and as a list; and its specification."""
    spec = store.spec
    first = spec.items // spec.shard_rows * spec.shard_rows
    before = spec.items - first
    count = before + len(new.rows)

    def both(mine: np.ndarray, theirs: np.ndarray) -> np.ndarray:
        return np.concatenate([mine[first:], taken(theirs, new.rows)])

    def names() -> Any:
        yield from old.ids[first:]
        for start in range(0, len(new.rows), AT_ONCE):
            yield from (manifest.ids[row] for row in new.rows[start : start + AT_ONCE].tolist())

    ids = Names.of(names(), "strict")
    labels = both(old.labels, manifest.labels)
    kept = DatasetManifest(manifest.kind, ids, both(old.sha256, manifest.sha256), labels, tuple(manifest.classes))
    reasons = {item.row - first: item.reason for item in store.quarantined if item.row >= first}
    part = PartSource(
        base=as_hashed(source, manifest.sha256),
        uri=source.uri,
        rows=np.concatenate([np.zeros(before, np.int64), new.rows]),
        ids=ids,
        labels=labels,
        notes=source.notes,
        before=before,
        reasons=reasons,
    )
    return part, replace(spec, items=count, items_root=kept.root), kept


def _growth(
    metadata: StoreMetadata, store: EmbeddingStore, old: DatasetManifest, *, part_manifest: DatasetManifest,
    spec: CacheSpec, new: _NewItems, uri: str,
) -> Growth:  # fmt: skip
    """The record that will make a part count, after those of ``metadata``: what it says of the store is as of then."""
    number = len(metadata.records) + 1 if isinstance(metadata, GrownMetadata) else 1
    first = len(old) // spec.shard_rows * spec.shard_rows
    whole = joined([old, part_manifest], [0, first], part_manifest.classes)
    grown = replace(store.spec, items=len(whole), items_root=whole.root)
    return Growth(
        number=number,
        part=f"{number}-{spec.fingerprint[:12]}",
        first_row=first,
        part_fingerprint=spec.fingerprint,
        items=grown.items,
        items_root=grown.items_root,
        fingerprint=grown.fingerprint,
        before=store.fingerprint,
        classes=list(part_manifest.classes),
        dataset=uri if new.in_order else "",
    )


def _clear_leftovers(where: Location, store: EmbeddingStore, growth: Growth) -> None:
    """Remove the part of an append of something else that was interrupted, where no other process can be at it."""
    metadata = read_metadata(store.location)
    if not metadata.transport.exclusive:
        return
    used = {record.part for record in metadata.records} if isinstance(metadata, GrownMetadata) else set()
    names = {key.split("/")[1] for key in metadata.transport.sizes(f"{layout.PARTS}/")}
    for name in sorted(names - used - {growth.part}):
        folder = where.below(layout.PARTS, name)
        for key in metadata.transport.sizes(f"{layout.PARTS}/{name}/"):
            if key.endswith(f"/{layout.GROUP}") and key.count("/") == 2:
                remove_store(folder)
                break
        else:
            for key in metadata.transport.sizes(f"{layout.PARTS}/{name}/"):
                metadata.transport.delete(key)


def _report(
    before: EmbeddingStore,
    after: EmbeddingStore,
    old: DatasetManifest,
    new: _NewItems,
    embedded: int,
    reused: int,
    seconds: dict[str, float],
) -> AppendReport:
    return AppendReport(
        location=str(before.location),
        fingerprint_before=before.fingerprint,
        fingerprint=after.fingerprint,
        items_before=len(before),
        items=len(after),
        appended=len(new.rows),
        already_there=new.already_there,
        not_in_dataset=len(old) - new.already_there,
        in_order=new.in_order,
        embedded=embedded,
        reused=reused,
        quarantined=len(after.quarantined) - len(before.quarantined),
        seconds={phase: round(value, 3) for phase, value in seconds.items()},
    )
