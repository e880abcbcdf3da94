"""Checking a store without the model: sizes against receipts, or every byte."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from gstds_cache.store.journal import Journal

Level = Literal["quick", "full"]


@dataclass(frozen=True)
class VerifyReport:
    """What a check found.

    Attributes:
        level: How deep it looked.
        units: Units in all.
        committed: Units with a receipt.
        complete: Whether COMPLETE is there.
        bytes_hashed: Bytes of unit objects that were hashed.
        problems: One line each; empty where all is well.
    """

    level: Level
    units: int
    committed: int
    complete: bool
    bytes_hashed: int
    problems: tuple[str, ...]


def verify(path: Path, level: Level = "quick") -> VerifyReport:
    """Check a store.

    Args:
        path: The store's directory.
        level: ``quick`` compares sizes with receipts and hashes the small objects; ``full`` hashes every object.

    Returns:
        The report.

    Raises:
        StoreNotFoundError: There is no store at ``path``.
        IntegrityError: The specification or a receipt cannot be read at all.
    """
    journal = Journal(path)
    receipts = journal.receipts()
    record = journal.complete()
    problems = journal.check_hashes(receipts) if level == "full" else journal.check_sizes(receipts)
    if record is not None:
        problems += journal.check_complete(record, receipts)
    return VerifyReport(
        level=level,
        units=journal.spec.units,
        committed=len(receipts),
        complete=record is not None,
        bytes_hashed=sum(receipt.size for receipt in receipts.values()) if level == "full" else 0,
        problems=tuple(problems),
    )
