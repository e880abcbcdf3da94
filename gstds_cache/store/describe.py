"""What a store holds, for people."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from gstds_cache.files.location import LocationLike
from gstds_cache.store.commit_record import Quarantined
from gstds_cache.store.grown import GrownMetadata, read_metadata
from gstds_cache.store.hidden import read_hidden


@dataclass(frozen=True)
class StoreSummary:
    """What a store holds and how it was made.

    Attributes:
        location: The store as a user names it.
        fingerprint: SHA-256 of its specification.
        complete: Whether all shards are committed and checked.
        shards: Shards in all.
        committed: Shards committed.
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
        quarantined: Items that could not be decoded, of the committed shards.
        hidden: Rows that selections leave out.
        appended: Rows that were appended since the store was made.
    """

    location: str
    fingerprint: str
    complete: bool
    shards: int
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
    hidden: int = 0
    appended: int = 0

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON-able values."""
        return vars(self) | {"quarantined": [vars(item) for item in self.quarantined]}


def summarise(where: LocationLike) -> StoreSummary:
    """Summarise the store at ``where``, complete or not, without reading embeddings.

    Raises:
        StoreNotFoundError: There is none.
        IntegrityError: Its specification or a commit record is damaged.
    """
    metadata = read_metadata(where)
    commits = metadata.commits()
    return StoreSummary(
        location=str(metadata.location),
        fingerprint=metadata.spec.fingerprint,
        complete=metadata.complete() is not None,
        shards=metadata.spec.shards,
        committed=len(commits),
        items=metadata.spec.items,
        dim=metadata.spec.dim,
        dtype=metadata.spec.dtype,
        size=sum(metadata.transport.sizes().values()),
        kind=metadata.kind,
        classes=len(metadata.classes),
        items_root=metadata.spec.items_root,
        model=str(metadata.spec.encoder.get("model")),
        encoder=metadata.spec.encoder,
        provenance=metadata.provenance,
        last_used=metadata.transport.last_used(),
        quarantined=tuple(item for shard in sorted(commits) for item in commits[shard].quarantined),
        hidden=len(read_hidden(metadata.transport, metadata.spec.items)),
        appended=metadata.spec.items - metadata.base.spec.items if isinstance(metadata, GrownMetadata) else 0,
    )
