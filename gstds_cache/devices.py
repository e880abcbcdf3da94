"""Devices and threads: from ``auto``, ``cpu``, ``cuda`` or ``cuda:N`` to what is there."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import threadpoolctl
import torch

from gstds_cache.errors import UsageError

T = TypeVar("T")
R = TypeVar("R")


def resolve_device(name: str) -> torch.device:
    """The device that ``name`` means on this machine.

    Args:
        name: ``auto`` (CUDA where there is one), ``cpu``, ``cuda`` or ``cuda:N``.

    Returns:
        The device.

    Raises:
        UsageError: The name is none of these, or there is no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"--device: got {name!r}, expected auto, cpu, cuda or cuda:N") from error
    if device.type not in {"cpu", "cuda"}:
        raise UsageError(f"--device: got {name!r}, expected auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(
            f"--device: got {name!r}, but torch sees {torch.cuda.device_count()} CUDA devices",
            hint="use --device cpu, or check the driver with: nvidia-smi",
        )
    return device


def describe_device(device: torch.device) -> str:
    """A device's name for provenance: the GPU's, or ``cpu``."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def limit_threads(threads: int) -> None:
    """Let this process use at most ``threads`` CPU threads; 0 changes nothing.

    torch, faiss and SciPy's BLAS each keep a pool of their own; unbounded beside a training run, they slowed its steps
    threefold on two cores.
    """
    if threads:
        torch.set_num_threads(threads)
        threadpoolctl.threadpool_limits(threads)


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
