"""The search of an audit, and hashing, give on Ray's workers what they give here."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from ray_cluster import LoopbackCluster

import gstds_cache
from gstds_cache.auditing.search import find_nearest
from gstds_cache.data import hashing, item_hashes
from gstds_cache.data.hash_cache import HashCache
from gstds_cache.data.manifest import build_manifest
from gstds_cache.data.sources import open_source
from gstds_cache.errors import DatasetError
from gstds_cache.runtime.executor import Executor
from gstds_cache.selection.unit_rows import UnitRows
from gstds_cache.store.reader import EmbeddingStore

pytestmark = pytest.mark.ray


@pytest.fixture
def executor(cluster: LoopbackCluster) -> Executor:
    from gstds_cache.cluster.executor import RayExecutor

    return RayExecutor(notify=lambda _line: None)


@pytest.mark.parametrize("exact_rows", [0, 1000])
def test_nearest_rows(executor: Executor, vectors: Path, exact_rows: int) -> None:
    rows = UnitRows.of(EmbeddingStore(vectors))
    options = {"device": torch.device("cpu"), "exact_rows": exact_rows, "probes": 3}
    want = find_nearest(rows, rows, 5, **options)
    got = find_nearest(rows, rows, 5, **options, executor=executor)
    assert np.array_equal(got.index, want.index)
    assert np.allclose(got.similarity, want.similarity, atol=1e-6)


def test_an_audit(cluster: LoopbackCluster, vectors: Path, tmp_path: Path) -> None:
    reports = [
        gstds_cache.audit(vectors, out=tmp_path / engine, engine=engine, page=False, progress=False, flipped=0.0)
        for engine in ("local", "ray")
    ]
    found = [(report.rows, report.groups, report.grouped, report.doubted) for report in reports]
    assert found[0] == found[1]
    assert (tmp_path / "ray" / "duplicates.parquet").read_bytes() == (
        tmp_path / "local" / "duplicates.parquet"
    ).read_bytes()


def test_hashing(executor: Executor, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(item_hashes, "SPREAD_FROM", 10)
    want = build_manifest(open_source(f"folder:{photos}"))
    for hash_cache in (None, HashCache(tmp_path / "hashes"), HashCache(tmp_path / "hashes")):
        done: list[int] = []
        source = open_source(f"folder:{photos}")
        got = build_manifest(
            source,
            hash_cache=hash_cache,
            executor=executor,
            progress=lambda count, _total, done=done: done.append(count),
        )
        assert got.root == want.root
        assert done[-1] == 60
    assert hashing.SPREAD_FROM > 1000  # a few images are not worth a cluster


def test_a_machine_that_does_not_see_the_data_set(
    executor: Executor, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(item_hashes, "SPREAD_FROM", 10)
    source = open_source(f"folder:{photos}")

    def elsewhere(task: hashing.HashAnywhere) -> hashing.HashAnywhere:
        theirs = copy.copy(source)
        object.__setattr__(theirs, "files", replace(source.files, folder="/nowhere/"))
        return hashing.HashAnywhere(theirs, task.key)

    monkeypatch.setattr(hashing.HashAnywhere, "recipe", elsewhere)
    with pytest.raises(DatasetError, match="cannot be read on .*\n  every machine has to see"):
        build_manifest(source, executor=executor)
