from __future__ import annotations

import threading
import time

import pytest
import threadpoolctl
import torch

from gstds_cache.runtime.threads import in_threads


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_results_come_in_the_order_of_the_items(threads: int) -> None:
    def work(item: int) -> int:
        time.sleep(0.002 * (item % 3))
        return item * item

    assert list(in_threads(work, range(20), threads)) == [item * item for item in range(20)]


def pool_sizes() -> list[int]:
    return [pool["num_threads"] for pool in threadpoolctl.threadpool_info()]


def test_every_library_has_one_thread_inside_and_what_it_had_afterwards() -> None:
    with threadpoolctl.threadpool_limits(2):
        before = pool_sizes()
        assert set(before) == {2}
        inside = list(in_threads(lambda _: (set(pool_sizes()), torch.get_num_threads()), range(4), 2))
        assert inside == [({1}, 1)] * 4
        assert pool_sizes() == before


@pytest.mark.parametrize("threads", [1, 3])
def test_an_error_ends_it_and_no_thread_stays(threads: int) -> None:
    def work(item: int) -> int:
        if item == 4:
            raise ValueError("item 4")
        return item

    there = threading.active_count()
    results = in_threads(work, range(100), threads)
    assert [next(results) for _ in range(4)] == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="item 4"):
        next(results)
    assert threading.active_count() == there


def test_a_reader_that_stops_early_stops_the_work() -> None:
    done: list[int] = []
    there = threading.active_count()
    results = in_threads(lambda item: done.append(item) or item, iter(range(1000)), 2)
    assert next(results) == 0
    results.close()
    assert len(done) <= 5
    assert threading.active_count() == there
