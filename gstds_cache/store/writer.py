"""Making and filling a store. A unit is committed object first, then receipt; COMPLETE comes last of all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int64

from gstds_cache.digest import sha256_hex
from gstds_cache.errors import IncompleteError, IntegrityError, NondeterminismError, UsageError
from gstds_cache.store import layout
from gstds_cache.store.journal import METADATA_KEYS, Complete, Journal, corrupt
from gstds_cache.store.receipt import Quarantined, Receipt, receipts_root
from gstds_cache.store.spec import CacheSpec, require_same
from gstds_cache.store.transport import LocalTransport


class StoreWriter:
    """Commits units to one store, under its writer lock. Made by :func:`open_writer`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._journal = Journal(path)
        self._transport = self._journal.transport
        self.spec = self._journal.spec

    def recover(self) -> dict[int, Receipt]:
        """Clear away what an interrupted run left, and return what is committed.

        Objects without a receipt and temporary files are deleted. A committed object that is missing or of another
        size is not passed over.

        Returns:
            The receipts by unit.

        Raises:
            ChunkCorruptError: A committed object is missing or of another size.
        """  # noqa: DOC501
        self._transport.collect_temporaries()
        receipts = self._journal.receipts()
        for unit in range(self.spec.units):
            if unit not in receipts and self._transport.exists(layout.object_key(unit)):
                self._transport.delete(layout.object_key(unit))
        problems = self._journal.check_sizes(receipts)
        if problems:
            raise corrupt(self.path, problems)
        return receipts

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
        if self._transport.exists(layout.receipt_key(unit)):
            return self._same_or_refuse(receipt)
        self._transport.put(layout.object_key(unit), data)
        if sha256_hex(self._transport.get(layout.object_key(unit))) != receipt.object_sha256:
            raise IntegrityError(f"{self.path}: unit {unit} read back differs from what was written; check the disk")
        if not self._transport.put_if_absent(layout.receipt_key(unit), receipt.to_bytes()):
            return self._same_or_refuse(receipt)
        return receipt

    def finish(self) -> Complete:
        """Check every object once more, write ``valid`` and COMPLETE.

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
                f"{self.path}: {len(missing)} of {self.spec.units} units are not committed, first {missing[:5]}",
                hint="run the same gstds-embed command again",
            )
        problems = self._journal.check_hashes(receipts)
        if problems:
            raise corrupt(self.path, problems)
        valid = valid_of(self.spec, receipts)
        self._transport.put(layout.VALID, layout.valid_object(self.spec, valid))
        record = Complete(
            fingerprint=self.spec.fingerprint,
            items=self.spec.items,
            ok=int((valid == layout.OK).sum()),
            quarantined=int((valid == layout.UNDECODABLE).sum()),
            units=self.spec.units,
            receipts_sha256=receipts_root(receipts),
            objects={key: sha256_hex(self._transport.get(key)) for key in METADATA_KEYS},
        )
        self._transport.put(layout.COMPLETE, record.to_bytes())
        return record

    def _same_or_refuse(self, receipt: Receipt) -> Receipt:
        data = self._transport.get(layout.receipt_key(receipt.unit))
        there = Receipt.from_bytes(data, unit=receipt.unit, fingerprint=self.spec.fingerprint)
        if there == receipt:
            return there
        raise NondeterminismError(
            f"{self.path}: unit {receipt.unit} was embedded twice with different results (content "
            f"{there.content_sha256[:12]} is committed, {receipt.content_sha256[:12]} came now)",
            hint="the committed one was kept; embed on one kind of machine with one set of library versions",
        )


def valid_of(spec: CacheSpec, receipts: dict[int, Receipt]) -> np.ndarray:
    """The ``valid`` array [N] uint8 that the receipts amount to."""
    valid = np.full(spec.items, layout.MISSING, np.uint8)
    for receipt in receipts.values():
        valid[slice(*receipt.rows)] = layout.OK
        valid[[item.row for item in receipt.quarantined]] = layout.UNDECODABLE
    return valid


@contextmanager
def open_writer(
    path: Path,
    spec: CacheSpec,
    *,
    labels: Int64[np.ndarray, " N"],
    items: bytes,
    attributes: dict[str, Any],
) -> Iterator[StoreWriter]:
    """Open the store at ``path`` for writing, making it first where there is none.

    Args:
        path: The store's directory.
        spec: What it holds; a store with another specification is refused and left alone.
        labels: Label of each row, -1 where there is none.
        items: Bytes of ``items.arrow``.
        attributes: ``kind``, ``classes`` and ``provenance`` of the data set and the run.

    Yields:
        The writer, which holds the store's lock until the block ends.

    Raises:
        UsageError: ``path`` is there and is no store.
        FingerprintMismatchError: The store at ``path`` holds something else.
        IncompleteError: Another process is writing the store.
    """
    if path.exists() and not path.is_dir():
        raise UsageError(f"--cache {path}: a file is in the way, expected a directory or nothing")
    if path.is_dir() and not (path / layout.GROUP).exists():
        names = {entry.name for entry in path.iterdir() if not entry.name.startswith(".")}
        # A creation that was killed has written items.arrow first of all.
        strange = sorted(names - layout.OWN_NAMES if layout.ITEMS in names else names)
        if strange:
            raise UsageError(
                f"--cache {path}: the directory is not empty and is no store (it holds {strange[0]!r})",
                hint="nothing was changed. Give the path of a new directory",
            )
    path.mkdir(parents=True, exist_ok=True)
    transport = LocalTransport(path)
    with transport.lock():
        if not transport.exists(layout.GROUP):
            transport.put(layout.ITEMS, items)
            described = {"fingerprint": spec.fingerprint, "spec": spec.to_dict(), **attributes}
            for key, data in layout.metadata_objects(spec, {"gstds": described}, labels).items():
                transport.put(key, data)
        writer = StoreWriter(path)
        require_same(writer.spec, spec, where=str(path))
        yield writer
