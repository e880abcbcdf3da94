"""Each rule against a slow reading of its own sentence."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from gstds_cache.errors import UsageError
from gstds_cache.files.digest import sha256_file
from gstds_cache.seeding import rng_for
from gstds_cache.selection.rule import TIE, RuleBatch, round_ties
from gstds_cache.selection.rules import RULES, find_rule

STEADY = [rng_for(seed, "steady") for seed in range(20)]
BEGINNING = rng_for(5)
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


@st.composite
def batches(draw) -> RuleBatch:
    """Batches as rules see them, with many ties, in eigenvectors and in guidance."""
    rows = draw(st.integers(1, 40))
    numbers = st.floats(-1, 1).map(lambda x: round(x, 1))
    basis = draw(arrays(np.float64, (rows, 8), elements=numbers))
    if draw(st.booleans()):
        basis[:, rows - 1 :] = 0  # a small graph has fewer
    return RuleBatch(
        vector=basis[:, 0].copy(),
        keep=draw(st.integers(1, rows)),
        rng=BEGINNING,
        per_batch_rng=draw(st.sampled_from(STEADY)),
        repeat=draw(st.integers(0, 9)),
        basis=basis,
        values=np.array([0.01, 0.02, 0.5, 0.5, 1.0, 2.0, 3.0, np.inf]),
        labels=np.arange(rows) % 3,
        guidance=draw(arrays(np.float64, rows, elements=st.floats(0, 9).map(lambda x: round(x, 1)))),
    )


def again(batch: RuleBatch) -> RuleBatch:
    """The same batch with its random numbers at their beginning."""
    return replace(batch, rng=copy.deepcopy(batch.rng), per_batch_rng=copy.deepcopy(batch.per_batch_rng))


def counts_of(batch: RuleBatch) -> list[float]:
    mean = sum(batch.guidance) / len(batch)
    return [g + 0.05 * mean if mean > 0 else 1.0 for g in batch.guidance]


DRAWN = {"random", "guided", "strata", "cells", "cells-squared"}


def naive_draws(batch: RuleBatch, pieces: list[list[int]], power: int = 1) -> list[int]:
    """One of each piece: along its cumulative weights, as far as its number and the repeats say."""
    golden = (math.sqrt(5) - 1) / 2
    weight = [count**power for count in counts_of(batch)]
    drawn = []
    for piece, number in zip(pieces, again(batch).per_batch_rng.random(batch.keep).tolist(), strict=True):
        left = math.fmod(number + batch.repeat * golden, 1) * sum(weight[i] for i in piece)
        for row in piece:
            left -= weight[row]
            if left < 0:
                break
        drawn.append(row)
    return sorted(drawn)


def naive_strata(batch: RuleBatch) -> list[int]:
    order = sorted(range(len(batch)), key=lambda i: (batch.vector[i], i))
    cut = [j * len(batch) // batch.keep for j in range(batch.keep + 1)]
    return naive_draws(batch, [order[a:b] for a, b in pairwise(cut)])


def scaled(batch: RuleBatch) -> list[list[float]]:
    return [[x / math.sqrt(value) for x, value in zip(row, batch.values, strict=True)] for row in batch.basis]


def naive_cells(batch: RuleBatch, power: int = 1) -> list[int]:
    points = scaled(batch)

    def cut(rows: list[int], keep: int) -> list[list[int]]:
        if keep == 1:
            return [sorted(rows)]
        wide = [np.var([points[i][q] for i in rows]) for q in range(8)]
        q = next(q for q in range(8) if wide[q] >= max(wide) * (1 - 1e-12))
        ordered = sorted(rows, key=lambda i: (points[i][q], i))
        left = len(rows) * (keep // 2) // keep
        return cut(ordered[:left], keep // 2) + cut(ordered[left:], keep - keep // 2)

    return naive_draws(batch, cut(list(range(len(batch))), batch.keep), power)


def naive_farthest(batch: RuleBatch, weight: list[float]) -> list[int]:
    points, chosen = scaled(batch), []
    while len(chosen) < batch.keep:
        places = [points[i] for i in chosen] or [[0.0] * 8]
        far = {
            i: weight[i] ** 2 * min(math.dist(points[i], place) ** 2 for place in places)
            for i in range(len(batch))
            if i not in chosen
        }
        most = max(far.values())
        chosen.append(min(i for i, value in far.items() if value >= most * (1 - 1e-9)))
    return sorted(chosen)


@settings(max_examples=40)
@given(batch=batches())
def test_strata_draws_one_of_each_stretch(batch: RuleBatch) -> None:
    assert RULES["strata"].choose(again(batch)).tolist() == naive_strata(batch)


@settings(max_examples=40)
@given(batch=batches(), noise=st.integers(0, 2**32))
def test_cells_draws_one_of_each_cell(batch: RuleBatch, noise: int) -> None:
    # Where two coordinates vary equally, rounding decides which is cut; so no ties here.
    batch = replace(batch, basis=np.random.default_rng(noise).normal(size=batch.basis.shape))
    assert RULES["cells"].choose(again(batch)).tolist() == naive_cells(batch)
    assert RULES["cells-squared"].choose(again(batch)).tolist() == naive_cells(batch, power=2)


@settings(max_examples=40)
@given(batch=batches(), noise=st.integers(0, 2**32))
def test_spread_takes_the_farthest_row_each_time(batch: RuleBatch, noise: int) -> None:
    rng = np.random.default_rng(noise)
    batch = replace(batch, basis=rng.normal(size=batch.basis.shape), guidance=rng.random(len(batch)))
    assert RULES["spread"].choose(batch).tolist() == naive_farthest(batch, [1.0] * len(batch))
    assert RULES["spread-guided"].choose(batch).tolist() == naive_farthest(batch, counts_of(batch))


def test_of_duplicates_spread_takes_one_and_then_the_first() -> None:
    basis = np.zeros((12, 8))
    basis[:, 0] = np.repeat([3.0, -2.0, 1.0], 4)  # three different images, four times each
    batch = RuleBatch(basis[:, 0].copy(), 3, basis=basis, values=np.ones(8))
    assert RULES["spread"].choose(batch).tolist() == [0, 4, 8]
    assert RULES["spread"].choose(replace(batch, keep=5)).tolist() == [0, 1, 2, 4, 8]


@pytest.mark.parametrize("repeats", [1, 40])
def test_the_harder_of_a_piece_is_drawn_more_often_in_proportion(repeats: int) -> None:
    guidance = np.tile([1.0, 3.0], 500)
    vector = np.repeat(np.arange(500.0), 2)
    drawn = np.zeros(1000)
    for turn in range(40):
        seed, repeat = divmod(turn, repeats)
        steady = rng_for(seed, "steady")
        batch = RuleBatch(vector, 500, guidance=guidance, per_batch_rng=steady, repeat=repeat)
        drawn[RULES["strata"].choose(batch)] += 1
    assert (drawn.reshape(500, 2).sum(axis=1) == 40).all()
    expected = (3 + 0.1) / (4 + 0.2)
    assert abs(drawn[1::2].sum() / 20_000 - expected) < 5 * math.sqrt(expected * (1 - expected) / 20_000)
    # Visits keep every single row close to its share; as many independent draws do not.
    worst = abs(drawn[1::2] / 40 - expected).max()
    assert worst < 0.05 if repeats > 1 else worst > 0.15


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@settings(max_examples=40)
@given(batch=batches())
def test_every_rule_keeps_that_many_different_rows_in_order_and_the_same_again(rule, batch: RuleBatch) -> None:
    kept = rule.choose(again(batch))
    assert kept.dtype == np.int64
    assert len(kept) == batch.keep
    assert (np.diff(kept) > 0).all()
    assert 0 <= kept[0] <= kept[-1] < len(batch)
    assert rule.choose(again(batch)).tolist() == kept.tolist()


@pytest.mark.parametrize("name", [name for name in RULES if name not in DRAWN])
@settings(max_examples=40)
@given(seed=st.integers(0, 2**32), rows=st.integers(3, 50), share=st.floats(0, 1))
def test_rules_that_draw_nothing_do_not_care_for_the_order_of_rows(name: str, seed, rows, share) -> None:
    rng = np.random.default_rng(seed)
    basis, guidance, order = rng.normal(size=(rows, 8)), rng.random(rows), rng.permutation(rows)
    values = np.arange(1.0, 9.0)
    keep = max(1, int(share * rows))
    plain = RuleBatch(basis[:, 0].copy(), keep, basis=basis, values=values, guidance=guidance)
    shuffled = replace(plain, vector=basis[order, 0], basis=basis[order], guidance=guidance[order])
    assert sorted(order[RULES[name].choose(shuffled)]) == RULES[name].choose(plain).tolist()


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
        kept = [RULES[name].choose(RuleBatch(round_ties(v), 20)).tolist() for v in (vector, vector + noise)]
        assert kept[0] == kept[1], name


def test_settling_changes_no_coordinate_by_more_than_half_a_step() -> None:
    vector = np.random.default_rng(0).normal(size=100)
    assert np.abs(round_ties(vector) - vector).max() <= 0.5 * TIE * np.abs(vector).max() * (1 + 1e-9)
    assert round_ties(np.zeros(3)).tolist() == [0, 0, 0]


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
    with pytest.raises(UsageError, match=r"`rule='own_rules_\d+:twice'`: got int64 .* expected 4 different positions"):
        find_rule(f"{own}:twice").choose(RuleBatch(np.zeros(9), 4))
    with pytest.raises(UsageError, match="unknown rule in module"):
        find_rule(f"{own}:frist")
    with pytest.raises(UsageError, match="coverage"):
        find_rule("no_such_module:rule")


def test_what_a_rule_of_ones_own_raises_is_told_with_its_place(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"raising_rules_{abs(hash(tmp_path)) % 10**9}"
    (tmp_path / f"{name}.py").write_text("def mine(batch):\n    return {}['x']\n\ndef scalar(batch):\n    return 3\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UsageError, match=rf"`rule='{name}:mine'` failed: KeyError: 'x' \(.*{name}\.py:2\)"):
        find_rule(f"{name}:mine").choose(RuleBatch(np.zeros(9), 4))
    with pytest.raises(UsageError, match="expected 4 different positions"):
        find_rule(f"{name}:scalar").choose(RuleBatch(np.zeros(9), 4))


def test_former_names_of_a_batch_still_work() -> None:
    batch = RuleBatch(np.zeros(4), 2, repeat=3)
    with pytest.warns(FutureWarning, match="now called repeat"):
        assert batch.visit == 3
    with pytest.warns(FutureWarning, match="now called per_batch_rng"):
        assert batch.steady_rng is batch.per_batch_rng
