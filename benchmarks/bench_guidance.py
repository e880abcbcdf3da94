"""Guidance beside its peers: seconds and held-out accuracy of the cross-fitted probe on cached embeddings.

    python benchmarks/bench_guidance.py [--rows 51712] [--dim 1280] [--classes 26]

The peers do the same with scikit-learn on float32 rows that are in memory already, standardised: SGDClassifier with
the logistic loss, which is one probe against the rest for each class, and LogisticRegression (multinomial, L-BFGS, 20
iterations), one for each of the same two folds. Rows are made up: clusters that overlap. OpenMP's threads wait without
spinning, or they would take the cores that ours works on.
"""

from __future__ import annotations

import os
import tempfile
import warnings
from pathlib import Path
from typing import Any

os.environ["OMP_WAIT_POLICY"] = "PASSIVE"

import numpy as np
from bench_store import BLOCK
from harness import interleaved, limit_threads, parser, report
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression, SGDClassifier

from gstds_cache.data.manifest import DatasetManifest
from gstds_cache.runtime.threads import cores
from gstds_cache.selection.linear_probe import ProbeSettings, assign_folds, probe_columns
from gstds_cache.selection.rows import EligibleRows
from gstds_cache.store.reader import EmbeddingStore
from gstds_cache.store.spec import CacheSpec
from gstds_cache.store.writer import open_writer


def made_up(count: int, dim: int, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Float16 rows around class centres, as far apart as it takes for some to be mistaken, and their labels."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, classes, count)
    rows = rng.normal(size=(classes, dim)).astype(np.float32)[labels] * 0.12
    rows += rng.normal(size=(count, dim)).astype(np.float32)
    return rows.astype(np.float16), labels.astype(np.int64)


def write(path: Path, rows: np.ndarray, labels: np.ndarray) -> None:
    """A store of these rows and labels."""
    count, dim = rows.shape
    items = DatasetManifest("benchmark", tuple(map(str, range(count))), np.zeros((count, 32), np.uint8), labels)
    spec = CacheSpec(
        items=count, items_root=items.root, encoder={}, dim=dim, dtype="float16", batch_size=1, shard_rows=BLOCK
    )
    with open_writer(path, spec, labels=labels, items=items.to_arrow(), attributes={}) as writer:
        for shard in range(spec.shards):
            span = spec.rows_of(shard)
            writer.commit(shard, rows[span.start : span.stop])
        writer.finish()


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--rows", type=int, default=51_712)
    made.add_argument("--dim", type=int, default=1280)
    made.add_argument("--classes", type=int, default=26)
    arguments = made.parse_args()
    if arguments.smoke:
        arguments.rows, arguments.dim, arguments.classes, arguments.trials = 1200, 32, 4, 1
    limit_threads(cores())
    warnings.simplefilter("ignore", ConvergenceWarning)  # 20 iterations are what there is time for
    rows, labels = made_up(arguments.rows, arguments.dim, arguments.classes)
    right: dict[str, list[float]] = {}

    def ours(threads: int) -> None:
        columns = probe_columns(store, ProbeSettings(), threads=threads)
        right.setdefault(f"ours_{threads}_threads", []).append(float((columns["predicted"] == labels).mean()))

    def peer(name: str, make: Any) -> None:
        x = rows.astype(np.float32)
        x = (x - x.mean(0)) / x.std(0)
        fold = assign_folds(labels, EligibleRows(len(labels), np.zeros(0, np.int64)), 2, seed=0)
        hits = [
            (make().fit(x[fold != f], labels[fold != f]).predict(x[fold == f]) == labels[fold == f]) for f in (0, 1)
        ]
        right.setdefault(name, []).append(float(np.concatenate(hits).mean()))

    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder) / "made-up.store", rows, labels)
        store = EmbeddingStore(Path(folder) / "made-up.store", access="memory")
        seconds = interleaved(
            arguments.trials,
            ours_1_threads=lambda: ours(1),
            ours_2_threads=lambda: ours(2),
            sgd=lambda: peer("sgd", lambda: SGDClassifier(loss="log_loss", max_iter=3, tol=None, n_jobs=cores())),
            lbfgs=lambda: peer("lbfgs", lambda: LogisticRegression(max_iter=20)),
        )
    result = {
        "rows": arguments.rows,
        "dim": arguments.dim,
        "classes": arguments.classes,
        "seconds": seconds,
        "held_out_accuracy": {name: float(np.mean(values)) for name, values in right.items()},
    }
    report("guidance", result, arguments)


if __name__ == "__main__":
    main()
