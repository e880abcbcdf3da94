"""One row per sample: how a selection sees it, for looking at data without training anything."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
from jaxtyping import Float64
from scipy.stats import rankdata

from gstds_cache.errors import UsageError
from gstds_cache.files.atomic import atomic_write
from gstds_cache.report.recompute import SeenBatch
from gstds_cache.store.reader import EmbeddingStore
from gstds_cache.stream.schema import Header

FORMATS = (".parquet", ".arrow")


@dataclass(eq=False)
class SampleScores:
    """Running sums over batches, each float64 or int64 [N].

    Attributes:
        items: Items of the data set (N).
        seen: How often an item was in a batch.
        kept: How often it stayed.
    """

    items: int
    seen: np.ndarray = field(init=False)
    kept: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.seen, self.kept, self._placed = (np.zeros(self.items, np.int64) for _ in range(3))
        self._percentile, self._from_middle, self._spacing, self._difficulty = (np.zeros(self.items) for _ in range(4))
        self._guided = np.zeros(self.items, np.int64)

    def add(self, batch: SeenBatch) -> None:
        """Count one batch; a row is in it once."""
        rows = batch.indices
        self.seen[rows] += 1
        self.kept[rows[batch.stays]] += 1
        if batch.seen.guidance is not None:
            self._guided[rows] += 1
            self._difficulty[rows] += batch.seen.guidance
        if batch.has_spectrum:
            place = percentile(batch.seen.vector)
            self._placed[rows] += 1
            self._percentile[rows] += place
            self._from_middle[rows] += np.abs(2 * place - 1)
            self._spacing[rows] += spacing(batch.seen.vector)

    @property
    def columns(self) -> dict[str, pa.Array]:
        """Columns ``seen``, ``kept``, ``percentile``, ``from_middle``, ``spacing``, ``difficulty``; null: not known."""
        return {
            "seen": pa.array(self.seen),
            "kept": pa.array(self.kept),
            "percentile": _mean(self._percentile, self._placed),
            "from_middle": _mean(self._from_middle, self._placed),
            "spacing": _mean(self._spacing, self._placed),
            "difficulty": _mean(self._difficulty, self._guided),
        }


def percentile(vector: Float64[np.ndarray, " B"]) -> Float64[np.ndarray, " B"]:
    """Place along the Fiedler order, from 0 to 1; equals share their mean place."""
    if len(vector) == 1:
        return np.full(1, 0.5)
    ranks: Float64[np.ndarray, " B"] = (rankdata(vector, "average") - 1) / (len(vector) - 1)
    return ranks


def spacing(vector: Float64[np.ndarray, " B"]) -> Float64[np.ndarray, " B"]:
    """Mean distance to the two neighbours along the Fiedler order, as a multiple of the batch's mean step.

    1 everywhere in evenly spaced rows; small in a crowd of near-duplicates, large in sparse stretches. At the ends,
    the distance to the one neighbour. Where all rows are equal, 1.
    """
    order = np.argsort(vector, kind="stable")
    steps = np.diff(vector[order])
    result = np.ones(len(vector))
    if steps.size and steps.sum() > 0:
        near = np.concatenate([[steps[0]], (steps[:-1] + steps[1:]) / 2, [steps[-1]]])
        result[order] = near / steps.mean()
    return result


def write_scores(scores: SampleScores, store: EmbeddingStore, header: Header, file: Path) -> int:
    """Write the table: columns ``row``, ``id``, ``label``, then those of :attr:`SampleScores.columns`.

    Args:
        scores: Of a whole selection.
        store: The store it was made from.
        header: The selection's header; its digest and the store's fingerprint go into the table's metadata.
        file: Where to write: ``.parquet`` or ``.arrow``.

    Returns:
        Bytes of the file.
    """
    manifest = store.manifest()
    columns = {
        "row": pa.array(np.arange(len(store))),
        "id": pa.array(manifest.ids, pa.utf8()),
        "label": pa.array(manifest.labels),
        **scores.columns,
    }
    about = {"gstds.selection_digest": header.selection_digest, "gstds.fingerprint": header.cache_fingerprint}
    table = pa.table(columns).replace_schema_metadata(about)
    with atomic_write(file, durable=True) as out:
        if file.suffix == ".parquet":
            pa.parquet.write_table(table, out)
        else:
            with pa.ipc.new_file(out, table.schema) as writer:
                writer.write_table(table)
    return file.stat().st_size


def check_target(file: Path, *, replace: bool) -> None:
    """Refuse a file that cannot be written before anything is computed.

    Raises:
        UsageError: The ending is none of ``FORMATS``, or the file exists and ``replace`` is not set.
    """
    if file.suffix not in FORMATS:
        raise UsageError(f"export to {file}: got the ending {file.suffix!r}, expected one of {', '.join(FORMATS)}")
    if file.exists() and not replace:
        raise UsageError(f"export to {file}: the file exists", hint="give another name, or `replace=True`")


def _mean(total: np.ndarray, count: np.ndarray) -> pa.Array:
    return pa.array(total / np.maximum(count, 1), mask=count == 0)
