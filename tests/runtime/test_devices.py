from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import threadpoolctl
import torch

from gstds_cache.errors import UsageError
from gstds_cache.runtime import devices, notify
from gstds_cache.runtime.devices import callers_random_numbers, resolve_device, why_no_cuda
from gstds_cache.runtime.threads import in_threads, limited_threads


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


def torch_and_pools() -> list[int]:
    return [torch.get_num_threads(), *pool_sizes()]


@pytest.mark.parametrize("blas_alone", [False, True])
def test_blocks_that_overlap_in_two_threads_leave_what_was_before(blas_alone: bool) -> None:
    """The first block begins first and ends first: what the second found on entering is the first one's limit."""
    inside, over, failed = threading.Event(), threading.Event(), []

    def second() -> None:
        try:
            if blas_alone:
                results = in_threads(lambda item: item, range(9), 1)
                next(results)
            else:
                results = limited_threads(1)
                results.__enter__()
            inside.set()
            assert over.wait(20)
            if blas_alone:
                assert len(list(results)) == 8
            else:
                results.__exit__(None, None, None)
                assert torch.get_num_threads() == 3  # OpenMP's number is this new thread's own
        except BaseException as error:
            failed.append(error)
            raise

    torch_before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with threadpoolctl.threadpool_limits(3):
            before = torch_and_pools()
            assert set(before) == {3}
            thread = threading.Thread(target=second)
            with limited_threads(2):
                assert set(torch_and_pools()) == {2}
                thread.start()
                assert inside.wait(20)
            assert torch.get_num_threads() == 3
            over.set()
            thread.join()
            assert not failed
            assert torch_and_pools() == before
    finally:
        torch.set_num_threads(torch_before)


def test_a_block_inside_another_gives_back_the_outer_limit() -> None:
    before = torch_and_pools()
    with limited_threads(3):
        assert list(in_threads(lambda _: set(pool_sizes()), range(2), 1)) == [{1}] * 2
        assert set(torch_and_pools()) == {3}
        with limited_threads(2):
            assert set(torch_and_pools()) == {2}
        assert set(torch_and_pools()) == {3}
    assert torch_and_pools() == before


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


OLD = (
    "The NVIDIA driver on your system is too old (found version 11040). Please update your GPU driver by downloading\n"
    "and installing a new version from the URL"
)


@pytest.mark.parametrize("driver", [True, False])
@pytest.mark.parametrize("hidden", ["", "-1", None])
def test_a_driver_that_is_too_old_is_said_and_the_cpu_taken(monkeypatch, tmp_path, caplog, driver, hidden) -> None:
    def init() -> None:
        raise RuntimeError(OLD)

    def available() -> bool:
        warnings.warn("CUDA initialization: " + OLD, stacklevel=1)
        return False

    (tmp_path / "version").touch()
    monkeypatch.setattr(torch.cuda, "init", init)
    monkeypatch.setattr(torch.cuda, "is_available", available)
    monkeypatch.setattr(devices, "DRIVER", (str(tmp_path / ("version" if driver else "nothing")),))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", False)
    if hidden is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    notify.log_once.cache_clear()
    for _ in range(2):
        assert resolve_device("auto") == torch.device("cpu")
    said = "torch cannot use CUDA: The NVIDIA driver on your system is too old (found version 11040); the CPU computes"
    assert caplog.text.count(said) == (driver and hidden is None)
    with pytest.raises(UsageError, match=r"`device`: got 'cuda', but torch sees 0 .*: The NVIDIA driver .* is too old"):
        resolve_device("cuda")


def test_what_torch_cannot_do_is_told_in_its_words(monkeypatch) -> None:
    if not torch.cuda.is_available():
        assert "driver" in why_no_cuda() or "CUDA" in why_no_cuda()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert why_no_cuda() == ""


def test_random_numbers_are_the_callers_again_and_their_failure_hides_no_error(monkeypatch) -> None:
    cpu = torch.device("cpu")
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    first = torch.rand(1)
    with callers_random_numbers(cpu):
        torch.manual_seed(9)
        torch.rand(5)
    assert torch.equal(torch.cat([first, torch.rand(1)]), expected)

    @contextmanager
    def beyond(devices: list[torch.device]) -> Iterator[None]:
        assert devices == [torch.device("cuda", 1)]
        try:
            yield
        finally:
            raise RuntimeError("offset increment outside graph capture encountered unexpectedly")

    monkeypatch.setattr(torch.random, "fork_rng", beyond)
    gpu = torch.device("cuda", 1)
    with pytest.raises(UsageError, match="cannot be recorded"), callers_random_numbers(gpu):
        raise UsageError("a step cannot be recorded")
    with pytest.raises(KeyboardInterrupt), callers_random_numbers(gpu):
        raise KeyboardInterrupt
    with pytest.raises(RuntimeError, match="offset increment"), callers_random_numbers(gpu):
        pass
