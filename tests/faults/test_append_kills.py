"""An append that is killed at any step leaves the old store or the new one, and the same append finishes it."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from kill_driver import Driver
from real_store import GROWN, ITEMS, Images, append, embed, objects_of, stamps

from gstds_cache.store import layout
from gstds_cache.store.reader import EmbeddingStore
from gstds_cache.store.verify import verify

LONG = pytest.param("all", marks=pytest.mark.faults)


def chosen(steps: tuple[str, ...], how_many: str, rng) -> list[int]:
    """All steps; or some, with those around the one that makes the new rows count."""
    if how_many == "all":
        return list(range(len(steps)))
    switch = next(number for number, step in enumerate(steps) if step.startswith("before link grown/"))
    return sorted({*rng.sample(range(len(steps)), 4), switch, switch + 1})


@pytest.mark.parametrize("how_many", ["some", LONG])
def test_a_kill_of_an_append_leaves_the_old_store_or_the_new_one(
    driver: Driver, reference: Path, fresh_copy, tmp_path: Path, tally, how_many
) -> None:
    counted = fresh_copy()
    outcome = driver.run("append", counted)
    assert outcome.code == 0
    assert outcome.result["images"] == GROWN - ITEMS
    whole, old = objects_of(counted), EmbeddingStore(reference)
    new = EmbeddingStore(counted)
    embed(tmp_path / "fresh", Images(GROWN))
    assert new.fingerprint == EmbeddingStore(tmp_path / "fresh").fingerprint
    good = {store.fingerprint: np.delete(np.arange(len(store)), store.without_embedding) for store in (old, new)}
    rows = {store.fingerprint: store.gather(good[store.fingerprint]) for store in (old, new)}
    seen = set()
    for point in chosen(outcome.steps, how_many, tally.rng("append")):
        store = fresh_copy()
        before = objects_of(store)
        assert driver.run("append", store, point).killed, outcome.steps[point]
        tally.kills += 1
        assert before.items() <= objects_of(store).items()
        left = EmbeddingStore(store, access="memory")
        seen.add(left.fingerprint)
        np.testing.assert_array_equal(left.gather(good[left.fingerprint]), rows[left.fingerprint])
        assert verify(store, "full").problems == ()
        part = {key: stamp for key, stamp in stamps(store).items() if key}
        assert driver.run("append", store).result["fingerprint"] == new.fingerprint
        assert stamps(store) == part
        assert objects_of(store) == whole, outcome.steps[point]
        assert not list(store.rglob("*.tmp"))
        shutil.rmtree(store)
    assert seen == {old.fingerprint, new.fingerprint}


def test_a_disk_that_fails_leaves_the_old_store(driver: Driver, reference: Path, fresh_copy, tally) -> None:
    steps = driver.run("append", fresh_copy()).steps
    for point in tally.rng("append disk").sample(range(len(steps)), 3):
        store = fresh_copy()
        driver.run("append", store, point, "ENOSPC")
        tally.faults += 1
        assert len(EmbeddingStore(store)) in {ITEMS, GROWN}
        append(store, Images(GROWN))
        assert len(EmbeddingStore(store)) == GROWN
        assert (store / layout.COMPLETE).read_bytes() == (reference / layout.COMPLETE).read_bytes()
