"""Selecting by units: the records of the run in one process, in order, whatever order tasks finish in."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ray_cluster import LoopbackCluster

import gstds_cache
from gstds_cache.config import SelectConfig
from gstds_cache.errors import UsageError
from gstds_cache.runtime.executor import LocalExecutor
from gstds_cache.selection.elsewhere import select_by, units_of
from gstds_cache.selection.run import BatchSelector
from gstds_cache.selection.selected_batch import SelectedBatch
from gstds_cache.store.reader import EmbeddingStore
from gstds_cache.stream.reader import open_selection
from gstds_cache.stream.record_writer import computed

SETTINGS: dict[str, Any] = {"batch_size": 24, "epochs": 4, "knn": 4, "device": "cpu", "threads": 1}
KINDS: list[dict[str, Any]] = [
    {},
    {"batch_assignments": 2},
    {"batch_assignments": 0},
    {"order": "window:64"},
    {"rule": "random"},
    {"min_per_class": 1},
    {"draw": "loss-minus-reference"},
    {"schedule": "linear:0.25:0.75"},
]


def same(one: SelectedBatch, other: SelectedBatch) -> bool:
    ours, theirs = vars(one).copy(), vars(other).copy()
    pairs = [(ours.pop("candidates"), theirs.pop("candidates"))]
    pairs = [(vars(a), vars(b)) if a is not None else ({}, {}) for a, b in pairs] + [(ours, theirs)]
    return all(
        left.keys() == right.keys() and all(np.array_equal(left[k], right[k], equal_nan=k != "status") if not (
            left[k] is None or right[k] is None) else left[k] is right[k] for k in left)
        for left, right in pairs
    )  # fmt: skip


class Backwards(LocalExecutor):
    """Finishes units in any order, and hands results over in order, as the contract says."""

    def run(self, task: Any, units: Any, *, ordered: bool = False) -> Iterator[Any]:
        assert ordered
        units = list(units)
        done = {place: next(iter(task([units[place]]))) for place in reversed(range(len(units)))}
        yield from (done[place] for place in range(len(units)))


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_units_give_the_records_of_a_run(vectors: Path, kind: dict[str, Any]) -> None:
    selector = BatchSelector(EmbeddingStore(vectors), SelectConfig(**SETTINGS | kind))
    want = list(selector.run())
    for start in (0, 5, 17, len(want) - 1):
        got = list(
            select_by(BatchSelector(EmbeddingStore(vectors), SelectConfig(**SETTINGS | kind)), Backwards(), start)
        )
        assert [batch.seq for batch in got] == list(range(start, len(want)))
        assert all(map(same, got, want[start:]))


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_every_batch_is_in_one_unit_and_every_graph_too(vectors: Path, kind: dict[str, Any]) -> None:
    plan = BatchSelector(EmbeddingStore(vectors), SelectConfig(**SETTINGS | kind)).plan
    for start in range(plan.total_batches):
        units = list(units_of(plan, start, 3))
        seqs = np.concatenate([unit.seqs for unit in units])
        assert sorted(seqs) == list(range(start, plan.total_batches))
        batches = [[plan.batch(seq) for seq in unit.seqs.tolist()] for unit in units]
        graphs = [{(batch.assignment, batch.group) for batch in unit} for unit in batches]
        assert max(map(len, graphs)) <= 3
        if plan.batch_assignments:
            assert sum(map(len, graphs)) == len(set().union(*graphs))  # no graph is made twice
        assert [unit.seqs[0] for unit in units] == sorted(unit.seqs[0] for unit in units)


def test_counts_are_those_of_a_run(vectors: Path) -> None:
    ours, theirs = (BatchSelector(EmbeddingStore(vectors), SelectConfig(**SETTINGS)) for _ in range(2))
    ours.executor = LocalExecutor()
    for batches in (computed(ours, 0), computed(theirs, 0)):
        list(batches)
    for name in ("batches", "rows", "kept", "status", "reused", "classes", "iterations"):
        assert getattr(ours.counts, name) == getattr(theirs.counts, name), name


@pytest.mark.ray
@pytest.mark.parametrize("kind", [{}, {"draw": "loss-minus-reference", "batch_assignments": 0}], ids=str)
def test_ray_gives_the_same_file(cluster: LoopbackCluster, vectors: Path, tmp_path: Path, kind: dict[str, Any]) -> None:
    files = []
    for engine in ("local", "ray"):
        out = tmp_path / f"{engine}.arrow"
        settings = SETTINGS | kind | {"device": "auto"}
        selection = gstds_cache.select(vectors, out=out, engine=engine, progress=False, access="memory", **settings)
        files.append((selection.summary.selection_digest, selection.summary.classes, out.read_bytes()))
        for kept in vectors.with_name("vectors.store.selections").glob("*.arrow"):
            kept.unlink()
    with open_selection(tmp_path / "local.arrow") as one, open_selection(tmp_path / "ray.arrow") as other:
        assert one.header == other.header
        ours, theirs = list(one), list(other)
    different = [(a, b) for a, b in zip(ours, theirs, strict=True) if not same(a, b)]
    assert not different, different[0]
    assert files[0] == files[1]


@pytest.mark.ray
def test_a_selection_goes_on_where_it_stopped(
    cluster: LoopbackCluster, vectors: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gstds_cache.stream.writer.HELD", 0.0)  # each batch is written before the next one is seen
    want, out = tmp_path / "want.arrow", tmp_path / "ray.arrow"
    gstds_cache.select(vectors, out=want, progress=False, **SETTINGS | {"seed": 3})
    for kept in vectors.with_name("vectors.store.selections").glob("*.arrow"):
        kept.unlink()

    def interrupt(_phase: str, done: int, _total: int, _shares: Any) -> None:
        if done == 7:  # of twelve in the first epoch; those of later epochs come all at once
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        gstds_cache.select(vectors, out=out, engine="ray", progress=interrupt, **SETTINGS | {"seed": 3})
    assert not out.exists()
    done: list[int] = []
    progress = lambda _phase, number, _total, _shares: done.append(number)  # noqa: E731
    gstds_cache.select(vectors, out=out, engine="ray", progress=progress, **SETTINGS | {"seed": 3})
    assert done[0] == 8
    assert out.read_bytes() == want.read_bytes()


def test_a_gpu_is_refused(vectors: Path) -> None:
    with pytest.raises(UsageError, match="`device`: got 'cuda' with `engine='ray'`"):
        gstds_cache.select(vectors, engine="ray", **SETTINGS | {"device": "cuda"})
