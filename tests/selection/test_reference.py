"""Reference losses relative to their class, beside the same in as few lines as it takes."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from gstds_cache.selection import difficulty
from gstds_cache.selection.difficulty import Difficulty
from gstds_cache.selection.reference import by_class

LOSSES = st.floats(0, 50, width=32) | st.just(np.nan)


@given(data=st.data(), count=st.integers(1, 40))
def test_a_row_s_loss_is_that_of_its_probability_over_its_class_s_mean_one(data: st.DataObject, count: int) -> None:
    losses = data.draw(arrays(np.float32, count, elements=LOSSES))
    labels = data.draw(arrays(np.int64, count, elements=st.sampled_from([-1, 0, 3, 7, 1000])))
    known = np.isfinite(losses) & (labels >= 0)
    if not known.any():
        return
    relative = np.where(np.isfinite(losses), losses, np.nanmedian(losses)).astype(np.float64)
    for label in np.unique(labels[known]):
        relative[labels == label] += np.log(np.exp(-losses[known & (labels == label)].astype(np.float64)).mean())
    offset = losses[known].astype(np.float64).mean() - relative[known].mean()
    classed = np.isin(labels, labels[known])
    expected = np.maximum(np.where(classed, relative + offset, relative), 0)
    found = by_class(Difficulty(losses), labels)
    rows = np.arange(count)[::-1]
    np.testing.assert_allclose(found.of(rows), expected[::-1], atol=1e-5)
    np.testing.assert_allclose(found.all(), expected, atol=1e-4)
    assert found.all().min() >= 0


def test_losses_that_no_probability_is_left_of_do_not_make_a_class_infinite() -> None:
    found = by_class(Difficulty(np.array([2000.0, 1500.0, 0.5], np.float32)), np.array([4, 4, 5]))
    assert np.isfinite(found.all()).all()


def test_thresholds_are_of_all_pieces_and_travel_to_other_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    losses, labels = rng.lognormal(size=999).astype(np.float32), rng.integers(0, 50, 999)
    losses[rng.random(999) < 0.1] = np.nan
    whole = by_class(Difficulty(losses), labels)
    monkeypatch.setattr(difficulty, "PIECE", 100)
    parts = by_class(Difficulty(losses), labels)
    np.testing.assert_array_equal(parts.names, whole.names)
    np.testing.assert_allclose(parts.shift, whole.shift, atol=1e-12)
    there = pickle.loads(pickle.dumps(parts))
    np.testing.assert_array_equal(there.of(np.arange(999)), parts.of(np.arange(999)))
