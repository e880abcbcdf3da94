"""An executor on a Ray cluster: small tasks, given to whoever is free, and given again where a worker is lost or slow.

What a task is made from (a recipe) is put into Ray's object store once; each worker process opens it once. A task gets
the names of its units and returns their small results. This process decides what is tried again, and not Ray, so that
it can say how often and where; units are idempotent, so a second try is harmless at any time.
"""

from __future__ import annotations

import math
import pickle
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence, Sized
from contextlib import closing
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from gstds_cache.cluster.progress import ClusterProgress
from gstds_cache.cluster.session import import_ray
from gstds_cache.cluster.versions import versions
from gstds_cache.cluster.worker import Answer, run_units
from gstds_cache.errors import GstdsError, IncompleteError, UsageError
from gstds_cache.runtime.executor import PortableTask, Recipe, Task
from gstds_cache.runtime.notify import Notify

R = TypeVar("R")
MANY = 64
"""Units of a task, at most, where it is not known how many there are."""


@dataclass(frozen=True)
class Limits:
    """How long things may take, in seconds, and how often they are tried.

    Attributes:
        task: What a task is made to take, of units that take less: little is lost with a worker.
        tick: How often it is looked whether something is slow.
        nodes: How often it is asked which nodes there are.
        told: How often progress is told.
        silent: After how long without a result the user is told what is waited for.
        no_node: After how long without a node that has what a task needs the run ends.
        slow: What a unit may take, at least, before another worker tries it as well.
        slow_times: The same, as a multiple of what units take.
        tries: How often a unit is tried before the run ends.
        pause: Before a unit is tried again, times the tries it has had.
    """

    task: float = 10.0
    tick: float = 0.5
    nodes: float = 5.0
    told: float = 30.0
    silent: float = 60.0
    no_node: float = 300.0
    slow: float = 30.0
    slow_times: float = 3.0
    tries: int = 4
    pause: float = 1.0


class RayExecutor:
    """Runs units on the Ray cluster that this process is connected to (:class:`gstds_cache.runtime.executor.Executor`).

    Attributes:
        gpus_per_task: GPUs of a task, or the part of one; None for one where the recipe is for a GPU.
        retries: Units that were tried again, of all runs of this object.
        second_tries: Units that were given to a second worker since the first was slow.
    """

    def __init__(
        self,
        *,
        notify: Notify,
        gpus_per_task: float | None = None,
        limits: Limits | None = None,
        start: Callable[[], object] | None = None,
    ) -> None:
        """Take how to run.

        Args:
            notify: Told of progress, retries and waiting.
            gpus_per_task: GPUs of a task, or the part of one.
            limits: How long things may take.
            start: Starts the cluster, once there is work; None where this process is connected to one.
        """
        self._start = start
        self.gpus_per_task, self.retries, self.second_tries = gpus_per_task, 0, 0
        self._notify, self._limits = notify, limits or Limits()

    def run(self, task: Task[R], units: Iterable[Any], *, ordered: bool = False) -> Iterator[R]:
        """Run ``task`` over ``units`` in the cluster's workers.

        Args:
            task: A portable one.
            units: Each is pickled and sent.
            ordered: Whether results come in the order of the units.

        Yields:
            One result per unit.

        Raises:
            TypeError: The task is none that another process could run.
            UsageError: What the task needs cannot be handed to another process.
            IncompleteError: A unit failed again and again, or no node has what a task needs.
            Exception: What was raised in a worker.
        """
        portable: object = task
        if not isinstance(portable, PortableTask):
            raise TypeError(f"{type(task).__name__} has no recipe by which another process could make it")
        self._require_started()
        recipe: Any = portable.recipe()
        if self.gpus_per_task is not None and "gpu" in getattr(recipe, "__dataclass_fields__", {}):
            recipe = replace(recipe, gpu=True)  # this machine may have none
        run = _Run(self, recipe, units, ordered=ordered, limits=self._limits, notify=self._notify)
        with closing(run.results()) as results:
            for result in results:
                yield portable.receive(result)

    def _require_started(self) -> None:
        start, self._start = self._start, None
        if start is not None:
            self._notify("ray: a cluster is started on this machine")
            start()


@dataclass(eq=False)
class _Block:
    """Units that one task does.

    Attributes:
        number: Position among the blocks.
        units: The units.
        tries: How often it failed.
        not_before: When it may be tried again.
        flights: Tasks that are at it.
        done: Whether its results are there.
    """

    number: int
    units: list[Any]
    tries: int = 0
    not_before: float = 0.0
    flights: set[Any] = field(default_factory=set)
    done: bool = False


@dataclass(eq=False)
class _Flight:
    """A task that was submitted; ``since`` is when it can have begun, None while others are before it."""

    block: _Block
    since: float | None = None


class _Run:
    """One run over units."""

    def __init__(
        self, of: RayExecutor, recipe: Recipe, units: Iterable[Any], *, ordered: bool, limits: Limits, notify: Notify
    ) -> None:
        self._ray = import_ray()
        self._of, self._recipe, self._limits, self._notify, self._ordered = of, recipe, limits, notify, ordered
        self._units = iter(units)
        total = len(units) if isinstance(units, Sized) else None
        self._left = total
        self._progress = ClusterProgress(recipe.counted, total, notify, limits.told)
        self._flights: dict[Any, _Flight] = {}
        self._again: deque[_Block] = deque()
        self._held: dict[int, list[Any]] = {}
        self._given, self._next, self._ended = 0, 0, False
        self._slots, self._asked, self._fitted = 0, -math.inf, time.monotonic()
        self._landed = self._told = time.monotonic()
        self._remote = self._options()
        self._shared = [self._ray.put((versions(), self._pickled(recipe), str(Path.cwd())))]

    def _options(self) -> Any:
        recipe, gpus = self._recipe, 0.0
        if recipe.gpu:
            gpus = 1.0 if self._of.gpus_per_task is None else self._of.gpus_per_task
        self._needs = (float(recipe.cpus), gpus)
        # A process serves any number of tasks (max_calls): Ray would end one with a GPU after each.
        return self._ray.remote(max_calls=0, max_retries=0)(run_units).options(
            num_cpus=recipe.cpus,
            num_gpus=gpus,
            scheduling_strategy="SPREAD",
            name=f"gstds-cache {recipe.counted}",
        )

    def _pickled(self, recipe: Recipe) -> bytes:
        """The recipe as bytes.

        Raises:
            UsageError: It does not pickle.
        """
        from ray import cloudpickle  # takes classes of a script along by value

        try:
            return bytes(cloudpickle.dumps(recipe, protocol=pickle.HIGHEST_PROTOCOL))
        except Exception as error:  # Anything: an object's own code says how it is pickled.
            raise UsageError(
                "`engine='ray'`: the data set cannot be handed to another machine: "
                f"{str(error) or type(error).__name__}",
                hint="give a data set by name that every machine sees (a path on a shared file system, tar shards or "
                "images in a bucket), or an object that can be pickled",
            ) from error

    def results(self) -> Generator[Any, None, None]:
        """Give out units and collect results until all are there.

        Yields:
            The results.
        """
        try:
            while True:
                self._ask_for_nodes()
                self._submit()
                if not self._flights and not self._again and self._ended:
                    break
                ready = self._wait()
                for flight in ready:
                    yield from self._land(flight)
                self._watch()
            self._progress.end(self._of.retries, self._of.second_tries)
        finally:
            for flight in list(self._flights):
                self._forget(flight)

    def _wait(self) -> list[Any]:
        if not self._flights:
            time.sleep(self._limits.tick)
            return []
        flights = list(self._flights)
        ready, _ = self._ray.wait(flights, num_returns=1, timeout=self._limits.tick)
        if ready and len(flights) > 1:  # all that are there by now
            ready, _ = self._ray.wait(flights, num_returns=len(flights), timeout=0)
        return list(ready)

    # -- which nodes there are

    def _ask_for_nodes(self) -> None:
        """How many tasks run at once; the cluster may grow and shrink.

        Raises:
            IncompleteError: No node has had what a task needs for too long.
        """
        now = time.monotonic()
        if now - self._asked < self._limits.nodes:
            return
        self._asked = now
        cpus, gpus = self._needs
        nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        fits = [
            min(int(node.get("CPU", 0) // cpus), int(node.get("GPU", 0) / gpus + 1e-9) if gpus else 1 << 30)
            for node in nodes
        ]
        self._slots, self._progress.nodes = sum(fits), sum(fit > 0 for fit in fits)
        if self._slots:
            self._fitted = now
        elif now - self._fitted > self._limits.no_node:
            wanted = f"{cpus:.0f} CPUs" + (f" and {gpus:g} GPUs" if gpus else "")
            raise IncompleteError(
                f"no node of the Ray cluster has the {wanted} that a task needs, for {self._limits.no_node:.0f} s; "
                f"there are {len(nodes)} nodes",
                hint="add such nodes, or use fewer `workers` or a smaller `gpus_per_task`; then run the same again",
            )

    # -- giving out

    def _submit(self) -> None:
        """Keep the workers busy, with one block more for each that waits until a worker is free."""
        most = max(1, 2 * self._slots)
        while len(self._flights) < most:
            block = self._next_block()
            if block is None:
                return
            self._give(block)

    def _give(self, block: _Block) -> None:
        ref = self._remote.remote(self._shared, self._recipe.key, block.units)
        running = sum(flight.since is not None for flight in self._flights.values())
        self._flights[ref] = _Flight(block, time.monotonic() if running < max(1, self._slots) else None)
        block.flights.add(ref)

    def _next_block(self) -> _Block | None:
        now = time.monotonic()
        for place, block in enumerate(self._again):
            if block.not_before <= now:
                del self._again[place]
                return block
        if self._ended or (self._ordered and self._given - self._next >= max(2, 2 * self._slots) + 2):
            return None
        units = list(islice(self._units, self._block_size()))
        if not units:
            self._ended = True
            return None
        self._given += 1
        if self._left is not None:
            self._left -= len(units)
        return _Block(self._given - 1, units)

    def _block_size(self) -> int:
        """Units of a task: many where they are short, and fewer towards the end, so that all workers end together."""
        a_unit = self._progress.seconds_of_a_unit
        if self._ordered or not a_unit:
            return 1
        share = MANY if self._left is None else math.ceil(self._left / (3 * max(1, self._slots)))
        return max(1, min(int(self._limits.task / a_unit), share))

    # -- taking in

    def _land(self, ref: Any) -> Iterator[Any]:
        """Take in one task.

        Yields:
            The results that are due.
        """
        flight = self._flights.pop(ref)
        block = flight.block
        block.flights.discard(ref)
        waiting = [other for other in self._flights.values() if other.since is None]
        if waiting:
            waiting[0].since = time.monotonic()
        if block.done:
            return
        answer = self._answer(ref, block)
        if answer is None:
            return
        block.done = True
        self._landed = self._told = time.monotonic()
        self._progress.add(answer, len(block.units))
        for other in list(block.flights):
            self._forget(other)
        if not self._ordered:
            yield from answer.results
            return
        self._held[block.number] = answer.results
        while self._next in self._held:
            yield from self._held.pop(self._next)
            self._next += 1

    def _answer(self, ref: Any, block: _Block) -> Answer | None:
        """What a task returned; None where its block is to be tried again.

        Raises:
            UsageError: The worker cannot run our code.
            Exception: What was raised in the worker, where trying again would not help.
        """
        errors = self._ray.exceptions
        try:
            answer = self._ray.get(ref)
        except errors.RayTaskError as error:  # our function was not reached, or its answer did not pickle
            text = str(error).strip().splitlines()[-1][:300]
            raise UsageError(
                f"a worker of Ray cannot run a task: {text}",
                hint="install the same version of gstds-cache, with what your model and data set need, on every node",
            ) from error
        except errors.RayError as error:
            self._failed(block, f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}")
            return None
        if answer.error is None:
            return answer  # type: ignore[no-any-return]
        if not _passes(answer.error):
            raise answer.error
        self._failed(block, str(answer.error).partition("\n")[0])
        return None

    def _failed(self, block: _Block, why: str) -> None:
        """Have a block tried again.

        Raises:
            IncompleteError: It was tried often enough.
        """
        if block.flights:
            return  # another worker is at it still
        block.tries += 1
        self._of.retries += 1
        named = f"{self._recipe.counted} {_named(block.units)}"
        if block.tries >= self._limits.tries:
            raise IncompleteError(
                f"{named} failed {block.tries} times on the Ray cluster, the last time with: {why}",
                hint="nothing that was committed is lost: the same command goes on",
            )
        self._notify(f"ray: {named} will be tried again (try {block.tries + 1} of {self._limits.tries}): {why}")
        block.not_before = time.monotonic() + self._limits.pause * block.tries
        self._again.append(block)

    # -- what is slow

    def _watch(self) -> None:
        now, limits = time.monotonic(), self._limits
        if not self._again and len(self._flights) < self._slots:  # a worker is free, and there is nothing to give it
            self._try_slow_ones_elsewhere(now)
        if now - self._landed > limits.silent and now - self._told > limits.silent:
            self._told = now
            at = f"{len(self._flights)} tasks are under way" if self._slots else "no node has what a task needs"
            self._notify(
                f"ray: nothing has finished for {now - self._landed:.0f} s; {at}, on {self._progress.nodes} nodes"
            )
        self._progress.tell(self._of.retries, self._of.second_tries)

    def _try_slow_ones_elsewhere(self, now: float) -> None:
        for flight in list(self._flights.values()):
            a_unit = self._progress.seconds_of_a_unit or 0.0
            usual = a_unit * len(flight.block.units) + self._progress.opening
            allowed = max(self._limits.slow, self._limits.slow_times * usual)
            if flight.since is None or now - flight.since < allowed or len(flight.block.flights) > 1:
                continue
            if len(self._flights) >= self._slots:
                return
            self._of.second_tries += 1
            self._notify(
                f"ray: {self._recipe.counted} {_named(flight.block.units)} have taken {now - flight.since:.0f} s, "
                "another worker tries them as well"
            )
            self._give(flight.block)

    def _forget(self, ref: Any) -> None:
        """Ask no more what became of a task. It runs to its end, and what it returns is dropped.

        Not ``ray.cancel``: where a task ends at the same time, Ray 2.60 ends this process with ``Check failed:
        Tried to complete task that was not pending``.
        """
        flight = self._flights.pop(ref, None)
        if flight is not None:
            flight.block.flights.discard(ref)


def _passes(error: Exception) -> bool:
    """Whether an error may be gone at the next try: a store that does not answer, memory or disk that ran out."""
    if isinstance(error, GstdsError):
        return isinstance(error, IncompleteError)
    return isinstance(error, OSError | MemoryError)


def _named(units: Sequence[Any]) -> str:
    """Units in words."""
    names = [str(unit) if isinstance(unit, int | str) else getattr(unit, "name", "") for unit in units]
    names = [name for name in names if name]
    return ", ".join(names) if len(names) < 4 else f"{names[0]}, {names[1]}, ..., {names[-1]}"
