from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gstds_cache.errors import UsageError
from gstds_cache.selection.plan import SelectionPlan
from gstds_cache.selection.schedule import parse_schedule


def make_plan(rows=100, batch_size=32, epochs=3, schedule="constant:0.75", seed=0) -> SelectionPlan:
    return SelectionPlan(
        np.arange(rows, dtype=np.int64) * 2,
        batch_size=batch_size,
        epochs=epochs,
        schedule=parse_schedule(schedule),
        seed=seed,
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("constant:1.0", "outside"),
        ("constant:-0.1", "outside"),
        ("constant:nan", "outside"),
        ("constant:lots", "expected a number"),
        ("constant", "expected constant:RATIO"),
        ("linear:0.5", "expected linear:FIRST:LAST"),
        ("linaer:0:1", "linear"),
    ],
)
def test_a_schedule_that_cannot_be_meant(text: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        parse_schedule(text)


def test_linear_goes_from_the_first_batch_of_the_run_to_the_last() -> None:
    schedule = parse_schedule("linear:0.2:0.8")
    assert [schedule.ratio(seq, 4) for seq in range(4)] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert schedule.ratio(0, 1) == 0.2


def test_the_share_is_removed_rounded_down_and_one_row_always_stays() -> None:
    assert make_plan(rows=512, batch_size=512).keep(0) == 128
    assert make_plan(rows=10, batch_size=10, schedule="constant:0.7").keep(0) == 3  # 0.7 * 10 is 6.999...
    assert make_plan(rows=32, batch_size=32, schedule="constant:0.99").keep(0) == 1


@pytest.mark.parametrize(
    ("rows", "sizes"), [(96, [32] * 3), (97, [32, 32, 33]), (111, [32, 32, 47]), (112, [32, 32, 32, 16]), (33, [33])]
)
def test_a_remainder_below_half_a_batch_goes_to_the_last_batch(rows: int, sizes: list[int]) -> None:
    plan = make_plan(rows=rows, epochs=1)
    assert [len(plan.batch(seq).indices) for seq in range(plan.total_batches)] == sizes


@given(
    rows=st.integers(4, 300),
    batch_size=st.integers(4, 300),
    epochs=st.integers(1, 4),
    first=st.floats(0, 0.99),
    last=st.floats(0, 0.99),
    seed=st.integers(0, 2**32),
)
def test_every_row_comes_once_an_epoch_and_the_totals_are_known(rows, batch_size, epochs, first, last, seed) -> None:
    batch_size = min(batch_size, rows)
    plan = make_plan(rows, batch_size, epochs, f"linear:{first}:{last}", seed)
    batches = [plan.batch(seq) for seq in range(plan.total_batches)]
    for epoch in range(epochs):
        seen = np.concatenate([b.indices for b in batches if b.epoch == epoch])
        assert sorted(seen) == list(range(0, 2 * rows, 2))
    assert [b.batch_id for b in batches] == list(range(plan.batches_per_epoch)) * epochs
    assert sum(b.keep for b in batches) == plan.total_kept
    assert all(1 <= b.keep <= len(b.indices) < 1.5 * batch_size for b in batches)
    assert all(len(b.indices) >= batch_size / 2 for b in batches)


def test_any_batch_can_be_made_without_the_ones_before_it() -> None:
    whole, alone = make_plan(), make_plan()
    in_order = [whole.batch(seq).indices for seq in range(whole.total_batches)]
    for seq in (8, 0, 7, 4):
        np.testing.assert_array_equal(alone.batch(seq).indices, in_order[seq])


def test_epochs_and_seeds_are_different_permutations() -> None:
    orders = [make_plan(seed=seed).batch(3 * epoch).indices.tolist() for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4


def test_a_batch_larger_than_the_data_is_refused() -> None:
    with pytest.raises(UsageError, match="only 100 rows"):
        make_plan(batch_size=101)
