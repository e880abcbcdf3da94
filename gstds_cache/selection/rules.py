"""Rules: from a graph's Fiedler vector to the rows that stay. Small pure functions in a registry.

Which rule is best is a question for measurements (benchmarks/), not for this file. The paper's abstract says that a
share of each batch is removed by its Fiedler vector; the readings of that below are ours.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64, Int64

from gstds_cache.errors import unknown_name

Choose = Callable[[Float64[np.ndarray, " B"], int, np.random.Generator], Int64[np.ndarray, " M"]]


@dataclass(frozen=True)
class Rule:
    """A named rule.

    Attributes:
        name: Its name on the command line.
        summary: What it keeps, in a few words.
        needs_spectrum: Whether the graph and its Fiedler vector have to be computed.
        choose: (Fiedler vector float64 [B], keep M, rng) -> positions int64 [M] in the batch, ascending, distinct.
    """

    name: str
    summary: str
    needs_spectrum: bool
    choose: Choose


TIE = 1e-6  # of the largest magnitude


def settle_ties(vector: Float64[np.ndarray, " B"]) -> Float64[np.ndarray, " B"]:
    """Round a Fiedler vector to multiples of 1e-6 of its largest magnitude, so that equals are equal.

    Duplicate images have the same neighbours and so the same coordinate, but for rounding errors. Left as they are,
    two exact solvers disagree on 1 to 3 % of the kept rows of a batch (benchmarks/results/fiedler.json); settled, they
    agree on all, and ties go to the row that comes first in the batch.
    """
    step = TIE * np.abs(vector).max(initial=0.0)
    return np.round(vector / step) * step if step > 0 else vector


def coverage(vector: Float64[np.ndarray, " B"], keep: int, _rng: np.random.Generator) -> Int64[np.ndarray, " M"]:
    """Evenly spaced ranks along the Fiedler order: the middle of each of ``keep`` equal stretches."""
    order = np.argsort(vector, kind="stable")
    ranks = ((2 * np.arange(keep) + 1) * len(vector)) // (2 * keep)
    return np.sort(order[ranks])


def extremes(vector: Float64[np.ndarray, " B"], keep: int, _rng: np.random.Generator) -> Int64[np.ndarray, " M"]:
    """Largest absolute value: rows deep inside either side of the cut."""
    return np.sort(np.argsort(-np.abs(vector), kind="stable")[:keep])


def boundary(vector: Float64[np.ndarray, " B"], keep: int, _rng: np.random.Generator) -> Int64[np.ndarray, " M"]:
    """Smallest absolute value: rows near the cut."""
    return np.sort(np.argsort(np.abs(vector), kind="stable")[:keep])


def gap(vector: Float64[np.ndarray, " B"], keep: int, _rng: np.random.Generator) -> Int64[np.ndarray, " M"]:
    """Widest spacing to the two neighbours in the Fiedler order; at the ends, twice the spacing to the one."""
    order = np.argsort(vector, kind="stable")
    steps = np.diff(vector[order])
    if not steps.size:
        return np.arange(keep, dtype=np.int64)
    spacing = np.concatenate([[2 * steps[0]], steps[:-1] + steps[1:], [2 * steps[-1]]])
    widest_first = np.lexsort((order, -spacing))
    return np.sort(order[widest_first[:keep]])


def random(vector: Float64[np.ndarray, " B"], keep: int, rng: np.random.Generator) -> Int64[np.ndarray, " M"]:
    """A uniformly random subset, without looking: the baseline every other rule has to beat."""
    return np.sort(rng.choice(len(vector), keep, replace=False))


RULES = {
    rule.name: rule
    for rule in (
        Rule("coverage", "evenly spaced along the Fiedler order", True, coverage),
        Rule("extremes", "largest absolute Fiedler value", True, extremes),
        Rule("boundary", "smallest absolute Fiedler value", True, boundary),
        Rule("gap", "widest spacing to Fiedler neighbours", True, gap),
        Rule("random", "uniformly random; computes no graph", False, random),
    )
}


def find_rule(name: str) -> Rule:
    """The rule of that name.

    Raises:
        UsageError: There is none; the message lists what there is.
    """  # noqa: DOC501
    if name not in RULES:
        raise unknown_name("rule", name, RULES)
    return RULES[name]
