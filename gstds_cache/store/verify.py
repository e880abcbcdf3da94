"""Checking a store without the model: sizes against receipts, or every byte."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from gstds_cache.errors import ChunkCorruptError
from gstds_cache.store import layout
from gstds_cache.store.journal import Journal, Problem, Progress

Level = Literal["quick", "full"]


@dataclass(frozen=True)
class VerifyReport:
    """What a check found.

    Attributes:
        location: The store.
        level: How deep it looked.
        units: Units in all.
        committed: Units with a receipt that can be read.
        complete: Whether COMPLETE is there.
        bytes_hashed: Bytes of unit objects that were hashed.
        problems: Empty where all is well.
    """

    location: str
    level: Level
    units: int
    committed: int
    complete: bool
    bytes_hashed: int
    problems: tuple[Problem, ...]

    @property
    def bad_units(self) -> list[int]:
        """Units that have to be done again."""
        return sorted({problem.unit for problem in self.problems if problem.unit is not None})


def verify(where: Path | str, level: Level = "quick", *, progress: Progress | None = None) -> VerifyReport:
    """Check a store.

    Args:
        where: The store: a directory, or a URL.
        level: ``quick`` compares sizes with receipts and hashes the small objects; ``full`` hashes every object.
        progress: Called with units hashed and units in all.

    Returns:
        The report.

    Raises:
        StoreNotFoundError: There is no store at ``where``.
        IntegrityError: The specification cannot be read at all.
    """
    journal = Journal(where)
    receipts, problems = journal.scan_receipts()
    problems += journal.check_hashes(receipts, progress) if level == "full" else journal.check_sizes(receipts)
    try:
        record = journal.complete()
    except ChunkCorruptError as error:
        record = None
        problems.append(Problem(layout.COMPLETE, error.message))
    named = {problem.unit for problem in problems}
    if record is not None:
        problems += [p for p in journal.check_complete(record, receipts) if p.unit is None or p.unit not in named]
    return VerifyReport(
        location=journal.location,
        level=level,
        units=journal.spec.units,
        committed=len(receipts),
        complete=record is not None,
        bytes_hashed=sum(receipt.size for receipt in receipts.values()) if level == "full" else 0,
        problems=tuple(problems),
    )
