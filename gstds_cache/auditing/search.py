"""The k nearest rows of every row of a store, in the same store or in another.

Up to ``exact_rows`` rows every row is compared with every other. Beyond that rows are put into cells (k-means), and
each row is compared with those of the cells nearest to it, as in an inverted file with so many probes. All rows that
look into a cell do so together, as one matrix product, which on a CPU is several times as fast as a search row by row
(``benchmarks/bench_audit.py``), and holds one cell at a time.

What grows with the rows: ``8 k`` bytes of a row that is searched for, and beyond ``exact_rows`` 4 bytes of a row that
is searched in and ``4 PROBES`` of one that is searched for; all of it in mapped files, which the kernel can take back.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float32, Int, Int32, Int64

from gstds_cache.auditing.faiss_index import cell_centroids
from gstds_cache.files import mapped
from gstds_cache.files.digest import digest_of
from gstds_cache.runtime.executor import Executor, LocalExecutor, PickledTask
from gstds_cache.seeding import rng_for
from gstds_cache.selection.unit_rows import UnitRows

PROBES = 16
SAMPLE_PER_CELL = 40
NOTHING = np.float32(-2)
"""A similarity that no two rows have: where fewer than k rows were found."""

PRODUCTS = 1 << 24
"""Similarities that are held at a time."""

Counted = Callable[[int, int], None]
Found = tuple[Float32[np.ndarray, "b c"], Int[np.ndarray, "b c"]]
Looked = tuple[Int64[np.ndarray, " b"], Float32[np.ndarray, "b k"], Int32[np.ndarray, "b k"]]


@dataclass(frozen=True, eq=False)
class Nearest:
    """The nearest rows of each row, nearest first, ties by number; never the row itself.

    Attributes:
        index: Their numbers, int32 [M, k]; -1 where there are fewer.
        similarity: Cosines, float32 [M, k]; :data:`NOTHING` where there are fewer.
        exact: Whether every row was compared with every other.
    """

    index: Int32[np.ndarray, "M k"]
    similarity: Float32[np.ndarray, "M k"]
    exact: bool

    @property
    def k(self) -> int:
        """Rows looked for."""
        return int(self.index.shape[1])


def find_nearest(
    queries: UnitRows,
    base: UnitRows,
    k: int,
    *,
    device: torch.device,
    exact_rows: int,
    seed: int = 0,
    probes: int = PROBES,
    progress: Counted = lambda _done, _total: None,
    executor: Executor | None = None,
) -> Nearest:
    """Search for the nearest rows of every row.

    Args:
        queries: Rows to search for.
        base: Rows to search in; the same object where a row is not its own neighbour.
        k: Rows to find.
        device: Where products are computed.
        exact_rows: Rows to search in up to which all are compared.
        seed: Of the cells.
        probes: Cells that a row looks into.
        progress: Called with rows done and rows in all.
        executor: Where rows are looked up; None for this process.

    Returns:
        What was found.
    """
    own = queries is base
    k = max(1, min(k, len(base) - own))
    found = Nearest(
        mapped.zeros((len(queries), k), np.int32), mapped.zeros((len(queries), k), np.float32), len(base) <= exact_rows
    )
    found.index[:], found.similarity[:] = -1, NOTHING
    search, executor = Search(queries, base, k, own, device), executor or LocalExecutor()
    if found.exact:
        _compare_all(search, executor, found, progress)
    else:
        _compare_cells(search, executor, found, seed, probes, progress)
    return found


def _compare_all(search: Search, executor: Executor, found: Nearest, progress: Counted) -> None:
    count, block, done = len(search.queries), search.queries.block, 0
    units = [Lookup(np.arange(first, min(first + block, count)), None) for first in range(0, count, block)]
    for rows, similarity, index in executor.run(search, units):
        found.similarity[rows], found.index[rows] = similarity, index
        done += len(rows)
        progress(done, count)


def _compare_cells(
    search: Search, executor: Executor, found: Nearest, seed: int, probes: int, progress: Counted
) -> None:
    queries, base, device = search.queries, search.base, search.device
    cells = max(1, round(math.sqrt(len(base))))
    rng = rng_for(seed, "audit-cells")
    sample = np.sort(rng.choice(len(base), min(len(base), SAMPLE_PER_CELL * cells), replace=False))
    centroids = cell_centroids(base.at(sample), cells, seed, device)
    probes = min(probes, cells)
    visits = _Members.of(queries, centroids, probes, device)
    members = _Members.first_of(visits, probes) if search.own else _Members.of(base, centroids, 1, device)

    def units() -> Iterator[Lookup]:
        for cell in range(cells):
            here, lookers = members.of_cell(cell), visits.of_cell(cell) // probes
            for start in range(0, len(lookers), queries.block):
                yield Lookup(lookers[start : start + queries.block], here)

    done = 0
    for rows, similarity, index in executor.run(search, units()):
        _merge(found, rows, (similarity, index))
        done += len(rows)
        progress(done // probes, len(queries))


@dataclass(frozen=True, eq=False)
class Lookup:
    """A unit of a search.

    Attributes:
        rows: Rows to search for, int64 [b].
        among: Rows to search in, int64 [n]; None for all.
    """

    rows: Int64[np.ndarray, " b"]
    among: Int64[np.ndarray, " n"] | None

    @property
    def name(self) -> str:
        """The unit in words."""
        return f"{self.rows[0]}-{self.rows[-1]}" if len(self.rows) else ""


@dataclass(frozen=True, eq=False)
class Search(PickledTask):
    """Looks rows up.

    Attributes:
        queries: Rows to search for.
        base: Rows to search in.
        k: How many to find.
        own: Whether both are the same rows, of which none is its own neighbour.
        device: Where products are computed.
    """

    queries: UnitRows
    base: UnitRows
    k: int
    own: bool
    device: torch.device
    counted = "blocks of rows"

    @property
    def key(self) -> str:
        """What tells this search from others."""
        stores = [[str(rows.store.location), rows.store.fingerprint, len(rows)] for rows in (self.queries, self.base)]
        return digest_of(["search", *stores, self.k])

    def __call__(self, units: Sequence[Lookup]) -> Iterator[Looked]:
        """Search.

        Args:
            units: What to look up.

        Yields:
            The rows of each unit, with the similarities and the numbers of what was found.
        """
        for unit in units:
            shape = (len(unit.rows), self.k)
            found = Nearest(np.full(shape, -1, np.int32), np.full(shape, NOTHING, np.float32), exact=True)
            block = self.queries.at(unit.rows)
            for numbers, others in self._among(unit):
                similarity, place = nearest(block, others, self.k + self.own, self.device)
                own = unit.rows if self.own else None
                _merge(found, np.arange(len(unit.rows)), (similarity, numbers[place]), own)
            yield unit.rows, found.similarity, found.index

    def _among(self, unit: Lookup) -> Iterator[tuple[Int64[np.ndarray, " n"], Float32[np.ndarray, "n D"]]]:
        if unit.among is None:
            for begin, others in self.base.blocks():
                yield np.arange(begin, begin + len(others)), others
            return
        for begin in range(0, len(unit.among), self.base.block):
            part = unit.among[begin : begin + self.base.block]
            yield part, self.base.at(part)


@dataclass(frozen=True, eq=False)
class _Members:
    """Entries of an array [M, p] of cells by the cell that they hold, ascending."""

    entries: Int[np.ndarray, " E"]
    begins: Int64[np.ndarray, " C1"]

    @classmethod
    def of(cls, rows: UnitRows, centroids: Float32[np.ndarray, "C D"], probes: int, device: torch.device) -> _Members:
        """Each row's ``probes`` nearest cells; entry ``row * probes + n`` is the n-th of a row."""
        cells = mapped.zeros((len(rows), probes), np.int32)
        for first, block in rows.blocks():
            cells[first : first + len(block)] = nearest(block, centroids, probes, device)[1]
        return cls.sorted(cells.reshape(-1), len(centroids))

    @classmethod
    def first_of(cls, visits: _Members, probes: int) -> _Members:
        """Rows by their nearest cell alone."""
        first = visits.entries % probes == 0
        cell = np.repeat(np.arange(len(visits.begins) - 1), np.diff(visits.begins))
        begins = np.concatenate([[0], np.cumsum(np.bincount(cell[first], minlength=len(visits.begins) - 1))])
        return cls(visits.entries[first] // probes, begins)

    @classmethod
    def sorted(cls, cells: Int[np.ndarray, " E"], count: int) -> _Members:
        """Sort entries by their cell."""
        entries = mapped.zeros(cells.shape, np.int32 if len(cells) < 1 << 31 else np.int64)
        entries[:] = np.argsort(cells, kind="stable")
        return cls(entries, np.concatenate([[0], np.cumsum(np.bincount(cells, minlength=count))]))

    def of_cell(self, cell: int) -> Int64[np.ndarray, " n"]:
        """The entries of one cell."""
        return self.entries[self.begins[cell] : self.begins[cell + 1]].astype(np.int64)


def nearest(
    queries: Float32[np.ndarray, "b D"], base: Float32[np.ndarray, "n D"], k: int, device: torch.device
) -> Found:
    """The largest inner products of each query, exact.

    By torch on every device: on a CPU its product and partial sort take 0.4 of the time of ``faiss.knn``, whose BLAS
    has no kernels for recent processors in some of its packages (``benchmarks/bench_audit.py``).

    Args:
        queries: Unit rows.
        base: Unit rows.
        k: How many to find.
        device: Where.

    Returns:
        Products ``[b, min(k, n)]``, largest first, and the places of their rows in ``base``.
    """
    right, many = torch.from_numpy(base).to(device).T, max(1, PRODUCTS // max(1, len(base)))
    parts = [
        (torch.from_numpy(queries[first : first + many]).to(device) @ right).topk(min(k, len(base)), dim=1)
        for first in range(0, len(queries), many)
    ]
    return torch.cat([part[0] for part in parts]).cpu().numpy(), torch.cat([part[1] for part in parts]).cpu().numpy()


def _merge(
    found: Nearest, rows: Int64[np.ndarray, " b"], new: Found, own: Int64[np.ndarray, " b"] | None = None
) -> None:
    """Put what was found of some rows, each of which is there once, with what they have.

    Args:
        found: What they have.
        rows: Where they are in ``found``.
        new: What was found; numbers below 0 are none.
        own: Their own numbers, which are not to be found; None where they cannot be.
    """
    index = new[1]
    similarity = np.where(index < 0, NOTHING, np.clip(new[0], -1, 1))
    if own is not None:
        similarity = np.where(index == own[:, None], NOTHING, similarity)
    better = similarity.max(axis=1, initial=NOTHING) > found.similarity[rows, -1]
    # Equal ones with lower numbers count as well: the order in which blocks come does not show.
    better |= similarity.max(axis=1, initial=NOTHING) == found.similarity[rows, -1]
    rows, similarity, index = rows[better], similarity[better], index[better]
    both = np.concatenate([found.similarity[rows], similarity], axis=1)
    names = np.concatenate([found.index[rows], index.astype(np.int32)], axis=1)
    order = np.lexsort((names, -both), axis=1)[:, : found.k]
    found.similarity[rows] = np.take_along_axis(both, order, axis=1)
    found.index[rows] = np.where(
        found.similarity[rows] == NOTHING, np.int32(-1), np.take_along_axis(names, order, axis=1)
    )
