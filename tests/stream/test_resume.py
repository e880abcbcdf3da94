"""A consumer that goes on from its token reads what it would have read: at every batch, from a file and a pipe."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from gstds_cache.errors import FingerprintMismatchError, StreamError, UsageError
from gstds_cache.selection.selected_batch import SelectedBatch
from gstds_cache.spectral.status import Status
from gstds_cache.stream.reader import SelectionStream, open_selection
from gstds_cache.stream.record_writer import SelectionWriter, grouped
from gstds_cache.stream.resume import ResumeToken
from gstds_cache.stream.schema import Header

BATCHES = 12
HEADER = Header("c" * 64, "d" * 64, 100, "e" * 64, 0, 3, 4, BATCHES, 5 * BATCHES, [20, 20, 20], {})


def selections() -> list[SelectedBatch]:
    rng = np.random.default_rng(0)
    return [
        SelectedBatch(
            seq, seq // 4, seq % 4, 20, rng.permutation(100)[:5], rng.random(5, np.float32), Status(0), 0.5, 0.0
        )
        for seq in range(BATCHES)
    ]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    with (tmp_path / "s.arrow").open("wb") as sink, SelectionWriter(sink, HEADER) as writer:
        for start in range(0, BATCHES, 5):  # groups that end at no epoch
            writer.write(*selections()[start : start + 5])
    return tmp_path / "s.arrow"


def read(stream: SelectionStream, count: int = BATCHES) -> list[list[int]]:
    return [selection.kept.tolist() for selection, _ in zip(stream, range(count), strict=False)]


@pytest.mark.parametrize("first", range(BATCHES + 1))  # 0, every batch, the exact ends of epochs, the end
def test_resume_at_every_batch_and_twice(file: Path, first: int) -> None:
    whole = [selection.kept.tolist() for selection in selections()]
    with open_selection(file) as stream:
        seen = [next(iter(stream)).kept.tolist() for _ in range(first)]
        token = ResumeToken.parse(json.loads(json.dumps(stream.token().as_dict())))
    assert (token.next_seq, token.epoch, token.kept) == (first, first // 4, 5 * first)
    for source in (file, io.BytesIO(file.read_bytes())):
        again = (
            open_selection(source, resume=token) if isinstance(source, Path) else SelectionStream(source, resume=token)
        )
        with again:
            assert again.token() == token
            middle = [next(iter(again)).kept.tolist() for _ in range((BATCHES - first) // 2)]
            second = again.token()
        with open_selection(file, resume=second) as rest:
            assert seen + middle + [selection.kept.tolist() for selection in rest] == whole
            assert rest.next_seq == BATCHES


def test_a_token_of_something_else_is_refused(file: Path, tmp_path: Path) -> None:
    with open_selection(file) as stream:
        next(iter(stream))
        token = stream.token()
    for other in (replace(token, selection_digest="0" * 64), replace(token, sha256="0" * 64), replace(token, kept=4)):
        with pytest.raises(FingerprintMismatchError):
            open_selection(file, resume=other)
    with pytest.raises(StreamError, match="batch 13, of 12"):
        open_selection(file, resume=replace(token, next_seq=13))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"next_seq": -1}, "next_seq"),
        ({"next_seq": True}, "next_seq"),
        ({"sha256": "zz"}, "sha256"),
        ({"x": 1}, "fields"),
    ],
    ids=str,
)
def test_a_malformed_token_names_the_field(file: Path, change: dict[str, object], words: str) -> None:
    with open_selection(file) as stream:
        fields = stream.token().as_dict() | change
    with pytest.raises(UsageError, match=words):
        ResumeToken.parse(fields)


def test_groups_are_bounded_by_records_and_by_rows() -> None:
    few, many = selections()[0], replace(selections()[0], kept=np.arange(40_000), score=None)
    assert [len(group) for group in grouped([few] * 600)] == [256, 256, 88]
    assert [len(group) for group in grouped([many] * 5)] == [2, 2, 1]
