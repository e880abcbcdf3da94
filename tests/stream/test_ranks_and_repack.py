from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gstds_cache.errors import UsageError
from gstds_cache.selection.selected_batch import SelectedBatch
from gstds_cache.spectral.status import Status
from gstds_cache.stream.ranks import rank_slice, real_rows, require_rank
from gstds_cache.stream.repack import packed_per_epoch, repack, require_repack

WORLDS = st.integers(1, 17)


@given(count=st.integers(1, 200), world=WORLDS)
def test_pad_misses_nothing_and_repeats_only_the_first_rows(count: int, world: int) -> None:
    kept = np.random.default_rng(count).permutation(1000)[:count]
    slices = [rank_slice(kept, rank, world, "pad") for rank in range(world)]
    assert {len(rows) for rows in slices} == {-(-count // world)}
    assert np.concatenate(slices).tolist() == np.resize(kept, len(slices[0]) * world).tolist()
    own = [rows[: real_rows(count, rank, world)] for rank, rows in enumerate(slices)]
    assert np.concatenate(own).tolist() == kept.tolist()


@given(count=st.integers(1, 200), world=WORLDS)
def test_drop_repeats_nothing_and_misses_only_the_last_rows(count: int, world: int) -> None:
    kept = np.random.default_rng(count).permutation(1000)[:count]
    if count < world:
        with pytest.raises(UsageError, match=r"pad"):
            rank_slice(kept, 0, world, "drop")
        return
    slices = [rank_slice(kept, rank, world, "drop") for rank in range(world)]
    assert {len(rows) for rows in slices} == {count // world}
    assert np.concatenate(slices).tolist() == kept[: count - count % world].tolist()


@pytest.mark.parametrize(("rank", "world"), [(-1, 2), (2, 2), (0, 0)])
def test_a_rank_that_is_none_is_refused(rank: int, world: int) -> None:
    with pytest.raises(UsageError, match="rank"):
        rank_slice(np.arange(4), rank, world, "pad")
    with pytest.raises(UsageError, match="drop, pad"):
        require_rank(0, 1, "wrap")


def selections(sizes: list[list[int]]) -> list[SelectedBatch]:
    """Batches of these many kept rows, by epoch; no row comes twice."""
    made, row = [], 0
    for epoch, batches in enumerate(sizes):
        for batch_id, size in enumerate(batches):
            kept = np.arange(row, row + size)
            made.append(SelectedBatch(len(made), epoch, batch_id, size, kept, None, Status.CONVERGED, 0.0, 0.0))
            row += size
    return made


SIZES = st.lists(st.lists(st.integers(1, 30), min_size=1, max_size=6), min_size=1, max_size=5)


@given(sizes=SIZES, size=st.integers(1, 20))
def test_carry_leaves_out_only_the_end_of_the_run(sizes: list[list[int]], size: int) -> None:
    per_epoch = [sum(batches) for batches in sizes]
    batches = list(repack(selections(sizes), size, "carry"))
    rows = [row for batch in batches for row in batch.kept.tolist()]
    assert all(len(batch.kept) == size for batch in batches)
    assert rows == list(range(sum(per_epoch) // size * size))
    assert [batch.seq for batch in batches] == list(range(len(batches)))
    if batches:
        counts = packed_per_epoch(per_epoch, size, "carry")
        assert [[b.batch_id for b in batches if b.epoch == e] for e in range(len(sizes))] == [
            [*range(c)] for c in counts
        ]


@given(sizes=SIZES, size=st.integers(1, 20))
def test_drop_leaves_out_only_the_end_of_each_epoch(sizes: list[list[int]], size: int) -> None:
    per_epoch = [sum(batches) for batches in sizes]
    batches = list(repack(selections(sizes), size, "drop"))
    begins = np.cumsum([0, *per_epoch])
    for epoch, (begin, kept) in enumerate(zip(begins, per_epoch, strict=False)):
        rows = [row for batch in batches if batch.epoch == epoch for row in batch.kept.tolist()]
        assert rows == list(range(begin, begin + kept // size * size))
    if batches:
        assert packed_per_epoch(per_epoch, size, "drop") == [kept // size for kept in per_epoch]


def test_a_full_batch_comes_before_more_is_read() -> None:
    read = []

    def reading():
        for batch in selections([[5, 5, 5]]):
            read.append(batch.seq)
            yield batch

    packed = repack(reading(), 4)
    next(packed)
    assert read == [0]
    next(packed)
    assert read == [0, 1]
    assert len(list(packed)) == 1


def test_what_cannot_be_meant_is_refused() -> None:
    with pytest.raises(UsageError, match="at most 9 rows"):
        packed_per_epoch([9, 8], 10, "drop")
    with pytest.raises(UsageError, match="at least 1"):
        next(repack([], 0))
    with pytest.raises(UsageError, match="carry, drop"):
        require_repack(3, "keep")
