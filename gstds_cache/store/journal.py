"""What a store says of itself: specification, receipts, completeness. Readers and the writer share it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gstds_cache import scratch
from gstds_cache.digest import canonical_json
from gstds_cache.errors import ChunkCorruptError, IntegrityError, StoreNotFoundError, command_line
from gstds_cache.store import layout
from gstds_cache.store.receipt import Receipt, receipts_root
from gstds_cache.store.spec import CacheSpec
from gstds_cache.store.transport import open_transport

Progress = Callable[[int, int], None]

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

    @classmethod
    def from_bytes(cls, data: bytes) -> Complete:
        """Parse what :meth:`to_bytes` gave.

        Raises:
            ValueError: ``data`` is something else.
            TypeError: It lacks fields, or has others.
        """
        record = cls(**json.loads(data))
        if record.to_bytes() != data:
            raise ValueError("it is not as it was written")
        return record


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a store.

    Attributes:
        key: The object it shows in.
        text: What is wrong, for people.
        unit: The unit that has to be done again, or None where the fault is in an object that belongs to no unit.
    """

    key: str
    text: str
    unit: int | None = None

    def __str__(self) -> str:
        return self.text if self.unit is None else f"unit {self.unit}: {self.text}"


class Journal:
    """Reads the specification and receipts of one store.

    Attributes:
        location: The store as a user names it.
        transport: Its objects.
        spec: What it holds.
        kind: Kind of data set.
        classes: Class names by label.
        provenance: How it was made; no identity.
    """

    def __init__(self, where: str | Path) -> None:
        """Read the specification of the store at ``where``.

        Raises:
            StoreNotFoundError: There is no store.
            IntegrityError: The specification is damaged.
        """
        self.transport = open_transport(where)
        self.location = self.transport.location
        try:
            data = self.transport.get(layout.GROUP)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise StoreNotFoundError(
                f"no store at {self.location}",
                hint="make one with: gstds-embed DATASET --cache STORE; list with: gstds-cache ls",
            ) from error
        try:
            attributes: dict[str, Any] = json.loads(data)["attributes"]["gstds"]
            fields: dict[str, Any] = dict(attributes["spec"])
            self.provenance: dict[str, Any] = dict(attributes.get("provenance", {}))
            self.classes: tuple[str, ...] = tuple(attributes.get("classes", ()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise IntegrityError(
                f"{self.location}/{layout.GROUP} is damaged or not of gstds-cache: {error!r}",
                hint="this one object says what the store holds, and cannot be made again from the others: restore it "
                "from a copy, or embed into a new --cache with --reuse of another store",
            ) from error
        self.spec = CacheSpec.from_dict(fields)
        self.kind = str(attributes.get("kind", ""))
        if attributes.get("fingerprint") != self.spec.fingerprint:
            raise IntegrityError(
                f"{self.location}: the specification was altered: its fingerprint is {self.spec.fingerprint[:12]}, "
                f"recorded is {str(attributes.get('fingerprint'))[:12]}",
                hint=f"restore {self.location}/{layout.GROUP} from a copy, or embed into a new --cache",
            )

    def scan_receipts(self) -> tuple[dict[int, Receipt], list[Problem]]:
        """All receipts that can be read, by unit, and a problem for each that cannot."""
        listed = self.transport.sizes("receipts/")
        units = [unit for unit in range(self.spec.units) if layout.receipt_key(unit) in listed]
        found: dict[int, Receipt] = {}
        problems = []
        for unit, data in zip(units, self.transport.get_many([layout.receipt_key(u) for u in units]), strict=True):
            try:
                found[unit] = self._parse(unit, data)
            except IntegrityError as error:
                problems.append(Problem(layout.receipt_key(unit), error.message, unit))
        return found, problems

    def _parse(self, unit: int, data: bytes) -> Receipt:
        receipt = Receipt.from_bytes(data, unit=unit, fingerprint=self.spec.fingerprint)
        if receipt.to_bytes() != data or range(*receipt.rows) != self.spec.rows_of(unit):
            raise IntegrityError(f"receipt of unit {unit} is not as it was written")
        return receipt

    def receipts(self) -> dict[int, Receipt]:
        """All receipts by unit.

        Raises:
            ChunkCorruptError: One is damaged or belongs elsewhere.
        """  # noqa: DOC501
        found, problems = self.scan_receipts()
        if problems:
            raise corrupt(self.location, problems)
        return found

    def complete(self) -> Complete | None:
        """The completeness record, or None.

        Raises:
            ChunkCorruptError: It is damaged or belongs to another store.
        """  # noqa: DOC501
        try:
            record = Complete.from_bytes(self.transport.get(layout.COMPLETE))
        except FileNotFoundError:
            return None
        except (ValueError, TypeError) as error:
            problem = Problem(layout.COMPLETE, f"{layout.COMPLETE} is damaged: {error}")
            raise corrupt(self.location, [problem]) from error
        if record.fingerprint != self.spec.fingerprint:
            text = f"{layout.COMPLETE} belongs to store {record.fingerprint[:12]}, not {self.spec.fingerprint[:12]}"
            raise corrupt(self.location, [Problem(layout.COMPLETE, text)])
        return record

    def discarded(self) -> set[int]:
        """Units that a repair has discarded and not yet committed again; of a damaged note, all units."""
        try:
            named = json.loads(self.transport.get(layout.REPAIR))["units"]
            return {unit for unit in range(self.spec.units) if unit in named}
        except FileNotFoundError:
            return set()
        except (ValueError, KeyError, TypeError):
            return set(range(self.spec.units))

    def check_sizes(self, receipts: dict[int, Receipt]) -> list[Problem]:
        """Problems visible without reading units: missing ones, and ones of another size."""
        sizes = self.transport.sizes("embeddings/")
        problems = []
        for unit, receipt in receipts.items():
            key = layout.object_key(unit)
            if key not in sizes:
                problems.append(Problem(key, f"{key} is missing", unit))
            elif sizes[key] != receipt.size:
                problems.append(Problem(key, f"{key} has {sizes[key]} bytes, its receipt says {receipt.size}", unit))
        return problems

    def check_hashes(self, receipts: dict[int, Receipt], progress: Progress | None = None) -> list[Problem]:
        """Problems found by hashing every committed unit.

        Args:
            receipts: Receipts of the units to hash.
            progress: Called with units done and units in all.

        Returns:
            What is wrong.
        """
        problems = self.check_sizes(receipts)
        named = {problem.unit for problem in problems}
        for done, (unit, receipt) in enumerate(receipts.items()):
            if progress is not None:
                progress(done, len(receipts))
            if unit not in named:
                key = layout.object_key(unit)
                got = self.transport.sha256(key)
                if got != receipt.object_sha256:
                    text = f"{key} hashes to {got[:12]}, its receipt says {receipt.object_sha256[:12]}"
                    problems.append(Problem(key, text, unit))
        return problems

    def check_complete(self, record: Complete, receipts: dict[int, Receipt]) -> list[Problem]:
        """Problems between the completeness record, the receipts and the objects that are no units."""
        problems = [
            Problem(layout.receipt_key(unit), "no receipt", unit)
            for unit in range(self.spec.units)
            if unit not in receipts
        ]
        if not problems and receipts_root(receipts) != record.receipts_sha256:
            text = f"{layout.COMPLETE}: the receipts are not the ones that were there when it was written"
            problems.append(Problem(layout.COMPLETE, text))
        counts = (self.spec.items, *counts_of(self.spec, receipts))
        if not problems and (record.items, record.ok, record.quarantined, record.units) != (*counts, self.spec.units):
            problems.append(Problem(layout.COMPLETE, f"{layout.COMPLETE} counts other rows than the receipts"))
        for key in METADATA_KEYS:
            if not self.transport.exists(key):
                problems.append(Problem(key, f"{key} is missing"))
            elif self.transport.sha256(key) != record.objects.get(key):
                problems.append(Problem(key, f"{key} was altered"))
        return problems


def valid_of(spec: CacheSpec, receipts: dict[int, Receipt]) -> np.ndarray:
    """The ``valid`` array [N] uint8 that the receipts amount to."""
    valid = scratch.zeros((spec.items,), np.uint8)
    for unit in range(spec.units):
        span = spec.rows_of(unit)
        valid[span.start : span.stop] = valid_in(spec, receipts, unit)
    return valid


def counts_of(spec: CacheSpec, receipts: dict[int, Receipt]) -> tuple[int, int]:
    """How many rows have an embedding, and how many could not be decoded."""
    quarantined = sum(len({item.row for item in receipt.quarantined}) for receipt in receipts.values())
    return sum(len(spec.rows_of(unit)) for unit in receipts) - quarantined, quarantined


def valid_in(spec: CacheSpec, receipts: dict[int, Receipt], unit: int) -> np.ndarray:
    """A unit's part [R] of the ``valid`` array."""
    span = spec.rows_of(unit)
    valid = np.full(len(span), layout.OK if unit in receipts else layout.MISSING, np.uint8)
    for item in receipts[unit].quarantined if unit in receipts else ():
        valid[item.row - span.start] = layout.UNDECODABLE
    return valid


def without_embedding(spec: CacheSpec, receipts: dict[int, Receipt]) -> np.ndarray:
    """The rows [A] int64, ascending, whose ``valid`` is not 1."""
    parts = [
        np.unique([item.row for item in receipts[unit].quarantined] if unit in receipts else spec.rows_of(unit))
        for unit in range(spec.units)
        if unit not in receipts or receipts[unit].quarantined
    ]
    return np.concatenate([np.zeros(0, np.int64), *parts])


def corrupt(location: str, problems: Iterable[Problem]) -> ChunkCorruptError:
    """The error for a store with ``problems``, naming each and the command that mends it."""
    lines = [str(problem) for problem in problems]
    more = [f"... and {len(lines) - 20} more"] if len(lines) > 20 else []
    return ChunkCorruptError(
        f"{location} is damaged:\n    " + "\n    ".join([*lines[:20], *more]),
        hint=f"mend it with: {command_line('gstds-cache', 'repair', location)}",
    )
