from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from gstds_cache.config import EmbedConfig
from gstds_cache.data.manifest import build_manifest
from gstds_cache.embedding.clock import Clock
from gstds_cache.embedding.run import embed_dataset
from gstds_cache.embedding.shard import EmbedTask
from gstds_cache.encoders.factory import open_encoder
from gstds_cache.errors import FingerprintMismatchError, IncompleteError
from gstds_cache.runtime.resources import out_of_memory
from gstds_cache.store import layout
from gstds_cache.store.format import CURRENT
from gstds_cache.store.reader import EmbeddingStore
from gstds_cache.store.spec import CacheSpec
from gstds_cache.store.writer import StoreWriter, open_writer


def config_of(model: str, **changes) -> EmbedConfig:
    return EmbedConfig(**({"model": model, "batch_size": 4, "shard_rows": 8, "workers": 0, "device": "cpu"} | changes))


@contextmanager
def task_of(source, model: str, where: Path, **options) -> Iterator[EmbedTask]:
    """A task over a new store with batches of 4 and shards of 8 rows."""
    encoder, manifest = open_encoder(model), build_manifest(source)
    spec = CacheSpec(
        items=len(source),
        items_root=manifest.root,
        encoder=encoder.spec.to_dict(),
        dim=encoder.spec.dim,
        dtype="float32",
        batch_size=4,
        shard_rows=8,
    )
    with open_writer(where, spec, labels=manifest.labels, items=manifest.to_arrow(), attributes={}) as writer:
        yield EmbedTask(source, encoder, writer, **({"device": torch.device("cpu"), "workers": 0} | options))


def rows_of(where: Path, count: int) -> np.ndarray:
    """The store's rows, zeros where there is no embedding."""
    store = EmbeddingStore(where, allow_partial=True)
    fine = np.flatnonzero(store.valid[:count] == layout.OK)
    rows = np.zeros((count, store.spec.dim), store.spec.dtype)
    rows[fine] = store.gather(fine)
    return rows


def commit_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("gstds-commit")]


def test_every_forward_pass_has_one_shape_and_a_row_does_not_depend_on_what_follows(
    array_source, watched, tmp_path
) -> None:
    embed_dataset(array_source(50), config_of(watched.URI, dtype="float32"), where=tmp_path / "long")
    embed_dataset(array_source(45), config_of(watched.URI, dtype="float32"), where=tmp_path / "short")
    assert {shape for shape in watched.SHAPES if shape[0] != 2} == {(4, 3, 16, 16)}  # of 2: the factory's own check
    np.testing.assert_array_equal(rows_of(tmp_path / "short", 45), rows_of(tmp_path / "long", 45))


def test_a_shard_is_committed_while_the_next_is_embedded(array_source, watched, tmp_path, monkeypatch) -> None:
    busy, most, seen, order = [0], [0], threading.Event(), []
    real_commit = StoreWriter.commit

    def slow_commit(self, shard, rows, quarantined=()):
        busy[0] += 1
        most[0] = max(most[0], busy[0])
        if shard == 0:
            assert seen.wait(20), "the next shard is not embedded before this one is committed"
        record = real_commit(self, shard, rows, quarantined)
        busy[0] -= 1
        return record

    monkeypatch.setattr(StoreWriter, "commit", slow_commit)
    with task_of(array_source(40), watched.URI, tmp_path / "s") as task:
        begun = len(watched.SHAPES)
        # The third pass is the first of the second shard.
        watched.ON_FORWARD = lambda: seen.set() if len(watched.SHAPES) - begun > 3 else None
        for commit in task(range(5)):
            assert (tmp_path / "s" / CURRENT.commit_key(commit.shard)).exists()
            order.append(commit.shard)
    assert (order, most[0]) == ([0, 1, 2, 3, 4], 1)
    assert task.clock.commit > 0
    assert commit_threads() == []


def test_decoders_start_before_the_model_and_not_for_a_store_that_is_there(array_source, watched, tmp_path) -> None:
    children: list[int] = []
    watched.ON_FORWARD = lambda: children.append(len(multiprocessing.active_children()))
    config = config_of(watched.URI, workers=2)
    embed_dataset(array_source(20), config, where=tmp_path / "s")
    tried = children.count(0)  # the factory's own check of the model, which tells the shape of what they decode
    assert children == [0] * tried + [2] * (len(children) - tried)
    assert len(children) - tried == 2 + 5  # the determinism check, and the batches
    assert multiprocessing.active_children() == []
    del children[:]
    assert embed_dataset(array_source(20), config, where=tmp_path / "s").report.cache_hit
    assert set(children) == {0}


def test_decoders_end_where_the_run_is_refused(array_source, watched, tmp_path) -> None:
    embed_dataset(array_source(20), config_of(watched.URI), where=tmp_path / "s")
    (tmp_path / "s" / CURRENT.commit_key(0)).unlink()
    (tmp_path / "s" / layout.COMPLETE).unlink()
    with pytest.raises(FingerprintMismatchError):
        embed_dataset(array_source(20), config_of(watched.URI, workers=2, dtype="float32"), where=tmp_path / "s")
    assert multiprocessing.active_children() == []


def test_an_error_of_a_commit_stops_the_run_soon(array_source, watched, tmp_path, monkeypatch) -> None:
    commit = StoreWriter.commit

    def full(self, shard, rows, quarantined=()):
        if shard == 1:
            raise OSError(errno.ENOSPC, "no space")
        return commit(self, shard, rows, quarantined)

    with monkeypatch.context() as patch:
        patch.setattr(StoreWriter, "commit", full)
        watched.SECONDS = 0.01
        with pytest.raises(IncompleteError, match="the disk is full") as caught:
            embed_dataset(array_source(400), config_of(watched.URI), where=tmp_path / "s")
    assert caught.value.hint.endswith(
        "then run the same command again: 1 of the 50 shards of this run are committed, and it goes on from there"
    )
    assert sum(shape[0] == 4 for shape in watched.SHAPES) < 12  # shard 1 ends with the fourth of a hundred
    assert commit_threads() == []
    assert sorted(path.name for path in (tmp_path / "s" / "commits").iterdir()) == ["0.json"]
    watched.SECONDS = 0.0
    assert embed_dataset(array_source(400), config_of(watched.URI), where=tmp_path / "s").report.committed_before == 8


def test_ctrl_c_leaves_no_thread_and_no_process(array_source, tiny_model, tmp_path) -> None:
    def interrupt(clock: Clock) -> None:
        if clock.images >= 20:
            raise KeyboardInterrupt

    with (
        task_of(array_source(200), tiny_model, tmp_path / "s", workers=2, on_batch=interrupt) as task,
        pytest.raises(KeyboardInterrupt) as caught,
    ):
        list(task(range(25)))
    assert caught.value is not None  # the traceback, and all its frames, are alive
    assert multiprocessing.active_children() == []
    assert commit_threads() == []
    assert list((tmp_path / "s").rglob(".*.tmp")) == []
    assert sorted(EmbeddingStore(tmp_path / "s", allow_partial=True).commits) == [0, 1]


def test_a_caller_who_has_enough_leaves_no_thread_and_no_process(array_source, tiny_model, tmp_path) -> None:
    with task_of(array_source(200), tiny_model, tmp_path / "s", workers=1) as task:
        commits = task(range(25))
        assert next(commits).shard == 0
        commits.close()
    assert multiprocessing.active_children() == []
    assert commit_threads() == []


def test_a_batch_is_queued_before_the_one_before_is_waited_for(array_source, watched, tmp_path) -> None:
    at_callback = []

    with task_of(array_source(16), watched.URI, tmp_path / "s") as task:
        begun = len(watched.SHAPES)
        task.on_batch = lambda clock: at_callback.append((clock.images, len(watched.SHAPES) - begun))
        list(task(range(2)))
    assert at_callback == [(4, 2), (8, 3), (12, 4), (16, 4)]


def test_the_clock_tells_decoding_from_waiting(array_source, watched, tmp_path) -> None:
    class SlowSource(array_source):
        def image(self, row):
            time.sleep(0.03)  # A batch takes two workers 0.06 s, far longer than the model.
            return super().image(row)

    with task_of(SlowSource(40), watched.URI, tmp_path / "s", workers=2) as task:
        list(task(range(5)))
    clock = task.clock
    assert clock.decode > 1.2
    assert 0.1 < clock.waiting < clock.elapsed()
    assert clock.waiting + clock.forward + clock.commit_wait <= clock.elapsed()
    shares = clock.shares()
    assert list(shares) == ["decode", "forward", "commit", "waiting"]
    assert all(0 < share < 1 for share in shares.values())
    assert shares["decode"] == pytest.approx(clock.decode / clock.elapsed() / 2)
    elapsed = clock.elapsed()
    time.sleep(0.01)
    assert clock.elapsed() == elapsed


@pytest.mark.parametrize("workers", [0, 2])
def test_known_rows_are_neither_decoded_nor_embedded(array_source, watched, tmp_path, workers) -> None:
    """Shards of eight: 0 with holes, 1 known whole, 2 not at all, 3 known but for one row, 4 to 6 whole, 7 short."""
    source, decoded = array_source(58, bad=frozenset({20})), tmp_path / "decoded"
    with task_of(source, watched.URI, tmp_path / "whole") as task:
        list(task(range(8)))
    whole = rows_of(tmp_path / "whole", 58)
    mask = np.ones(58, bool)
    mask[[1, 2, 3, 5, 6, 7, *range(16, 24), 30, 57]] = False
    asked = []

    class Watching(array_source):
        def image(self, row):
            with decoded.open("a") as file:
                file.write(f"{row}\n")
            return super().image(row)

    def known(span: range):
        asked.append(span.start // 8)
        part = mask[span.start : span.stop]
        return part, whole[span.start : span.stop][part]

    with task_of(Watching(58, bad=frozenset({20})), watched.URI, tmp_path / "s", known=known, workers=workers) as task:
        passes = len(watched.SHAPES)
        assert [commit.shard for commit in task(range(8))] == list(range(8))
    assert sorted(map(int, decoded.read_text().split())) == np.flatnonzero(~mask).tolist()
    assert watched.SHAPES[passes:] == [(4, 3, 16, 16)] * 6  # two, none, two, one, none and one
    np.testing.assert_array_equal(rows_of(tmp_path / "s", 58), whole)
    assert task.clock.images == 16
    assert all(asked.count(shard) <= (1 if shard in {0, 2, 3, 7} else 2) for shard in range(8))


def test_a_data_set_that_is_known_whole_is_committed(array_source, watched, tmp_path) -> None:
    def known(span: range):
        return np.ones(len(span), bool), np.full((len(span), 49), 0.5, np.float32)

    with task_of(array_source(30), watched.URI, tmp_path / "s", known=known, workers=1) as task:
        assert [commit.rows for commit in task(range(4))] == [(0, 8), (8, 16), (16, 24), (24, 30)]
    assert task.clock.images == 0
    assert (rows_of(tmp_path / "s", 30) == 0.5).all()


def test_a_killed_decoder_ends_the_run_with_a_way_on(array_source, tiny_model, tmp_path) -> None:
    test = os.getpid()

    class Deadly(array_source):
        def image(self, row):
            if row == 30 and os.getpid() != test:  # not where the size of some images is looked at
                os.kill(os.getpid(), signal.SIGKILL)
            return super().image(row)

    with pytest.raises(IncompleteError, match="was killed") as caught:
        embed_dataset(Deadly(60), config_of(tiny_model, workers=1), where=tmp_path / "s")
    assert "`workers=0`" in caught.value.hint
    assert commit_threads() == []


def test_a_users_own_error_in_a_decoder_stays_what_it_is(array_source, tiny_model, tmp_path) -> None:
    class Broken(array_source):
        def image(self, row):
            raise RuntimeError("a bug of mine")

    with pytest.raises(RuntimeError, match="a bug of mine") as caught:
        embed_dataset(Broken(60), config_of(tiny_model, workers=1), where=tmp_path / "s")
    assert not isinstance(caught.value, IncompleteError)


@pytest.mark.parametrize(
    ("error", "is_one"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (MemoryError(), True),
        (RuntimeError("shape mismatch"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_which_errors_mean_that_memory_ran_out(error, is_one) -> None:
    assert out_of_memory(error) is is_one


def test_the_cpu_allocators_error_is_known() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 50)
    assert out_of_memory(caught.value)
