"""Floors: every class keeps so many rows, and nothing else moves more than it must."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gstds_cache.errors import UsageError
from gstds_cache.selection.floors import check_floor, hold_floor

NAMES = ("ants", "bees", "cats")


def naive(kept: list[int], labels: list[int], floor: int) -> list[int] | None:
    """The sentence of `hold_floor`, one exchange after the other; None where it cannot be."""
    need = {c: min(labels.count(c), floor) if c >= 0 else 0 for c in sorted(set(labels))}
    if sum(need.values()) > len(kept):
        return None
    kept = list(kept)

    def spare(c: int) -> int:
        return sum(labels[i] == c for i in kept) - need[c]

    for c in need:
        while spare(c) < 0:
            rich = max(need, key=lambda other: (spare(other), -other))
            kept.remove(max(i for i in kept if labels[i] == rich))
            # A row that was exchanged away is never taken back: it was of a class with more than it needs.
            kept.append(min(i for i in range(len(labels)) if labels[i] == c and i not in kept))
    return sorted(kept)


@given(labels=st.lists(st.integers(-1, 4), min_size=1, max_size=30), floor=st.integers(1, 5), data=st.data())
def test_every_class_keeps_its_floor_by_as_few_exchanges_as_it_takes(labels, floor, data) -> None:
    kept = sorted(data.draw(st.sets(st.integers(0, len(labels) - 1), min_size=1)))
    expected = naive(kept, labels, floor)
    arguments = np.array(kept), np.array(labels), floor, NAMES, "batch 3 of epoch 0"
    if expected is None:
        with pytest.raises(UsageError, match="batch 3 of epoch 0 keeps"):
            hold_floor(*arguments)
        return
    held = hold_floor(*arguments)
    assert held.tolist() == expected
    assert len(held) == len(kept)
    short = sum(max(0, min(labels.count(c), floor) - sum(labels[i] == c for i in kept)) for c in set(labels) if c >= 0)
    assert len(set(kept) - set(held.tolist())) == short


def test_a_floor_that_does_not_fit_names_the_class_and_the_numbers() -> None:
    labels = np.array([0, 0, 0, 1, 1, 2])
    with pytest.raises(UsageError, match=r"keeps 3 of 6 rows(.|\n)*need 5 together \(bees would keep 1 of 2\)"):
        hold_floor(np.array([0, 1, 3]), labels, 2, NAMES, "batch 0 of epoch 0")
    with pytest.raises(UsageError, match="cats has 1 rows in the whole data set, expected 2"):
        check_floor(2, labels, NAMES)
    with pytest.raises(UsageError, match="no labels"):
        check_floor(1, np.full(4, -1), NAMES)
    check_floor(1, labels, NAMES)
