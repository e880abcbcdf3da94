"""Format 3: candidates are read as they were written, nothing damaged is taken for them, and format 2 is as it was."""

from __future__ import annotations

import io
import struct
from dataclasses import replace
from hashlib import sha256

import google_crc32c
import numpy as np
import offered
import pyarrow as pa
import pytest

from gstds_cache.errors import ProducerFailedError, StreamError, TruncatedStreamError
from gstds_cache.selection.selected_batch import Candidates, SelectedBatch
from gstds_cache.spectral.status import Status
from gstds_cache.stream.reader import SelectionStream
from gstds_cache.stream.record_writer import SelectionWriter, grouped
from gstds_cache.stream.schema import CANDIDATE_FIELDS, Header

HEADER = offered.header()
EXPECTED = "c2fc69c4c2f9ce740c0b21022126c64da938da58e9c48de988db6a63ddf9e425"  # of the version before candidates
BATCHES = [offered.batch(seq) for seq in range(HEADER.total_batches)]


def written(batches: list[SelectedBatch] = BATCHES, header: Header = HEADER, *, group: int = 1) -> bytes:
    sink = io.BytesIO()
    with SelectionWriter(sink, header) as writer:
        for start in range(0, len(batches), group):
            writer.write(*batches[start : start + group])
    return sink.getvalue()


def read(data: bytes) -> list[SelectedBatch]:
    return list(SelectionStream(io.BytesIO(data)))


@pytest.mark.parametrize("group", [1, 5, 12])
def test_candidates_come_back_as_they_were_written_however_they_are_grouped(group) -> None:
    stream = SelectionStream(io.BytesIO(written(group=group)))
    for got, wrote in zip(stream, BATCHES, strict=True):
        assert (got.seq, got.epoch, got.batch_id, got.n_in) == (wrote.seq, wrote.epoch, wrote.batch_id, 18)
        assert got.count == offered.KEEP[got.batch_id] == got.candidates.keep
        assert got.score is None
        for name in ("stratum", "reference", "prior"):
            mine, theirs = getattr(got.candidates, name), getattr(wrote.candidates, name)
            np.testing.assert_array_equal(mine, theirs)
            assert mine.dtype == theirs.dtype
        np.testing.assert_array_equal(got.kept, wrote.kept)
        assert got.status == Status.CONVERGED
    assert stream.token().kept == HEADER.total_kept == 3 * sum(offered.KEEP)
    assert len(list(grouped(BATCHES))) == 1


def test_checksum_and_hash_are_over_the_bytes_that_the_document_names() -> None:
    data = written()
    table = pa.ipc.open_stream(io.BytesIO(data)).read_all()
    assert table.schema.names == CANDIDATE_FIELDS.names
    running = bytes(32)
    for row in table.to_pylist():
        rows, prior = row["rows"], row["prior"]
        packed = struct.pack("<iq", row["epoch"], row["batch_id"])
        packed = struct.pack("<q", row["seq"]) + packed + struct.pack("<bii", row["kind"], row["n_in"], row["keep"])
        packed += struct.pack("<bffqq", row["status"], row["value"], row["residual"], len(rows), len(prior))
        packed += struct.pack(f"<{len(rows)}q", *rows) + struct.pack(f"<{len(prior)}h", *row["stratum"])
        packed += struct.pack(f"<{len(prior)}f", *row["reference"]) + struct.pack(f"<{len(prior)}f", *prior)
        assert google_crc32c.value(packed) == row["crc"]
        if row["kind"] == 2:
            assert row["rows"] == [12, HEADER.total_kept, *struct.unpack(">4q", running)]
        else:
            running = sha256(running + packed).digest()


def test_a_stream_cut_at_any_record_or_inside_is_truncated() -> None:
    data = written()
    for end in range(len(data) // 3, len(data) - 9, 97):
        with pytest.raises(TruncatedStreamError):
            read(data[:end])


def test_a_flipped_bit_in_any_list_is_found() -> None:
    data = written(group=12)
    for needle in (BATCHES[3].kept, BATCHES[3].candidates.reference, BATCHES[3].candidates.prior):
        at = data.index(needle.tobytes()) + needle.nbytes // 2
        damaged = bytearray(data)
        damaged[at] ^= 4
        with pytest.raises(StreamError, match="its crc does not match"):
            read(bytes(damaged))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"keep": 19}, "19 of 18 rows are to be drawn"),
        ({"keep": 0}, "0 of 18 rows"),
        ({"prior": np.full(18, -1, np.float32)}, "a prior is below 0"),
        ({"reference": np.full(18, np.inf, np.float32)}, "is no number"),
        ({"stratum": np.full(18, -3, np.int16)}, "a stratum is below 0"),
    ],
)
def test_candidates_that_cannot_be_drawn_from_are_refused(changes, words) -> None:
    batches = [*BATCHES]
    batches[1] = replace(batches[1], candidates=Candidates(**(vars(batches[1].candidates) | changes)))
    data = io.BytesIO()
    writer = SelectionWriter(data, HEADER)
    writer.write(*batches[:3])
    data.seek(0)
    with pytest.raises(StreamError, match=words):
        list(SelectionStream(data))


def test_rows_outside_the_data_set_or_twice_are_refused() -> None:
    for row, words in ((offered.ITEMS, "one outside 0..71"), (int(BATCHES[0].kept[1]), "a row is there twice")):
        rows = BATCHES[0].kept.copy()
        rows[0] = row
        data = io.BytesIO()
        SelectionWriter(data, HEADER).write(replace(BATCHES[0], kept=rows))
        data.seek(0)
        with pytest.raises(StreamError, match=words):
            list(SelectionStream(data))


def test_a_producer_that_fails_says_so() -> None:
    sink = io.BytesIO()
    writer = SelectionWriter(sink, HEADER)
    writer.write(BATCHES[0])
    writer.fail("made to fail")
    with pytest.raises(ProducerFailedError, match="made to fail"):
        read(sink.getvalue())


def test_kept_rows_and_candidates_do_not_go_into_one_selection() -> None:
    writer = SelectionWriter(io.BytesIO(), HEADER)
    with pytest.raises(StreamError, match="do not go into one selection"):
        writer.write(replace(BATCHES[0], candidates=None))
    writer = SelectionWriter(io.BytesIO(), replace(HEADER, format=2))
    with pytest.raises(StreamError, match="do not go into one selection"):
        writer.write(BATCHES[0])


def test_a_format_that_is_not_known_is_refused_by_its_number() -> None:
    sink = io.BytesIO()
    schema = CANDIDATE_FIELDS.with_metadata(HEADER.to_schema().metadata | {b"gstds.format": b"4"})
    pa.ipc.new_stream(sink, schema).close()
    with pytest.raises(StreamError, match="selection format 4 is not supported, expected 2 or 3"):
        read(sink.getvalue())
    swapped = CANDIDATE_FIELDS.with_metadata(replace(HEADER, format=2).to_schema().metadata)
    sink = io.BytesIO()
    pa.ipc.new_stream(sink, swapped).close()
    with pytest.raises(StreamError, match="columns are not format 2's"):
        read(sink.getvalue())


def test_a_reader_goes_on_from_its_token() -> None:
    data = written(group=12)
    first = SelectionStream(io.BytesIO(data))
    for _ in range(5):
        next(iter(first))
    token = first.token()
    assert token.kept == sum(batch.count for batch in BATCHES[:5])
    rest = SelectionStream(io.BytesIO(data), resume=token)
    assert [batch.seq for batch in rest] == list(range(5, 12))


def test_the_bytes_of_a_selection_of_kept_rows_are_those_of_before() -> None:
    header = Header("c" * 64, "d" * 64, 9, "e" * 64, 7, 1, 2, 2, 5, [5], {"rule": "coverage"})
    sink = io.BytesIO()
    with SelectionWriter(sink, header) as writer:
        score = np.array([0.5, -0.25], np.float32)
        writer.write(SelectedBatch(0, 0, 0, 4, np.array([1, 8]), score, Status.BRIDGED, 0.125, 1e-6))
        writer.write(SelectedBatch(1, 0, 1, 5, np.array([0, 2, 3]), None, Status.NOT_COMPUTED, np.nan, np.nan))
    rows = pa.ipc.open_stream(io.BytesIO(sink.getvalue())).read_all()
    words = rows.column("kept").to_pylist()[-1]
    assert sha256(struct.pack(">4q", *words[2:])).hexdigest() == EXPECTED
