"""The stream: one schema for file and pipe, and nothing short of the whole taken for one."""

from __future__ import annotations

import hashlib
import io
import os
import struct
import subprocess
import sys
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import google_crc32c
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gstds_cache.errors import (
    FingerprintMismatchError,
    IncompleteError,
    ProducerFailedError,
    StreamError,
    TruncatedStreamError,
    UsageError,
)
from gstds_cache.selection.run import BatchSelector
from gstds_cache.selection.selected_batch import SelectedBatch
from gstds_cache.spectral.status import Status
from gstds_cache.stream.reader import SelectionStream, open_selection, require_dataset, require_store
from gstds_cache.stream.record_writer import SelectionWriter
from gstds_cache.stream.records import Kind, Record, encode
from gstds_cache.stream.schema import Header
from gstds_cache.stream.writer import is_finished, partial_of, write_file

HEADER = Header(
    cache_fingerprint="c" * 64,
    selection_digest="d" * 64,
    items=1000,
    items_root="e" * 64,
    seed=7,
    epochs=2,
    batches_per_epoch=3,
    total_batches=6,
    total_kept=6 * 5,
    kept_per_epoch=[15, 15],
    settings={"rule": "coverage", "tolerance": 1e-4},
)


def make_selection(seq: int) -> SelectedBatch:
    rng = np.random.default_rng(seq)
    score = None if seq == 4 else rng.normal(size=5).astype(np.float32)
    nan = float("nan")
    status = Status.NOT_COMPUTED if seq == 4 else Status.BRIDGED | Status.DEGENERATE
    value, residual = (nan, nan) if seq == 4 else (0.125, float(np.float32(1e-5)))
    return SelectedBatch(seq, seq // 3, seq % 3, 20, rng.permutation(1000)[:5], score, status, value, residual)


def write(sink, count: int = 6) -> None:
    with SelectionWriter(sink, HEADER) as writer:
        for seq in range(count):
            writer.write(make_selection(seq))


def whole(group: int) -> bytes:
    sink = io.BytesIO()
    with SelectionWriter(sink, HEADER) as writer:
        for seq in range(0, 6, group):
            writer.write(*(make_selection(s) for s in range(seq, min(seq + group, 6))))
    return sink.getvalue()


SINGLY, WHOLE = whole(1), whole(6)  # a record batch per record, as they become ready; in one, as in a finished file


def read(data: bytes) -> list[SelectedBatch]:
    return list(SelectionStream(io.BytesIO(data)))


def assert_equal(a: SelectedBatch, b: SelectedBatch) -> None:
    assert (a.seq, a.epoch, a.batch_id, a.n_in, a.status) == (b.seq, b.epoch, b.batch_id, b.n_in, b.status)
    np.testing.assert_equal((a.value, a.residual), (b.value, b.residual))
    np.testing.assert_array_equal(a.kept, b.kept)
    assert a.kept.dtype == b.kept.dtype == np.int64
    if a.score is None or b.score is None:
        assert a.score is b.score
    else:
        np.testing.assert_array_equal(a.score, b.score)


def test_what_was_written_comes_back() -> None:
    stream = SelectionStream(io.BytesIO(WHOLE))
    assert stream.header == HEADER
    selections = list(stream)
    assert len(selections) == 6
    for seq, selection in enumerate(selections):
        assert_equal(selection, make_selection(seq))


def test_grouping_changes_neither_the_selection_nor_its_running_hash() -> None:
    one, six = SelectionStream(io.BytesIO(SINGLY)), SelectionStream(io.BytesIO(WHOLE))
    for a, b in zip(one, six, strict=True):
        assert_equal(a, b)
        assert one.token() == six.token()
    assert len(WHOLE) < len(SINGLY)


def test_the_documented_layout_is_the_one_in_the_file() -> None:
    """The crc and the running hash, from the columns as any Arrow reader has them and docs/stream-format.md."""
    running, end = bytes(32), []
    for row in pa.ipc.open_stream(io.BytesIO(WHOLE)).read_all().to_pylist():
        numbers = [row[name] for name in ("seq", "epoch", "batch_id", "kind", "n_in", "status", "value", "residual")]
        score = row["score"]
        body = struct.pack("<qiqbibffqq", *numbers, len(row["kept"]), -1 if score is None else len(score))
        body += np.array(row["kept"], "<i8").tobytes() + np.array(score or [], "<f4").tobytes()
        assert google_crc32c.value(body) == row["crc"]
        if row["kind"] == Kind.STREAM_END:
            end = row["kept"]
        else:
            running = hashlib.sha256(running + body).digest()
    assert end == [6, 30, *struct.unpack(">4q", running)]


def test_a_stream_that_failed_is_not_taken_for_whole_when_it_is_asked_again() -> None:
    stream = SelectionStream(io.BytesIO(SINGLY[: len(SINGLY) // 2]))
    with pytest.raises(TruncatedStreamError):
        list(stream)
    with pytest.raises(StreamError, match="failed at batch"):
        list(stream)


def test_any_arrow_reader_opens_it() -> None:
    table = pa.ipc.open_stream(io.BytesIO(WHOLE)).read_all()
    assert table.column("kind").to_pylist() == [0, 0, 0, 1, 0, 0, 0, 1, 2]
    assert table.schema.field("kept").type == pa.list_(pa.field("item", pa.int64(), nullable=False))
    assert table.column("kept").to_pylist()[3] == [15]
    assert table.column("kept").to_pylist()[-1][:2] == [6, 30]


@pytest.mark.parametrize("whole", [SINGLY, WHOLE], ids=["singly", "grouped"])
def test_every_prefix_is_recognised_as_truncated(whole: bytes) -> None:
    for cut in range(0, len(whole) - 8, 1 if whole is WHOLE else 5):
        with pytest.raises(TruncatedStreamError):
            read(whole[:cut])
    # Arrow's own end-of-stream marker, the last 8 bytes, says nothing more than the stream-end record did.
    for cut in range(len(whole) - 8, len(whole)):
        assert len(read(whole[:cut])) == 6


def test_every_boundary_between_records_is_recognised_as_truncated() -> None:
    ends = []
    sink = io.BytesIO()
    writer = SelectionWriter(sink, HEADER)
    for seq in range(6):
        writer.write(make_selection(seq))
        ends.append(len(sink.getvalue()))
    for end in ends:
        for tail in (b"", struct.pack("<II", 0xFFFFFFFF, 0)):  # with and without Arrow's end-of-stream marker
            with pytest.raises(TruncatedStreamError, match="truncated"):
                read(SINGLY[:end] + tail)


@pytest.mark.parametrize("piped", [False, True])
def test_a_length_that_is_larger_than_the_file_is_damage_and_not_memory_that_ran_out(tmp_path, piped) -> None:
    path, lengths = tmp_path / "s.arrow", 0
    for at in range(0, len(WHOLE) - 16, 4):
        (length,) = struct.unpack_from("<q", WHOLE, at)
        if not 0 < length < len(WHOLE):
            continue
        path.write_bytes(WHOLE[:at] + struct.pack("<q", length + (1 << 44)) + WHOLE[at + 8 :])
        try:
            if piped:
                with subprocess.Popen(["cat", path], stdout=subprocess.PIPE) as cat:
                    assert cat.stdout is not None
                    list(SelectionStream(cat.stdout))
            else:
                with open_selection(path) as stream:
                    list(stream)
        except StreamError as error:
            lengths += str(length + (1 << 44)) in str(error)
    assert lengths >= 2  # of a schema's or a record's body, and of a buffer


@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), whole=st.sampled_from([SINGLY, WHOLE]))
def test_a_flipped_bit_is_an_error_or_changes_nothing_that_is_read(place: float, bit: int, whole: bytes) -> None:
    damaged = bytearray(whole)
    damaged[int(place * (len(whole) - 8))] ^= 1 << bit
    try:
        stream = SelectionStream(io.BytesIO(bytes(damaged)))
        header, selections = stream.header, list(stream)
    except StreamError:
        return
    # Padding, and the header's names and digests, are not covered by a crc (digests are compared with the data set's).
    # What a trainer steps by is.
    for name in ("epochs", "batches_per_epoch", "total_batches", "total_kept", "kept_per_epoch"):
        assert getattr(header, name) == getattr(HEADER, name)
    for seq, selection in enumerate(selections):
        assert_equal(selection, make_selection(seq))


def _stream_of(records: list[Record], header: Header = HEADER) -> bytes:
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, header.to_schema()) as writer:
        for record in records:
            writer.write_batch(encode([record])[0])
    return sink.getvalue()


def test_a_record_out_of_sequence_is_named() -> None:
    with pytest.raises(StreamError, match="got batch 2, expected 1"):
        read(_stream_of([Record.data(make_selection(0)), Record.data(make_selection(2))]))


@pytest.mark.parametrize("row", [-1, 1000])
def test_a_row_out_of_range_is_named(row: int) -> None:
    bad = replace(make_selection(0), kept=np.array([3, 4, 5, 6, row]))
    with pytest.raises(StreamError, match=r"record 0 names .* outside 0..999"):
        read(_stream_of([Record.data(bad)]))


def test_a_wrong_crc_is_named() -> None:
    batch = encode([Record.data(make_selection(0))])[0]
    batch = batch.set_column(0, batch.schema.field(0), pa.array([1], pa.int64()))
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, HEADER.to_schema()) as writer:
        writer.write_batch(batch)
    with pytest.raises(StreamError, match="record 1 is damaged: its crc"):
        read(sink.getvalue())


def test_totals_that_do_not_match_the_records_are_refused() -> None:
    records = [Record.data(make_selection(seq)) for seq in range(3)]
    end = Record.mark(Kind.STREAM_END, 3, 1, [6, 30, 0, 0, 0, 0])
    with pytest.raises(StreamError, match="totals do not match"):
        read(_stream_of([*records, Record.mark(Kind.EPOCH_END, 3, 0, [15]), end]))
    with pytest.raises(StreamError, match="epoch 0 ends with"):
        read(_stream_of([*records, Record.mark(Kind.EPOCH_END, 3, 0, [14])]))


@pytest.mark.parametrize("kept", [[15], [15, 16]], ids=str)
def test_a_header_whose_epochs_do_not_add_up_is_refused(kept) -> None:
    with pytest.raises(StreamError, match="header is damaged"):
        read(_stream_of([], replace(HEADER, kept_per_epoch=kept)))


def test_an_epoch_that_keeps_other_than_the_header_promised_is_refused() -> None:
    records = [Record.data(make_selection(seq)) for seq in range(3)]
    with pytest.raises(StreamError, match="the header promises 14"):
        read(_stream_of([*records, Record.mark(Kind.EPOCH_END, 3, 0, [15])], replace(HEADER, kept_per_epoch=[14, 16])))


def test_another_version_or_another_arrow_stream_is_refused() -> None:
    with pytest.raises(StreamError, match="format 1"):
        read(_stream_of([], replace(HEADER, format=1)))
    sink = io.BytesIO()
    pa.ipc.new_stream(sink, pa.schema([("a", pa.int8())])).close()
    with pytest.raises(StreamError, match="no selection"):
        read(sink.getvalue())
    with pytest.raises(TruncatedStreamError, match="no selection"):
        read(b"hello")


def test_a_producer_that_fails_says_so_to_the_reader() -> None:
    sink = io.BytesIO()
    with pytest.raises(ZeroDivisionError), SelectionWriter(sink, HEADER) as writer:  # noqa: PT012
        writer.write(make_selection(0))
        raise ZeroDivisionError("the reason")
    with pytest.raises(ProducerFailedError, match="ZeroDivisionError: the reason"):
        read(sink.getvalue())


def test_a_producer_that_stops_early_is_an_error() -> None:
    with pytest.raises(StreamError, match="5 batches written, the header promises 6"):
        write(io.BytesIO(), count=5)


def test_a_pipe_is_read_record_by_record() -> None:
    readable, writable = os.pipe()
    with os.fdopen(writable, "wb", buffering=0) as sink, os.fdopen(readable, "rb") as source:
        writer = SelectionWriter(sink, HEADER)
        writer.write(make_selection(0))
        stream = SelectionStream(source)
        batches = iter(stream)
        assert_equal(next(batches), make_selection(0))  # though the producer is not done
        writer.write(make_selection(1))
        assert_equal(next(batches), make_selection(1))


def test_a_selection_of_another_data_set_or_cache_is_refused(tmp_path: Path) -> None:
    require_dataset(HEADER, items=1000, items_root="e" * 64, uri="x")
    require_store(HEADER, fingerprint="c" * 64, where=tmp_path)
    for items, root in ((999, "e" * 64), (1000, "f" * 64)):
        with pytest.raises(FingerprintMismatchError, match="another data set"):
            require_dataset(HEADER, items=items, items_root=root, uri="x")
    with pytest.raises(FingerprintMismatchError, match="from cache cccccccccccc"):
        require_store(HEADER, fingerprint="x" * 64, where=tmp_path)


class FakeSelector(BatchSelector):
    """Stands where BatchSelector stands, with the selections of this file."""

    def __init__(self, fail_at: int = 99) -> None:
        self.fail_at, self.computed, self.digest = fail_at, [], "d" * 64

    def run(self, start: int = 0):
        for seq in range(start, 6):
            if seq == self.fail_at:
                raise KeyboardInterrupt
            self.computed.append(seq)
            self.wait()
            yield make_selection(seq)

    def wait(self) -> None:
        pass


@pytest.fixture
def header_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gstds_cache.stream.writer.header_of", lambda _selector: HEADER)


@pytest.mark.usefixtures("header_of")
@pytest.mark.parametrize("fail_at", [0, 1, 3, 5])
def test_an_interrupted_file_goes_on_where_it_stopped(tmp_path: Path, fail_at: int) -> None:
    path = tmp_path / "s.arrow"
    with pytest.raises(KeyboardInterrupt):
        list(write_file(FakeSelector(fail_at), path))
    assert not path.exists()
    rest = FakeSelector()
    list(write_file(rest, path))
    assert rest.computed == list(range(fail_at, 6))
    assert path.read_bytes() == WHOLE
    assert sorted(p.name for p in tmp_path.iterdir()) == [".s.arrow.lock", "s.arrow"]


@pytest.mark.usefixtures("header_of")
def test_an_interrupt_between_two_batches_loses_neither(tmp_path: Path, monkeypatch) -> None:
    path, calls = tmp_path / "s.arrow", [0]

    def clock() -> float:
        calls[0] += 1
        if calls[0] == 6:  # one at a group's first batch, one at each
            raise KeyboardInterrupt
        return 0.0

    with monkeypatch.context() as patch:
        patch.setattr("gstds_cache.stream.record_writer.time", SimpleNamespace(monotonic=clock))
        with pytest.raises(KeyboardInterrupt):
            list(write_file(FakeSelector(), path))
    rest = FakeSelector()
    list(write_file(rest, path))
    assert rest.computed == [5]
    assert path.read_bytes() == WHOLE


@pytest.mark.usefixtures("header_of")
def test_batches_that_come_fast_are_written_once_in_full_groups(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("gstds_cache.stream.writer._finish", lambda *_: pytest.fail("written once more"))
    now, selector = [0.0], FakeSelector()  # whose first batch takes a minute, as where kernels are compiled
    monkeypatch.setattr("gstds_cache.stream.record_writer.time", SimpleNamespace(monotonic=lambda: now[0]))
    selector.wait = lambda: now.__setitem__(0, max(now[0], 60.0))
    list(write_file(selector, tmp_path / "s.arrow"))
    assert (tmp_path / "s.arrow").read_bytes() == WHOLE


@pytest.mark.usefixtures("header_of")
def test_batches_that_come_slowly_are_on_the_disk_before_the_next_ones(tmp_path: Path, monkeypatch) -> None:
    now = [0.0]
    monkeypatch.setattr("gstds_cache.stream.record_writer.time", SimpleNamespace(monotonic=lambda: now[0]))
    path, selector = tmp_path / "s.arrow", FakeSelector()
    selector.wait = lambda: now.__setitem__(0, now[0] + 2.0)  # the third batch is 4 s behind the first
    running = write_file(selector, path)
    for last in (2, 5):
        assert next(running).seq == last - 2
        assert selector.computed[-1] == last
        stream = SelectionStream(io.BytesIO(partial_of(path).read_bytes()))
        assert [batch.seq for batch in islice(stream, last + 1)] == list(range(last + 1))
        assert [next(running).seq for _ in range(2)] == [last - 1, last]
    list(running)
    assert path.read_bytes() == WHOLE


@pytest.mark.usefixtures("header_of")
def test_a_killed_file_goes_on_from_its_last_whole_record(tmp_path: Path) -> None:
    path = tmp_path / "s.arrow"
    (tmp_path / ".s.arrow.partial").write_bytes(SINGLY[: len(SINGLY) * 2 // 3])
    rest = FakeSelector()
    list(write_file(rest, path))
    assert 0 < rest.computed[0] < 6
    assert path.read_bytes() == WHOLE


@pytest.mark.usefixtures("header_of")
def test_two_processes_never_write_one_selection(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from gstds_cache.files.lock import exclusive\n"
        "with exclusive(Path(sys.argv[1]), of=Path('s')): print('held', flush=True); sys.stdin.read()"
    )
    words = [sys.executable, "-c", program, str(tmp_path / ".s.arrow.lock")]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(IncompleteError, match="another process"):
            list(write_file(FakeSelector(), tmp_path / "s.arrow"))
        assert not (tmp_path / "s.arrow").exists()
        other.communicate(b"")
    list(write_file(FakeSelector(), tmp_path / "s.arrow"))
    assert (tmp_path / "s.arrow").read_bytes() == WHOLE


@pytest.mark.usefixtures("header_of")
def test_a_file_of_something_else_is_never_replaced_unasked(tmp_path: Path) -> None:
    path = tmp_path / "s.arrow"
    assert not is_finished(FakeSelector(), path)
    path.write_bytes(WHOLE)
    assert is_finished(FakeSelector(), path)
    for content in (b"my notes", WHOLE[:-50], _stream_of([], replace(HEADER, selection_digest="x"))):
        path.write_bytes(content)
        with pytest.raises(UsageError, match="`force=True`"):
            is_finished(FakeSelector(), path)
        assert path.read_bytes() == content
        assert not is_finished(FakeSelector(), path, replace=True)


def test_a_missing_file_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="gstds-select STORE"):
        open_selection(tmp_path / "no.arrow")
