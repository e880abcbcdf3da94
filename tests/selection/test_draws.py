"""Draws: scores, strata and chances, each against its definition written out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gstds_cache.errors import UsageError
from gstds_cache.seeding import rng_for
from gstds_cache.selection.draws import (
    DRAWS,
    FLOOR,
    Draw,
    draw_rows,
    find_draw,
    importance_weights,
    inclusion,
    quotas,
)
from gstds_cache.selection.selected_batch import Candidates

NAN = float("nan")


def candidates(keep: int, stratum: list[int] | np.ndarray, reference=0.0, prior=1.0) -> Candidates:
    count = len(stratum)
    return Candidates(
        keep,
        np.asarray(stratum, np.int16),
        np.broadcast_to(np.asarray(reference, np.float32), (count,)).copy(),
        np.broadcast_to(np.asarray(prior, np.float32), (count,)).copy(),
    )


def test_scores_are_the_formulas_and_rows_never_seen_have_the_mean_loss_of_those_that_were_times_prior() -> None:
    batch = candidates(2, [0] * 5, reference=[0.5, 3.0, 2.0, 0.0, 1.0], prior=[1, 1, 1, 0.5, 2])
    last = np.array([2.0, 1.0, 4.0, NAN, NAN], np.float32)
    mean, chance = 7 / 3, 1.5
    expected = {
        "loss-minus-reference": ([1.5, 0.0, 2.0, 0.5 * mean, 2 * (mean - 1)], [1.0, 0.0, 0.0, 0.5 * 1.5, 2 * 0.5]),
        "damped-loss": (
            np.array([2, 1, 4, 0.5 * mean, 2 * mean]) / (1 + np.exp(3 * (batch.reference - 2))),
            1.5 * batch.prior / (1 + np.exp(3 * (batch.reference - 2))),
        ),
        "loss": ([2.0, 1.0, 4.0, 0.5 * mean, 2 * mean], [1.5, 1.5, 1.5, 0.75, 3.0]),
        "loss-squared": ([4.0, 1.0, 16.0, 0.5 * mean**2, 2 * mean**2], [2.25, 2.25, 2.25, 1.125, 4.5]),
    }  # fmt: skip
    for name, (some, none) in expected.items():
        np.testing.assert_allclose(DRAWS[name].scores(batch, last, chance), some, rtol=1e-6)
        np.testing.assert_allclose(DRAWS[name].scores(batch, np.full(5, NAN), chance), none, rtol=1e-6)
    np.testing.assert_array_equal(DRAWS["prior"].scores(batch, last, chance), batch.prior)


def test_in_selections_without_a_chance_rows_never_seen_have_the_mean_score_of_those_that_were_times_prior() -> None:
    batch = candidates(2, [0] * 5, reference=[0.5, 3.0, 2.0, 0.0, 1.0], prior=[1, 1, 1, 0.5, 2])
    last = np.array([2.0, 1.0, 4.0, NAN, NAN], np.float32)
    damped = [2 / (1 + np.exp(3 * (0.5 - 2))), 1 / (1 + np.exp(3.0)), 4 / 2]
    expected = {
        "loss-minus-reference": [1.5, 0.0, 2.0],
        "damped-loss": damped,
        "loss": [2.0, 1.0, 4.0],
    }
    for name, seen in expected.items():
        mean = np.mean(seen)
        np.testing.assert_allclose(DRAWS[name].scores(batch, last), [*seen, 0.5 * mean, 2 * mean], rtol=1e-6)
    np.testing.assert_array_equal(DRAWS["prior"].scores(batch, last), batch.prior)
    np.testing.assert_array_equal(DRAWS["uniform"].scores(batch, last), np.ones(5))
    for draw in DRAWS.values():
        if draw.needs_losses:
            np.testing.assert_array_equal(draw.scores(batch, np.full(5, NAN)), batch.prior)


def test_the_adaptive_draw_subtracts_until_the_network_has_passed_the_reference_model() -> None:
    reference = np.array([0.1] * 10 + [0.69, 0.7, 3.0], np.float32)  # of 11 rows the reference model is sure
    batch, rng = candidates(2, [0] * 13, reference=reference), np.random.default_rng(0)
    for better, name in (
        (0, "loss-minus-reference"),
        (3, "loss-minus-reference"),
        (4, "damped-loss"),
        (11, "damped-loss"),
    ):
        last = np.where(rng.permutation(np.arange(11)) < better, 0.05, 1.0)
        last = np.concatenate([last, [0.2, 0.2]])  # better on both of which it is not sure: that counts for nothing
        np.testing.assert_array_equal(DRAWS["adaptive"].scores(batch, last), DRAWS[name].scores(batch, last))
    unsure, last = candidates(2, [0] * 3, reference=1.0), np.array([0.5, 2.0, 3.0])
    np.testing.assert_array_equal(
        DRAWS["adaptive"].scores(unsure, last), DRAWS["loss-minus-reference"].scores(unsure, last)
    )


def test_a_huge_reference_loss_damps_to_nothing_without_overflow() -> None:
    scores = DRAWS["damped-loss"].scores(candidates(1, [0, 0], reference=[1e4, 0.0]), np.array([5.0, 5.0]))
    assert 0 <= scores[0] < 1e-20 < scores[1]


@given(st.integers(1, 60), st.integers(1, 9), st.integers(0, 1000), st.floats(0, 1))
def test_each_draw_is_of_the_right_size_in_all_and_in_each_stratum(count, strata, seed, share) -> None:
    rng = np.random.default_rng(seed)
    keep = max(1, int(share * count))
    batch = candidates(keep, rng.integers(0, strata, count))
    scores = rng.choice([0.0, 0.0, 1.0, 1e-9, 1e9], count)
    drawn = draw_rows(batch, scores, rng_for(seed))
    assert len(drawn) == keep
    assert (np.diff(drawn) > 0).all()
    given_, sizes = np.bincount(batch.stratum[drawn], minlength=strata), np.bincount(batch.stratum, minlength=strata)
    assert (np.abs(given_ - keep * sizes / count) < 1).all()
    np.testing.assert_array_equal(drawn, draw_rows(batch, scores, rng_for(seed)))
    weights = importance_weights(batch, scores, drawn)
    assert weights.mean() == pytest.approx(1, abs=1e-5)
    assert (weights > 0).all()


def test_strata_with_equal_remainders_give_the_odd_rows_in_turn() -> None:
    batch = candidates(10, np.repeat(np.arange(8), 4))
    total = sum(quotas(batch, rng_for(seed)) for seed in range(400))
    assert total.sum() == 4000
    assert (np.abs(total - 500) < 60).all()


def test_rows_are_drawn_in_proportion_to_score_and_a_little_for_all() -> None:
    batch = candidates(1, [0, 0, 0, 0])
    scores = np.array([0.0, 1.0, 2.0, 5.0])
    counts = np.bincount(
        np.concatenate([draw_rows(batch, scores, rng_for(0, seed)) for seed in range(8000)]), minlength=4
    )
    weight = scores + FLOOR * scores.mean()
    np.testing.assert_allclose(counts / 8000, weight / weight.sum(), atol=0.02)
    assert counts[0] > 0


@given(st.integers(1, 60), st.integers(1, 9), st.integers(0, 1000), st.floats(0, 1))
def test_the_largest_scores_of_each_stratum_are_taken_and_of_equal_ones_random_rows(count, strata, seed, share) -> None:
    rng = np.random.default_rng(seed)
    batch = candidates(max(1, int(share * count)), rng.integers(0, strata, count))
    scores = rng.choice([0.0, 1.0, 1e-9, 3.0, 1e9], count)
    drawn = draw_rows(batch, scores, rng_for(seed), largest=True)
    assert len(drawn) == batch.keep
    assert (np.diff(drawn) > 0).all()
    left = np.setdiff1d(np.arange(count), drawn)
    for stratum in range(strata):
        mine, others = (part[batch.stratum[part] == stratum] for part in (drawn, left))
        assert not len(mine) or not len(others) or scores[mine].min() >= scores[others].max()
    given_, sizes = np.bincount(batch.stratum[drawn], minlength=strata), np.bincount(batch.stratum, minlength=strata)
    assert (np.abs(given_ - batch.keep * sizes / count) < 1).all()


def test_of_equal_scores_every_row_is_taken_as_often() -> None:
    batch, scores = candidates(2, [0] * 6), np.array([5.0, 1.0, 1.0, 1.0, 1.0, 0.0])
    counts = sum(np.bincount(draw_rows(batch, scores, rng_for(seed), largest=True), minlength=6) for seed in range(400))
    assert (counts[0], counts[5]) == (400, 0)
    assert (np.abs(counts[1:5] - 100) < 40).all()


def test_largest_losses_are_taken_until_the_network_has_passed_the_reference_model() -> None:
    draw, chance = DRAWS["largest-damped-loss"], 2.3
    batch = candidates(2, [0] * 10, reference=0.5)
    for better, takes in ((0, True), (3, True), (4, False), (10, False)):
        last = np.where(np.arange(10) < better, 0.1, 1.0)
        assert draw.takes_largest(batch, last, chance) is takes
        np.testing.assert_array_equal(
            draw.scores(batch, last, chance), DRAWS["damped-loss"].scores(batch, last, chance)
        )
    nothing = np.full(10, NAN)
    assert draw.takes_largest(batch, nothing, chance)  # a network that knows nothing has passed nobody
    assert draw.takes_largest(batch, nothing)
    unseen = np.where(np.arange(10) < 2, 0.1, NAN)  # the others count as these do
    assert not draw.takes_largest(batch, unseen, chance)
    assert DRAWS["largest-loss-minus-reference"].takes_largest(batch, np.full(10, 0.1), chance)
    assert not any(DRAWS[name].largest for name in ("loss-minus-reference", "damped-loss", "adaptive", "loss-squared"))


def test_a_draw_of_ones_own_may_take_the_largest_and_nothing_else_by_that_name(tmp_path, monkeypatch) -> None:
    (tmp_path / "largest_draws.py").write_text(
        "from gstds_cache.selection.draws import Draw\n"
        "def score(last, reference, prior): return last\n"
        "good = Draw('good', '', score, largest=True)\n"
        "passed = Draw('passed', '', score, largest='until passed')\n"
        "odd = Draw('odd', '', score)\n"
        "object.__setattr__(odd, 'largest', 'always')\n"  # in tests its type is checked where it is made
        "blind = Draw('blind', '', score, needs_reference=False, largest='until passed')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    batch = candidates(2, [0] * 4, reference=0.5)
    assert find_draw("largest_draws:good").takes_largest(batch, np.ones(4))
    assert not find_draw("largest_draws:passed").takes_largest(batch, np.full(4, 0.1))
    for name in ("odd", "blind"):
        with pytest.raises(UsageError, match="largest="):
            find_draw(f"largest_draws:{name}")


def test_importance_weights_follow_from_how_often_rows_are_drawn() -> None:
    rng = np.random.default_rng(0)
    batch = candidates(24, np.repeat(np.arange(3), 32))
    scores = rng.gamma(1.0, 1.0, 96)
    often = np.zeros(96)
    for seed in range(4000):
        often[draw_rows(batch, scores, rng_for(1, seed))] += 1
    chance = inclusion(scores + FLOOR * scores.mean(), batch.stratum, np.array([8, 8, 8]))
    assert chance.sum() == pytest.approx(24, abs=0.01)
    np.testing.assert_allclose(chance, often / 4000, atol=0.04)
    # An unbiased mean of something that depends on the score, where the drawn rows' own mean is far off.
    values, estimates, plain = scores**2, [], []
    for seed in range(1500):
        drawn = draw_rows(batch, scores, rng_for(2, seed))
        estimates.append((values[drawn] * importance_weights(batch, scores, drawn)).mean())
        plain.append(values[drawn].mean())
    assert abs(np.mean(estimates) - values.mean()) < 0.15 * abs(np.mean(plain) - values.mean())


def test_a_stratum_that_gives_all_its_rows_gives_them_for_certain() -> None:
    chance = inclusion(np.array([1.0, 2.0, 3.0, 1.0]), np.array([0, 0, 1, 1]), np.array([2, 1]))
    np.testing.assert_allclose(chance[:2], 1.0)
    np.testing.assert_allclose(chance[2:].sum(), 1.0, atol=1e-3)


OWN = """
import numpy as np
from gstds_cache.selection.draws import Draw

def ratio(last, reference, prior):
    return last / (reference + 1)

def negative(last, reference, prior):
    return last - 100

def short(last, reference, prior):
    return last[:-1]

def huge(last, reference, prior):
    return last * 1e200

def two(last, reference):
    return last

def later(last, reference, prior):
    if 77 in last:
        raise ValueError("later")
    return last

without = Draw("without", "no reference", lambda last, reference, prior: last**2, needs_reference=False)
"""


def test_ones_own_function_is_a_draw_and_what_it_returns_is_checked(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "own_draws.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    batch, last = candidates(1, [0, 0], reference=[1.0, 3.0]), np.array([2.0, 2.0])
    own = find_draw("own_draws:ratio")
    np.testing.assert_allclose(own.scores(batch, last), [1.0, 0.5])
    assert len(own.source) == 64
    assert not find_draw("own_draws:without").needs_reference
    for name in ("negative", "short", "huge"):
        with pytest.raises(UsageError, match="expected 8 finite numbers from 0 to 1e\\+100, one for each") as caught:
            find_draw(f"own_draws:{name}")  # before an epoch is trained
        assert "select again" in caught.value.hint
    with pytest.raises(UsageError, match=r"failed: ValueError: later \(own_draws.py"):
        find_draw("own_draws:later").scores(batch, np.array([2.0, 77.0]))
    for name, words in (
        ("own_draws:two", "takes 2 positional arguments"),
        (":two", "names no module"),
        ("no_such_module:two", "a module no_such_module is looked for in the current directory and on PYTHONPATH"),
    ):
        with pytest.raises(UsageError, match=words):
            find_draw(name)
    with pytest.raises(UsageError, match="damped-loss"):
        find_draw("damped-los")


def test_candidates_that_do_not_fit_together_say_what_does_not() -> None:
    rows = np.array([4, 7, 9])
    assert not candidates(2, [0, 1, 1]).problem(rows)
    for wrong, words in (
        (candidates(2, [0, 1]), "3 rows have [2] strata"),
        (candidates(4, [0, 1, 1]), "4 of 3 rows are to be drawn"),
        (candidates(2, [0, -1, 1]), "a stratum is below 0"),
        (candidates(2, [0, 1, 1], reference=np.inf), "is no number"),
        (candidates(2, [0, 1, 1], prior=NAN), "is no number"),
        (candidates(2, [0, 1, 1], prior=-1), "a prior is below 0"),
    ):
        assert words in wrong.problem(rows)
    assert candidates(2, [0, 1, 1]).problem(np.array([4, 7, 4])) == "a row is there twice"
    assert not candidates(2, [0, 1, 1], reference=NAN).problem(rows)  # not known


def test_every_draw_has_a_name_that_a_commands_help_shows() -> None:
    assert all(isinstance(draw, Draw) and draw.name == name and draw.summary for name, draw in DRAWS.items())
