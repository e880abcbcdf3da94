"""Threads: how many cores there are, and how many threads torch, BLAS and OpenMP may use."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
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
    mine = _enter_torch(threads)
    try:
        # OpenMP's number of threads is a setting of each thread: blocks of several threads are not in each other's way.
        with threadpoolctl.threadpool_limits(threads, user_api="openmp"), _limited_blas(threads):
            yield
    finally:
        with _LOCK:
            _TORCH.remove(mine)
            torch.set_num_threads(mine.before)


@dataclass(eq=False)
class _TorchLimit:
    """A block that limits torch: the thread it runs in, and the number of threads to give back."""

    thread: int
    before: int


_LOCK = threading.Lock()
_TORCH: list[_TorchLimit] = []  # blocks that last, the first one first
_BLAS: list[list[int]] = []  # the limit of each block that lasts, in a list of its own, which tells equal ones apart
_BLAS_BEFORE: dict[str, int] = {}  # threads that each library had before the first of these blocks, by its file


def _enter_torch(threads: int) -> _TorchLimit:
    """Limit torch in this thread. torch gives the number to new threads too: there it is not the one from before."""
    with _LOCK:
        me = threading.get_ident()
        own = not _TORCH or any(limit.thread == me for limit in _TORCH)
        mine = _TorchLimit(me, torch.get_num_threads() if own else _TORCH[0].before)
        _TORCH.append(mine)
        torch.set_num_threads(threads)
        return mine


@contextmanager
def _limited_blas(threads: int) -> Iterator[None]:
    """Limit BLAS, whose number of threads is the process's. While several blocks last, that of the latest holds.

    After the last of them BLAS has as many threads as before the first, in whatever order they end.
    """
    mine = [threads]
    with _LOCK:
        _BLAS.append(mine)
        _set_blas()
    try:
        yield
    finally:
        with _LOCK:
            _BLAS[:] = [limit for limit in _BLAS if limit is not mine]
            _set_blas()


def _set_blas() -> None:
    for library in threadpoolctl.ThreadpoolController().select(user_api="blas").lib_controllers:
        before = _BLAS_BEFORE.setdefault(library.filepath, library.num_threads)
        library.set_num_threads(_BLAS[-1][0] if _BLAS else before)
    if not _BLAS:
        _BLAS_BEFORE.clear()


def in_threads(
    work: Callable[[T], R], items: Iterable[T], threads: int, stopped: threading.Event | None = None
) -> Generator[R, None, None]:
    """Do ``work`` for each of ``items``, in as many threads, in each of which BLAS and OpenMP have one thread.

    What is computed does not depend on the number of threads. Until the last result is read, the BLAS of NumPy and
    SciPy has one thread in this whole process. At most ``threads + 1`` items are ahead of whoever reads the results.

    Args:
        work: What to do; mostly in compiled code, outside Python's lock.
        items: Read in the reader's thread.
        threads: How many, at least 1.
        stopped: Set once no result is wanted any more: work that lasts looks at it, or an interrupt waits for its end.

    Yields:
        The results, in the order of the items.
    """
    # OpenMP's number of threads is a setting of each thread; BLAS's, mostly, of the process.
    pool = ThreadPoolExecutor(threads, initializer=threadpoolctl.threadpool_limits, initargs=(1, "openmp"))
    ahead: deque[Future[R]] = deque()
    with _limited_blas(1):
        try:
            for item in items:
                ahead.append(pool.submit(work, item))
                if len(ahead) > threads + 1:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            if stopped is not None:
                stopped.set()
            pool.shutdown(cancel_futures=True)
