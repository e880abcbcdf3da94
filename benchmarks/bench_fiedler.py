"""Fiedler vectors of real batches against scipy.linalg.eigh in float64: accuracy first, then time.

    python benchmarks/bench_fiedler.py STORE [--batches 50] [--batch-size 512] [--knn 10]

Accuracy: |cos| with scipy's vector, relative error of the eigenvalue, and the share of rows kept by both for each rule
that reads the Fiedler vector. Time: our solve of the stacked graphs beside scipy.linalg.eigh and
scipy.sparse.linalg.eigsh on the same Laplacians, interleaved in this run, all with one thread.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import scipy.linalg
import scipy.sparse
import scipy.sparse.linalg
import torch
from harness import interleaved, parser, report

from gstds_cache.config import SelectConfig
from gstds_cache.devices import limit_threads
from gstds_cache.graph.components import bridge_components
from gstds_cache.graph.knn import knn_graph
from gstds_cache.graph.laplacian import Laplacian, symmetrise
from gstds_cache.selection.rules import RULES, settle_ties
from gstds_cache.selection.run import BatchSelector
from gstds_cache.spectral.fiedler import fiedler_vectors
from gstds_cache.spectral.status import Status
from gstds_cache.store.reader import EmbeddingStore

EIGSH_TOLERANCE = 1e-6
GAP = 1e-2  # relative eigengap above which the vector is well defined


def batches_of(arguments) -> np.ndarray:
    """Embeddings [G, B, D] of the first batches of a plan over the store, or made-up clusters."""
    if arguments.smoke:
        rng = np.random.default_rng(0)
        centres = rng.normal(size=(5, 32))
        return (centres[rng.integers(0, 5, (4, 64))] + rng.normal(size=(4, 64, 32))).astype(np.float32)
    store = EmbeddingStore(arguments.store)
    plan = BatchSelector(store, SelectConfig(batch_size=arguments.batch_size, knn=arguments.knn, epochs=100)).plan
    full, seq = [], 0
    while len(full) < arguments.batches:
        batch = plan.batch(seq)
        if len(batch.indices) == arguments.batch_size:
            full.append(store.gather(batch.indices))
        seq += 1
    return np.stack(full)


def shared(rule: str, one: np.ndarray, other: np.ndarray, keep: int) -> float:
    """Share of the rows a rule keeps that it keeps for both vectors."""
    kept = [set(RULES[rule].choose(vector, keep, np.random.default_rng(0)).tolist()) for vector in (one, other)]
    return len(kept[0] & kept[1]) / keep


def arpack(matrix: scipy.sparse.csr_array) -> tuple[np.ndarray, np.ndarray]:
    """The peer: the lowest eigenpairs by scipy's eigsh, without the trivial one (which ARPACK skips now and then)."""
    start = np.random.default_rng(0).normal(size=matrix.shape[0])
    values, vectors = scipy.sparse.linalg.eigsh(matrix, k=3, which="SA", tol=EIGSH_TOLERANCE, v0=start)
    order = [i for i in np.argsort(values) if values[i] > 1e-9 * values.max()]
    return values[order], vectors[:, order]


def main() -> None:
    made = parser(__doc__)
    made.add_argument("store", type=Path, nargs="?", help="a store of real images; not needed with --smoke")
    made.add_argument("--batches", type=int, default=50)
    made.add_argument("--batch-size", type=int, default=512)
    made.add_argument("--knn", type=int, default=10)
    arguments = made.parse_args()
    if arguments.store is None and not arguments.smoke:
        made.error("give a STORE, or --smoke")
    limit_threads(1)
    x = torch.from_numpy(batches_of(arguments))
    graph, _ = bridge_components(symmetrise(knn_graph(x, arguments.knn)), x)
    result = fiedler_vectors(graph)
    operator = Laplacian(graph, "combinatorial")
    dense = [operator.dense(g).numpy() for g in range(len(x))]
    exact = [scipy.linalg.eigh(matrix, subset_by_index=[1, 2]) for matrix in dense]

    cosine, error, gaps = [], [], []
    overlap: dict[str, list[float]] = {name: [] for name, rule in RULES.items() if rule.needs_spectrum}
    raw: dict[str, list[float]] = {name: [] for name in overlap}
    keep = x.shape[1] // 4
    for g, (values, vectors) in enumerate(exact):
        ours, theirs = result.vector[g].numpy(), vectors[:, 0]
        cosine.append(abs(float(ours @ theirs)))
        error.append(abs(float(result.values[g, 0]) - values[0]) / values[0])
        gaps.append((values[1] - values[0]) / values[1])
        theirs = theirs * np.sign(ours @ theirs)
        whole = scipy.linalg.eigh(dense[g])[1][:, 1]
        whole = whole * np.sign(ours @ whole)
        for name, shares in overlap.items():
            shares.append(shared(name, settle_ties(ours), settle_ties(theirs), keep))
            raw[name].append(shared(name, whole, theirs, keep))
    sparse = [scipy.sparse.csr_array(matrix) for matrix in dense]
    peer = [abs(float(arpack(m)[1][:, 0] @ vectors[:, 0])) for m, (_, vectors) in zip(sparse, exact, strict=True)]
    timed = interleaved(
        1 if arguments.smoke else arguments.trials,
        ours=lambda: fiedler_vectors(graph),
        eigh=lambda: [scipy.linalg.eigh(matrix, subset_by_index=[1, 2]) for matrix in dense],
        eigsh=lambda: [arpack(matrix) for matrix in sparse],
    )
    clear = [c for c, gap in zip(cosine, gaps, strict=True) if gap > GAP]
    statuses = Counter(str(Status(int(s)).name or int(s)).lower() for s in result.status)
    report(
        "fiedler",
        {
            "batches": len(x),
            "batch_size": x.shape[1],
            "dim": x.shape[2],
            "knn": arguments.knn,
            "tolerance_ours": SelectConfig().tolerance,
            "tolerance_eigsh": EIGSH_TOLERANCE,
            "status": dict(statuses),
            "iterations": {"median": float(result.iterations.median()), "max": int(result.iterations.max())},
            "residual_max": float(result.residual[:, 0].max()),
            "eigenvalue_relative_error_max": max(error),
            "batches_with_clear_gap": len(clear),
            "cosine_min_where_gap_is_clear": min(clear, default=None),
            "cosine_min": min(cosine),
            "cosine_of_eigsh": {"min": min(peer), "median": float(np.median(peer))},
            "kept_overlap": {n: {"min": min(v), "mean": float(np.mean(v))} for n, v in overlap.items()},
            "kept_overlap_of_two_scipy_solvers_without_settling_ties": {
                n: {"min": min(v), "mean": float(np.mean(v))} for n, v in raw.items()
            },
            "seconds": timed,
            "eigh_over_ours": timed["eigh"]["median"] / timed["ours"]["median"],
            "eigsh_over_ours": timed["eigsh"]["median"] / timed["ours"]["median"],
        },
        arguments,
    )


if __name__ == "__main__":
    main()
