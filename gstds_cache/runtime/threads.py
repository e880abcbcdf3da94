"""Threads: how many cores there are, and how many threads torch, BLAS and OpenMP may use."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import threadpoolctl
import torch

T = TypeVar("T")
R = TypeVar("R")


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def limited_threads(threads: int) -> Iterator[None]:
    """Let this process use at most ``threads`` CPU threads while the block lasts; 0 changes nothing.

    torch, faiss and SciPy's BLAS each keep a pool of their own; unbounded beside a training run, they slowed its steps
    threefold on two cores. Afterwards each has as many threads as before.

    Yields:
        Once.
    """
    if not threads:
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with threadpoolctl.threadpool_limits(threads):
            yield
    finally:
        torch.set_num_threads(before)


def in_threads(work: Callable[[T], R], items: Iterable[T], threads: int) -> Generator[R, None, None]:
    """Do ``work`` for each of ``items``, in as many threads, in each of which BLAS and OpenMP have one thread.

    What is computed does not depend on the number of threads. Until the last result is read, the BLAS of NumPy and
    SciPy has one thread in this whole process. At most ``threads + 1`` items are ahead of whoever reads the results.

    Args:
        work: What to do; mostly in compiled code, outside Python's lock.
        items: Read in the reader's thread.
        threads: How many, at least 1.

    Yields:
        The results, in the order of the items.
    """
    # OpenMP's number of threads is a setting of each thread; BLAS's, mostly, of the process.
    pool = ThreadPoolExecutor(threads, initializer=threadpoolctl.threadpool_limits, initargs=(1, "openmp"))
    ahead: deque[Future[R]] = deque()
    with threadpoolctl.threadpool_limits(1, user_api="blas"):
        try:
            for item in items:
                ahead.append(pool.submit(work, item))
                if len(ahead) > threads + 1:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)
