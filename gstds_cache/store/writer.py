"""Making and filling a store. A unit is committed object first, then receipt; COMPLETE comes last of all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int64

from gstds_cache.digest import canonical_json, sha256_hex
from gstds_cache.errors import (
    ChunkCorruptError,
    IncompleteError,
    IntegrityError,
    NondeterminismError,
    UsageError,
    command_line,
)
from gstds_cache.store import layout
from gstds_cache.store.journal import METADATA_KEYS, Complete, Journal, Progress, corrupt, counts_of, valid_of
from gstds_cache.store.receipt import Quarantined, Receipt, receipts_root
from gstds_cache.store.spec import CacheSpec, require_same
from gstds_cache.store.transport import Transport, local_path, open_transport


class StoreWriter:
    """Commits units to one store, under its writer lock. Made by :func:`open_writer`."""

    def __init__(self, journal: Journal) -> None:
        self.location = journal.location
        self.spec = journal.spec
        self._journal = journal
        self._transport = journal.transport

    def recover(self) -> dict[int, Receipt]:
        """Clear away what an interrupted run left, and return what is committed.

        Temporary files are deleted, and objects without a receipt as well, unless the store has other writers: theirs
        may be just about to get one. (What is left there is overwritten when its unit is committed.) A committed
        object that is missing or of another size is not passed over.

        Returns:
            The receipts by unit.

        Raises:
            ChunkCorruptError: A committed object is missing or of another size, or a receipt is damaged.
        """  # noqa: DOC501
        self._transport.collect_temporaries()
        receipts = self._journal.receipts()
        if self._transport.exclusive:
            committed = {layout.object_key(unit) for unit in receipts}
            for key in self._transport.sizes("embeddings/c/"):
                if key not in committed:
                    self._transport.delete(key)
        problems = self._journal.check_sizes(receipts)
        if problems:
            raise corrupt(self.location, problems)
        return receipts

    def committed(self, unit: int) -> bool:
        """Whether the unit has a receipt by now; another writer may have given it one."""
        return self._transport.exists(layout.receipt_key(unit))

    def discard(self, units: Sequence[int]) -> None:
        """Undo the commit of ``units``: COMPLETE goes first, then each receipt, then its object.

        A note of the units stays until :meth:`end_repair` or :meth:`finish`. It tells a repair that was killed from a
        run of embedding that did not come so far.
        """
        self._transport.put(layout.REPAIR, canonical_json({"units": sorted({*units, *self._journal.discarded()})}))
        self._transport.delete(layout.COMPLETE)
        for unit in units:
            self._transport.delete(layout.receipt_key(unit))
            self._transport.delete(layout.object_key(unit))

    def end_repair(self) -> None:
        """Forget which units were discarded: they are committed again."""
        if self._transport.exists(layout.REPAIR):
            self._transport.delete(layout.REPAIR)

    def commit(self, unit: int, rows: Float[np.ndarray, "R D"], quarantined: Sequence[Quarantined] = ()) -> Receipt:
        """Commit one unit: write the object, read it back, then write the receipt.

        Args:
            unit: The unit.
            rows: Its rows in the store's dtype, [R, D].
            quarantined: Its items that could not be decoded; their rows are zero.

        Returns:
            The receipt, which may be one that was there already with the same content.

        Raises:
            UsageError: ``rows`` has another shape or dtype, or holds NaN or Inf.
            IntegrityError: The object read back is not the one written.
            NondeterminismError: The unit is committed already with other content.
        """
        span = self.spec.rows_of(unit)
        if rows.shape != (len(span), self.spec.dim) or rows.dtype != np.dtype(self.spec.dtype):
            expected = (len(span), self.spec.dim)
            raise UsageError(f"unit {unit}: got rows {rows.shape} {rows.dtype}, expected {expected} {self.spec.dtype}")
        if not np.isfinite(rows).all():
            raise UsageError(f"unit {unit}: rows hold NaN or Inf")
        data = layout.unit_object(self.spec, unit, rows)
        receipt = Receipt(
            unit=unit,
            rows=(span.start, span.stop),
            object_sha256=sha256_hex(data),
            content_sha256=sha256_hex(np.ascontiguousarray(rows).astype(rows.dtype.newbyteorder("<")).tobytes()),
            size=len(data),
            fingerprint=self.spec.fingerprint,
            quarantined=tuple(quarantined),
        )
        if self.committed(unit):
            return self._same_or_refuse(receipt)
        # Where several write, an object with these bytes is as good as ours, and is not replaced under a reader.
        if self._transport.exclusive or not self._transport.put_if_absent(layout.object_key(unit), data):
            self._transport.put(layout.object_key(unit), data)
        if self._transport.sha256(layout.object_key(unit)) != receipt.object_sha256:
            raise IntegrityError(
                f"{self.location}: unit {unit} read back differs from what was written; check the disk"
            )
        if not self._transport.put_if_absent(layout.receipt_key(unit), receipt.to_bytes()):
            return self._same_or_refuse(receipt)
        return receipt

    def finish(self, progress: Progress | None = None) -> Complete:
        """Check every object once more, write ``valid`` and COMPLETE.

        Args:
            progress: Called with units checked and units in all.

        Returns:
            The completeness record.

        Raises:
            IncompleteError: Units are not committed yet.
            ChunkCorruptError: A committed object is not what its receipt says (a late write, say).
        """  # noqa: DOC501
        receipts = self._journal.receipts()
        missing = [unit for unit in range(self.spec.units) if unit not in receipts]
        if missing:
            raise IncompleteError(
                f"{self.location}: {len(missing)} of {self.spec.units} units are not committed, first {missing[:5]}",
                hint="run the same gstds-embed command again",
            )
        problems = self._journal.check_hashes(receipts, progress)
        if problems:
            raise corrupt(self.location, problems)
        self._transport.put(layout.VALID, layout.valid_object(self.spec, valid_of(self.spec, receipts)))
        ok, quarantined = counts_of(self.spec, receipts)
        record = Complete(
            fingerprint=self.spec.fingerprint,
            items=self.spec.items,
            ok=ok,
            quarantined=quarantined,
            units=self.spec.units,
            receipts_sha256=receipts_root(receipts),
            objects={key: self._transport.sha256(key) for key in METADATA_KEYS},
        )
        self.end_repair()
        self._transport.put(layout.COMPLETE, record.to_bytes())
        return record

    def _same_or_refuse(self, receipt: Receipt) -> Receipt:
        data = self._transport.get(layout.receipt_key(receipt.unit))
        there = Receipt.from_bytes(data, unit=receipt.unit, fingerprint=self.spec.fingerprint)
        if there == receipt:
            return there
        hint = "the committed one was kept; embed on one kind of machine with one set of library versions"
        key = layout.object_key(receipt.unit)
        if self._transport.sha256(key) != there.object_sha256:
            # Another writer's receipt came between our object and our receipt. A missing object is found by every
            # reader, one with other rows by none.
            self._transport.delete(key)
            hint = f"neither was kept; make the unit anew with: {command_line('gstds-cache', 'repair', self.location)}"
        raise NondeterminismError(
            f"{self.location}: unit {receipt.unit} was embedded twice with different results (content "
            f"{there.content_sha256[:12]} is committed, {receipt.content_sha256[:12]} came now)",
            hint=hint,
        )


@contextmanager
def open_writer(
    where: str | Path,
    spec: CacheSpec,
    *,
    labels: Int64[np.ndarray, " N"],
    items: bytes | memoryview,
    attributes: dict[str, Any],
) -> Iterator[StoreWriter]:
    """Open the store at ``where`` for writing, making it first where there is none.

    Args:
        where: The store: a directory, or a URL.
        spec: What it holds; a store with another specification is refused and left alone.
        labels: Label of each row, -1 where there is none.
        items: Bytes of ``items.arrow``.
        attributes: ``kind``, ``classes`` and ``provenance`` of the data set and the run.

    Yields:
        The writer. A directory's is the only one until the block ends; a bucket may have several at once.

    Raises:
        UsageError: ``where`` is there and is no store.
        FingerprintMismatchError: The store at ``where`` holds something else.
        IncompleteError: Another process is writing the store.
    """
    transport = open_transport(where)
    if not transport.exists(layout.GROUP):
        _require_room(where, transport)
    with transport.lock():
        described = {"fingerprint": spec.fingerprint, "spec": spec.to_dict(), **attributes}
        objects = layout.metadata_objects(spec, {"gstds": described}, labels) | {layout.ITEMS: items}
        _make(transport, objects)
        journal = Journal(where)
        require_same(journal.spec, spec, where=journal.location)
        if attributes.get("provenance", {}) != journal.provenance:  # begun by another run
            described["provenance"] = journal.provenance
            objects |= layout.metadata_objects(spec, {"gstds": described}, labels)
        # What an interrupted run left has no hashes yet, and COMPLETE would vouch for whatever it has become.
        _write_anew(transport, objects)
        del items, objects  # Mapped, and no longer needed.
        # The lock of this transport is the one that is held.
        journal.transport = transport
        yield StoreWriter(journal)


@contextmanager
def reopen_writer(
    where: str | Path,
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
    journal = Journal(where)
    with journal.transport.lock():
        described = {
            "fingerprint": journal.spec.fingerprint,
            "spec": journal.spec.to_dict(),
            **(attributes or {"kind": journal.kind, "classes": list(journal.classes)}),
            "provenance": journal.provenance,
        }
        objects = layout.metadata_objects(journal.spec, {"gstds": described}, labels) | {layout.ITEMS: items}
        with suppress(ChunkCorruptError):
            record, group = journal.complete(), journal.transport.get(layout.GROUP)
            if record is not None and record.objects.get(layout.GROUP) == sha256_hex(group):
                objects[layout.GROUP] = group
        _write_anew(journal.transport, objects)
        del items, objects
        yield StoreWriter(journal)


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


def _write_anew(transport: Transport, objects: dict[str, bytes | memoryview]) -> None:
    """Replace the small objects that are missing or have other bytes."""
    for key, data in objects.items():
        if not transport.exists(key) or transport.sha256(key) != sha256_hex(data):
            transport.delete(layout.COMPLETE)
            transport.put(key, data)


def _require_room(where: str | Path, transport: Transport) -> None:
    """Refuse a place that holds something else.

    Raises:
        UsageError: It does.
    """
    path = local_path(where)
    if path is None:
        names = {key.partition("/")[0] for key in transport.sizes()}
    elif path.exists() and not path.is_dir():
        raise UsageError(f"--cache {path}: a file is in the way, expected a directory or nothing")
    else:
        entries = path.iterdir() if path.is_dir() else ()
        names = {entry.name for entry in entries if not entry.name.startswith(".")}
    # A creation that was killed has written items.arrow first of all.
    strange = sorted(names - layout.OWN_NAMES if layout.ITEMS in names else names)
    if strange:
        raise UsageError(
            f"--cache {transport.location}: the place is not empty and is no store (it holds {strange[0]!r})",
            hint="nothing was changed. Give the path of a new directory",
        )
