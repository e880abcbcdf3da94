"""Selecting in other processes and on other machines: which batches make up a unit, and how they come back in order.

Where assignments of rows to batches are fixed, a batch comes again in later epochs, and its graph is what takes time.
So a unit holds a few graphs with *all* batches that they serve from where the run begins. What is selected for later
epochs waits in a temporary file without a name until its turn comes; in memory are the units under way and no more.

Difficulty and reference losses are computed once, in the first process: a probe trained on another machine could differ
in the last bit, and so would the selection.
"""

from __future__ import annotations

import os
import pickle
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import IO, TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Int64

from gstds_cache.config import SelectConfig
from gstds_cache.errors import FingerprintMismatchError
from gstds_cache.files import mapped
from gstds_cache.files.digest import digest_of
from gstds_cache.files.location import Location
from gstds_cache.runtime.executor import Executor
from gstds_cache.selection.counts import SelectionCounts
from gstds_cache.selection.difficulty import Difficulty
from gstds_cache.selection.guidance import Guidance
from gstds_cache.selection.plan import SelectionPlan
from gstds_cache.selection.selected_batch import SelectedBatch
from gstds_cache.store.access import Kind
from gstds_cache.store.reader import EmbeddingStore

if TYPE_CHECKING:
    from gstds_cache.selection.run import BatchSelector

GRAPHS = 32
"""Graphs of a unit, at most: half a second or so of one core at 512 rows each."""
UNITS = 64
"""Units that a run is made into, at least, where it has so many graphs: workers that are faster take more of them."""


@dataclass(frozen=True, eq=False)
class BatchUnit:
    """Batches that one task selects.

    Attributes:
        seqs: Their positions in the run, ascending, int64 [n].
        first: How many of them come next in the run; the others are of later epochs.
    """

    seqs: Int64[np.ndarray, " n"]
    first: int

    @property
    def name(self) -> str:
        """The unit in words."""
        return f"{self.seqs[0]}-{self.seqs[self.first - 1]}"


def units_of(plan: SelectionPlan, start: int, graphs: int) -> Iterator[BatchUnit]:
    """Cut a run into units, each with its graphs' batches of all epochs.

    Args:
        plan: The run.
        start: The first batch that is wanted.
        graphs: Graphs of a unit.

    Yields:
        Units, by their first batch. Every batch from ``start`` on is in one of them.
    """
    seq = start
    while seq < plan.total_batches:
        epoch = seq // plan.batches_per_epoch
        end = min((epoch + 1) * plan.batches_per_epoch, plan.total_batches)
        new = np.arange(seq, end)
        if plan.batch_assignments:
            new = new[~_came_before(plan, epoch, start)[new % plan.batches_per_epoch]]
        for first in range(0, len(new), graphs):
            part = new[first : first + graphs]
            yield BatchUnit(np.concatenate([part, *_later(plan, part)]), len(part))
        seq = end


def _came_before(plan: SelectionPlan, epoch: int, start: int) -> np.ndarray:
    """Which places of an epoch hold groups that an earlier epoch had, from batch ``start`` on: bool [T]."""
    before = np.zeros(plan.batches_per_epoch, bool)
    groups = plan.groups(epoch)
    for earlier in range(epoch - plan.batch_assignments, -1, -plan.batch_assignments):
        if (earlier + 1) * plan.batches_per_epoch <= start:
            break
        from_place = max(0, start - earlier * plan.batches_per_epoch)
        had = np.zeros(plan.batches_per_epoch, bool)
        had[plan.groups(earlier)[from_place:]] = True
        before |= had[groups]
        if not from_place:
            break
    return before


def _later(plan: SelectionPlan, seqs: Int64[np.ndarray, " n"]) -> list[Int64[np.ndarray, " n"]]:
    """Where the groups of ``seqs``, which are of one epoch, come again, epoch by epoch."""
    if not plan.batch_assignments:
        return []
    epoch = int(seqs[0]) // plan.batches_per_epoch
    groups = plan.groups(epoch)[seqs % plan.batches_per_epoch]
    mine = np.zeros(plan.batches_per_epoch, bool)
    mine[groups] = True
    return [
        np.flatnonzero(mine[plan.groups(later)]) + later * plan.batches_per_epoch
        for later in range(epoch + plan.batch_assignments, plan.epochs, plan.batch_assignments)
    ]


@dataclass(frozen=True)
class SelectedUnit:
    """What another process sends back.

    Attributes:
        batches: What stays of each batch, in order.
        counts: What was counted.
    """

    batches: list[SelectedBatch]
    counts: dict[str, Any]


@dataclass(frozen=True)
class SelectRecipe:
    """What another process needs to select (:class:`gstds_cache.runtime.executor.Recipe`).

    Attributes:
        location: The store.
        fingerprint: Its fingerprint.
        hidden: Digest of the rows that are left out.
        access: How to read rows.
        memory_budget: Bytes of embeddings that each process may hold.
        config: How to select.
        digest: What the selection is, as the first process has it.
        guidance: The rows' difficulty.
        reference: Their reference losses.
    """

    location: Location
    fingerprint: str
    hidden: str
    access: Kind
    memory_budget: int
    config: SelectConfig
    digest: str
    guidance: Guidance
    reference: Difficulty | None
    cpus = 1
    gpu = False
    counted = "blocks of batches"

    @property
    def key(self) -> str:
        """What tells this recipe from others."""
        return digest_of(["select", str(self.location), self.digest])

    def open(self) -> SelectElsewhere:
        """Open the store and plan the run.

        Raises:
            FingerprintMismatchError: It is another selection than the first process has.
        """
        from gstds_cache.selection.run import BatchSelector

        store = EmbeddingStore(
            self.location,
            memory_budget=self.memory_budget,
            access=self.access,
            state=self.fingerprint,
            hidden=self.hidden,
        )
        selector = BatchSelector(store, self.config)
        if selector.digest != self.digest:
            raise FingerprintMismatchError(
                f"{self.location}: here it is selection {selector.digest[:12]}, expected {self.digest[:12]}",
                hint="every machine has to see the same store, rules and files under the same names",
            )
        selector.__dict__ |= {"guidance": self.guidance, "reference": self.reference}
        return SelectElsewhere(selector)


class SelectElsewhere:
    """In another process: selects units of batches."""

    def __init__(self, selector: BatchSelector) -> None:
        self._selector = selector

    def __call__(self, units: Sequence[BatchUnit]) -> Iterator[SelectedUnit]:
        """Select.

        Args:
            units: Units of batches.

        Yields:
            What stays of each unit's batches.
        """
        for unit in units:
            self._selector.counts = SelectionCounts()
            batches = list(self._selector.select(unit.seqs.tolist()))
            yield SelectedUnit(batches, self._selector.counts.parts())


class SelectAnywhere:
    """Selects the batches of a run by an executor (:class:`gstds_cache.runtime.executor.PortableTask`)."""

    def __init__(self, selector: BatchSelector) -> None:
        self._selector = selector

    def __call__(self, units: Sequence[BatchUnit]) -> Iterator[list[SelectedBatch]]:
        """Select in this process.

        Args:
            units: Units of batches.

        Yields:
            What stays of each unit's batches.
        """
        for unit in units:
            yield list(self._selector.select(unit.seqs.tolist()))

    def recipe(self) -> SelectRecipe:
        """How it is done in another process."""
        selector = self._selector
        store = selector.store
        return SelectRecipe(
            location=store.location,
            fingerprint=store.fingerprint,
            hidden=store.hidden_digest,
            access=store.access_asked,
            memory_budget=store.memory_budget,
            config=replace(selector.config, threads=1, device="cpu"),
            digest=selector.digest,
            guidance=selector.guidance,
            reference=selector.reference,
        )

    def receive(self, result: SelectedUnit) -> list[SelectedBatch]:
        """Count what another process selected."""
        self._selector.counts.merge(result.counts)
        return result.batches


def select_by(selector: BatchSelector, executor: Executor, start: int) -> Iterator[SelectedBatch]:
    """Select the batches of a run, in order.

    Args:
        selector: The run.
        executor: Where batches are selected.
        start: The first batch.

    Yields:
        The batches from ``start`` on.
    """
    plan = selector.plan
    graphs = max(1, min(GRAPHS, plan.batches_per_epoch // UNITS))
    units = list(units_of(plan, start, graphs)) if plan.total_batches <= 1 << 16 else units_of(plan, start, graphs)
    waiting = _Waiting(plan.total_batches)
    due, results = start, executor.run(SelectAnywhere(selector), units, ordered=True)
    try:
        while True:
            begun = time.perf_counter()
            batches = next(results, None)
            selector.counts.elapsed += time.perf_counter() - begun
            for batch in batches or ():
                waiting.put(batch)
            while (ready := waiting.take(due)) is not None:
                due += 1
                selector.pending = int(waiting.has(due))  # those that follow at once are written together
                yield ready
            if batches is None:
                return
    finally:
        results.close()  # type: ignore[attr-defined]
        waiting.close()


class _Waiting:
    """Batches that came before their turn, in a temporary file."""

    def __init__(self, batches: int) -> None:
        self._total, self._size = batches, 0

    @cached_property
    def _file(self) -> IO[bytes]:
        return mapped.temporary_file()

    @cached_property
    def _places(self) -> Int64[np.ndarray, "B 2"]:
        """Where each batch lies, and its bytes: mapped as well."""
        return mapped.zeros((self._total, 2), np.int64)

    def put(self, batch: SelectedBatch) -> None:
        """Keep a batch until its turn comes."""
        data = pickle.dumps(batch, protocol=pickle.HIGHEST_PROTOCOL)
        os.pwrite(self._file.fileno(), data, self._size)
        self._places[batch.seq] = self._size, len(data)
        self._size += len(data)

    def has(self, seq: int) -> bool:
        """Whether a batch waits."""
        return bool(self._size and seq < self._total and self._places[seq, 1])

    def take(self, seq: int) -> SelectedBatch | None:
        """A batch that waits; None where it is not there."""
        if not self.has(seq):
            return None
        place, size = self._places[seq].tolist()
        batch: SelectedBatch = pickle.loads(os.pread(self._file.fileno(), size, place))
        return batch

    def close(self) -> None:
        """The file is gone."""
        if self._size:
            self._file.close()
