"""The registry of rules, and those that look at one Fiedler coordinate alone.

Which rule is best is a question for measurements (docs/results.md), not for this file. The paper's abstract says that a
share of each batch is removed by its Fiedler vector; the readings of that below are ours.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from jaxtyping import Int64

from gstds_cache.errors import UsageError, unknown_name
from gstds_cache.plugins import load_factory, own_code, source_digest
from gstds_cache.runtime.resources import out_of_memory
from gstds_cache.selection import catalog
from gstds_cache.selection.catalog import SPREAD
from gstds_cache.selection.rule import Choose, Rule, RuleBatch
from gstds_cache.selection.spread import spread, spread_guided
from gstds_cache.selection.strata import cells, cells_squared, guided, strata


def coverage(batch: RuleBatch) -> Int64[np.ndarray, " M"]:
    """Evenly spaced ranks along the Fiedler order: the middle of each of ``keep`` equal stretches."""
    order = np.argsort(batch.vector, kind="stable")
    ranks = ((2 * np.arange(batch.keep) + 1) * len(batch)) // (2 * batch.keep)
    return np.sort(order[ranks])


def extremes(batch: RuleBatch) -> Int64[np.ndarray, " M"]:
    """Largest absolute value: rows deep inside either side of the cut."""
    return np.sort(np.argsort(-np.abs(batch.vector), kind="stable")[: batch.keep])


def boundary(batch: RuleBatch) -> Int64[np.ndarray, " M"]:
    """Smallest absolute value: rows near the cut."""
    return np.sort(np.argsort(np.abs(batch.vector), kind="stable")[: batch.keep])


def gap(batch: RuleBatch) -> Int64[np.ndarray, " M"]:
    """Widest spacing to the two neighbours in the Fiedler order; at the ends, twice the spacing to the one."""
    order = np.argsort(batch.vector, kind="stable")
    steps = np.diff(batch.vector[order])
    if not steps.size:
        return np.arange(batch.keep, dtype=np.int64)
    spacing = np.concatenate([[2 * steps[0]], steps[:-1] + steps[1:], [2 * steps[-1]]])
    widest_first = np.lexsort((order, -spacing))
    return np.sort(order[widest_first[: batch.keep]])


def random(batch: RuleBatch) -> Int64[np.ndarray, " M"]:
    """A uniformly random subset, without looking: the baseline every other rule has to beat."""
    return np.sort(batch.rng.choice(len(batch), batch.keep, replace=False))


def _ours(name: str, choose: Choose, vectors: int = 1, *, needs_guidance: bool = False, power: float = 1.0) -> Rule:
    return Rule(name, catalog.RULES[name], choose, vectors, needs_guidance, power)


RULES = {
    rule.name: rule
    for rule in (
        _ours("coverage", coverage),
        _ours("extremes", extremes),
        _ours("boundary", boundary),
        _ours("gap", gap),
        _ours("strata", strata, needs_guidance=True),
        _ours("cells", cells, SPREAD, needs_guidance=True),
        _ours("cells-squared", cells_squared, SPREAD, needs_guidance=True, power=2.0),
        _ours("spread", spread, SPREAD),
        _ours("spread-guided", spread_guided, SPREAD, needs_guidance=True),
        _ours("guided", guided, 0, needs_guidance=True),
        _ours("random", random, 0),
    )
}


def find_rule(name: str) -> Rule:
    """The rule of that name: one of ours, or ``module:function``.

    A function of one's own takes a :class:`RuleBatch` and gets one eigenvector; to ask for more, or for guidance, name
    a :class:`Rule` instead of a function: ``mine = Rule("mine", "what it keeps", my_function, vectors=8)``.

    Args:
        name: The name.

    Returns:
        The rule; what one's own returns is checked batch by batch.

    Raises:
        UsageError: There is none; the message lists what there is.
    """  # noqa: DOC501
    if ":" not in name:
        if name not in RULES:
            raise unknown_name("rule", name, [*RULES, "module:function"])
        return RULES[name]
    loaded = load_factory(name, "rule", RULES)
    own = loaded if isinstance(loaded, Rule) else Rule(name, "your own", loaded)
    return replace(own, name=name, choose=_checked(name, own.choose), source=source_digest(own.choose))


def _checked(name: str, choose: Choose) -> Choose:
    def checked(batch: RuleBatch) -> Int64[np.ndarray, " M"]:
        with own_code(f"`rule={name!r}`", but=out_of_memory):
            kept = np.asarray(choose(batch))
            kept = kept[None] if kept.ndim == 0 else kept
        ascending = kept.ndim == 1 and kept.dtype.kind in "iu" and bool((np.diff(kept) > 0).all())
        if len(kept) != batch.keep or not ascending or kept[0] < 0 or kept[-1] >= len(batch):
            raise UsageError(
                f"`rule={name!r}`: got {kept.dtype} {list(kept.shape)} {kept[:8]}..., expected {batch.keep} different "
                f"positions from 0 to {len(batch) - 1}, ascending, as integers"
            )
        return kept.astype(np.int64)

    return checked
