"""Repairing a store: what is damaged is embedded again from the data set, and nothing else is touched."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from gstds_cache.config import DEVICE
from gstds_cache.data.align import part_of
from gstds_cache.data.hash_cache import HashCache
from gstds_cache.data.hashed import as_hashed
from gstds_cache.data.manifest import DatasetManifest, build_manifest
from gstds_cache.data.names import Names
from gstds_cache.data.source import ImageSource
from gstds_cache.embedding.determinism import DeterminismCheck
from gstds_cache.embedding.estimate import workers_for
from gstds_cache.embedding.mismatch import explained
from gstds_cache.embedding.settle import take_code_as_stored
from gstds_cache.embedding.shard import EmbedTask
from gstds_cache.encoders.encoder import Encoder
from gstds_cache.errors import ChunkCorruptError, UsageError
from gstds_cache.files.location import LocationLike
from gstds_cache.runtime.devices import resolve_device
from gstds_cache.runtime.notify import log
from gstds_cache.runtime.progress import Progress
from gstds_cache.store.commit_record import CommitRecord, commits_root
from gstds_cache.store.grown import GrownMetadata
from gstds_cache.store.metadata import StoreMetadata
from gstds_cache.store.spec import require_same
from gstds_cache.store.verify import VerifyReport, verify
from gstds_cache.store.writer import StoreWriter, reopen_writer


@dataclass(frozen=True)
class RepairReport:
    """What was repaired.

    Attributes:
        before: What was wrong.
        shards: Shards that were embedded again.
        images: Images put through the model for it.
        changed: Shards whose rows are not, to the last bit, the ones their commit records told of.
        after: What a full check finds now.
    """

    before: VerifyReport
    shards: tuple[int, ...]
    images: int
    changed: tuple[int, ...]
    after: VerifyReport

    def to_dict(self) -> dict[str, Any]:
        """The check after the repair, and what was done, as JSON-able values."""
        return self.after.to_dict() | {
            "was_wrong": [str(problem) for problem in self.before.problems],
            "images": self.images,
            "shards_made_again": list(self.shards),
            "changed": list(self.changed),
        }


def require_same_data(
    metadata: StoreMetadata, source: ImageSource, encoder: Encoder, hash_cache: HashCache | None = None
) -> DatasetManifest:
    """The manifest of ``source``, if store, data set and model belong together.

    Args:
        metadata: The store's.
        source: The data set.
        encoder: The model.
        hash_cache: Hashes that are known already.

    Raises:
        FingerprintMismatchError: They do not; the fields that differ are named.
    """
    manifest = build_manifest(source, hash_cache=hash_cache)
    take_code_as_stored(encoder, metadata.spec.encoder, log)
    wanted = replace(
        metadata.spec,
        items=len(manifest),
        items_root=manifest.root,
        encoder=encoder.spec.to_dict(),
        dim=encoder.spec.dim,
    )
    with explained(metadata, manifest, source):
        made_of = f" ({metadata.dataset_uri}, {metadata.model_uri})" if metadata.dataset_uri else ""
        meant = f"give the `dataset` and the `model` that it was made of{made_of}, as they were then"
        require_same(
            metadata.spec, wanted, where=metadata.location, otherwise=f"{meant}; for what there is now, embed anew"
        )
    return manifest


def repair(
    where: LocationLike | StoreMetadata,
    source: ImageSource,
    encoder: Encoder,
    *,
    shards: Sequence[int] = (),
    device: str = DEVICE,
    workers: int | None = None,
    hash_cache: HashCache | None = None,
    progress: Progress | None = None,
) -> RepairReport:
    """Hash every object of the store at ``where``, and make again what is missing or damaged.

    Shards without a commit record that were never committed are left to ``gstds-embed``; those that a repair discarded
    before it was killed are not. A store that ends up with all its shards is complete again.

    Args:
        where: The store; or its metadata, which is not read again.
        source: The data set it was made of.
        encoder: The model it was made with.
        shards: Shards to make again whatever their hashes.
        device: Where the model runs.
        workers: Processes that decode images; None fits the machine and the data set.
        hash_cache: Hashes of the data set that are known already.
        progress: Called with phase, shards or images done, how many in all, and no shares of the time.

    Returns:
        What was done.

    Raises:
        UsageError: A shard does not exist, or there cannot be so many workers.
        EncoderError: The model's rows mean nothing.
        FingerprintMismatchError: The data set or the model is not the store's.
        IncompleteError: Another process is writing the store; or memory or the disk ran out on the way, or a process
            that decodes was killed, and the same call goes on.
        IntegrityError: The specification itself is damaged; or a file changed, or came back, since it was hashed.
    """
    metadata = where if isinstance(where, StoreMetadata) else StoreMetadata(where)
    beyond = [shard for shard in shards if not 0 <= shard < metadata.spec.shards]
    if beyond:
        raise UsageError(f"`shards`: got {beyond[0]}, {metadata.location} has shards 0 to {metadata.spec.shards - 1}")
    if workers is not None and workers < 0:
        raise UsageError(f"`workers`: got {workers}, expected 0 or more, or auto")
    if isinstance(metadata, GrownMetadata):
        return _repair_parts(metadata, source, encoder, shards, device, workers, hash_cache, progress)
    names = metadata.spec.names
    show: Progress = progress or (lambda _phase, _done, _total, _shares: None)
    before = verify(metadata, "full", progress=lambda done, total: show("check", done, total, {}))
    old, _ = metadata.scan_commits()  # known from the check
    redo = sorted({*before.bad_shards, *shards, *(metadata.discarded() - old.keys())})
    expected = _expected_root(metadata)
    if len(old) < metadata.spec.shards or commits_root(old, names) == expected:
        expected = None  # all commit records are those that COMPLETE vouches for, or the others cannot be judged
    if not redo and not before.problems and (before.complete or before.committed < before.shards):
        return RepairReport(before, (), 0, (), before)
    manifest = require_same_data(metadata, source, encoder, hash_cache)
    source = as_hashed(source, manifest.sha256)
    attributes = {"kind": manifest.kind, "classes": list(manifest.classes)}
    with reopen_writer(
        metadata.location, labels=manifest.labels, items=manifest.to_arrow(), attributes=attributes
    ) as writer:
        run_on = resolve_device(device)
        DeterminismCheck(source, encoder.to(run_on), dtype=writer.spec.dtype).run(writer.spec.batch_size)
        count = workers_for(source, encoder, workers, run_on)
        task = EmbedTask(source, encoder, writer, device=run_on, workers=count, cuda_graphs=False)
        new, kept, images = _replace_shards(writer, task, redo, expected, show)
        if len(kept) + len(new) == writer.spec.shards:
            writer.finish(lambda done, total: show("check", done, total, {}))
        else:
            writer.end_repair()
    changed = [shard for shard in new if shard in old and old[shard].content_sha256 != new[shard].content_sha256]
    return RepairReport(before, tuple(sorted(new)), images, tuple(changed), verify(metadata.location, "full"))


def _repair_parts(
    metadata: GrownMetadata,
    source: ImageSource,
    encoder: Encoder,
    shards: Sequence[int],
    device: str,
    workers: int | None,
    hash_cache: HashCache | None,
    progress: Progress | None,
) -> RepairReport:
    """Repair each of the stores that a store is made of which rows were appended to.

    Args:
        metadata: The store's.
        source: Its items, in its order.
        encoder: As for :func:`repair`, as are the others.
        shards: As for :func:`repair`.
        device: As for :func:`repair`.
        workers: As for :func:`repair`.
        hash_cache: As for :func:`repair`.
        progress: As for :func:`repair`.

    Returns:
        What was done, by the shards of the whole.
    """
    before = verify(metadata, "full")
    if not before.problems and not shards:
        return RepairReport(before, (), 0, (), before)
    done: list[int] = []
    changed: list[int] = []
    images = 0
    for first, _, part in metadata.parts:
        mine = [shard - first for shard in shards if metadata.part_of(shard)[0] == first]
        start = first * part.spec.shard_rows
        rows = np.arange(start, start + part.spec.items)
        ids = Names.of(source.ids[row] for row in rows.tolist())
        report = repair(
            part,
            part_of(source, rows, ids),
            encoder,
            shards=mine,
            device=device,
            workers=workers,
            hash_cache=hash_cache,
            progress=progress,
        )
        done += [shard + first for shard in report.shards]
        changed += [shard + first for shard in report.changed]
        images += report.images
    return RepairReport(before, tuple(done), images, tuple(changed), verify(metadata.location, "full"))


def _replace_shards(
    writer: StoreWriter,
    task: EmbedTask,
    shards: Sequence[int],
    expected: str | None,
    show: Progress,
) -> tuple[dict[int, CommitRecord], dict[int, CommitRecord], int]:
    """Embed and commit ``shards`` anew; all others too, unless all commit records together have the root ``expected``.

    Returns:
        The new commit records, those that were kept, and how many images it took.
    """
    new: dict[int, CommitRecord] = {}
    images = 0
    total = sum(len(writer.spec.rows_of(shard)) for shard in shards)
    while True:
        task.on_batch = lambda clock, before=images, of=total: show("embed", before + clock.images, of, {})
        writer.discard(shards)
        writer.recover()
        new |= {commit.shard: commit for commit in task(shards)}
        images += task.clock.images
        kept = {shard: commit for shard, commit in writer.recover().items() if shard not in new}
        if expected is None or not kept or commits_root(kept | new, writer.spec.names) == expected:
            return new, kept, images
        # A commit record was altered so that nothing else shows it, and nobody can say which.
        shards = sorted(kept)
        total += sum(len(writer.spec.rows_of(shard)) for shard in shards)


def _expected_root(metadata: StoreMetadata) -> str | None:
    """The root over all commit records that COMPLETE holds, or None where it does not say."""
    with suppress(ChunkCorruptError):
        record = metadata.complete()
        return record.commits_sha256 if record is not None else None
    return None
