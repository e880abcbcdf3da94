"""Rows that are left out of selections: a list beside the store's objects, none of which it touches.

Each change is a record of its own, ``hidden/1.json``, ``hidden/2.json``, ..., with all rows that are hidden after it,
and no record is ever replaced: so a selection that was made with fewer or more of them can be computed again.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64

from gstds_cache.errors import IntegrityError
from gstds_cache.files.digest import canonical_json, digest_of
from gstds_cache.files.location import Location
from gstds_cache.store import layout
from gstds_cache.store.transport import Transport


@dataclass(frozen=True, eq=False)
class HiddenRows:
    """Rows that no selection takes.

    Attributes:
        rows: Which, ascending, each once, int64 [A].
        number: Of the record; 0 where none was ever hidden.
    """

    rows: Int64[np.ndarray, " A"]
    number: int = 0

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def digest(self) -> str:
        """Identity of the rows; empty where there are none, so that selections are what they were without this."""
        return digest_of(self.ranges) if len(self.rows) else ""

    @property
    def ranges(self) -> list[list[int]]:
        """The rows as [first, one past the last] of each run of them."""
        if not len(self.rows):
            return []
        ends = np.flatnonzero(np.diff(self.rows) != 1)
        first, last = np.append(0, ends + 1), np.append(ends, len(self.rows) - 1)
        return [list(run) for run in zip(self.rows[first].tolist(), (self.rows[last] + 1).tolist(), strict=True)]

    def below(self, items: int) -> HiddenRows:
        """Those of them that a store of so many rows has."""
        return HiddenRows(self.rows[: np.searchsorted(self.rows, items)], self.number)

    def to_bytes(self) -> bytes:
        """Canonical JSON of number, count and ranges, and ``sha256``, the hash of that of these; and a line end."""
        fields = {"number": self.number, "count": len(self), "ranges": self.ranges}
        return canonical_json(fields | {"sha256": digest_of(fields)}) + b"\n"

    @classmethod
    def from_bytes(cls, data: bytes) -> HiddenRows:
        """Parse what :meth:`to_bytes` gave.

        Raises:
            ValueError: It is something else.
        """
        try:
            fields = json.loads(data)
            ranges = np.array(fields["ranges"], np.int64).reshape(-1, 2)
            parts = [np.arange(first, stop) for first, stop in ranges.tolist()]
            hidden = cls(np.concatenate([np.zeros(0, np.int64), *parts]), int(fields["number"]))
        except (TypeError, KeyError, AttributeError, OverflowError) as error:
            raise ValueError(f"{type(error).__name__}: {error}") from error
        if hidden.to_bytes() != data:
            raise ValueError("it is not as it was written")
        return hidden


NOTHING = HiddenRows(np.zeros(0, np.int64))


def read_hidden(transport: Transport, items: int, digest: str | None = None) -> HiddenRows:
    """The rows that are hidden.

    Args:
        transport: The store's objects.
        items: Rows of the store, as it is looked at: of those that were appended later none is told of.
        digest: Of the rows that were hidden when a selection was made; None for those that are hidden now.

    Returns:
        The rows.

    Raises:
        IntegrityError: A record is damaged; or there is none of that digest.
    """
    if digest == "":
        return NOTHING
    listed = transport.sizes(f"{layout.HIDDEN}/")
    last = 0
    while record_key(last + 1) in listed:
        last += 1
    if digest is None:
        return _read(transport, last).below(items) if last else NOTHING
    for number in range(last, 0, -1):
        if (found := _read(transport, number).below(items)).digest == digest:
            return found
    raise IntegrityError(
        f"{transport.location}: no record in {layout.HIDDEN}/ is of the hidden rows {digest[:12]}",
        hint="the selection was made from another copy of the store, or the records were deleted: select again",
    )


def record_key(number: int) -> str:
    """Key of a record."""
    return f"{layout.HIDDEN}/{number}.json"


def write_hidden(transport: Transport, before: HiddenRows, rows: Int64[np.ndarray, " A"]) -> HiddenRows | None:
    """Hide ``rows`` and no others from now on.

    Args:
        transport: The store's objects.
        before: What was hidden before.
        rows: Ascending, each once.

    Returns:
        What is hidden now; None where another process changed it meanwhile.
    """
    now = HiddenRows(rows, before.number + 1)
    return now if transport.put_if_absent(record_key(now.number), now.to_bytes()) else None


def _read(transport: Transport, number: int) -> HiddenRows:
    """One record.

    Raises:
        IntegrityError: It is damaged.
    """
    problem = "it is another record"
    try:
        found = HiddenRows.from_bytes(transport.get(record_key(number)))
        if found.number == number:
            return found
    except ValueError as error:
        problem = str(error)
    where: Location = transport.location
    raise IntegrityError(
        f"{where}/{record_key(number)}, the list of hidden rows, is damaged: {problem}",
        hint="restore it from a copy; or delete it, which hides the rows of the record before it, and hide again",
    )
