"""Pipes: a waiting reader gets each batch at once, a slow one holds the producer back, a vanished one ends it."""

from __future__ import annotations

import errno
import os
import threading
import time
from pathlib import Path

import pytest
from small_store import fill

from gstds_cache.config import SelectConfig
from gstds_cache.errors import ProducerFailedError
from gstds_cache.selection.run import BatchSelector
from gstds_cache.selection.selected_batch import SelectedBatch
from gstds_cache.store.reader import EmbeddingStore
from gstds_cache.stream.pipe import AHEAD, replay, write_pipe
from gstds_cache.stream.reader import SelectionStream, open_selection
from gstds_cache.stream.writer import Storing, header_of, partial_of, stored_header, write_file


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> EmbeddingStore:
    where = tmp_path_factory.mktemp("pipe") / "store"
    fill(where)
    return EmbeddingStore(where)


def selector(store: EmbeddingStore, epochs: int = 20, fail_at: int = -1) -> BatchSelector:
    made = BatchSelector(store, SelectConfig(batch_size=8, epochs=epochs, knn=3, rule="random", device="cpu"))
    run = made.run

    def failing(start: int = 0):
        for selection in run(start):
            if selection.seq == fail_at:
                raise ZeroDivisionError("the reason")
            yield selection

    made.run = failing
    return made


def pipe():
    readable, writable = os.pipe()
    return os.fdopen(readable, "rb"), os.fdopen(writable, "wb")


def produce(made: BatchSelector, sink, **options) -> tuple[threading.Thread, list[BaseException]]:
    errors: list[BaseException] = []

    def run() -> None:
        try:
            with sink:
                list(write_pipe(made, sink, **options))
        except (ZeroDivisionError, BrokenPipeError) as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, errors


def kept(stream: SelectionStream) -> list[list[int]]:
    return [selection.kept.tolist() for selection in stream]


def test_a_pipe_is_kept_for_the_next_time_and_replayed(store: EmbeddingStore, tmp_path: Path) -> None:
    list(write_file(selector(store), tmp_path / "reference.arrow"))
    source, sink = pipe()
    thread, errors = produce(selector(store), sink, keep=tmp_path / "kept.arrow")
    with source:
        seen = kept(SelectionStream(source))
    thread.join()
    assert not errors
    assert (tmp_path / "kept.arrow").read_bytes() == (tmp_path / "reference.arrow").read_bytes()
    assert stored_header(tmp_path / "kept.arrow") == header_of(selector(store))
    source, sink = pipe()
    copying = threading.Thread(target=lambda: (replay(tmp_path / "kept.arrow", sink), sink.close()))
    copying.start()
    with source:
        assert kept(SelectionStream(source)) == seen
    copying.join()


def test_an_interrupted_pipe_goes_on_from_what_was_kept(store: EmbeddingStore, tmp_path: Path) -> None:
    source, sink = pipe()
    thread, errors = produce(selector(store, fail_at=31), sink, keep=tmp_path / "kept.arrow")
    with source, pytest.raises(ProducerFailedError, match="batch 31: ZeroDivisionError: the reason"):
        kept(SelectionStream(source))
    thread.join()
    assert isinstance(errors[0], ZeroDivisionError)
    assert not (tmp_path / "kept.arrow").exists()
    source, sink = pipe()
    started: list[int] = []
    rest = selector(store)
    run = rest.run
    rest.run = lambda start=0: (started.append(start), run(start))[1]
    thread, errors = produce(rest, sink, keep=tmp_path / "kept.arrow")
    with source:
        assert len(kept(SelectionStream(source))) == rest.plan.total_batches
    thread.join()
    assert (started, errors) == ([31], [])
    with open_selection(tmp_path / "kept.arrow") as stream:
        assert len(kept(stream)) == rest.plan.total_batches


def test_a_place_that_cannot_keep_it_is_said_and_the_pipe_served(store: EmbeddingStore, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    source, sink = pipe()
    notes: list[str] = []
    thread, errors = produce(selector(store), sink, keep=tmp_path / "file" / "kept.arrow", notify=notes.append)
    with source:
        assert len(kept(SelectionStream(source))) == selector(store).plan.total_batches
    thread.join()
    assert not errors
    assert "not kept" in notes[0]


def test_a_disk_that_fills_ends_the_keeping_and_the_pipe_is_served(store, tmp_path, monkeypatch) -> None:
    write = Storing.write

    def full_at_10(self: Storing, *selections: SelectedBatch) -> None:
        if any(selection.seq == 10 for selection in selections):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(self, *selections)

    monkeypatch.setattr(Storing, "write", full_at_10)
    source, sink = pipe()
    notes: list[str] = []
    thread, errors = produce(selector(store), sink, keep=tmp_path / "kept.arrow", notify=notes.append)
    with source:
        assert len(kept(SelectionStream(source))) == selector(store).plan.total_batches
    thread.join()
    assert not errors
    assert [note for note in notes if "No space left on device" in note] == notes != []
    assert not list(tmp_path.glob("*.arrow"))
    assert not partial_of(tmp_path / "kept.arrow").exists()  # the room is given back


def test_a_stalled_reader_holds_the_producer_back_and_a_vanished_one_ends_it(store: EmbeddingStore) -> None:
    source, sink = pipe()
    made = selector(store, epochs=4000)
    thread, errors = produce(made, sink)
    stream = SelectionStream(source)
    next(iter(stream))
    before = -1
    while made.counts.batches != before:  # until it stands still
        before = made.counts.batches
        time.sleep(0.3)
    # What Linux holds in a pipe, 64 KiB, at above 100 bytes a batch; the queue; one group in hand.
    assert before < 2 * AHEAD + 65536 // 100 < made.plan.total_batches / 4
    assert thread.is_alive()
    source.close()
    thread.join(timeout=30)
    assert not thread.is_alive()
    assert isinstance(errors[0], BrokenPipeError)
