"""Nearest rows: what is exact is what a plain matrix product gives, and cells find what was planted."""

from __future__ import annotations

import numpy as np
import torch
from vector_store import vector_store

from gstds_cache.auditing.search import NOTHING, find_nearest
from gstds_cache.selection import unit_rows
from gstds_cache.selection.unit_rows import UnitRows

CPU = torch.device("cpu")


def rows_of(store) -> UnitRows:
    return UnitRows.of(store)


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_every_row_is_compared_with_every_other(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(unit_rows, "BLOCK_BYTES", 0)  # blocks of 256: three each way
    rows = np.random.default_rng(0).normal(size=(600, 8))
    store = rows_of(vector_store(tmp_path / "s", rows, bad=(3, 511)))
    found = find_nearest(store, store, 5, device=CPU, exact_rows=1000)
    assert found.exact
    kept = np.delete(unit(rows), (3, 511), axis=0)
    naive = kept @ kept.T
    np.fill_diagonal(naive, -np.inf)
    order = np.argsort(-naive, axis=1)[:, :5]
    assert (found.index == order).mean() > 0.999
    np.testing.assert_allclose(found.similarity, np.take_along_axis(naive, order, axis=1), atol=1e-5)


def test_rows_in_another_store_may_have_the_same_number(tmp_path) -> None:
    rows = np.random.default_rng(1).normal(size=(40, 8))
    one, other = rows_of(vector_store(tmp_path / "a", rows)), rows_of(vector_store(tmp_path / "b", rows[::-1]))
    found = find_nearest(one, other, 1, device=CPU, exact_rows=1000)
    assert found.index[:, 0].tolist() == list(range(39, -1, -1))


def test_cells_find_planted_pairs(tmp_path) -> None:
    rng = np.random.default_rng(2)
    rows = unit(rng.normal(size=(3000, 32)))
    other = rng.normal(size=(300, 32))
    other = unit(other - (other * rows[:300]).sum(axis=1, keepdims=True) * rows[:300])
    rows[-300:] = 0.95 * rows[:300] + np.sqrt(1 - 0.95**2) * other
    store = rows_of(vector_store(tmp_path / "s", rows, shard_rows=1024))
    told = []
    found = find_nearest(store, store, 10, device=CPU, exact_rows=0, progress=lambda *at: told.append(at))
    assert not found.exact
    one, two = np.arange(300), 2700 + np.arange(300)
    there = (found.index[one] == two[:, None]).any(axis=1) | (found.index[two] == one[:, None]).any(axis=1)
    assert there.mean() >= 0.99
    assert (found.index != np.arange(3000)[:, None]).all()
    assert told[-1] == (3000, 3000)
    found = find_nearest(store, store, 10, device=CPU, exact_rows=0, probes=1)
    assert (found.similarity[:, 0] > NOTHING).mean() > 0.9  # fewer cells, fewer neighbours; none is made up
    assert ((found.index >= 0) == (found.similarity > NOTHING)).all()


def test_rows_that_are_all_equal(tmp_path) -> None:
    store = rows_of(vector_store(tmp_path / "s", np.ones((30, 4))))
    for exact_rows in (100, 0):
        found = find_nearest(store, store, 4, device=CPU, exact_rows=exact_rows)
        assert (found.similarity[:, 0] > 0.999999).all()
        assert (found.index != np.arange(30)[:, None]).all()
    two = rows_of(vector_store(tmp_path / "two", np.eye(4)[:2]))
    assert find_nearest(two, two, 10, device=CPU, exact_rows=100).index.tolist() == [[1], [0]]
