"""A core set: N rows for a whole training run, chosen once over the whole data set.

- ``k-centre``: farthest-first (T. Gonzalez, 1985): each next row is the one farthest from all that were taken. It
  covers everything, and so takes outliers first.
- ``facility-location``: rows such that every row is similar to one of them. Greedy, each step among random candidates
  (stochastic greedy, B. Mirzasoleiman et al., AAAI 2015), its gain measured on up to :data:`REFERENCES` rows: time
  grows with the rows, not with their square.
- ``cells``: rows are cut in two at the median of their widest principal direction, again and again, into as many cells
  of equal size as rows are wanted; of each cell the row nearest its mean is taken.

Classes are gone through one after the other where rows are balanced. Memory, beside blocks of rows: 17 bytes a row, of
the largest class ``4 * DIRECTIONS`` more for ``cells``, and :data:`REFERENCES` unit rows for ``facility-location``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
from jaxtyping import Float32, Int64

from gstds_cache.config import OnceConfig
from gstds_cache.errors import UsageError
from gstds_cache.seeding import rng_for
from gstds_cache.selection.unit_rows import UnitRows

REFERENCES = 8192
POOL = 256
DIRECTIONS = 32
SLACK = 0.1
"""A step of facility location finds, in expectation, at least 1 - 1/e - SLACK of the best value."""

Taken = Callable[[int], None]
Choose = Callable[[UnitRows, Int64[np.ndarray, " M"], int, np.random.Generator, torch.device, Taken],
                  Int64[np.ndarray, " n"]]  # fmt: skip


def choose_core_set(
    rows: UnitRows,
    count: int,
    config: OnceConfig,
    device: torch.device,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> Int64[np.ndarray, " n"]:
    """Choose rows of a store.

    Args:
        rows: The rows that may be chosen.
        count: How many to choose.
        config: How.
        device: Where products are computed.
        progress: Called with rows chosen, and rows to choose.

    Returns:
        Rows of the store, ascending.

    Raises:
        UsageError: There are fewer rows, or fewer with a label where classes are balanced.
    """
    labels = np.asarray(rows.store.labels)
    members = np.arange(len(rows), dtype=np.int64)
    if config.balance != "none":
        given = labels[rows.rows.at(members)]
        if (given >= 0).any():
            members = members[given >= 0]
    if not 1 <= count <= len(members):
        having = "have an embedding" if len(members) == len(rows) else "have an embedding and a label"
        raise UsageError(
            f"`once`: got {count:,}, expected 1 to {len(members):,}: so many rows of {rows.store.location} {having}",
            hint="choose fewer" + ("" if len(members) == len(rows) else ", or pass `balance='none'`"),
        )
    given = labels[rows.rows.at(members)] if config.balance != "none" else np.zeros(len(members), np.int8)
    names, sizes = np.unique(given, return_counts=True)
    done, parts = 0, []
    for name, size, quota in zip(names, sizes, quotas(sizes, count, config.balance), strict=True):
        mine = members[given == name]
        begun = done
        if quota == size:
            part = mine
        elif quota:
            rng = rng_for(config.seed, "core-set", int(name) + 1)
            part = METHODS[config.method](rows, mine, int(quota), rng, device,
                                          lambda taken, begun=begun: progress(begun + taken, count))  # type: ignore[misc]  # fmt: skip
        else:
            part = mine[:0]
        parts.append(part)
        done += len(part)
        progress(done, count)
    chosen: Int64[np.ndarray, " n"] = np.sort(rows.rows.at(np.concatenate(parts)))
    return chosen


def quotas(sizes: Int64[np.ndarray, " C"], count: int, balance: str) -> Int64[np.ndarray, " C"]:
    """How many rows of each class.

    Args:
        sizes: Rows that each class has.
        count: Rows in all, at most the sum of ``sizes``.
        balance: ``equal``: the same number of each class, and all of those that have fewer. Else in proportion.

    Returns:
        The numbers, int64 [C]; their sum is ``count``.
    """
    if balance == "equal":
        least, most = 0, int(sizes.max())
        while least < most:  # the largest number that all classes together do not exceed
            middle = (least + most + 1) // 2
            least, most = (middle, most) if int(np.minimum(sizes, middle).sum()) <= count else (least, middle - 1)
        quota = np.minimum(sizes, least).astype(np.int64)
        rest = np.flatnonzero(sizes > least)[: count - int(quota.sum())]
    else:
        exact = sizes * (count / sizes.sum())
        quota = np.minimum(np.floor(exact), sizes).astype(np.int64)
        rest = np.argsort(-(exact - quota), kind="stable")[: count - int(quota.sum())]
    quota[rest] += 1
    return np.asarray(quota, np.int64)


def k_centre(
    rows: UnitRows,
    members: Int64[np.ndarray, " M"],
    count: int,
    rng: np.random.Generator,  # noqa: ARG001 - nothing is drawn
    device: torch.device,
    taken: Taken,
) -> Int64[np.ndarray, " n"]:
    """Farthest-first, from the row nearest the mean on.

    Distances only fall as rows are taken. So of the farthest rows, held in a pool, the next one may be taken as long as
    it is at least as far as the farthest row outside was: one pass over all rows then stands for many steps.
    """
    mean = np.zeros(rows.dim)
    for _, block in _blocks(rows, members):
        mean += block.sum(axis=0, dtype=np.float64)
    likeness = np.concatenate([block @ mean.astype(np.float32) for _, block in _blocks(rows, members)])
    picks = [int(likeness.argmax())]
    distance = np.full(len(members), np.inf, np.float32)
    new = picks[:]
    while True:
        right = torch.from_numpy(rows.at(members[new])).to(device).T
        for first, block in _blocks(rows, members):
            near = 1 - (torch.from_numpy(block).to(device) @ right).amax(dim=1).cpu().numpy()
            part = distance[first : first + len(block)]
            np.minimum(part, near, out=part)
        distance[picks] = -np.inf
        taken(len(picks))
        if len(picks) == count:
            return np.asarray(members[np.array(picks)], np.int64)
        new = _farthest(rows, members, distance, count - len(picks))
        picks += new


def _farthest(
    rows: UnitRows, members: Int64[np.ndarray, " M"], distance: Float32[np.ndarray, " M"], wanted: int
) -> list[int]:
    """The next rows of farthest-first, as many as one pool allows: one at least."""
    pool = np.lexsort((np.arange(len(distance)), -distance))[:POOL] if len(distance) <= 4 * POOL else _top(distance)
    outside = np.delete(distance, pool).max(initial=-np.inf)
    vectors, left = rows.at(members[pool]), distance[pool].copy()
    picks: list[int] = []
    while len(picks) < wanted:
        best = int(left.argmax())
        if left[best] == -np.inf or (picks and left[best] < outside):
            break
        picks.append(int(pool[best]))
        np.minimum(left, 1 - vectors @ vectors[best], out=left)
        left[best] = -np.inf
    return picks


def _top(distance: Float32[np.ndarray, " M"]) -> Int64[np.ndarray, " P"]:
    """The :data:`POOL` largest, ties by place."""
    pool = np.argpartition(-distance, POOL)[:POOL]
    return pool[np.lexsort((pool, -distance[pool]))]


def facility_location(
    rows: UnitRows,
    members: Int64[np.ndarray, " M"],
    count: int,
    rng: np.random.Generator,
    device: torch.device,
    taken: Taken,
) -> Int64[np.ndarray, " n"]:
    """Stochastic greedy on the sum, over reference rows, of the similarity (1 + cosine) to the nearest row taken."""
    reference = np.sort(rng.choice(members, min(REFERENCES, len(members)), replace=False))
    right = torch.from_numpy(rows.at(reference)).to(device).T.contiguous()
    best = torch.zeros(right.shape[1], device=device)
    left, picks = members.copy(), np.empty(count, np.int64)
    many = max(1, math.ceil(len(members) / count * math.log(1 / SLACK)))
    for step in range(count):
        there = len(left) - step  # rows that were taken stand at the end
        places = rng.choice(there, min(many, there), replace=False)
        near = torch.from_numpy(rows.at(left[places])).to(device) @ right + 1
        winner = int((near - best).clamp_min_(0).sum(dim=1).argmax())
        best = torch.maximum(best, near[winner])
        place = int(places[winner])
        picks[step] = left[place]
        left[place], left[there - 1] = left[there - 1], left[place]
        taken(step + 1)
    return picks


def cells(
    rows: UnitRows,
    members: Int64[np.ndarray, " M"],
    count: int,
    rng: np.random.Generator,
    device: torch.device,  # noqa: ARG001 - a CPU is quick enough
    taken: Taken,
) -> Int64[np.ndarray, " n"]:
    """One row of each of ``count`` cells of equal size, in the principal directions of the rows."""
    some = rows.at(np.sort(rng.choice(members, min(REFERENCES, len(members)), replace=False)))
    some = some - some.mean(axis=0)
    # Of few rows in many dimensions the singular vectors are found in less time than those of all products.
    if len(some) < rows.dim:
        directions = np.linalg.svd(some, full_matrices=False)[2][:DIRECTIONS].T
    else:
        directions = np.linalg.eigh(some.T @ some)[1][:, -DIRECTIONS:]
    places = np.concatenate([block @ directions for _, block in _blocks(rows, members)])
    picks: list[int] = []
    open_cells: list[tuple[Int64[np.ndarray, " m"], int]] = [(np.arange(len(members)), count)]
    while open_cells:
        mine, wanted = open_cells.pop()
        here = places[mine]
        if wanted == 1:
            away = np.square(here - here.mean(axis=0)).sum(axis=1)
            picks.append(int(mine[away.argmin()]))
            taken(len(picks))
            continue
        first = wanted // 2
        along = here[:, here.var(axis=0).argmax()]
        order = np.lexsort((mine, along))
        cut = max(first, min(len(mine) - (wanted - first), round(len(mine) * first / wanted)))
        open_cells += [(mine[order[:cut]], first), (mine[order[cut:]], wanted - first)]
    return np.asarray(members[np.array(picks)], np.int64)


def _blocks(rows: UnitRows, members: Int64[np.ndarray, " M"]) -> Iterator[tuple[int, Float32[np.ndarray, "b D"]]]:
    for first in range(0, len(members), rows.block):
        yield first, rows.at(members[first : first + rows.block])


METHODS: dict[str, Choose] = {"k-centre": k_centre, "facility-location": facility_location, "cells": cells}
