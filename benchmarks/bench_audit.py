"""What an audit finds beside its peers: near-duplicates, labels in doubt, core sets.

    python benchmarks/bench_audit.py [--rows 200000] [--store CIFAR.store] [--corrected STORE CORRECTED.csv TEST.store]

- Near-duplicates: a twentieth of the rows gets a partner at cosine 0.95, among independent normal rows (the hardest
  case: no clusters) and among 1,000 clusters. Recall of the partners, with the cells that are used beyond
  ``exact_rows``; CPU seconds beside those of faiss's flat index for a sample of queries, times all rows. On a tenth of
  the rows also faiss's inverted file with as many cells and probes, and HNSW.
- Labels: of ``--store`` a tenth is flipped. Of the first rows, as many as were flipped, the share that was; ours by
  both ranks beside cleanlab's on the same probabilities, where cleanlab is installed.
- ``--corrected``: how many of the labels that a later release of the data set corrected are among the first 100; and
  the accuracy on the test store of a probe that is trained on a core set, by method, beside random rows.

Seconds are of the CPU, not of the clock: the machine is shared.
"""

from __future__ import annotations

import csv
import math
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch
from bench_guidance import made_up, write
from harness import limit_threads, parser, report
from sklearn.linear_model import LogisticRegression

from gstds_cache.auditing.labels import Doubts, Predictions, find_doubts, flip_labels, flip_test, predict
from gstds_cache.auditing.search import PROBES, find_nearest
from gstds_cache.config import OnceConfig
from gstds_cache.selection.core_set import METHODS, choose_core_set
from gstds_cache.selection.linear_probe import ProbeSettings, rows_to_learn
from gstds_cache.selection.unit_rows import UnitRows
from gstds_cache.store.reader import EmbeddingStore

CPU = torch.device("cpu")
COSINE = 0.95
RANKS = ("normalized-margin", "self-confidence")


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def planted(kind: str, count: int, dim: int) -> tuple[np.ndarray, int]:
    """Unit rows of which the last ones are partners of the first, and how many."""
    rng = np.random.default_rng(0)
    if kind == "independent":
        rows = unit(rng.standard_normal((count, dim), dtype=np.float32))
    else:
        centres = rng.standard_normal((1000, 32), dtype=np.float32)
        inner = centres[rng.integers(0, 1000, count)] + 0.7 * rng.standard_normal((count, 32), dtype=np.float32)
        rows = inner @ rng.standard_normal((32, dim), dtype=np.float32)
        rows = unit(rows + rng.standard_normal((count, dim), dtype=np.float32))
    pairs = count // 20
    other = rng.standard_normal((pairs, dim), dtype=np.float32)
    other = unit(other - (other * rows[:pairs]).sum(axis=1, keepdims=True) * rows[:pairs])
    rows[-pairs:] = COSINE * rows[:pairs] + math.sqrt(1 - COSINE**2) * other
    return rows, pairs


def recall(index: np.ndarray, pairs: int) -> float:
    """Share of the planted pairs that either row has among its nearest."""
    one, two = np.arange(pairs), len(index) - pairs + np.arange(pairs)
    there = (index[one] == two[:, None]).any(axis=1) | (index[two] == one[:, None]).any(axis=1)
    return float(there.mean())


def cpu_seconds(work: Callable[[], Any]) -> tuple[Any, float]:
    begun = time.process_time()
    return work(), round(time.process_time() - begun, 2)


def flat_search_seconds(rows: np.ndarray, sample: np.ndarray) -> float:
    flat = faiss.IndexFlatIP(rows.shape[1])
    flat.add(rows)
    return cpu_seconds(lambda: flat.search(sample, 11))[1]


def near_duplicates(kind: str, count: int, dim: int) -> dict[str, Any]:
    rows, pairs = planted(kind, count, dim)
    sample = rows[: max(1, min(count, 400))].copy()
    of_all = round(flat_search_seconds(rows, sample) * count / len(sample), 1)
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder) / "planted.store", rows.astype(np.float16), np.zeros(count, np.int64))
        del rows
        store = UnitRows.of(EmbeddingStore(Path(folder) / "planted.store", access="memory"))
        found, seconds = cpu_seconds(lambda: find_nearest(store, store, 10, device=CPU, exact_rows=0))
        recalled = recall(found.index, pairs)
    return {
        "rows": count,
        "dim": dim,
        "pairs": pairs,
        "probes": PROBES,
        "recall": recalled,
        "cpu_seconds": seconds,
        "flat_cpu_seconds_of_all_rows": of_all,
        "over_flat": round(seconds / max(of_all, 1e-9), 4),
        "most_resident_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3),
    }


def other_indexes(count: int, dim: int) -> dict[str, Any]:
    """The same rows by faiss's own indexes."""
    rows, pairs = planted("independent", count, dim)
    cells = max(1, round(math.sqrt(count)))

    def inverted_file() -> np.ndarray:
        index = faiss.IndexIVFFlat(faiss.IndexFlatIP(dim), dim, cells, faiss.METRIC_INNER_PRODUCT)
        index.train(rows[: 40 * cells])
        index.add(rows)
        index.nprobe = PROBES
        return index.search(rows, 11)[1]

    def hnsw() -> np.ndarray:
        index = faiss.IndexHNSWFlat(dim, 16, faiss.METRIC_INNER_PRODUCT)
        index.add(rows)
        index.hnsw.efSearch = 64
        return index.search(rows, 11)[1]

    def ours() -> np.ndarray:
        return find_nearest(store, store, 10, device=CPU, exact_rows=0).index

    found = {}
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder) / "planted.store", rows.astype(np.float16), np.zeros(count, np.int64))
        store = UnitRows.of(EmbeddingStore(Path(folder) / "planted.store", access="memory"))
        for name, work in (("ours", ours), ("IndexIVFFlat", inverted_file), ("IndexHNSWFlat", hnsw)):
            index, seconds = cpu_seconds(work)
            found[name] = {"recall": recall(index, pairs), "cpu_seconds": seconds}
    return {"rows": count, "dim": dim, **found}


def cleanlabs(predictions: Predictions, labels: np.ndarray, flipped: np.ndarray) -> dict[str, Any]:
    """Cleanlab's ranks of the same probabilities."""
    try:
        from cleanlab.filter import find_label_issues
        from cleanlab.rank import get_label_quality_scores
    except ImportError as error:
        return {"not_measured": str(error)}
    chances = np.zeros((len(labels), int(labels.max()) + 1))
    np.put_along_axis(chances, predictions.label.astype(np.int64), predictions.probability, axis=1)
    was, found = np.isin(np.arange(len(labels)), flipped), {}
    for rank in ("normalized_margin", "self_confidence"):
        scores = get_label_quality_scores(labels, chances, method=rank)
        found[rank] = float(was[np.argsort(scores, kind="stable")[: len(flipped)]].mean())
        issues = find_label_issues(labels, chances, return_indices_ranked_by=rank, n_jobs=1)
        first = issues[: len(flipped)]
        found[f"find_label_issues, {rank}"] = {"rows": len(issues), "precision": float(was[first].mean())}
    issues = find_label_issues(labels, chances, filter_by="confident_learning", n_jobs=1)
    return found | {"confident_learning": {"rows": int(issues.sum()), "found": int(was[issues].sum())}}


def flipped_labels(store: EmbeddingStore, folds: int) -> dict[str, Any]:
    changed, flipped = flip_labels(store.labels, rows_to_learn(store).all(), 0.1, seed=0)
    predictions, seconds = cpu_seconds(
        lambda: predict(store, ProbeSettings(folds=folds), labels=changed, threads=1, device=CPU)
    )
    ours = {}
    for rank in RANKS:
        doubts = find_doubts(predictions, changed, rank)
        test = flip_test(doubts, flipped)
        ours[rank] = {"precision": test.precision, "first": test.first}
    return {
        "rows": len(store),
        "flipped": len(flipped),
        "folds": folds,
        "probe_cpu_seconds": seconds,
        "accuracy_on_given_labels": float((predictions.label[:, 0] == store.labels).mean()),
        "ours": ours | {"recall": test.recall, "false_positive_rate": test.false_positive_rate,
                        "doubted": test.found + test.doubted},
        "cleanlab": cleanlabs(predictions, np.asarray(changed), flipped),
    }  # fmt: skip


def corrected_labels(store: EmbeddingStore, names: set[str]) -> dict[str, Any]:
    predictions = predict(store, ProbeSettings(folds=5), threads=1, device=CPU)
    known = np.array([Path(name).stem in names for name in store.manifest().ids])

    def first(doubts: Doubts, count: int) -> int:
        return int(known[doubts.row[:count]].sum())

    ranked = {rank: find_doubts(predictions, store.labels, rank) for rank in RANKS}
    return {
        "rows": len(store),
        "corrected": int(known.sum()),
        **{rank: {str(count): first(doubts, count) for count in (100, 300)} for rank, doubts in ranked.items()},
        "doubted": int(ranked[RANKS[0]].doubted.sum()),
        "corrected_and_doubted": int(known[ranked[RANKS[0]].row[ranked[RANKS[0]].doubted]].sum()),
    }


def core_sets(store: EmbeddingStore, test: EmbeddingStore, count: int, seeds: int) -> dict[str, Any]:
    rows, there = UnitRows.of(store), UnitRows.of(test)
    x, y = there.at(np.arange(len(there))), test.labels[there.rows.all()]

    def accuracy(chosen: np.ndarray) -> float:
        features = rows.at(rows.rows.below(chosen))
        probe = LogisticRegression(C=10.0, max_iter=60).fit(features, store.labels[chosen])
        return float((probe.predict(x) == y).mean())

    result: dict[str, Any] = {"rows": count, "of": len(rows)}
    for method in METHODS:
        chosen, seconds = cpu_seconds(
            lambda method=method: choose_core_set(rows, count, OnceConfig(method=method, device="cpu"), CPU)
        )
        result[method] = {"accuracy": accuracy(chosen), "cpu_seconds": seconds}
    every = rows.rows.all()
    drawn = [np.random.default_rng(seed).choice(every, count, replace=False) for seed in range(seeds)]
    return result | {"random": list(map(accuracy, drawn)), "everything": accuracy(every)}


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--rows", type=int, default=200_000)
    made.add_argument("--dim", type=int, default=256)
    made.add_argument("--store", help="a store with labels, of which a tenth is flipped")
    made.add_argument("--folds", type=int, default=5)
    made.add_argument("--corrected", nargs=3, metavar=("STORE", "CSV", "TEST"))
    made.add_argument("--parts", nargs="*", default=["duplicates", "indexes", "labels", "corrected"])
    made.add_argument("--kinds", nargs="*", default=["independent", "clustered"], help="of the planted rows")
    arguments = made.parse_args()
    limit_threads(1)
    faiss.omp_set_num_threads(1)
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        if arguments.smoke:
            arguments.rows, arguments.dim, arguments.store = 2000, 32, f"{folder}/labels.store"
            write(Path(arguments.store), *made_up(600, 32, 4))
            result["core_sets"] = core_sets(*[EmbeddingStore(arguments.store)] * 2, 60, 2)
        if "duplicates" in arguments.parts:
            for kind in arguments.kinds:
                result[f"near_duplicates_{kind}"] = near_duplicates(kind, arguments.rows, arguments.dim)
        if "indexes" in arguments.parts:
            result["indexes"] = other_indexes(arguments.rows // 10, arguments.dim)
        if arguments.store and "labels" in arguments.parts:
            result["flipped_labels"] = flipped_labels(EmbeddingStore(arguments.store), arguments.folds)
        if arguments.corrected and "corrected" in arguments.parts:
            store, test = EmbeddingStore(arguments.corrected[0]), EmbeddingStore(arguments.corrected[2])
            lines = Path(arguments.corrected[1]).read_text().splitlines()
            names = {line["image"] for line in csv.DictReader(lines)}
            result["corrected_labels"] = corrected_labels(store, names)
            result["core_sets"] = core_sets(store, test, min(500, len(store) // 4), 3)
    report("audit", result, arguments)


if __name__ == "__main__":
    main()
