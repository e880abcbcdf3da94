"""Mending a store: what is damaged is made again from the data set and the model, and nothing else is touched."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from gstds_cache.data.manifest import DatasetManifest, build_manifest
from gstds_cache.data.memo import HashMemo
from gstds_cache.data.source import ImageSource
from gstds_cache.devices import resolve_device
from gstds_cache.embed.look import TwoLooks
from gstds_cache.embed.mismatch import explained
from gstds_cache.embed.probe import workers_for
from gstds_cache.embed.unit import Clock, EmbedTask
from gstds_cache.encoders.encoder import Encoder
from gstds_cache.errors import ChunkCorruptError, UsageError
from gstds_cache.store.journal import Journal
from gstds_cache.store.receipt import Receipt, receipts_root
from gstds_cache.store.spec import require_same
from gstds_cache.store.verify import VerifyReport, verify
from gstds_cache.store.writer import StoreWriter, reopen_writer


@dataclass(frozen=True)
class RepairReport:
    """What was mended.

    Attributes:
        before: What was wrong.
        units: Units that were embedded again.
        images: Images put through the model for it.
        changed: Units whose rows are not, to the last bit, the ones their receipts told of.
        after: What a full check finds now.
    """

    before: VerifyReport
    units: tuple[int, ...]
    images: int
    changed: tuple[int, ...]
    after: VerifyReport


def same_data(journal: Journal, source: ImageSource, encoder: Encoder, memo: HashMemo | None = None) -> DatasetManifest:
    """The manifest of ``source``, if store, data set and model belong together.

    Args:
        journal: The store's.
        source: The data set.
        encoder: The model.
        memo: Hashes that are known already.

    Raises:
        FingerprintMismatchError: They do not; the fields that differ are named.
    """
    manifest = build_manifest(source, memo=memo)
    wanted = replace(
        journal.spec,
        items=len(manifest),
        items_root=manifest.root,
        encoder=encoder.spec.to_dict(),
        dim=encoder.spec.dim,
    )
    with explained(journal, manifest, source):
        require_same(journal.spec, wanted, where=journal.location)
    return manifest


def repair_store(
    where: str | Path,
    source: ImageSource,
    encoder: Encoder,
    *,
    units: Sequence[int] = (),
    device: str = "auto",
    workers: int | None = None,
    memo: HashMemo | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> RepairReport:
    """Hash every object of the store at ``where``, and make again what is missing or damaged.

    Units without a receipt that were never committed are left to ``gstds-embed``; those that a repair discarded before
    it was killed are not. A store that ends up with all its units is complete again.

    Args:
        where: The store.
        source: The data set it was made of.
        encoder: The model it was made with.
        units: Units to make again whatever their hashes.
        device: Where the model runs.
        workers: Processes that decode images; None fits the machine and the data set.
        memo: Hashes of the data set that are known already.
        progress: Called with phase, units or images done, and how many in all.

    Returns:
        What was done.

    Raises:
        UsageError: A unit does not exist, or there cannot be so many workers.
        EncoderError: The model's rows mean nothing.
        FingerprintMismatchError: The data set or the model is not the store's.
        IncompleteError: Another process is writing the store, or a process that decodes was killed.
        IntegrityError: The specification itself is damaged.
    """
    journal = Journal(where)
    beyond = [unit for unit in units if not 0 <= unit < journal.spec.units]
    if beyond:
        raise UsageError(f"--unit {beyond[0]}: {journal.location} has units 0 to {journal.spec.units - 1}")
    if workers is not None and workers < 0:
        raise UsageError(f"--workers: got {workers}, expected 0 or more, or auto")
    say = progress or (lambda _phase, _done, _total: None)
    before = verify(where, "full", progress=partial(say, "check"))
    old, _ = journal.scan_receipts()
    redo = sorted({*before.bad_units, *units, *(journal.discarded() - old.keys())})
    vouched = _vouched(journal)
    if len(old) < journal.spec.units or receipts_root(old) == vouched:
        vouched = None  # all receipts are the ones that COMPLETE vouches for, or the others cannot be judged
    if not redo and not before.problems and (before.complete or before.committed < before.units):
        return RepairReport(before, (), 0, (), before)
    manifest = same_data(journal, source, encoder, memo)
    attributes = {"kind": manifest.kind, "classes": list(manifest.classes)}
    with reopen_writer(where, labels=manifest.labels, items=manifest.to_arrow(), attributes=attributes) as writer:
        images_before = 0

        def on_batch(clock: Clock) -> None:
            say("embed", images_before + clock.images, sum(len(writer.spec.rows_of(unit)) for unit in redo))

        run_on = resolve_device(device)
        TwoLooks(source, encoder.to(run_on), dtype=writer.spec.dtype).compare(writer.spec.batch_size)
        workers = workers_for(source, encoder, workers, run_on)
        task = EmbedTask(source, encoder, writer, device=run_on, workers=workers, on_batch=on_batch)
        made = _make_again(writer, task, redo)
        images = task.clock.images
        committed = {unit: receipt for unit, receipt in writer.recover().items() if unit not in made}
        if vouched is not None and receipts_root(committed | made) != vouched:
            # A receipt was altered so that nothing else shows it, and nobody can say which.
            images_before, redo = images, sorted({*redo, *committed})
            made |= _make_again(writer, task, sorted(committed))
            images += task.clock.images
            committed = {}
        if len(committed) + len(made) == writer.spec.units:
            writer.finish(partial(say, "check"))
        else:
            writer.end_repair()
    changed = [unit for unit, new in made.items() if unit in old and old[unit].content_sha256 != new.content_sha256]
    return RepairReport(before, tuple(redo), images, tuple(changed), verify(where, "full"))


def _make_again(writer: StoreWriter, task: EmbedTask, units: Sequence[int]) -> dict[int, Receipt]:
    writer.discard(units)
    writer.recover()
    return {receipt.unit: receipt for receipt in task(units)}


def _vouched(journal: Journal) -> str | None:
    """The root over all receipts that COMPLETE holds, or None where it does not say."""
    with suppress(ChunkCorruptError):
        record = journal.complete()
        return record.receipts_sha256 if record is not None else None
    return None
