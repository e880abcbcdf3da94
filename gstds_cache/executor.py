"""Where units of work run. The work itself knows nothing of it.

A *task* takes the ids of some units and yields one result per unit as each is done. An executor decides which process
gets which ids. This file holds the contract and the in-process executor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, TypeVar, runtime_checkable

R = TypeVar("R")
Task = Callable[[Sequence[int]], Iterator[R]]


@runtime_checkable
class Executor(Protocol):
    """Runs a task over units and yields the results in the order they finish."""

    def run(self, task: Task[R], units: Sequence[int]) -> Iterator[R]:
        """Run ``task`` over ``units``; every unit is done once or an exception is raised."""
        ...


class LocalExecutor:
    """Runs all units one after the other in this process."""

    def run(self, task: Task[R], units: Sequence[int]) -> Iterator[R]:
        """Run ``task`` over ``units`` in order, here.

        Yields:
            One result per unit.
        """
        yield from task(units)
