"""What a run on a cluster tells the user: workers, rate, retries and the slowest node."""

from __future__ import annotations

import time
from collections import deque
from statistics import median

from gstds_cache.cluster.worker import Answer
from gstds_cache.runtime.notify import Notify

REMEMBERED = 200  # answers of which the usual time is taken


class ClusterProgress:
    """Counts answers, and says now and then how it goes.

    Attributes:
        nodes: Nodes that have what a task needs.
        opening: The longest that a worker took to open the recipe, seconds.
    """

    def __init__(self, counted: str, total: int | None, notify: Notify, every: float) -> None:
        """Begin.

        Args:
            counted: What units are.
            total: How many there are, if known.
            notify: Told.
            every: How often, in seconds.
        """
        self.nodes, self.opening = 0, 0.0
        self._counted, self._total, self._notify, self._every = counted, total, notify, every
        self._done, self._begun, self._told = 0, time.monotonic(), time.monotonic()
        self._units: deque[float] = deque(maxlen=REMEMBERED)
        self._workers: set[str] = set()
        self._of_node: dict[str, tuple[int, float]] = {}

    @property
    def seconds_of_a_unit(self) -> float | None:
        """What a unit takes, the median of the last ones; None before the first."""
        return median(self._units) if self._units else None

    def add(self, answer: Answer, units: int) -> None:
        """Count an answer."""
        self._done += units
        self._workers.add(answer.process)
        self._units.append(answer.seconds / units)
        self.opening = max(self.opening, answer.opening)
        done, seconds = self._of_node.get(answer.node, (0, 0.0))
        self._of_node[answer.node] = done + units, seconds + answer.seconds

    def tell(self, retries: int, second_tries: int) -> None:
        """Say how it goes, if it is time."""
        now = time.monotonic()
        if now - self._told >= self._every and self._done:
            self._told = now
            self._notify(self.text(retries, second_tries))

    def end(self, retries: int, second_tries: int) -> None:
        """Say how it went, where it took long enough to ask or something went wrong."""
        if self._done and (time.monotonic() - self._begun >= self._every or retries or second_tries):
            self._notify(self.text(retries, second_tries))

    def text(self, retries: int, second_tries: int) -> str:
        """How it goes, on one line."""
        elapsed = max(time.monotonic() - self._begun, 1e-9)
        of = "" if self._total is None else f" of {self._total:,}"
        parts = [
            f"ray: {len(self._workers)} workers on {len(self._of_node)} nodes",
            f"{self._done:,}{of} {self._counted}",
            f"{60 * self._done / elapsed:.1f} a minute",
            f"{retries} retries" + (f", {second_tries} second tries" if second_tries else ""),
        ]
        means = sorted((seconds / done, node) for node, (done, seconds) in self._of_node.items())
        if len(means) > 1:
            others = median(mean for mean, _ in means[:-1])
            parts.append(f"slowest node {means[-1][1]}: {means[-1][0]:.1f} s each, the others {others:.1f} s")
        return ", ".join(parts)
