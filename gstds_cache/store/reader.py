"""Reading embeddings, receipts first: zarr itself reads a missing chunk as fill values without a word."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

import numpy as np
import zarr
from jaxtyping import Float, Int64, UInt8
from zarr.storage import LocalStore

from gstds_cache.errors import IncompleteError, UsageError, command_line
from gstds_cache.store import layout
from gstds_cache.store.journal import Journal, corrupt
from gstds_cache.store.receipt import Quarantined
from gstds_cache.store.writer import valid_of


class EmbeddingStore:
    """A store opened for reading.

    Attributes:
        path: Its directory.
        spec: What it holds.
        fingerprint: SHA-256 of the specification.
        valid: [N] uint8: 0 missing, 1 ok, 2 undecodable.
        quarantined: The undecodable items with their reasons.
        memory_budget: Bytes of embeddings that may be held in memory.
    """

    def __init__(self, path: Path | str, *, allow_partial: bool = False, memory_budget: int = 8 << 30) -> None:
        """Open a store and check its receipts against what is on disk (sizes, not hashes).

        Args:
            path: The store's directory.
            allow_partial: Accept a store that is not complete; rows that are missing have ``valid`` 0.
            memory_budget: Bytes of embeddings that may be held in memory.

        Raises:
            StoreNotFoundError: There is no store at ``path``.
            IncompleteError: The store is not complete and ``allow_partial`` is not set.
            ChunkCorruptError: An object is missing or of another size, or a record was altered.
        """  # noqa: DOC501
        self.path = Path(path)
        self.memory_budget = memory_budget
        self.journal = Journal(self.path)
        self.spec = self.journal.spec
        self.fingerprint = self.spec.fingerprint
        self.receipts = self.journal.receipts()
        record = self.journal.complete()
        if record is None and not allow_partial:
            command = self.journal.provenance.get("command", ["gstds-embed", "DATASET"])
            raise IncompleteError(
                f"{self.path} is not complete: {len(self.receipts)} of {self.spec.units} units are committed",
                hint=f"finish it with: {command_line(*command, '--cache', self.path)}",
            )
        problems = self.journal.check_sizes(self.receipts)
        if record is not None:
            problems += self.journal.check_complete(record, self.receipts)
        if problems:
            raise corrupt(self.path, problems)
        self.valid: UInt8[np.ndarray, " N"] = valid_of(self.spec, self.receipts)

    def __len__(self) -> int:
        return self.spec.items

    @property
    def quarantined(self) -> list[Quarantined]:
        """Items that could not be decoded, in row order."""
        return [item for unit in sorted(self.receipts) for item in self.receipts[unit].quarantined]

    @cached_property
    def labels(self) -> Int64[np.ndarray, " N"]:
        """Label of each row, -1 where there is none."""
        return np.asarray(self._array("label")[:])

    @property
    def nbytes(self) -> int:
        """Bytes of all embeddings in memory."""
        return self.spec.items * self.spec.dim * np.dtype(self.spec.dtype).itemsize

    @property
    def in_memory(self) -> bool:
        """Whether :meth:`gather` reads the whole store into memory once (it fits the budget) or unit by unit."""
        return self.nbytes <= self.memory_budget

    def unit(self, unit: int) -> Float[np.ndarray, "R D"]:
        """All rows of one committed unit, in the store's dtype.

        Raises:
            IncompleteError: The unit is not committed.
            ChunkCorruptError: Its object does not decode.
        """  # noqa: DOC501
        if unit not in self.receipts:
            raise IncompleteError(f"{self.path}: unit {unit} is not committed")
        span = self.spec.rows_of(unit)
        if not self.journal.transport.exists(layout.object_key(unit)):
            raise corrupt(self.path, [f"unit {unit}: {layout.object_key(unit)} is missing"])
        try:
            return np.asarray(self._array("embeddings")[span.start : span.stop])
        except (ValueError, RuntimeError, OSError) as error:
            raise corrupt(self.path, [f"unit {unit}: {layout.object_key(unit)} does not decode ({error})"]) from error

    def gather(self, rows: Int64[np.ndarray, " B"]) -> Float[np.ndarray, "B D"]:
        """The embeddings of ``rows``, in that order and in the store's dtype.

        Raises:
            UsageError: A row is out of range, or has no embedding.
        """
        if rows.size and (rows.min() < 0 or rows.max() >= len(self)):
            raise UsageError(f"row {rows.min()}..{rows.max()} asked for, the store has 0..{len(self) - 1}")
        without = rows[self.valid[rows] != layout.OK]
        if without.size:
            raise UsageError(f"row {without[0]} has no embedding (valid = {self.valid[without[0]]})")
        if self.in_memory:
            gathered: Float[np.ndarray, "B D"] = self._all[rows]
            return gathered
        out = np.empty((len(rows), self.spec.dim), self.spec.dtype)
        units = rows // self.spec.unit_rows
        for unit in np.unique(units):
            here = units == unit
            out[here] = self.unit(int(unit))[rows[here] - unit * self.spec.unit_rows]
        return out

    @cached_property
    def _all(self) -> Float[np.ndarray, "N D"]:
        rows = np.zeros((len(self), self.spec.dim), self.spec.dtype)
        for unit in self.receipts:
            span = self.spec.rows_of(unit)
            rows[span.start : span.stop] = self.unit(unit)
        return rows

    def _array(self, name: str) -> zarr.Array:  # type: ignore[type-arg]
        found = self._group[name]
        if not isinstance(found, zarr.Array):
            raise corrupt(self.path, [f"{name} is no array"])
        return found

    @cached_property
    def _group(self) -> zarr.Group:
        return zarr.open_group(LocalStore(self.path, read_only=True), mode="r", zarr_format=3)
