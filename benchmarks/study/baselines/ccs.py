"""CCS: coverage-centric coreset selection.

Zheng et al. 2023, "Coverage-centric Coreset Selection for High Pruning Rates" (ICLR), algorithm 1: the hardest share
beta is dropped (most of it is mislabelled), the range of the other scores is cut into strata of equal width, and the
budget is spent from the smallest stratum up, each getting an equal share of what is left, at random inside a stratum.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float64, Int64

STRATA = 50


def ccs(
    scores: Float64[np.ndarray, " N"],
    keep: int,
    rng: np.random.Generator,
    *,
    beta: float = 0.1,
    strata: int = STRATA,
) -> Int64[np.ndarray, " M"]:
    """Choose ``keep`` rows.

    Args:
        scores: Difficulty of each sample, float64 [N].
        keep: How many stay (M).
        rng: Random numbers.
        beta: Share of the hardest that is dropped; less where the budget needs them.
        strata: Strata of the score range.

    Returns:
        Rows, int64 [M], ascending.
    """
    easy_first = np.argsort(scores, kind="stable")
    left = easy_first[: max(keep, len(scores) - int(beta * len(scores)))]
    low, high = float(scores[left[0]]), float(scores[left[-1]])
    width = (high - low) / strata or 1.0
    place = np.minimum(((scores[left] - low) / width).astype(np.int64), strata - 1)
    groups = sorted((left[place == s] for s in range(strata) if (place == s).any()), key=len)
    chosen: list[Int64[np.ndarray, " m"]] = []
    budget = keep
    for done, group in enumerate(groups):
        share = min(len(group), budget // (len(groups) - done))
        chosen.append(rng.choice(group, share, replace=False))
        budget -= share
    return np.sort(np.concatenate(chosen))
