"""Three ways to a store's rows: the same rows by each, every row once, and nothing of a damaged mirror."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_store import SHARD, D, N, fill, make_rows

from gstds_cache.errors import IntegrityError, UsageError
from gstds_cache.store import layout
from gstds_cache.store.access import WindowAccess, choose
from gstds_cache.store.reader import EmbeddingStore
from gstds_cache.store.spec import CacheSpec

ROW_BYTES = D * 2
WITH_ROWS = [row for row in range(N) if row != 3]


@pytest.fixture
def store(tmp_path: Path) -> Path:
    fill(tmp_path / "s")
    return tmp_path / "s"


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("kind", ["memory", "mirror", "window"])
def test_all_ways_give_the_same_rows_in_either_dtype(store: Path, kind, dtype) -> None:
    reader = EmbeddingStore(store, access=kind, memory_budget=0)
    picked = np.array([21, 0, 9, 9, 16, 8])
    out = np.full((6, D), 7, dtype)
    assert reader.gather(picked, out) is out
    np.testing.assert_array_equal(out, make_rows()[picked].astype(dtype))
    assert reader.gather(picked).dtype == np.float16


@pytest.mark.parametrize("budget", [0, 2 * SHARD * ROW_BYTES, 10**9])
@pytest.mark.parametrize("kind", ["memory", "mirror", "window"])
@pytest.mark.parametrize("batch_size", [1, 4, 21, 50])
def test_a_shuffled_epoch_has_every_row_with_an_embedding_once(store: Path, kind, budget, batch_size) -> None:
    reader = EmbeddingStore(store, access=kind, memory_budget=budget)
    orders = []
    for epoch in (0, 1, 0):
        names, sizes = [], []
        for rows, embeddings in reader.shuffled(batch_size, seed=5, epoch=epoch):
            assert embeddings.dtype == np.float32
            np.testing.assert_array_equal(embeddings, make_rows()[rows])
            names += rows.tolist()
            sizes.append(len(rows))
        assert sorted(names) == WITH_ROWS
        assert set(sizes[:-1]) <= {batch_size}
        orders.append(names)
    assert orders[0] == orders[2] != orders[1]


def test_a_window_epoch_reads_every_shard_once(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = EmbeddingStore(store, access="window", memory_budget=2 * SHARD * ROW_BYTES)
    read: list[int] = []
    monkeypatch.setattr(reader, "shard", lambda shard: read.append(shard) or EmbeddingStore.shard(reader, shard))
    for _ in reader.shuffled(4, seed=0, epoch=0):
        pass
    assert sorted(read) == [0, 1, 2]


@given(
    items=st.integers(1, 60),
    shard=st.integers(1, 9),
    capacity=st.integers(1, 5),
    drop=st.sets(st.integers(0, 59)),
    seed=st.integers(0, 9),
)
def test_windows_cover_any_rows_exactly_once(items: int, shard: int, capacity: int, drop: set[int], seed: int) -> None:
    spec = CacheSpec(items=items, items_root="", encoder={}, dim=1, dtype="float32", batch_size=1, shard_rows=shard)
    everything = np.arange(items, dtype=np.float32)[:, None]
    access = WindowAccess(spec, lambda u: everything[list(spec.rows_of(u))], memory_budget=capacity * shard * 4)
    rows = np.array(sorted(set(range(items)) - drop), np.int64)
    seen = []
    for names, block, places in access.windows(rows, np.random.default_rng(seed)):
        assert len(block) <= max(capacity, 1) * shard
        assert block[places][:, 0].tolist() == names.tolist()
        seen += names.tolist()
    assert sorted(seen) == rows.tolist()


def test_window_access_holds_no_more_shards_than_its_budget(store: Path) -> None:
    reader = EmbeddingStore(store, access="window", memory_budget=SHARD * ROW_BYTES)
    reader.gather(np.array([0, 9, 20]))
    assert (reader._access.capacity, len(reader._access._held)) == (1, 1)


@pytest.mark.parametrize("kind", ["memory", "mirror", "window"])
def test_threads_read_from_one_store(store: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = EmbeddingStore(store, access=kind, memory_budget=0)
    inside, most, read, failed, begin = 0, 0, 0, [], threading.Barrier(8)

    def watched(shard: int) -> np.ndarray:
        nonlocal inside, most, read
        inside, read = inside + 1, read + 1
        most = max(most, inside)
        time.sleep(0.002)
        rows = EmbeddingStore.shard(reader, shard)
        inside -= 1
        return rows

    monkeypatch.setattr(reader, "shard", watched)

    def work(seed: int) -> None:
        begin.wait()
        drawn = np.random.default_rng(seed).choice(WITH_ROWS, (5, 6))
        failed.extend(picked for picked in drawn if not np.array_equal(reader.gather(picked), make_rows()[picked]))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert not failed
    assert most == 1, "two threads read a shard at once"
    if kind == "window":
        assert len(reader._access._held) == 1
    else:
        assert read == 3, "the rows are read once"


@pytest.mark.parametrize(
    ("budget", "complete", "free", "there", "kind"),
    [
        (1000, True, 0, False, "memory"),
        (999, True, 1101, False, "mirror"),
        (999, True, 1000, False, "window"),
        (999, True, 0, True, "mirror"),
        (999, False, 10**9, False, "window"),
    ],
)
def test_the_budget_decides_and_the_reason_is_said(tmp_path, budget, complete, free, there, kind) -> None:
    if there:
        (tmp_path / "embeddings.npy").touch()
    chosen, reason = choose("auto", nbytes=1000, memory_budget=budget, mirror=tmp_path, complete=complete, free=free)
    assert chosen == kind
    assert "0.0 MB of memory" in reason
    assert ("slow" in reason) == (kind == "window")


def test_the_mirror_is_made_once_and_any_tool_maps_it(store: Path) -> None:
    EmbeddingStore(store, access="mirror").gather(np.array([1]))
    file = store.with_name("s.mirror") / "embeddings.npy"
    np.testing.assert_array_equal(np.load(file, mmap_mode="r"), make_rows())
    before = file.stat()
    EmbeddingStore(store, access="mirror").gather(np.array([1]))
    assert (file.stat().st_ino, file.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "other store", "record"])
def test_a_damaged_mirror_is_made_anew(store: Path, tmp_path: Path, damage: str) -> None:
    EmbeddingStore(store, access="mirror").gather(np.array([1]))
    file = store.with_name("s.mirror") / "embeddings.npy"
    data = bytearray(file.read_bytes())
    if damage == "flip":
        data[-5] ^= 1
        file.write_bytes(data)
    elif damage == "truncate":
        file.write_bytes(data[:-2])
    elif damage == "empty":
        file.write_bytes(b"")
    elif damage == "other store":
        np.save(file, np.ones((N, D), np.float16))
    else:
        (file.parent / "mirror.json").write_text("{")
    np.testing.assert_array_equal(EmbeddingStore(store, access="mirror").gather(np.array([21])), make_rows()[[21]])
    np.testing.assert_array_equal(np.load(file), make_rows())


def test_a_mirror_of_a_touched_file_is_checked_and_kept(store: Path) -> None:
    EmbeddingStore(store, access="mirror").gather(np.array([1]))
    file = store.with_name("s.mirror") / "embeddings.npy"
    os.utime(file, (1, 1))
    inode = file.stat().st_ino
    EmbeddingStore(store, access="mirror").gather(np.array([1]))
    assert file.stat().st_ino == inode


def test_a_shard_that_is_not_its_commits_makes_no_mirror(store: Path) -> None:
    # Whole, with a right CRC, and of another content: what a late writer leaves.
    from small_store import make_spec

    (store / layout.object_key(1)).write_bytes(layout.shard_object(make_spec(), 1, np.ones((SHARD, D), np.float16)))
    with pytest.raises(IntegrityError, match="verify STORE --level full"):
        EmbeddingStore(store, access="mirror").gather(np.array([1]))
    with pytest.raises(IntegrityError):
        EmbeddingStore(store, access="mirror").gather(np.array([1]))


def test_a_mirror_of_a_store_that_is_not_whole_is_refused(tmp_path: Path) -> None:
    fill(tmp_path / "s", shards=(0,), finish=False)
    with pytest.raises(UsageError, match="not complete"):
        EmbeddingStore(tmp_path / "s", allow_partial=True, access="mirror")


def _gather_there(store: EmbeddingStore, queue) -> None:
    try:
        queue.put(store.gather(np.array([9, 0])).tolist())
    except UsageError as error:
        queue.put(str(error))


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_fork_is_refused_and_a_spawned_process_opens_the_store_anew(store: Path, method: str) -> None:
    context = multiprocessing.get_context(method)
    reader = EmbeddingStore(store)
    reader.gather(np.array([0]))
    queue = context.Queue()
    process = context.Process(target=_gather_there, args=(reader, queue))
    process.start()
    answer = queue.get(timeout=60)
    process.join()
    if method == "fork":
        assert "forked from it" in answer
        assert "spawn" in answer
    else:
        assert answer == make_rows()[[9, 0]].tolist()


def test_pickling_keeps_how_the_store_was_opened(store: Path) -> None:
    again = pickle.loads(pickle.dumps(EmbeddingStore(store, access="window", memory_budget=0)))
    assert (again.access_kind, again.memory_budget) == ("window", 0)


def test_shards_are_read_as_zarr_reads_them(store: Path) -> None:
    import zarr

    reader = EmbeddingStore(store)
    rows = zarr.open_group(store, mode="r")["embeddings"]
    for shard in range(3):
        span = reader.spec.rows_of(shard)
        np.testing.assert_array_equal(reader.shard(shard), rows[span.start : span.stop])
        assert not reader.shard(shard).flags.writeable
