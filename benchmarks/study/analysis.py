"""From result lines to differences with intervals, at equal gradients and at equal wall clock.

Everything is paired by seed: two methods of one seed start from the same weights and see the same order of the data.
Seconds are CPU seconds. A run is one process of one thread, so on an idle core they are its wall clock; on a busy
machine they still are what an idle one would have shown, but for caches. The wall clock of each phase is in the lines
as well. Of runs that have a GPU to themselves it is what counts.

Intervals are Student's t of the paired differences. A percentile bootstrap over three seeds would be the smallest and
the largest of the three: with 3 pairs in 4 the mean lies between them, not with 95 %.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import t as student

Line = dict[str, Any]
PAID = ("select", "scores", "train")  # not warm-up
ONCE = ("warm-up", "images", "trial")  # phases that a run does not pay for: once for all runs, or for a process
LEVEL = 0.95
OFTEN = math.inf  # experiments on one cache: its share of the cost is nothing


@dataclass(frozen=True)
class Interval:
    """A mean of paired differences in points, with its 95 % interval.

    Attributes:
        mean: In percentage points.
        low: Its lower end; minus infinity where there is one pair.
        high: Its upper end.
        seeds: Pairs.
        beyond: Pairs in which the reference's budget ended before the method's time: its largest budget was taken.
    """

    mean: float
    low: float
    high: float
    seeds: int
    beyond: int = 0

    @property
    def verdict(self) -> str:
        """In a word; two seeds tell nothing."""
        if self.seeds < 3:
            return "too few seeds"
        return "ahead" if self.low > 0 else "behind" if self.high < 0 else "not told apart"

    def __neg__(self) -> Interval:
        return Interval(-self.mean, -self.high, -self.low, self.seeds, self.beyond)

    def __str__(self) -> str:
        ends = "one seed" if self.seeds < 2 else f"{self.low:+.2f}, {self.high:+.2f}"
        text = f"{self.mean:+.2f} [{ends}]"
        return text + ("*" if self.beyond else "")


def paired(differences: Sequence[float], beyond: int = 0) -> Interval:
    """Mean of ``differences`` (shares) in points, and Student's t interval of it.

    It is about other seeds: other first weights and other orders of the same training data, the same test data.
    """
    values, count = 100 * np.asarray(differences, np.float64), len(differences)
    half = math.inf
    if count > 1:
        half = float(student.ppf((1 + LEVEL) / 2, count - 1) * values.std(ddof=1) / math.sqrt(count))
    mean = float(values.mean())
    return Interval(mean, mean - half, mean + half, count, beyond)


@dataclass(frozen=True)
class Cost:
    """What reaching an accuracy takes, over seeds.

    Attributes:
        reached: What each seed spent that got there.
        seeds: All that ran the method's largest budget.
        smallest: What the method's smallest budget takes, in the mean.
        largest: What its largest takes.
    """

    reached: tuple[float, ...]
    seeds: int
    smallest: float
    largest: float

    def as_share(self, of: float) -> str:
        """In words: the geometric mean as a share of ``of``, with Student's 95 % interval, if all seeds got there.

        If some did not, the median seed's; it is known only to be more than the largest budget if that seed is one of
        them, and at most the smallest where all were there after it.
        """
        if len(self.reached) < self.seeds:
            median = float(np.median([*self.reached, *[math.inf] * (self.seeds - len(self.reached))]))
            if not math.isfinite(median):
                return f"more than {self.largest / of:.2f}"
            return f"{'at most ' if median <= 1.05 * self.smallest else ''}{median / of:.2f}, median"
        if max(self.reached) <= 1.05 * self.smallest:
            return f"at most {self.smallest / of:.2f}"
        logs = np.log(np.array(self.reached) / of)
        if self.seeds < 2:
            return f"{math.exp(logs[0]):.2f} [one seed]"
        half = float(student.ppf((1 + LEVEL) / 2, self.seeds - 1) * logs.std(ddof=1) / math.sqrt(self.seeds))
        low, middle, high = np.exp(logs.mean() + half * np.array([-1, 0, 1]))
        bound = "at most " if min(self.reached) <= 1.001 * self.smallest else ""  # some were there after the smallest
        return f"{bound}{middle:.2f} [{low:.2f}, {high:.2f}]"


def _crossing(points: Sequence[tuple[int, float, float]], target: float) -> float | None:
    """Where accuracy first reaches ``target``, of (epochs, cost, accuracy) cheapest first; None where it does not."""
    costs, accuracies = np.array([cost for _, cost, _ in points]), np.array([accuracy for *_, accuracy in points])
    there = np.flatnonzero(accuracies >= target)
    if not len(there):
        return None
    first = int(there[0])
    if first == 0:
        return float(costs[0])  # its smallest budget: it may have been there earlier
    share = (target - accuracies[first - 1]) / (accuracies[first] - accuracies[first - 1])
    return float(np.exp(np.interp(share, [0, 1], np.log(costs[first - 1 : first + 1]))))


@dataclass(frozen=True)
class Study:
    """One setting's lines.

    Attributes:
        lines: All of them.
    """

    lines: tuple[Line, ...]

    @property
    def runs(self) -> list[Line]:
        return [line for line in self.lines if line["kind"] == "run"]

    def of(self, method: str, ratio: float, epochs: int) -> dict[int, Line]:
        """Runs by seed; ``full`` has no ratio."""
        return {
            line["seed"]: line
            for line in self.runs
            if line["method"] == method and line["epochs"] == epochs and (method == "full" or line["ratio"] == ratio)
        }

    @property
    def on_gpu(self) -> bool:
        """Whether the runs were on a GPU, so that seconds are of the wall clock."""
        return any("device" in line for line in self.runs)

    @property
    def embed_seconds(self) -> float:
        """Core seconds of embedding the data set once."""
        return sum(line["cpu_seconds"] for line in self.lines if line["kind"] == "embedding")

    def score_seconds(self, need: str) -> float:
        """Core seconds of a score that was computed once."""
        return sum(line["cpu_seconds"] for line in self.lines if line["kind"] == "scores" and line["need"] == need)

    def clock(self, line: Line, experiments: float) -> float:
        """Core seconds of a run, the cache's share with ``experiments`` on it counted; on a GPU, seconds.

        The probe is part of the cache, and so is the trial that says which guidance is used. Early networks and
        forgetting counts are not shared: they are of one network and one budget. What was embedded with a GPU is not
        counted there.
        """
        if self.on_gpu:
            own = sum(spent for phase, spent in line["seconds"].items() if phase not in ONCE)
            return float(own + sum(self.score_seconds(need) for need in line["needs"] if need != "probe"))
        seconds = self._own_seconds(line)
        shared = self._trial_seconds(line) + (self.embed_seconds if line["embeds"] else 0.0)
        for need in line["needs"]:
            if need == "probe":
                shared += self.score_seconds(need)
            else:
                seconds += self.score_seconds(need)
        return float(seconds + shared / experiments)

    def _trial_seconds(self, line: Line) -> float:
        """Core seconds of the trial of a run's guidance: those of the run that made it; the others found it made."""
        if "trial" not in line["cpu_seconds"] or line["guidance"] == "none":
            return 0.0
        alike = (run["cpu_seconds"] for run in self.runs if run.get("guidance") == line["guidance"])
        return float(max(spent.get("trial", 0.0) for spent in alike))

    def _own_seconds(self, line: Line) -> float:
        """Core seconds of a run alone. Of a longer run they are its steps at the pace of the method's shortest runs.

        Methods take turns within a budget, not from one budget to the next: at another hour the machine may be slower
        by half.
        """
        same = [run for run in self.runs if (run["method"], run["ratio"]) == (line["method"], line["ratio"])]
        shortest = [run for run in same if run["epochs"] == min(run["epochs"] for run in same)]
        if any(line is run for run in shortest):
            shortest = [line]
        steps = sum(run["steps"] for run in shortest)
        seconds = sum(run["cpu_seconds"].get(phase, 0.0) for run in shortest for phase in PAID)
        return float(seconds * line["steps"] / steps)

    def budgets(self, method: str, ratio: float, seed: int, experiments: float) -> tuple[np.ndarray, np.ndarray]:
        """Seconds and accuracies of ``method`` at all its budgets of epochs, cheapest first."""
        points = sorted(
            (self.clock(line, experiments), line["test_accuracy"])
            for line in self.runs
            if line["method"] == method and line["seed"] == seed and (method == "full" or line["ratio"] == ratio)
        )
        return np.array([seconds for seconds, _ in points]), np.array([accuracy for _, accuracy in points])

    def difference(self, a: str, b: str, ratio: float, epochs: int, b_epochs: int | None = None) -> Interval | None:
        """Accuracy of ``a`` minus that of ``b``, at the same number of epochs or after ``b_epochs``."""
        ours, theirs = self.of(a, ratio, epochs), self.of(b, ratio, b_epochs or epochs)
        seeds = sorted(ours.keys() & theirs.keys())
        if not seeds:
            return None
        return paired([ours[s]["test_accuracy"] - theirs[s]["test_accuracy"] for s in seeds])

    def at_equal_clock(
        self, method: str, reference: str, ratio: float, epochs: int, experiments: float = OFTEN
    ) -> Interval | None:
        """Accuracy of ``method`` minus what ``reference`` reaches in the same seconds.

        The reference was run with several numbers of epochs, each with its own schedule of the learning rate; between
        two of them, its accuracy is read off along a straight line over log seconds. Seeds for which the reference has
        one budget alone are left out.

        Returns:
            The difference; None where there are no runs, or the reference's smallest budget takes longer (by more than
            a twentieth, in the mean).
        """
        differences, against, beyond = [], [], 0
        for seed, line in self.of(method, ratio, epochs).items():
            seconds, accuracies = self.budgets(reference, ratio, seed, experiments)
            if len(seconds) < 2:
                continue
            spent = self.clock(line, experiments)
            against.append(spent / seconds[0])
            beyond += bool(spent > 1.02 * seconds[-1])
            differences.append(line["test_accuracy"] - float(np.interp(np.log(spent), np.log(seconds), accuracies)))
        if not differences or np.mean(against) < 0.95:
            return None
        return paired(differences, beyond)

    def cost_to(self, method: str, ratio: float, target: float, experiments: float | None = None) -> Cost | None:
        """What ``method`` spends until it is at ``target``, read off between its budgets of epochs.

        A budget is a run to its end, with its own schedule of the learning rate; between two, accuracy is a straight
        line over the logarithm of what was spent. Only seeds that ran the method's largest budget count: of the others
        it is not known whether they would have got there.

        Args:
            method: As in the lines.
            ratio: The filter ratio; anything for ``full``.
            target: Test accuracy, a share.
            experiments: Core seconds are counted, with so many experiments on one cache; gradient samples where None.

        Returns:
            The cost; None where there are no runs.
        """
        found: dict[int, list[tuple[int, float, float]]] = {}
        for line in self.runs:
            if line["method"] == method and (method == "full" or line["ratio"] == ratio):
                spent = line["gradient_samples"] if experiments is None else self.clock(line, experiments)
                found.setdefault(line["seed"], []).append((line["epochs"], float(spent), line["test_accuracy"]))
        if not found:
            return None
        most = max(epochs for points in found.values() for epochs, _, _ in points)
        seeds = [sorted(points) for points in found.values() if max(points)[0] == most]
        reached = [cost for points in seeds if (cost := _crossing(points, target)) is not None]
        smallest, largest = (float(np.mean([points[place][1] for points in seeds])) for place in (0, -1))
        return Cost(tuple(reached), len(seeds), smallest, largest)

    def break_even(self, ratio: float, epochs: int, method: str = "default") -> float | None:
        """Experiments after which embedding and probe have been paid for by what ``method`` saves against ``full``."""
        ours, full = self.of(method, ratio, epochs), self.of("full", ratio, epochs)
        seeds = sorted(ours.keys() & full.keys())
        if not seeds or not self.embed_seconds:
            return None
        saved = float(np.mean([self.clock(full[s], OFTEN) - self.clock(ours[s], OFTEN) for s in seeds]))
        first = ours[seeds[0]]
        shared = self.embed_seconds + sum(self.score_seconds(n) for n in first["needs"] if n == "probe")
        shared += self._trial_seconds(first)
        return shared / saved if saved > 0 else None
