from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gstds_cache.config import BALANCED, SelectConfig
from gstds_cache.errors import UsageError
from gstds_cache.selection.order import DEFAULT_WINDOW, Order, parse_order
from gstds_cache.selection.plan import SelectionPlan
from gstds_cache.selection.rows import EligibleRows
from gstds_cache.selection.schedule import parse_schedule


def make_plan(rows=100, batch_size=32, epochs=3, schedule="constant:0.75", seed=0, **order) -> SelectionPlan:
    return SelectionPlan(
        EligibleRows(2 * rows, np.arange(rows, dtype=np.int64) * 2 + 1),
        batch_size=batch_size,
        epochs=epochs,
        schedule=parse_schedule(schedule),
        seed=seed,
        **order,
    )


def ratios(text: str, total: int, per_epoch: int = 1) -> list[float]:
    run_schedule = parse_schedule(text).over(np.full(per_epoch, 10), total // per_epoch)
    whole, _ = run_schedule.piece(0, total)
    assert [run_schedule.piece(at, at + 1)[0].item() for at in range(total)] == whole.tolist()
    return whole.tolist()


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
        ("cosine:0.5:0.6:0.7", "got 3 values, expected cosine:FIRST:LAST"),
        ("step:", "expected step:RATIO"),
        ("step:0.5:2", "outside"),
        ("budget:many", "whole number"),
        ("constant:0.5+full:1", "share of full epochs"),
    ],
)
def test_a_schedule_that_cannot_be_meant(text: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        parse_schedule(text)


def test_linear_goes_from_the_first_batch_of_the_run_to_the_last() -> None:
    assert ratios("linear:0.2:0.8", 4) == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert ratios("linear:0.2:0.8", 1) == [0.2]


def test_cosine_and_step_go_as_they_say() -> None:
    assert ratios("cosine:0.2:0.8", 5) == pytest.approx([0.5 - 0.3 * math.cos(math.pi * i / 4) for i in range(5)])
    assert ratios("step:0.25:0.5:0.75", 7) == [0.25] * 3 + [0.5] * 2 + [0.75] * 2
    assert ratios("step:0.5", 3) == [0.5] * 3
    assert ratios("step:0.1:0.2", 1) == [0.1]


def test_full_epochs_come_at_the_end() -> None:
    assert ratios("constant:0.75+full:0.125", 32, per_epoch=4) == [0.75] * 28 + [0.0] * 4
    # The first part runs its course before them.
    assert ratios("linear:0.2:0.8+full:0.3", 12, per_epoch=4) == pytest.approx(
        [0.2 + 0.6 * i / 7 for i in range(8)] + [0] * 4
    )
    assert ratios("constant:0.75+full:0.01", 4, per_epoch=2)[2:] == [0, 0]  # one at least
    with pytest.raises(UsageError, match="got 1 epoch"):
        ratios("constant:0.75+full:0.5", 4, per_epoch=4)


@given(
    sizes=st.lists(st.integers(1, 50), min_size=1, max_size=30),
    epochs=st.integers(2, 4),
    share=st.floats(0, 1),
    full=st.booleans(),
)
def test_a_budget_is_spent_to_the_last_sample_and_evenly(sizes, epochs, share, full) -> None:
    whole = np.array(sizes * epochs, np.int64)
    head = whole[: -len(sizes)] if full else whole
    least, most = len(head) + whole.sum() - head.sum(), whole.sum()
    budget = int(least + share * (most - least))
    text = f"budget:{budget}" + ("+full:0.01" if full else "")
    run_schedule = parse_schedule(text).over(np.array(sizes, np.int64), epochs)
    ratios, keeps = run_schedule.piece(0, len(whole))
    assert keeps.sum() == budget == run_schedule.kept_per_epoch.sum()
    middle = len(whole) // 2
    assert [*run_schedule.piece(0, middle)[1], *run_schedule.piece(middle, len(whole) + 5)[1]] == keeps.tolist()
    assert ((keeps >= 1) & (keeps <= whole)).all()
    assert (keeps[len(head) :] == whole[len(head) :]).all()
    assert ((ratios >= 0) & (ratios < 1)).all()
    # Evenly: up to any batch no more than one sample from the share of what could be given.
    room = np.cumsum(head - 1)
    given_ = np.cumsum(keeps[: len(head)] - 1)
    assert (abs(given_ - room * (given_[-1] / max(room[-1], 1))) <= 1).all()


@pytest.mark.parametrize(("budget", "words"), [(11, "from 12"), (391, "to 390"), (10**20, "to 390")])
def test_a_budget_that_does_not_fit(budget: int, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        make_plan(rows=130, schedule=f"budget:{budget}")


def test_a_budget_that_full_epochs_use_up() -> None:
    with pytest.raises(UsageError, match="beside the epochs that keep everything"):
        make_plan(rows=130, schedule="budget:130+full:0.1")


def test_a_file_has_a_line_for_each_epoch_or_batch(tmp_path: Path) -> None:
    file = tmp_path / "ratios.txt"
    file.write_text("# rising\n0.25\n\n0.5  # half\n")
    assert ratios(f"file:{file}", 6, per_epoch=3) == [0.25] * 3 + [0.5] * 3
    assert ratios(f"file:{file}", 2, per_epoch=2) == [0.25, 0.5]
    with pytest.raises(UsageError, match=r"got 2 ratios, expected 3 \(one for each epoch\) or 9"):
        ratios(f"file:{file}", 9, per_epoch=3)
    assert ratios(f"file:{file}+full:0.1", 9, per_epoch=3) == [0.25] * 3 + [0.5] * 3 + [0.0] * 3


def test_the_content_of_a_file_is_its_identity(tmp_path: Path) -> None:
    for name, text in (("a", "0.5\n"), ("b", "0.50 # same\n"), ("c", "0.25\n")):
        (tmp_path / name).write_text(text)
    a, b, c = (parse_schedule(f"file:{tmp_path / name}").identity for name in "abc")
    assert a == b != c
    assert str(tmp_path) not in a
    assert parse_schedule(f"file:{tmp_path / 'a'}+full:0.5").identity not in {a, c}


@pytest.mark.parametrize(
    ("line", "words"), [("1.0", "outside"), ("-0.5", "outside"), ("nan", "outside"), ("half", "number")]
)
def test_a_bad_line_of_a_file_is_named(tmp_path: Path, line: str, words: str) -> None:
    (tmp_path / "ratios.txt").write_text(f"0.5\n# comment\n{line}\n")
    with pytest.raises(UsageError, match=rf"ratios\.txt, line 3.*{words}"):
        parse_schedule(f"file:{tmp_path / 'ratios.txt'}")


def test_a_file_that_is_not_there() -> None:
    with pytest.raises(UsageError, match="`schedule` file not found"):
        parse_schedule("file:nowhere.txt")


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


@given(
    rows=st.integers(4, 300),
    batch_size=st.integers(4, 100),
    epochs=st.integers(1, 3),
    window=st.none() | st.integers(1, 400),
    shard_rows=st.integers(1, 90),
    seed=st.integers(0, 2**32),
    data=st.data(),
)
def test_any_order_has_every_row_once_an_epoch_and_any_batch_by_itself(
    rows, batch_size, epochs, window, shard_rows, seed, data
) -> None:
    def plan() -> SelectionPlan:
        return make_plan(rows, min(batch_size, rows), epochs, seed=seed, order=Order(window), shard_rows=shard_rows)

    whole = plan()
    batches = [whole.batch(seq) for seq in range(whole.total_batches)]
    for epoch in range(epochs):
        seen = np.concatenate([b.indices for b in batches if b.epoch == epoch])
        assert sorted(seen) == list(range(0, 2 * rows, 2))
        if window is not None:
            # Each window's shards appear together: a shard is never left and come back to outside its window.
            first_seen = {shard: i for i, shard in reversed(list(enumerate((seen // shard_rows).tolist())))}
            at_once = max(1, window // shard_rows)
            order = sorted(first_seen, key=first_seen.__getitem__)
            of_window = [order.index(shard) // at_once for shard in (seen // shard_rows).tolist()]
            assert of_window == sorted(of_window)
    seq = data.draw(st.integers(0, whole.total_batches - 1))
    alone = plan().batch(seq)
    assert alone.indices.tolist() == batches[seq].indices.tolist()
    assert (alone.epoch, alone.batch_id, alone.keep) == (batches[seq].epoch, batches[seq].batch_id, batches[seq].keep)


def test_orders_by_name() -> None:
    assert parse_order("permutation") == Order()
    assert parse_order("window") == Order(DEFAULT_WINDOW)
    assert parse_order(BALANCED) == Order(balanced=True)
    assert [parse_order(text).identity for text in ("permutation", BALANCED, "window:9")] == [
        "permutation", "class-balanced", "window:9"
    ]  # fmt: skip
    assert parse_order("window:100") == Order(100)
    for text in ("windows", "window:", "window:0", "window:-1", "window:many", "permutation:1", ""):
        with pytest.raises(UsageError, match="`order`"):
            parse_order(text)


def balanced(sizes: list[int], **settings) -> tuple[SelectionPlan, np.ndarray]:
    """A plan in which classes of these sizes come by turns, and the labels of all rows, every second left out."""
    rows = sum(sizes)
    labels = np.full(2 * rows, -1, np.int64)
    labels[::2] = np.random.default_rng(0).permutation(np.repeat(10 * np.arange(len(sizes)) + 3, sizes))
    return make_plan(rows, order=Order(balanced=True), labels=labels, **settings), labels


@given(
    sizes=st.lists(st.integers(8, 60), min_size=2, max_size=6),
    batch_size=st.integers(4, 10),
    epochs=st.integers(1, 9),
    seed=st.integers(0, 2**32),
    data=st.data(),
)
def test_classes_come_by_turns_and_every_row_as_often_as_others_of_its_class(sizes, batch_size, epochs, seed, data):
    settings = {"batch_size": batch_size, "epochs": epochs, "seed": seed}
    plan, labels = balanced(sizes, **settings)
    batches = [plan.batch(seq) for seq in range(plan.total_batches)]
    for batch in batches:
        assert len(set(batch.indices.tolist())) == len(batch.indices)  # no row twice
        counts = np.bincount(labels[batch.indices] // 10, minlength=len(sizes))
        assert counts.max() - counts.min() <= 1
    for number, size in enumerate(sizes):
        passes = -(-size // (sum(sizes) // len(sizes)))
        of_class = np.flatnonzero(labels == 10 * number + 3)
        for first in range(0, epochs - passes + 1, passes):
            rows = np.concatenate([b.indices for b in batches if first <= b.epoch < first + passes])
            times = np.bincount(rows, minlength=len(labels))[of_class]
            assert times.min() >= 1
            assert times.max() - times.min() <= 1
    seq = data.draw(st.integers(0, plan.total_batches - 1))
    assert balanced(sizes, **settings)[0].batch(seq).indices.tolist() == batches[seq].indices.tolist()
    stacked = [batch.indices.tolist() for stack in plan.stacks(seq, 3) for batch in stack]
    assert stacked == [batch.indices.tolist() for batch in batches[seq:]]


def test_class_balanced_epochs_and_seeds_differ_and_fixed_assignments_come_again() -> None:
    orders = [balanced([40, 20], seed=seed)[0].batch(2 * epoch).indices.tolist() for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4
    plan, _ = balanced([40, 20], epochs=6, batch_assignments=2, batch_size=12)
    sets = [{tuple(sorted(plan.batch(5 * epoch + n).indices)) for n in range(5)} for epoch in range(6)]
    assert sets[0] == sets[2] == sets[4] != sets[1] == sets[3] == sets[5]
    assert {row for part in sets[0] | sets[1] for row in part} == set(range(0, 120, 2))


def test_neither_batches_nor_places_in_them_have_the_same_classes_in_every_epoch() -> None:
    plan, labels = balanced([40] * 30, batch_size=15, epochs=3)
    classes = [set(labels[plan.batch(80 * epoch + n).indices].tolist()) for epoch in range(3) for n in range(2)]
    assert len(set(map(frozenset, classes))) == 6
    assert max(max(some) - min(some) for some in classes) > 150  # of 0 to 290
    plan, labels = balanced([40] * 10, batch_size=50, epochs=1)
    ends = [labels[plan.batch(n).indices[-2:]].tolist() for n in range(plan.total_batches)]
    assert len({label for end in ends for label in end}) > 4  # what two ranks of four would leave out


def test_classes_that_cannot_come_by_turns() -> None:
    with pytest.raises(UsageError, match="a class has 3 rows, a batch of 10 takes 5 of each") as caught:
        balanced([39, 3], batch_size=8)
    fits, knn = map(int, re.findall(r"(?:batch_size|knn)=(\d+)", caught.value.hint))
    balanced([39, 3], batch_size=SelectConfig(batch_size=fits, knn=knn).batch_size)
    with pytest.raises(UsageError, match="a class has 1 rows") as caught:
        balanced([39, 39, 1], batch_size=4)
    assert caught.value.hint.startswith("no batch is small enough: leave `order` out, or hide")
    with pytest.raises(UsageError, match="all rows have the same label"):
        balanced([40], batch_size=8)
    labels = np.repeat(np.arange(4), 20)
    labels[:14] = -1
    with pytest.raises(UsageError, match="7 of 40 rows have no label"):
        make_plan(40, 8, order=Order(balanced=True), labels=labels)
    with pytest.raises(UsageError, match="`batch_assignments`: got 1, and it takes 2 epochs"):
        balanced([40, 20], batch_assignments=1, batch_size=12)
    balanced([40, 20], batch_assignments=1, batch_size=12, epochs=1)


def test_epochs_and_seeds_are_different_permutations() -> None:
    orders = [make_plan(seed=seed).batch(3 * epoch).indices.tolist() for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4


def test_a_batch_larger_than_the_data_is_refused() -> None:
    with pytest.raises(UsageError, match="only 100 rows"):
        make_plan(batch_size=101)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "is empty"),
        (b"\xff\xfe0\x00", "cannot be read as text"),
        (bytes(range(256)), "cannot be read as text"),
        (b"0.5\nnan\n", "outside|expected a number"),
        (b"1e300\n", "outside"),
        (b"0.5\x000.5", "expected a number"),
    ],
)
def test_a_file_of_ratios_that_is_none(tmp_path, data: bytes, words: str) -> None:
    (tmp_path / "ratios.txt").write_bytes(data)
    with pytest.raises(UsageError, match=words):
        parse_schedule(f"file:{tmp_path / 'ratios.txt'}")
    with pytest.raises(UsageError, match="got the folder"):
        parse_schedule(f"file:{tmp_path}")


def test_a_byte_order_mark_is_no_ratio(tmp_path) -> None:
    (tmp_path / "ratios.txt").write_bytes(b"\xef\xbb\xbf0.5\n0.25\n")
    (tmp_path / "plain.txt").write_bytes(b"0.5\n0.25\n")
    marked, plain = (parse_schedule(f"file:{tmp_path / name}").identity for name in ("ratios.txt", "plain.txt"))
    assert marked == plain


@pytest.mark.parametrize("window", [None, 300])
@pytest.mark.parametrize("assignments", [0, 1, 2])
@pytest.mark.parametrize(
    "rows", [1000, 1037, 70_000]
)  # whole batches, a last one that differs, a permutation by cipher
def test_a_stack_holds_what_its_batches_are_one_by_one(rows: int, assignments: int, window: int | None) -> None:
    size = 64 if rows < 70_000 else 4096
    plan = SelectionPlan(
        EligibleRows(rows, np.array([3, 77, 500])),
        batch_size=size,
        epochs=5,
        schedule=parse_schedule("linear:0.2:0.9"),
        seed=3,
        order=Order(window),
        shard_rows=50,
        batch_assignments=assignments,
    )
    for start, most in ((0, 7), (3, 1000), (plan.total_batches - 1, 5)):
        stacks = list(plan.stacks(start, most))
        assert all(len(stack) <= most for stack in stacks)
        batches = [batch for stack in stacks for batch in stack]
        assert [batch.seq for batch in batches] == list(range(start, plan.total_batches))
        for batch in batches:
            alone = plan.batch(batch.seq)
            assert batch.indices.tolist() == alone.indices.tolist()
            assert replace(batch, indices=alone.indices) == alone
