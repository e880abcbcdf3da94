"""Records of candidates to Arrow record batches and back: what :mod:`gstds_cache.stream.records` does, for format 3."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import google_crc32c
import numpy as np
import pyarrow as pa

from gstds_cache.selection.selected_batch import Candidates
from gstds_cache.stream.records import Record, Rows, values_of
from gstds_cache.stream.schema import CANDIDATE_FIELDS

NUMBERS = np.dtype(
    [
        ("seq", "<i8"),
        ("epoch", "<i4"),
        ("batch_id", "<i8"),
        ("kind", "i1"),
        ("n_in", "<i4"),
        ("keep", "<i4"),
        ("status", "i1"),
        ("value", "<f4"),
        ("residual", "<f4"),
        ("rows_length", "<i8"),
        ("prior_length", "<i8"),  # 0 in marks
    ]
)
LISTS = {"rows": "<i8", "stratum": "<i2", "reference": "<f4", "prior": "<f4"}
_NONE = Candidates(0, np.zeros(0, np.int16), np.zeros(0, np.float32), np.zeros(0, np.float32))


def encode_candidates(records: Sequence[Record]) -> tuple[pa.RecordBatch, list[bytes]]:
    """Put records of candidates, and marks, into one Arrow record batch.

    Args:
        records: At least one.

    Returns:
        The record batch, and the packed bytes of each record.
    """
    numbers = np.zeros(len(records), NUMBERS)
    parts: dict[str, list[np.ndarray]] = {name: [] for name in LISTS}
    for number, record in zip(numbers, records, strict=True):
        offered = record.candidates or _NONE
        number["keep"], number["kind"], number["status"] = offered.keep, record.kind, record.status
        for name in ("seq", "epoch", "batch_id", "n_in", "value", "residual"):
            number[name] = getattr(record, name)
        lists = (record.kept, offered.stratum, offered.reference, offered.prior)
        for (name, kind), values in zip(LISTS.items(), lists, strict=True):
            parts[name].append(np.ascontiguousarray(values, kind))
        number["rows_length"], number["prior_length"] = len(record.kept), len(offered.prior)
    packed = _packed(numbers, parts)
    columns = {name: _lists(name, lists) for name, lists in parts.items()}
    columns["crc"] = pa.array(np.array([google_crc32c.value(body) for body in packed], np.uint32))
    arrays = [
        columns[name] if name in columns else pa.array(np.ascontiguousarray(numbers[name]))
        for name in CANDIDATE_FIELDS.names
    ]
    return pa.RecordBatch.from_arrays(arrays, schema=CANDIDATE_FIELDS), packed


def _packed(numbers: np.ndarray, parts: dict[str, list[np.ndarray]]) -> list[bytes]:
    """The bytes over which checksum and hash are taken: the numbers of a record, then its lists."""
    lists = zip(*(parts[name] for name in LISTS), strict=True)
    return [
        number.tobytes() + b"".join(values.tobytes() for values in record)
        for number, record in zip(numbers, lists, strict=True)
    ]


def _lists(name: str, parts: list[np.ndarray]) -> pa.ListArray:
    offsets = np.zeros(len(parts) + 1, np.int32)
    np.cumsum([len(part) for part in parts], out=offsets[1:])
    kind = CANDIDATE_FIELDS.field(name).type
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.concatenate(parts)), type=kind)


class CandidateRows(Rows):
    """The rows of one Arrow record batch of candidates, as :class:`~gstds_cache.stream.records.Rows` has them.

    In ``columns`` the place of the score holds the record's :class:`Candidates`.
    """

    def __init__(self, batch: pa.RecordBatch) -> None:
        """Take a record batch with the columns of candidates apart.

        Raises:
            ValueError: A column holds nulls.
        """
        column = {name: batch.column(position) for position, name in enumerate(CANDIDATE_FIELDS.names)}
        for name, array in column.items():
            if array.null_count:
                raise ValueError(f"column {name} holds nulls")
        numbers = np.zeros(batch.num_rows, NUMBERS)
        plain: dict[str, list[Any]] = {}
        for name in ("seq", "epoch", "batch_id", "kind", "n_in", "keep", "status", "value", "residual"):
            numbers[name] = values = column[name].to_numpy()
            plain[name] = values.tolist()
        starts, parts = {}, {}
        for name in LISTS:
            starts[name], values = values_of(column[name])
            parts[name] = [values[a:b] for a, b in pairwise(starts[name].tolist())]
            if name == "rows":
                self.kept, self.starts = values, starts[name].tolist()
        numbers["rows_length"], numbers["prior_length"] = np.diff(starts["rows"]), np.diff(starts["prior"])
        packed = _packed(numbers, parts)
        keep = plain.pop("keep")
        offered: Iterator[Candidates] = map(Candidates, keep, parts["stratum"], parts["reference"], parts["prior"])
        self.columns = zip(*plain.values(), packed, parts["rows"], offered, strict=True)
        crcs = zip(map(google_crc32c.value, packed), column["crc"].to_numpy().tolist(), strict=True)
        self.damaged = next((row for row, (got, recorded) in enumerate(crcs) if got != recorded), None)
