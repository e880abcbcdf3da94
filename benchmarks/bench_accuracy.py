"""Fiedler vectors of real batches against scipy.linalg.eigh in float64, and the rows that rules keep by them.

    python benchmarks/bench_accuracy.py STORE... [--solver compiled|torch]

For every batch size the batches that a selection would see. Eigenvalue: relative error. Vector: |cos| with scipy's.
Kept rows: the share of a rule's choice at filter ratio 0.75 that is also its choice by scipy's vector. Unreported
failures: batches whose status tells of nothing, and which are off by more than 1e-4 in the value, or have |cos| below
0.9999 where the relative eigengap is above 1e-2.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import scipy.linalg
import torch
from batches import batches_of
from harness import limit_threads, parser, report

from gstds_cache.config import SelectConfig
from gstds_cache.graph.components import bridge_components
from gstds_cache.graph.knn import nearest
from gstds_cache.graph.laplacian import Laplacian, SparseGraph, symmetrise
from gstds_cache.graph.neighbors import normalized_rows
from gstds_cache.runtime.threads import cores
from gstds_cache.selection.rule import RuleBatch, round_ties
from gstds_cache.selection.rules import RULES
from gstds_cache.spectral import fiedler
from gstds_cache.spectral.lobpcg import lobpcg
from gstds_cache.spectral.result import canonical_sign
from gstds_cache.spectral.status import Status

ONE_COORDINATE = [name for name, rule in RULES.items() if rule.vectors == 1 and not rule.needs_guidance]
GREEDY = "spread"  # farthest points: one swapped choice moves all later ones
GAP = 1e-2  # relative eigengap above which a vector is well defined
BATCHES = {8: 60, 16: 60, 32: 60, 64: 60, 128: 60, 256: 80, 512: 100, 1024: 40, 2048: 10, 4096: 2}


def shared(rule: str, one: RuleBatch, other: RuleBatch) -> float:
    """Share of the rows a rule keeps that it keeps for both."""
    return len(set(RULES[rule](one).tolist()) & set(RULES[rule](other).tolist())) / one.keep


def seen(values: np.ndarray, basis: np.ndarray, keep: int) -> RuleBatch:
    """What a rule sees of eigenpairs: ``values`` [Q], ``basis`` [B, Q]."""
    basis = round_ties(basis)
    return RuleBatch(basis[:, 0].copy(), keep, basis=basis, values=values)


def greedy_overlap(graph: SparseGraph, operator: Laplacian, keep: int, tolerance: float) -> dict[str, float]:
    """How many rows farthest points in several eigenvectors have in common: reported, not promised."""
    q = RULES[GREEDY].vectors
    result, overlap = fiedler.fiedler_of_graph(graph, q=q, tolerance=tolerance), []
    for g in range(graph.graphs):
        values, vectors = scipy.linalg.eigh(operator.dense(g).numpy(), subset_by_index=[1, q])
        basis = canonical_sign(torch.from_numpy(vectors)[None])[0].numpy()
        ours = seen(result.values[g].numpy(), result.basis[g].numpy(), keep)
        overlap.append(shared(GREEDY, ours, seen(values, basis, keep)))
    return {"min": min(overlap), "mean": float(np.mean(overlap))}


def compare(x: np.ndarray, knn: int, tolerance: float) -> dict[str, object]:
    """One batch size: ours and scipy's, batch by batch."""
    rows = normalized_rows(torch.from_numpy(x))
    graph, _ = bridge_components(symmetrise(nearest(rows, knn)), rows)
    result = fiedler.fiedler_of_graph(graph, tolerance=tolerance)
    operator, keep = Laplacian(graph), max(1, x.shape[1] // 4)
    error, cosine, clear, unreported = [], [], [], 0
    overlap: dict[str, list[float]] = {name: [] for name in ONE_COORDINATE}
    for g in range(len(x)):
        values, vectors = scipy.linalg.eigh(operator.dense(g).numpy(), subset_by_index=[1, 2])
        ours, theirs = result.vector[g].numpy(), vectors[:, 0]
        off, cos = abs(float(result.values[g, 0]) - values[0]) / values[0], abs(float(ours @ theirs))
        defined = values[1] - values[0] > GAP * values[1]
        wrong = off > 1e-4 or (defined and cos < 0.9999)
        unreported += wrong and not int(result.status[g]) & (Status.MAX_ITERATIONS | Status.DEGENERATE)
        error.append(off)
        cosine.append(cos)
        if defined:
            clear.append(cos)
            for name, shares in overlap.items():
                both = (seen(values[:1], vector[:, None], keep) for vector in (ours, theirs * np.sign(ours @ theirs)))
                shares.append(shared(name, *both))
    return {
        "batches": len(x),
        "status": dict(Counter(str(Status(int(s)).name or Status(int(s))).lower() for s in result.status)),
        "iterations": {"median": float(result.iterations.median()), "max": int(result.iterations.max())},
        "residual_max": float(result.residual.max()),
        "eigenvalue_relative_error_max": max(error),
        "with_clear_gap": len(clear),
        "cosine_min": min(cosine),
        "cosine_min_where_gap_is_clear": min(clear, default=None),
        "kept_overlap": {name: {"min": min(v), "mean": float(np.mean(v))} for name, v in overlap.items() if v},
        **(
            {f"kept_overlap_of_{GREEDY}": greedy_overlap(graph, operator, keep, tolerance)}
            if 64 <= x.shape[1] <= 1024
            else {}
        ),
        "unreported_failures": int(unreported),
    }


def main() -> None:
    made = parser(__doc__)
    made.add_argument("stores", type=Path, nargs="*", help="stores of real images; not needed with --smoke")
    made.add_argument("--knn", type=int, default=10)
    made.add_argument("--tolerance", type=float, default=SelectConfig().tolerance)
    made.add_argument("--solver", choices=["compiled", "torch"], default="compiled", help="torch is what CUDA runs")
    arguments = made.parse_args()
    if not arguments.stores and not arguments.smoke:
        made.error("give a STORE, or --smoke")
    limit_threads(cores())
    if arguments.solver == "torch":

        def by_torch(A, q, *, threads, **options):  # noqa: ARG001
            return lobpcg(A, q, **options)

        fiedler.lobpcg_compiled = by_torch
    sizes = {8: 4, 64: 4} if arguments.smoke else BATCHES
    by_size = {
        size: compare(batches_of(arguments.stores, count, size), min(arguments.knn, size - 1), arguments.tolerance)
        for size, count in sizes.items()
    }
    report(
        "accuracy" if arguments.solver == "compiled" else "accuracy_torch",
        {
            "knn": arguments.knn,
            "tolerance": arguments.tolerance,
            "solver": arguments.solver,
            "batches": sum(part["batches"] for part in by_size.values()),
            "unreported_failures": sum(part["unreported_failures"] for part in by_size.values()),
            "by_batch_size": by_size,
        },
        arguments,
    )


if __name__ == "__main__":
    main()
