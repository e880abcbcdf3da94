"""Killed before or after any request that changes a bucket, the same run again ends with the bytes of a whole one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from kill_driver import Driver
from real_store import BAD, ITEMS, SHARDS, objects_of

from gstds_cache.errors import GstdsError
from gstds_cache.files.location import Location
from gstds_cache.store import layout
from gstds_cache.store.factory import open_transport
from gstds_cache.store.format import CURRENT
from gstds_cache.store.reader import EmbeddingStore

pytestmark = pytest.mark.faults
GOOD = np.array([row for row in range(ITEMS) if row != BAD])


@pytest.fixture
def bucket_driver(s3_prefix: str) -> Iterator[Driver]:
    """A driver whose runs see the bucket; none was used before they are forked."""
    started = Driver()
    yield started
    started.close()


def objects(where: str) -> dict[str, bytes]:
    transport = open_transport(Location.parse(where))
    return {key: transport.get(key) for key in transport.sizes()}


def committed(there: dict[str, bytes]) -> list[int]:
    return [shard for shard in range(SHARDS) if CURRENT.commit_key(shard) in there]


def never_wrong(where: str, reference: Path) -> None:
    expected = EmbeddingStore(reference, access="memory").gather(GOOD)
    for partial in (False, True):
        try:
            reader = EmbeddingStore(where, allow_partial=partial, access="memory")
            there = reader.valid[GOOD] == layout.OK
            np.testing.assert_array_equal(reader.gather(GOOD[there]), expected[there])
        except GstdsError:
            continue


def test_a_kill_at_any_request_of_a_run_costs_only_what_was_not_committed(
    bucket_driver, reference, s3_prefix, tally
) -> None:
    whole = objects_of(reference)
    steps = bucket_driver.run("embed", f"{s3_prefix}-counted").steps
    assert objects(f"{s3_prefix}-counted") == whole
    assert {"before put .probe/UUID", "after put commits/2.json", "before put COMPLETE.json"} < set(steps)
    states = set()
    for point, step in enumerate(steps):
        where = f"{s3_prefix}-{point}"
        assert bucket_driver.run("embed", where, point).killed, step
        tally.kills += 1
        before = objects(where)
        states.add(tuple(before))
        never_wrong(where, reference)
        missing = [shard for shard in range(SHARDS) if shard not in committed(before)]
        again = bucket_driver.run("embed", where)
        assert (again.code, again.result.get("shards")) == (0, missing), (step, again.result)
        after = objects(where)
        assert after == whole, step
        assert {key: after[key] for key in before} == before, f"{step}: an object changed that was there"
    assert len(states) > len(steps) / 4


def test_a_kill_at_any_request_of_a_repair_is_finished_by_repair(bucket_driver, reference, s3_prefix, tally) -> None:
    whole = objects_of(reference)

    def damaged(where: str) -> str:
        transport = open_transport(Location.parse(where))
        for key, data in whole.items():
            transport.put(key, data)
        transport.put(layout.object_key(0), whole[layout.object_key(0)][:-1] + b"?")
        transport.delete(layout.object_key(1))
        transport.put(layout.LABEL, b"damaged")
        return where

    steps = bucket_driver.run("repair", damaged(f"{s3_prefix}-counted")).steps
    assert objects(f"{s3_prefix}-counted") == whole
    for point, step in enumerate(steps):
        where = damaged(f"{s3_prefix}-{point}")
        assert bucket_driver.run("repair", where, point).killed, step
        tally.kills += 1
        never_wrong(where, reference)
        mended = bucket_driver.run("repair", where)
        assert set(mended.result.get("shards", [9])) <= {0, 1}, (step, mended.result)
        assert objects(where) == whole, step
