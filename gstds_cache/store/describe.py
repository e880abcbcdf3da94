"""What a store holds, for people."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gstds_cache.store.journal import Journal
from gstds_cache.store.receipt import Quarantined


@dataclass(frozen=True)
class StoreSummary:
    """What a store holds and how it was made.

    Attributes:
        location: The store as a user names it.
        fingerprint: SHA-256 of its specification.
        complete: Whether all units are committed and checked.
        units: Units in all.
        committed: Units committed.
        items: Rows (N).
        dim: Length of an embedding (D).
        dtype: How an embedding is stored.
        size: Bytes of all files.
        kind: Kind of data set.
        classes: Number of classes.
        items_root: Merkle root of the data set's manifest.
        model: The reference model.
        encoder: Everything that identifies its features.
        provenance: Versions and device; no identity.
        last_used: Seconds since 1970, or None where the place does not tell.
        quarantined: Items that could not be decoded, of the committed units.
    """

    location: str
    fingerprint: str
    complete: bool
    units: int
    committed: int
    items: int
    dim: int
    dtype: str
    size: int
    kind: str
    classes: int
    items_root: str
    model: str
    encoder: dict[str, Any]
    provenance: dict[str, Any]
    last_used: float | None
    quarantined: tuple[Quarantined, ...]

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON-able values."""
        return vars(self) | {"quarantined": [vars(item) for item in self.quarantined]}


def summarise(where: str | Path) -> StoreSummary:
    """Summarise the store at ``where``, complete or not, without reading embeddings.

    Raises:
        StoreNotFoundError: There is none.
        IntegrityError: Its specification or a receipt is damaged.
    """
    journal = Journal(where)
    receipts = journal.receipts()
    return StoreSummary(
        location=journal.location,
        fingerprint=journal.spec.fingerprint,
        complete=journal.complete() is not None,
        units=journal.spec.units,
        committed=len(receipts),
        items=journal.spec.items,
        dim=journal.spec.dim,
        dtype=journal.spec.dtype,
        size=sum(journal.transport.sizes().values()),
        kind=journal.kind,
        classes=len(journal.classes),
        items_root=journal.spec.items_root,
        model=str(journal.spec.encoder.get("model")),
        encoder=journal.spec.encoder,
        provenance=journal.provenance,
        last_used=journal.transport.last_used(),
        quarantined=tuple(item for unit in sorted(receipts) for item in receipts[unit].quarantined),
    )
