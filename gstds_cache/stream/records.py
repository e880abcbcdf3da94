"""Records to Arrow record batches and back, many rows at a time.

A record's *packed* bytes are one run of memory (docs/stream-format.md): 50 bytes of numbers, the kept rows, the
scores. The crc is taken over them, and the running SHA-256 is a chain over them, ``h = sha256(h + packed)``, so that
32 bytes say all that is needed to go on from any record, however records were grouped into record batches.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from hashlib import sha256
from itertools import pairwise

import google_crc32c
import numpy as np
import pyarrow as pa

from gstds_cache.selection.selected_batch import Candidates, SelectedBatch
from gstds_cache.spectral.status import Status
from gstds_cache.stream.schema import FIELDS

NUMBERS = np.dtype(
    [
        ("seq", "<i8"),
        ("epoch", "<i4"),
        ("batch_id", "<i8"),
        ("kind", "i1"),
        ("n_in", "<i4"),
        ("status", "i1"),
        ("value", "<f4"),
        ("residual", "<f4"),
        ("kept_length", "<i8"),
        ("score_length", "<i8"),  # -1 where there is no score
    ]
)
GROUP_RECORDS, GROUP_ROWS = 256, 65_536  # a record batch is closed at whichever comes first: below 1 MB
NO_RECORD = bytes(32)  # the running hash before the first record
STATUS = {int(status): status for status in map(Status, range(64))}  # making a flag takes as long as the rest


class Kind(IntEnum):
    """What a record is."""

    DATA = 0
    EPOCH_END = 1
    STREAM_END = 2
    ERROR = 3


@dataclass(frozen=True)
class Record:
    """One row of a stream; what is in it is said in :mod:`gstds_cache.stream.schema`."""

    seq: int
    epoch: int
    batch_id: int
    kind: Kind
    n_in: int
    kept: np.ndarray
    score: np.ndarray | None
    status: int
    value: float
    residual: float
    candidates: Candidates | None = None

    @classmethod
    def data(cls, selection: SelectedBatch) -> Record:
        """The record of a selected batch."""
        return cls(
            selection.seq,
            selection.epoch,
            selection.batch_id,
            Kind.DATA,
            selection.n_in,
            selection.kept,
            selection.score,
            int(selection.status),
            selection.value,
            selection.residual,
            selection.candidates,
        )

    @classmethod
    def mark(cls, kind: Kind, seq: int, epoch: int, numbers: list[int]) -> Record:
        """A record that is no batch: epoch end, stream end or error."""
        return cls(seq, epoch, -1, kind, 0, np.array(numbers, np.int64), None, 0, float("nan"), float("nan"))


def encode(records: Sequence[Record]) -> tuple[pa.RecordBatch, list[bytes]]:
    """Put records into one Arrow record batch.

    Args:
        records: At least one.

    Returns:
        The record batch, and the packed bytes of each record.
    """
    kept_lengths = [len(record.kept) for record in records]
    score_lengths = [-1 if record.score is None else len(record.score) for record in records]
    numbers = np.array(
        [
            (r.seq, r.epoch, r.batch_id, r.kind, r.n_in, r.status, r.value, r.residual, k, s)
            for r, k, s in zip(records, kept_lengths, score_lengths, strict=True)
        ],
        NUMBERS,
    )
    kept = [np.ascontiguousarray(record.kept, "<i8") for record in records]
    score = [np.ascontiguousarray(() if record.score is None else record.score, "<f4") for record in records]
    whole, size = numbers.tobytes(), NUMBERS.itemsize
    packed = [
        whole[row * size : (row + 1) * size] + rows.tobytes() + scores.tobytes()
        for row, (rows, scores) in enumerate(zip(kept, score, strict=True))
    ]
    columns = {
        "kept": _lists("kept", kept, None),
        "score": _lists("score", score, np.array([length < 0 for length in score_lengths])),
        "crc": pa.array(np.array([google_crc32c.value(body) for body in packed], np.uint32)),
    }
    arrays = [
        columns[name] if name in columns else pa.array(np.ascontiguousarray(numbers[name])) for name in FIELDS.names
    ]
    return pa.RecordBatch.from_arrays(arrays, schema=FIELDS), packed


def _lists(name: str, parts: list[np.ndarray], null: np.ndarray | None) -> pa.ListArray:
    offsets = np.zeros(len(parts) + 1, np.int32)
    np.cumsum([len(part) for part in parts], out=offsets[1:])
    mask = None if null is None or not null.any() else pa.array(null)
    return pa.ListArray.from_arrays(
        pa.array(offsets), pa.array(np.concatenate(parts)), type=FIELDS.field(name).type, mask=mask
    )


class Rows:
    """The rows of one Arrow record batch, taken apart once for all of them.

    Attributes:
        kept: All kept rows of the batch, int64, writable; row ``r`` has ``kept[starts[r]:starts[r + 1]]``.
        columns: An iterator over the rows in order: seq, epoch, batch_id, kind, n_in, status, value, residual, packed
            bytes, kept, score.
        damaged: The first row whose crc is not that of its columns; None where there is none.
    """

    def __init__(self, batch: pa.RecordBatch) -> None:
        """Take a record batch with the columns of a stream apart; no row is looked at yet.

        Raises:
            ValueError: A column holds nulls where there may be none.
        """
        column = {name: batch.column(position) for position, name in enumerate(FIELDS.names)}
        for name, array in column.items():
            if name != "score" and array.null_count:
                raise ValueError(f"column {name} holds nulls")
        starts, self.kept = values_of(column["kept"])
        score_starts, score = values_of(column["score"])
        numbers = np.empty(batch.num_rows, NUMBERS)
        plain = []
        for name in ("seq", "epoch", "batch_id", "kind", "n_in", "status", "value", "residual"):
            numbers[name] = values = column[name].to_numpy()
            plain.append(values.tolist())
        numbers["kept_length"] = np.diff(starts)
        numbers["score_length"] = np.diff(score_starts)
        self.starts = starts.tolist()
        kept_parts = [self.kept[a:b] for a, b in pairwise(self.starts)]
        score_parts: list[np.ndarray | None] = [score[a:b] for a, b in pairwise(score_starts.tolist())]
        if column["score"].null_count:
            for row in np.flatnonzero(column["score"].is_null().to_numpy(zero_copy_only=False)).tolist():
                numbers["score_length"][row] = -1
                score_parts[row] = None
        heads = numbers.view(f"V{NUMBERS.itemsize}").tolist()
        scores = [b"" if part is None else part for part in score_parts]
        packed = [b"".join(parts) for parts in zip(heads, kept_parts, scores, strict=True)]  # type: ignore[arg-type]
        self.columns = zip(*plain, packed, kept_parts, score_parts, strict=True)
        crcs = zip(map(google_crc32c.value, packed), column["crc"].to_numpy().tolist(), strict=True)
        self.damaged = next((row for row, (got, recorded) in enumerate(crcs) if got != recorded), None)

    def outside(self, items: int) -> frozenset[int]:
        """Rows of the batch that name an item below 0 or from ``items`` on."""
        bad = np.flatnonzero(self.kept.view(np.uint64) >= items)  # a negative number is a huge one
        return frozenset((np.searchsorted(self.starts, bad, side="right") - 1).tolist()) if bad.size else frozenset()


def values_of(column: pa.ListArray) -> tuple[np.ndarray, np.ndarray]:
    """Offsets from 0, and a writable copy of what lies between the first and the last."""
    offsets = column.offsets.to_numpy().astype(np.int64)
    values = column.values.to_numpy()[offsets[0] : offsets[-1]].copy()
    return offsets - offsets[0], values


def next_hash(before: bytes, packed: bytes) -> bytes:
    """The running SHA-256 after one more record."""
    return sha256(before + packed).digest()


def sha_words(digest: bytes) -> list[int]:
    """A SHA-256 digest as four big-endian signed 64-bit integers, as the stream-end record holds it."""
    return list(struct.unpack(">4q", digest))
