"""Computed permutations: one to one, the same piece by piece, and not to be told from random ones."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gstds_cache.selection import permutation
from gstds_cache.selection.permutation import STORED, Permutation
from gstds_cache.selection.rows import EligibleRows

N = 250_000


def computed(n: int, *key: int) -> Permutation:
    return Permutation(n, np.random.default_rng(key), stored=0)


@given(n=st.integers(1, 5000), seed=st.integers(0, 2**32), cut=st.floats(0, 1))
@example(n=1, seed=0, cut=0)
@example(n=2, seed=0, cut=0.5)
@example(n=3, seed=1, cut=0.5)
@example(n=4096, seed=2, cut=0.5)
@example(n=4097, seed=2, cut=0.5)
@example(n=4999, seed=2, cut=0.5)  # a prime
def test_each_number_once_and_any_part_by_itself(n: int, seed: int, cut: float) -> None:
    made = computed(n, seed)
    whole, middle = made.at(0, n), int(cut * n)
    assert whole.dtype == np.int64
    assert sorted(whole.tolist()) == list(range(n))
    assert [*computed(n, seed).at(middle, n), *made.at(0, middle)] == [*whole[middle:], *whole[:middle]]


@pytest.mark.parametrize("n", [STORED - 1, STORED, STORED + 1, 2**20 - 1, 2**20, 2**20 + 1, 1_000_003])
def test_each_number_once_where_there_are_many(n: int) -> None:
    made = Permutation(n, np.random.default_rng(n))
    counts = np.bincount(np.concatenate([made.at(n // 3, n), made.at(0, n // 3)]), minlength=n)
    assert counts.shape == (n,)
    assert (counts == 1).all()


def test_an_array_up_to_a_bound_and_no_array_above_it() -> None:
    few, many = (Permutation(n, np.random.default_rng(0)) for n in (STORED, STORED + 1))
    assert few.at(0, STORED).tolist() == np.random.default_rng(0).permutation(STORED).tolist()
    held = [value.nbytes for value in vars(many).values() if isinstance(value, np.ndarray)]
    assert held == [8 * permutation.ROUNDS]


@pytest.mark.parametrize("n", [2**32 + 15, 10**12, 2**61 - 1])
def test_more_numbers_than_32_bits_have(n: int) -> None:
    made = computed(n, 1)
    parts = [made.at(start, start + 1000) for start in (0, n // 2, n - 1000)]
    found = np.concatenate(parts)
    assert ((found >= 0) & (found < n)).all()
    assert len(np.unique(found)) == 3000
    # Its places are all over the range: of 3,000 in sixteenths, 187.5 each, 13 of them a standard deviation.
    assert (abs(np.bincount(found // (n // 16 + 1), minlength=16) - 187.5) < 65).all()


def test_keys_make_different_permutations() -> None:
    made = [tuple(computed(N, *key).at(0, 20)) for key in [(0, 0), (0, 1), (1, 0), (1, 1)]]
    assert len(set(made)) == 4


def surprise(counts: np.ndarray, expected: float, freedom: int) -> float:
    """Pearson's chi-square, in standard deviations from its mean."""
    return float((((counts - expected) ** 2 / expected).sum() - freedom) / np.sqrt(2 * freedom))


def surprises(order: np.ndarray) -> dict[str, float]:
    """How far each of some statistics of a permutation is from what a random one has, in standard deviations."""
    n, found = len(order), {}
    cells = order * 32 // n
    for lag in (1, 2):
        pair = np.bincount(cells[:-lag] * 32 + cells[lag:], minlength=1024)
        found[f"pairs {lag} apart"] = surprise(pair, (n - lag) / 1024, 31 * 31)
    for lag in (1, 2, 499, 500, 501):  # 500 is the width of the network's square
        steps = (order[lag:] - order[:-lag]) % n
        found[f"steps over {lag}"] = surprise(np.bincount(steps * 500 // n, minlength=500), (n - lag) / 500, 499)
    # Batches: how their rows spread over stretches of the data (classes, in a folder), and over every k-th row.
    batch = 500
    for name, parts, of in [
        ("stretches", 10, order * 10 // n),
        ("stretches", 100, order * 100 // n),
        ("every", 10, order % 10),
        ("every", 100, order % 100),
    ]:
        rows = of + np.repeat(np.arange(n // batch), batch) * parts
        counts = np.bincount(rows, minlength=n // batch * parts)
        # Rows are drawn without replacement, which makes counts a little more even.
        found[f"{name} {parts}"] = surprise(counts, batch / parts, n // batch * (parts - 1))
    return found


@pytest.mark.parametrize("key", range(3))
def test_a_computed_permutation_looks_like_a_random_one(key: int) -> None:
    # 11 statistics of 3 keys: one beyond 4 standard deviations would come once in 480 such tests.
    strange = {name: value for name, value in surprises(computed(N, key).at(0, N)).items() if abs(value) > 4}
    assert not strange


@pytest.mark.parametrize("rounds", [2, 3])
def test_and_one_of_too_few_rounds_is_found_out(rounds: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(permutation, "ROUNDS", rounds)
    assert max(map(abs, surprises(computed(N, 0).at(0, N)).values())) > 100


def test_a_number_lands_anywhere_with_any_key() -> None:
    keys = 2000
    lands = np.array([[computed(N, key).at(i, i + 1)[0] for i in (0, 1, N // 2, N - 1)] for key in range(keys)])
    cells = lands * 16 // N
    for column in cells.T:
        assert abs(surprise(np.bincount(column, minlength=16), keys / 16, 15)) < 4
    neighbours = np.bincount(cells[:, 0] * 16 + cells[:, 1], minlength=256)
    assert abs(surprise(neighbours, keys / 256, 255)) < 4


@given(items=st.integers(1, 200), data=st.data())
def test_rows_taking_part_are_numbered_in_their_order(items: int, data: st.DataObject) -> None:
    left_out = data.draw(st.sets(st.integers(0, items - 1), max_size=items - 1))
    rows = EligibleRows(items, np.array(sorted(left_out), np.int64))
    expected = [row for row in range(items) if row not in left_out]
    assert len(rows) == len(expected)
    assert rows.all().tolist() == expected
    assert rows.below(np.arange(items + 1)).tolist() == [
        sum(row < bound for row in expected) for bound in range(items + 1)
    ]
