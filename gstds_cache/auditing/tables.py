"""What an audit found as Parquet files, a block of rows at a time; ids join them with anything."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
from jaxtyping import Int64

from gstds_cache.auditing.duplicates import Groups, Pairs
from gstds_cache.auditing.labels import Doubts
from gstds_cache.files.atomic import atomic_write
from gstds_cache.store.reader import EmbeddingStore

AT_ONCE = 1 << 16
"""Rows of a Parquet row group: ids of so many are in memory."""

Columns = Mapping[str, pa.Array]


class Items:
    """Ids, labels and classes of a store's rows, a few at a time."""

    def __init__(self, store: EmbeddingStore) -> None:
        self.store, self.ids = store, store.manifest().ids

    def columns(self, rows: Int64[np.ndarray, " b"], prefix: str = "") -> dict[str, pa.Array]:
        """Columns ``row``, ``id``, ``label`` and ``class`` of some rows; null where there is no label or name."""
        labels = np.asarray(self.store.labels[rows], np.int64)
        return {
            f"{prefix}row": pa.array(rows),
            f"{prefix}id": pa.array([_text(self.ids[row]) for row in rows.tolist()], pa.utf8()),
            f"{prefix}label": pa.array(labels, mask=labels < 0),
            f"{prefix}class": self.names(labels),
        }

    def names(self, labels: Int64[np.ndarray, " b"]) -> pa.Array:
        """Names of classes; null where there is none."""
        classes = self.store.classes
        return pa.array([_text(classes[n]) if 0 <= n < len(classes) else None for n in labels.tolist()], pa.utf8())


def write_duplicates(file: Path, items: Items, groups: Groups) -> None:
    """Columns ``group``, those of :meth:`Items.columns`, ``cosine``, ``same_bytes`` and ``keep``, group by group.

    Where all rows without ``keep`` go, each of them leaves a near-duplicate behind, and no two of those are left.
    """
    _write(file, items.store, len(groups.row), lambda part: {
        "group": pa.array(groups.group[part]),
        **items.columns(groups.row[part]),
        "cosine": pa.array(groups.cosine[part]),
        "same_bytes": pa.array(groups.same_bytes[part]),
        "keep": pa.array(groups.keep[part]),
    })  # fmt: skip


def write_leaks(file: Path, items: Items, others: Items, pairs: Pairs) -> None:
    """Columns of :meth:`Items.columns`, the same of the other store as ``other_...``, ``cosine`` and ``same_bytes``."""
    _write(file, items.store, len(pairs), lambda part: {
        **items.columns(pairs.other[part]),
        **others.columns(pairs.one[part], "other_"),
        "cosine": pa.array(pairs.cosine[part]),
        "same_bytes": pa.array(pairs.same_bytes[part]),
    })  # fmt: skip


def write_labels(file: Path, items: Items, doubts: Doubts) -> None:
    """Every labelled row, the most doubtful first.

    Columns of :meth:`Items.columns`, ``doubted``, ``score``, ``probability`` of the label, ``suggested`` and
    ``suggested_class``, another label, and ``suggested_probability``.
    """
    _write(file, items.store, len(doubts.row), lambda part: {
        **items.columns(doubts.row[part]),
        "doubted": pa.array(doubts.doubted[part]),
        "score": pa.array(doubts.score[part]),
        "probability": pa.array(doubts.own[part]),
        "suggested": pa.array(doubts.suggested[part]),
        "suggested_class": items.names(doubts.suggested[part].astype(np.int64)),
        "suggested_probability": pa.array(doubts.probability[part]),
    })  # fmt: skip


def write_joint(file: Path, items: Items, doubts: Doubts) -> None:
    """Counts of rows by ``label`` and the class ``counted_for``, largest first; equal numbers are no doubts."""
    counts = np.array(doubts.joint, np.int64).reshape(-1, 3)
    _write(file, items.store, len(counts), lambda part: {
        "label": pa.array(counts[part, 0]),
        "class": items.names(counts[part, 0]),
        "counted_for": pa.array(counts[part, 1]),
        "counted_for_class": items.names(counts[part, 1]),
        "rows": pa.array(counts[part, 2]),
    })  # fmt: skip


def write_outliers(
    file: Path,
    items: Items,
    rows: Int64[np.ndarray, " M"],
    mean: np.ndarray,
    nearest: Int64[np.ndarray, " M"],
    cosine: np.ndarray,
) -> None:
    """Every row that was looked at, the farthest from its neighbours first.

    Columns of :meth:`Items.columns`, ``mean_cosine`` to its nearest rows, ``nearest_row`` and ``nearest_cosine``.
    """
    _write(file, items.store, len(rows), lambda part: {
        **items.columns(rows[part]),
        "mean_cosine": pa.array(mean[part]),
        "nearest_row": pa.array(nearest[part], mask=nearest[part] < 0),
        "nearest_cosine": pa.array(cosine[part], mask=nearest[part] < 0),
    })  # fmt: skip


def _write(file: Path, store: EmbeddingStore, rows: int, columns: Callable[[slice], Columns]) -> None:
    about = {"gstds.fingerprint": store.fingerprint}
    schema = pa.table(dict(columns(slice(0, 0)))).schema.with_metadata(about)
    with atomic_write(file, durable=True) as out, pa.parquet.ParquetWriter(out, schema) as writer:
        for first in range(0, rows, AT_ONCE):
            writer.write_table(pa.table(dict(columns(slice(first, min(first + AT_ONCE, rows)))), schema=schema))


def _text(name: str) -> str:
    """A name as UTF-8 has it: of bytes that are none, their escapes."""
    return name.encode("utf-8", "backslashreplace").decode()
