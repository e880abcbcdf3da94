"""What runs in a worker process of Ray: open a recipe once, then do the units that come.

It imports no ray but to fetch a recipe. Errors are returned and not raised: Ray would wrap them, and print them twice.
"""

from __future__ import annotations

import os
import pickle
import platform
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from gstds_cache.cluster.versions import require_same_versions
from gstds_cache.data.workers import portable_error
from gstds_cache.errors import GstdsError
from gstds_cache.runtime.executor import Task


@dataclass(frozen=True)
class Answer:
    """What a task returns.

    Attributes:
        results: A result for each unit; fewer where ``error`` is set.
        error: What ended the task early.
        node: The machine.
        process: The process, as ``machine:pid``.
        opening: Seconds that it took to open the recipe; 0 where that was done before.
        seconds: Seconds that the units took.
    """

    results: list[Any]
    error: Exception | None
    node: str
    process: str
    opening: float
    seconds: float


_opened: dict[str, Task[Any]] = {}  # of this process: a model and a data set's index, by the recipe's key


def run_units(shared: Sequence[Any], key: str, units: Sequence[Any]) -> Answer:
    """Do units of work.

    Args:
        shared: One reference, to what the first process has (its versions, the pickled recipe, its current folder);
            fetched where it is needed.
        key: The recipe's key.
        units: The units.

    Returns:
        Their results.
    """
    begun, results, error = time.perf_counter(), list[Any](), None
    opened = begun
    try:
        task = _open(shared, key)
        opened = time.perf_counter()
        results.extend(task(units))
    except Exception as raised:  # Anything: it is raised in the first process.
        error = _named(portable_error(raised, f"in a worker of Ray on {_node()}"))
    ended = time.perf_counter()
    node = _node()
    return Answer(results, error, node, f"{node}:{os.getpid()}", opened - begun, ended - opened)


def _open(shared: Sequence[Any], key: str) -> Task[Any]:
    if key not in _opened:
        import ray

        expected, pickled, folder = ray.get(shared[0])
        require_same_versions(expected, f"the worker on {_node()}")
        with suppress(OSError):
            os.chdir(folder)  # a relative name means what it means to the first process
        _opened.clear()  # the memory of one run's model at a time
        _opened[key] = pickle.loads(pickled).open()
    return _opened[key]


def _named(error: Exception) -> Exception:
    """The error, which says where it was raised."""
    if not isinstance(error, GstdsError):
        return error
    if platform.node() in error.message:
        return error
    return type(error)(f"on {_node()}: {error.message}", hint=error.hint)


def _node() -> str:
    """This machine's name; with the address where Ray knows one, since nodes of one machine share the name."""
    import ray

    context = ray.get_runtime_context()
    return f"{platform.node()} ({context.get_node_id()[:8]})"
