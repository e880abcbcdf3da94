"""Numbers of rows that are not held: their median, and those of some rows."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from gstds_cache.selection import difficulty
from gstds_cache.selection.difficulty import Difficulty, nth_smallest, pieces

VALUES = st.floats(width=32, allow_infinity=False) | st.sampled_from([0.0, -0.0, 1.0, np.nan])


def test_pieces_are_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(difficulty, "PIECE", 7)
    parts = list(pieces(np.arange(23)))
    assert [len(part) for part in parts] == [7, 7, 7, 2]
    assert np.concatenate(parts).tolist() == list(range(23))


@example(values=np.array([1.8e38], np.float32))
@example(values=np.array([3e38, 2e38], np.float32))
@given(values=arrays(np.float32, st.integers(1, 40), elements=VALUES))
def test_what_is_not_known_counts_as_the_median(values: np.ndarray) -> None:
    known = np.isfinite(values)
    if not known.any():
        return
    ordered = np.sort(values[known])
    assert [nth_smallest(values, n) for n in range(len(ordered))] == ordered.tolist()
    made = Difficulty(values)
    middle = np.float32(np.median(values[known].astype(np.float64)))
    assert np.float32(made.middle) == middle
    expected = np.where(known, values, middle)
    assert made.all().tolist() == expected.tolist()
    assert made.of(np.arange(len(values))[::-1]).tolist() == expected[::-1].tolist()


def test_many_values_in_several_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(difficulty, "PIECE", 1000)
    rng = np.random.default_rng(0)
    columns = np.zeros(9_999, [("loss", "<f4"), ("predicted", "<i4")])
    columns["loss"] = rng.lognormal(size=9_999)
    columns["loss"][rng.random(9_999) < 0.3] = np.nan
    assert Difficulty(columns["loss"]).middle == np.nanmedian(columns["loss"])
