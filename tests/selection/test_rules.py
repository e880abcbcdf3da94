"""Each rule against a slow reading of its own sentence."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from gstds_cache.errors import UsageError
from gstds_cache.seeding import rng_for
from gstds_cache.selection.rules import RULES, TIE, find_rule, settle_ties

VECTORS = arrays(np.float64, st.integers(1, 60), elements=st.floats(-1, 1).map(lambda x: round(x, 2)))


def naive_coverage(vector, keep):
    order = sorted(range(len(vector)), key=lambda i: (vector[i], i))
    return sorted(order[int((j + 0.5) * len(vector) / keep)] for j in range(keep))


def naive_extremes(vector, keep):
    return sorted(sorted(range(len(vector)), key=lambda i: (-abs(vector[i]), i))[:keep])


def naive_boundary(vector, keep):
    return sorted(sorted(range(len(vector)), key=lambda i: (abs(vector[i]), i))[:keep])


def naive_gap(vector, keep):
    order = sorted(range(len(vector)), key=lambda i: (vector[i], i))
    value = [vector[i] for i in order]
    last = len(order) - 1

    def spacing(rank):
        if last == 0:
            return 0.0
        if rank in {0, last}:
            return 2 * abs(value[rank] - value[1 if rank == 0 else last - 1])
        return (value[rank] - value[rank - 1]) + (value[rank + 1] - value[rank])

    ranks = sorted(range(len(order)), key=lambda rank: (-spacing(rank), order[rank]))
    return sorted(order[rank] for rank in ranks[:keep])


@pytest.mark.parametrize("naive", [naive_coverage, naive_extremes, naive_boundary, naive_gap])
@given(vector=VECTORS, share=st.floats(0, 1))
def test_rules_do_what_their_sentence_says(naive, vector, share) -> None:
    keep = max(1, int(share * len(vector)))
    rule = find_rule(naive.__name__.removeprefix("naive_"))
    assert rule.choose(vector, keep, rng_for(0)).tolist() == naive(vector, keep)


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@given(vector=VECTORS, share=st.floats(0, 1))
def test_every_rule_keeps_that_many_different_rows_in_order(rule, vector, share) -> None:
    keep = max(1, int(share * len(vector)))
    kept = rule.choose(vector, keep, rng_for(0))
    assert kept.dtype == np.int64
    assert len(kept) == keep
    assert (np.diff(kept) > 0).all()
    assert 0 <= kept[0] <= kept[-1] < len(vector)


def test_random_is_uniform_and_does_not_look() -> None:
    counts = np.zeros(20)
    for draw in range(2000):
        counts[RULES["random"].choose(np.arange(20.0), 5, rng_for(draw))] += 1
    assert abs(counts - 500).max() < 5 * np.sqrt(2000 * 0.25 * 0.75)


@given(steps=arrays(np.int64, 40, elements=st.integers(-(10**6), 10**6)), seed=st.integers(0, 2**32))
def test_settled_ties_do_not_depend_on_the_noise_of_a_solver(steps, seed) -> None:
    # Coordinates at the middle of their steps, each twice, as duplicates have them; the largest fixes the step.
    vector = np.concatenate([[1.0, -1.0], np.repeat(steps * TIE, 2)])
    noise = np.random.default_rng(seed).normal(size=len(vector)) * 1e-12
    noise[:2] = 0
    for name in ("coverage", "gap", "extremes", "boundary"):
        kept = [RULES[name].choose(settle_ties(v), 20, rng_for(0)).tolist() for v in (vector, vector + noise)]
        assert kept[0] == kept[1], name


def test_settling_changes_no_coordinate_by_more_than_half_a_step() -> None:
    vector = np.random.default_rng(0).normal(size=100)
    assert np.abs(settle_ties(vector) - vector).max() <= 0.5 * TIE * np.abs(vector).max() * (1 + 1e-9)
    assert settle_ties(np.zeros(3)).tolist() == [0, 0, 0]


def test_an_unknown_rule_lists_what_there_is() -> None:
    with pytest.raises(UsageError, match="there are: boundary, "):
        find_rule("bounds")
