"""Where shards of work run. The work itself knows nothing of it.

A *task* takes the ids of some shards and yields one result per shard as each is done. An executor decides which process
gets which ids. This file holds the contract and the in-process executor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, TypeVar, runtime_checkable

R = TypeVar("R")
Task = Callable[[Sequence[int]], Iterator[R]]


@runtime_checkable
class Executor(Protocol):
    """Runs a task over shards and yields the results in the order they finish."""

    def run(self, task: Task[R], shards: Sequence[int]) -> Iterator[R]:
        """Run ``task`` over ``shards``; every shard is done once or an exception is raised."""
        ...


class LocalExecutor:
    """Runs all shards one after the other in this process."""

    def run(self, task: Task[R], shards: Sequence[int]) -> Iterator[R]:
        """Run ``task`` over ``shards`` in order, here.

        Yields:
            One result per shard.
        """
        yield from task(shards)
