"""Where units of work run. The work itself knows nothing of it.

A *task* takes some units (shards of a store, blocks of batches) and yields one result per unit as each is done. An
executor decides which process gets which units. This file holds the contract and the in-process executor; one suite
tests every executor (tests/cluster/test_contract.py).

A task that may run in other processes says how it is made there (:meth:`PortableTask.recipe`), and takes in what comes
back (:meth:`PortableTask.receive`). Units are idempotent: an executor may run one again, or twice at the same time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol, TypeVar, runtime_checkable

R = TypeVar("R")
T = TypeVar("T")
Task = Callable[[Sequence[Any]], Iterator[R]]


@runtime_checkable
class Recipe(Protocol):
    """Makes a task anew in another process. It is pickled, and holds no credentials."""

    @property
    def key(self) -> str:
        """What tells this recipe from others: a process opens one with the same key once."""
        ...

    @property
    def cpus(self) -> int:
        """Cores that one task uses."""
        ...

    @property
    def gpu(self) -> bool:
        """Whether it computes on a GPU."""
        ...

    @property
    def counted(self) -> str:
        """What its units are, e.g. ``shards``."""
        ...

    def open(self) -> Task[Any]:
        """Load what the task needs (a model, a data set), and check that it is what the first process has."""
        ...


@runtime_checkable
class PortableTask(Protocol):
    """A task that other processes can run as well."""

    def recipe(self) -> Recipe:
        """How the task is made in another process."""
        ...

    def receive(self, result: Any) -> Any:
        """Take in a unit's result that another process computed; returns what the task itself would have yielded."""
        ...


class PickledTask:
    """A portable task that is its own recipe: it is pickled, and what it yields is the same wherever it runs.

    A class that is derived from it has ``key`` and ``counted``, and is called with units.

    Attributes:
        cpus: Cores that one task uses.
        gpu: Whether it computes on a GPU.
    """

    cpus = 1
    gpu = False

    def recipe(self: T) -> T:
        """How it is made in another process."""
        return self

    def open(self: T) -> T:
        """It is made by being unpickled."""
        return self

    def receive(self, result: R) -> R:
        """What another process computed is what this one would have."""
        return result


@runtime_checkable
class Executor(Protocol):
    """Runs a task over units, each of them once or, where that changes nothing, more often."""

    def run(self, task: Task[R], units: Iterable[Any], *, ordered: bool = False) -> Iterator[R]:
        """Run ``task`` over ``units``.

        Args:
            task: What to do.
            units: Read as they are needed.
            ordered: Whether results come in the order of the units; else in the order in which they finish. Few are
                held back meanwhile, however many units there are.

        Yields:
            One result per unit, or an exception is raised.
        """
        ...


class LocalExecutor:
    """Runs all units one after the other in this process."""

    def run(self, task: Task[R], units: Iterable[Any], *, ordered: bool = False) -> Iterator[R]:
        """Run ``task`` over ``units`` in order, here.

        Args:
            task: What to do.
            units: What to do it to.
            ordered: They are in any case.

        Yields:
            One result per unit.
        """
        del ordered
        yield from task(units if isinstance(units, Sequence) else list(units))
