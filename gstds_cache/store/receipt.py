"""The journal: one receipt per committed unit. A unit is committed exactly when its receipt exists."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from gstds_cache.digest import canonical_json, digest_of, merkle_root
from gstds_cache.errors import IntegrityError


@dataclass(frozen=True)
class Quarantined:
    """An item without an embedding: it could not be decoded, or the model gives no features for it.

    Its row is zero and ``valid`` is 2.

    Attributes:
        row: Row of the store, which is the item's position in the manifest.
        id: The item's id.
        reason: Why; where it does not decode, in the decoder's words.
    """

    row: int
    id: str
    reason: str


@dataclass(frozen=True)
class Receipt:
    """What was committed for one unit. It holds no time and no count of tries: the same rows give the same receipt.

    Attributes:
        unit: The unit.
        rows: First row, and one past the last.
        object_sha256: Hash of the stored object, read back after writing.
        content_sha256: Hash of the rows' little-endian bytes.
        size: Bytes of the stored object.
        fingerprint: The store's.
        quarantined: Items of the unit that have no embedding, in row order.
    """

    unit: int
    rows: tuple[int, int]
    object_sha256: str
    content_sha256: str
    size: int
    fingerprint: str
    quarantined: tuple[Quarantined, ...] = ()

    def to_bytes(self) -> bytes:
        """Canonical JSON of the fields and ``sha256``, the hash of that of the fields; and a line end."""
        fields = asdict(self)
        return canonical_json(fields | {"sha256": digest_of(fields)}) + b"\n"

    @classmethod
    def from_bytes(cls, data: bytes, *, unit: int, fingerprint: str) -> Receipt:
        """Parse a receipt and check that it is this unit's, of this store.

        Raises:
            IntegrityError: It is damaged, or of another unit or store.
        """
        try:
            fields = json.loads(data)
            told = fields.pop("sha256")
            found = digest_of(fields)
            fields["rows"] = tuple(fields["rows"])
            fields["quarantined"] = tuple(Quarantined(**item) for item in fields["quarantined"])
            receipt = cls(**fields)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise IntegrityError(
                f"receipt of unit {unit} is damaged: {type(error).__name__}",
                hint=f"delete receipts/{unit}.json and run the same gstds-embed command: only that unit is done again",
            ) from error
        if told != found:
            raise IntegrityError(
                f"receipt of unit {unit} is damaged: its own hash is {found[:12]}, it says {str(told)[:12]}"
            )
        if (receipt.unit, receipt.fingerprint) != (unit, fingerprint):
            raise IntegrityError(
                f"receipt of unit {unit} belongs to unit {receipt.unit} of store {receipt.fingerprint[:12]}, "
                f"expected store {fingerprint[:12]}"
            )
        return receipt


def receipts_root(receipts: dict[int, Receipt]) -> str:
    """Merkle root over the receipts in unit order."""
    return merkle_root(receipts[unit].to_bytes() for unit in sorted(receipts))
