"""What a store's directory says of itself: specification, receipts, completeness. Readers and the writer share it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gstds_cache.digest import canonical_json, sha256_hex
from gstds_cache.errors import ChunkCorruptError, IntegrityError, StoreNotFoundError, command_line
from gstds_cache.store import layout
from gstds_cache.store.receipt import Receipt, receipts_root
from gstds_cache.store.spec import CacheSpec
from gstds_cache.store.transport import LocalTransport

METADATA_KEYS = (
    layout.GROUP,
    "embeddings/zarr.json",
    "label/zarr.json",
    "valid/zarr.json",
    layout.LABEL,
    layout.VALID,
    layout.ITEMS,
)


@dataclass(frozen=True)
class Complete:
    """The record that a store is whole.

    Attributes:
        fingerprint: The store's.
        items: Rows in all; ``items == ok + quarantined``.
        ok: Rows with an embedding.
        quarantined: Rows whose item could not be decoded.
        units: Number of units.
        receipts_sha256: Merkle root over all receipts.
        objects: SHA-256 of every object that is not a unit.
    """

    fingerprint: str
    items: int
    ok: int
    quarantined: int
    units: int
    receipts_sha256: str
    objects: dict[str, str]

    def to_bytes(self) -> bytes:
        """Canonical JSON and a line end."""
        return canonical_json(vars(self)) + b"\n"


class Journal:
    """Reads the specification and receipts under one directory."""

    def __init__(self, path: Path) -> None:
        """Read ``path``'s specification.

        Raises:
            StoreNotFoundError: There is no store at ``path``.
            IntegrityError: The specification is damaged.
        """
        self.path = path
        self.transport = LocalTransport(path)
        try:
            group = json.loads(self.transport.get(layout.GROUP))
            attributes: dict[str, Any] = group["attributes"]["gstds"]
            fields: dict[str, Any] = dict(attributes["spec"])
            self.provenance: dict[str, Any] = dict(attributes.get("provenance", {}))
            self.classes: tuple[str, ...] = tuple(attributes.get("classes", ()))
        except (FileNotFoundError, NotADirectoryError) as error:
            raise StoreNotFoundError(
                f"no store at {path}",
                hint="make one with: gstds-embed DATASET --cache STORE; list with: gstds-cache ls",
            ) from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise IntegrityError(f"{path / layout.GROUP} is damaged or not of gstds-cache: {error!r}") from error
        self.spec = CacheSpec.from_dict(fields)
        self.kind = str(attributes.get("kind", ""))
        if attributes.get("fingerprint") != self.spec.fingerprint:
            raise IntegrityError(
                f"{path}: the specification was altered: its fingerprint is {self.spec.fingerprint[:12]}, "
                f"recorded is {str(attributes.get('fingerprint'))[:12]}"
            )

    def receipts(self) -> dict[int, Receipt]:
        """All receipts by unit.

        Raises:
            IntegrityError: One is damaged or belongs elsewhere.
        """
        found = {}
        for unit in range(self.spec.units):
            if self.transport.exists(layout.receipt_key(unit)):
                data = self.transport.get(layout.receipt_key(unit))
                found[unit] = Receipt.from_bytes(data, unit=unit, fingerprint=self.spec.fingerprint)
        return found

    def complete(self) -> Complete | None:
        """The completeness record, or None.

        Raises:
            IntegrityError: It is damaged or belongs to another store.
        """
        try:
            record = Complete(**json.loads(self.transport.get(layout.COMPLETE)))
        except FileNotFoundError:
            return None
        except (ValueError, TypeError) as error:
            raise IntegrityError(f"{self.path / layout.COMPLETE} is damaged: {error}") from error
        if record.fingerprint != self.spec.fingerprint:
            raise IntegrityError(f"{self.path / layout.COMPLETE} belongs to store {record.fingerprint[:12]}")
        return record

    def check_sizes(self, receipts: dict[int, Receipt]) -> list[str]:
        """Problems visible without reading objects: missing or of another size; one line each."""
        problems = []
        for unit, receipt in receipts.items():
            key = layout.object_key(unit)
            if not self.transport.exists(key):
                problems.append(f"unit {unit}: {key} is missing")
            elif self.transport.size(key) != receipt.size:
                size = self.transport.size(key)
                problems.append(f"unit {unit}: {key} has {size} bytes, its receipt says {receipt.size}")
        return problems

    def check_hashes(self, receipts: dict[int, Receipt]) -> list[str]:
        """Problems found by hashing every committed object; one line each."""
        problems = self.check_sizes(receipts)
        named = {line.partition(":")[0] for line in problems}
        for unit, receipt in receipts.items():
            if f"unit {unit}" not in named:
                got = sha256_hex(self.transport.get(layout.object_key(unit)))
                if got != receipt.object_sha256:
                    problems.append(
                        f"unit {unit}: {layout.object_key(unit)} hashes to {got[:12]}, its receipt says "
                        f"{receipt.object_sha256[:12]}"
                    )
        return problems

    def check_complete(self, record: Complete, receipts: dict[int, Receipt]) -> list[str]:
        """Problems between the completeness record, the receipts and the other objects; one line each."""
        problems = [f"unit {unit}: no receipt" for unit in range(self.spec.units) if unit not in receipts]
        if not problems and receipts_root(receipts) != record.receipts_sha256:
            problems.append(f"{layout.COMPLETE}: the receipts are not the ones that were there when it was written")
        for key in METADATA_KEYS:
            if not self.transport.exists(key):
                problems.append(f"{key} is missing")
            elif sha256_hex(self.transport.get(key)) != record.objects.get(key):
                problems.append(f"{key} was altered")
        return problems


def corrupt(path: Path, problems: list[str]) -> ChunkCorruptError:
    """The error for a store with ``problems``, naming each and saying how to mend it."""
    units = sorted({int(line.partition(":")[0][5:]) for line in problems if line.startswith("unit ")})
    named = [f"{path}/{layout.COMPLETE}", *(f"{path}/{layout.receipt_key(unit)}" for unit in units)]
    journal_only = all(line.startswith(("unit ", layout.COMPLETE, layout.VALID)) for line in problems)
    return ChunkCorruptError(
        f"{path} is damaged:\n    " + "\n    ".join(problems[:20]),
        hint=(
            f"{command_line('rm', '-f', *named)}; then run the gstds-embed command again: it embeds the units without "
            "a receipt, and no other"
            if journal_only
            else f"restore the named files from a copy, or remove {path} and run the gstds-embed command again"
        ),
    )
