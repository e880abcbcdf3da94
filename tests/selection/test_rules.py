"""Each rule against a slow reading of its own sentence."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from gstds_cache.digest import sha256_file
from gstds_cache.errors import UsageError
from gstds_cache.seeding import rng_for
from gstds_cache.selection.rule import TIE, RuleBatch, settle_ties
from gstds_cache.selection.rules import RULES, find_rule

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
    assert rule.choose(RuleBatch(vector, keep)).tolist() == naive(vector, keep)


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@given(vector=VECTORS, share=st.floats(0, 1))
def test_every_rule_keeps_that_many_different_rows_in_order(rule, vector, share) -> None:
    keep = max(1, int(share * len(vector)))
    kept = rule.choose(RuleBatch(vector, keep))
    assert kept.dtype == np.int64
    assert len(kept) == keep
    assert (np.diff(kept) > 0).all()
    assert 0 <= kept[0] <= kept[-1] < len(vector)


def test_random_is_uniform_and_does_not_look() -> None:
    counts = np.zeros(20)
    for draw in range(2000):
        counts[RULES["random"].choose(RuleBatch(np.arange(20.0), 5, rng_for(draw)))] += 1
    assert abs(counts - 500).max() < 5 * np.sqrt(2000 * 0.25 * 0.75)


@given(steps=arrays(np.int64, 40, elements=st.integers(-(10**6), 10**6)), seed=st.integers(0, 2**32))
def test_settled_ties_do_not_depend_on_the_noise_of_a_solver(steps, seed) -> None:
    # Coordinates at the middle of their steps, each twice, as duplicates have them; the largest fixes the step.
    vector = np.concatenate([[1.0, -1.0], np.repeat(steps * TIE, 2)])
    noise = np.random.default_rng(seed).normal(size=len(vector)) * 1e-12
    noise[:2] = 0
    for name in ("coverage", "gap", "extremes", "boundary"):
        kept = [RULES[name].choose(RuleBatch(settle_ties(v), 20)).tolist() for v in (vector, vector + noise)]
        assert kept[0] == kept[1], name


def test_settling_changes_no_coordinate_by_more_than_half_a_step() -> None:
    vector = np.random.default_rng(0).normal(size=100)
    assert np.abs(settle_ties(vector) - vector).max() <= 0.5 * TIE * np.abs(vector).max() * (1 + 1e-9)
    assert settle_ties(np.zeros(3)).tolist() == [0, 0, 0]


def test_an_unknown_rule_lists_what_there_is() -> None:
    with pytest.raises(UsageError, match="there are: boundary, "):
        find_rule("bounds")


OWN = """
import numpy as np
from gstds_cache.selection.rule import Rule

def first(batch):
    return np.arange(batch.keep)

def far_end(batch):
    assert batch.basis.shape == (len(batch), 3), batch.basis.shape
    assert batch.values.shape == (3,)
    assert batch.neighbors.shape == batch.similarities.shape
    assert len(batch.labels) == len(batch)
    return np.sort(np.argsort(-batch.basis[:, 2], kind="stable")[: batch.keep])

ends = Rule("ends", "far end of the third eigenvector", far_end, vectors=3)

def twice(batch):
    return np.zeros(batch.keep, np.int64)
"""


@pytest.fixture
def own(tmp_path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module of the user's own."""
    name = f"own_rules_{abs(hash(tmp_path)) % 10**9}"
    (tmp_path / f"{name}.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    return name


def test_a_function_of_ones_own_is_a_rule_and_its_file_is_its_identity(own: str, tmp_path) -> None:
    rule = find_rule(f"{own}:first")
    assert (rule.name, rule.vectors, rule.needs_guidance) == (f"{own}:first", 1, False)
    assert rule.choose(RuleBatch(np.zeros(9), 4)).tolist() == [0, 1, 2, 3]
    assert rule.source == sha256_file(tmp_path / f"{own}.py")
    assert find_rule(f"{own}:ends").vectors == 3


def test_what_a_rule_of_ones_own_returns_is_checked(own: str) -> None:
    with pytest.raises(UsageError, match=r"--rule own_rules_\d+:twice: got int64 .* expected 4 different positions"):
        find_rule(f"{own}:twice").choose(RuleBatch(np.zeros(9), 4))
    with pytest.raises(UsageError, match="unknown rule in module"):
        find_rule(f"{own}:frist")
    with pytest.raises(UsageError, match="coverage"):
        find_rule("no_such_module:rule")
