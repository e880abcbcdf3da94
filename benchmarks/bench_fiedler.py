"""The solver alone: lowest nontrivial eigenpairs of graphs of real batches, beside every library that has a way.

    python benchmarks/bench_fiedler.py STORE... [--batch-sizes 256 512 1024 2048]

All get the same graphs: ours as stacked CSR, the others as one scipy (dense, networkx) Laplacian each, made beforehand.
Ours and ARPACK stop at the same relative residual, the others where their own tolerance comes closest to it; what each
reached is beside its time. Trials are interleaved in one run on all cores: ours spreads the graphs over threads, the
others have all cores for their BLAS. A trial of each takes about as long: a method that takes long is measured on fewer
graphs, and one that is quick on the same ones again and again.
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable
from pathlib import Path

os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # threads that spin would take the cores from the next in turn

import networkx
import numpy as np
import scipy.linalg
import scipy.sparse
import scipy.sparse.linalg
import sklearn.manifold
import torch
from batches import batches_of
from harness import limit_threads, parser, report, spread

from gstds_cache.graph.components import bridge_components
from gstds_cache.graph.knn import nearest
from gstds_cache.graph.laplacian import Laplacian, SparseGraph, symmetrise
from gstds_cache.graph.neighbors import normalized_rows
from gstds_cache.runtime.allocator import keep_freed_memory
from gstds_cache.runtime.threads import cores
from gstds_cache.spectral.fiedler import fiedler_of_graph

SECONDS_OF_A_TRIAL = 0.4
Solve = Callable[[int], np.ndarray]  # graph number -> vectors [B, q]


class Peers:
    """The same graphs for everyone, and a way to solve one of them for each library."""

    def __init__(self, graph: SparseGraph, q: int, tolerance: float) -> None:
        self.q, self.tolerance = q, tolerance
        operator = Laplacian(graph)
        self.dense = [operator.dense(g).numpy() for g in range(graph.graphs)]
        self.sparse = [scipy.sparse.csr_array(matrix) for matrix in self.dense]
        self.adjacency = [scipy.sparse.csr_array(np.diag(np.diag(m)) - m) for m in self.dense]
        self.networks = [networkx.from_scipy_sparse_array(w) for w in self.adjacency]
        self.torch = [torch.sparse_csr_tensor(m.indptr, m.indices, m.data, m.shape) for m in self.sparse]
        self.value = [scipy.linalg.eigh(m, subset_by_index=[1, 1], eigvals_only=True)[0] for m in self.dense]
        self.start = np.random.default_rng(0).normal(size=(graph.nodes, q + 1))

    def all(self) -> dict[str, Solve]:
        """Every peer by name."""
        ways = {
            "numpy eigh": lambda g: np.linalg.eigh(self.dense[g])[1][:, 1 : self.q + 1],
            "scipy eigh, subset": lambda g: scipy.linalg.eigh(self.dense[g], subset_by_index=[1, self.q])[1],
            "scipy eigsh SA": self.arpack,
            "scipy eigsh shift-invert": self.shift_invert,
            "scipy lobpcg, Jacobi": self.scipy_lobpcg,
            "torch.lobpcg": self.torch_lobpcg,
            "scikit-learn arpack": lambda g: self.embedding(g, "arpack"),
            "scikit-learn lobpcg": lambda g: self.embedding(g, "lobpcg"),
            "scikit-learn amg": lambda g: self.embedding(g, "amg"),
        }
        if self.q == 1:
            for method in ("tracemin_pcg", "tracemin_lu", "lanczos", "lobpcg"):
                ways[f"networkx {method}"] = lambda g, method=method: self.network(g, method)
        return ways

    def arpack(self, g: int) -> np.ndarray:
        found = scipy.sparse.linalg.eigsh(
            self.sparse[g], k=self.q + 1, which="SA", tol=self.tolerance, v0=self.start[:, 0]
        )
        return self.nontrivial(*found)

    def shift_invert(self, g: int) -> np.ndarray:
        found = scipy.sparse.linalg.eigsh(
            self.sparse[g].tocsc(), k=self.q + 1, sigma=-0.1 * self.value[g], tol=self.tolerance, v0=self.start[:, 0]
        )
        return self.nontrivial(*found)

    def nontrivial(self, values: np.ndarray, vectors: np.ndarray) -> np.ndarray:
        """Without the trivial pair, which ARPACK skips now and then."""
        order = [n for n in np.argsort(values) if values[n] > 1e-9]
        return vectors[:, order[: self.q]]

    def scipy_lobpcg(self, g: int) -> np.ndarray:
        matrix = self.sparse[g]
        found = scipy.sparse.linalg.lobpcg(
            matrix, self.start[:, : self.q], M=scipy.sparse.diags_array(1 / matrix.diagonal()),
            Y=np.ones((matrix.shape[0], 1)), tol=self.tolerance * self.value[g], maxiter=500, largest=False,
        )  # fmt: skip
        return found[1][:, np.argsort(found[0])]

    def torch_lobpcg(self, g: int) -> np.ndarray:
        found = torch.lobpcg(
            self.torch[g], X=torch.from_numpy(self.start), tol=self.tolerance * self.value[g], niter=500, largest=False
        )
        return found[1][:, 1:].numpy()

    def embedding(self, g: int, solver: str) -> np.ndarray:
        return sklearn.manifold.spectral_embedding(
            self.adjacency[g], n_components=self.q, eigen_solver=solver, eigen_tol=self.tolerance, norm_laplacian=False,
            random_state=0,
        )  # fmt: skip

    def network(self, g: int, method: str) -> np.ndarray:
        return networkx.fiedler_vector(
            self.networks[g], weight="weight", method=method, tol=self.tolerance, seed=np.random.RandomState(0)
        )[:, None]

    def residual(self, g: int, vectors: np.ndarray) -> float:
        """Largest relative residual of the vectors, with the values that fit them best."""
        vectors = vectors - vectors.mean(axis=0)
        vectors = vectors / np.linalg.norm(vectors, axis=0)
        values = (vectors * (self.dense[g] @ vectors)).sum(axis=0)
        return float((np.linalg.norm(self.dense[g] @ vectors - vectors * values, axis=0) / values).max())


def how_many(solve: Solve, graphs: int) -> int | str:
    """Graphs of a trial, or why the method is left out."""
    try:
        solve(0)
        begun = time.perf_counter()
        solve(0)
        one = time.perf_counter() - begun
    except Exception as error:  # a library that is not there, or gives up
        return f"{type(error).__name__}: {error}"
    return max(1, min(graphs, int(SECONDS_OF_A_TRIAL / one)))


def race(graph: SparseGraph, q: int, tolerance: float, trials: int) -> dict[str, object]:
    """Milliseconds per graph and residuals of everyone, at one batch size and tolerance."""
    peers = Peers(graph, q, tolerance)
    ways, left_out = peers.all(), {}
    share = {}
    for name, solve in ways.items():
        found = how_many(solve, graph.graphs)
        if isinstance(found, str):
            left_out[name] = found
        else:
            share[name] = found
    times: dict[str, list[float]] = {"gstds-cache": [], "gstds-cache, 1 thread": [], **{name: [] for name in share}}
    residuals: dict[str, list[float]] = {name: [] for name in share}
    fiedler_of_graph(graph, q=q, tolerance=tolerance)
    for trial in range(trials):
        for name, threads in (("gstds-cache", cores()), ("gstds-cache, 1 thread", 1)):
            begun, rounds = time.perf_counter(), 0
            while time.perf_counter() - begun < SECONDS_OF_A_TRIAL:
                ours = fiedler_of_graph(graph, q=q, tolerance=tolerance, threads=threads)
                rounds += 1
            times[name].append((time.perf_counter() - begun) / (rounds * graph.graphs) * 1e3)
        for name, count in share.items():
            begun = time.perf_counter()
            vectors = [ways[name](g) for g in range(count)]
            times[name].append((time.perf_counter() - begun) / count * 1e3)
            if trial == 0:
                residuals[name] = [peers.residual(g, found) for g, found in enumerate(vectors)]
    residuals["gstds-cache"] = [peers.residual(g, ours.basis[g].numpy()) for g in range(graph.graphs)]
    residuals["gstds-cache, 1 thread"] = residuals["gstds-cache"]
    fastest = min(share, key=lambda name: float(np.median(times[name])))
    return {
        "ms_per_graph": {name: spread(values) for name, values in times.items()},
        "residual": {name: {"median": float(np.median(r)), "max": max(r)} for name, r in residuals.items()},
        "graphs_of_a_trial": {"gstds-cache": graph.graphs, **share},
        "left_out": left_out,
        "iterations": {"median": float(ours.iterations.median()), "max": int(ours.iterations.max())},
        "not_converged": int((ours.status & 1).sum()),
        "fastest_peer": fastest,
        "fastest_peer_over_ours": spread(
            [peer / own for peer, own in zip(times[fastest], times["gstds-cache"], strict=True)]
        ),
        "eigsh_over_ours": spread(
            [peer / own for peer, own in zip(times["scipy eigsh SA"], times["gstds-cache"], strict=True)]
        ),
    }


def main() -> None:
    made = parser(__doc__)
    made.add_argument("stores", type=Path, nargs="*", help="stores of real images; not needed with --smoke")
    made.add_argument("--batch-sizes", type=int, nargs="+", default=[256, 512, 1024, 2048])
    made.add_argument("--graphs", type=int, default=64)
    made.add_argument("--knn", type=int, default=10)
    arguments = made.parse_args()
    if not arguments.stores and not arguments.smoke:
        made.error("give a STORE, or --smoke")
    if arguments.smoke:
        arguments.batch_sizes, arguments.graphs, arguments.trials = [64], 2, 1
    keep_freed_memory()  # as our commands do; it holds for everyone in this process
    limit_threads(cores())
    warnings.simplefilter(
        "ignore"
    )  # scipy's and scikit-learn's lobpcg tell of tolerances they missed: see the residuals
    races: dict[str, dict[str, object]] = {}
    for size in arguments.batch_sizes:
        rows = normalized_rows(
            torch.from_numpy(batches_of(arguments.stores, min(arguments.graphs, 65536 // size), size))
        )
        graph, _ = bridge_components(symmetrise(nearest(rows, arguments.knn)), rows)
        for q, tolerance in ((1, 1e-3), (1, 1e-6), (8, 1e-3)):
            if q > 1 and size != arguments.batch_sizes[min(1, len(arguments.batch_sizes) - 1)]:
                continue
            races[f"B={size} q={q} tol={tolerance:g}"] = race(graph, q, tolerance, arguments.trials)
    report("fiedler", {"knn": arguments.knn, "races": races}, arguments)


if __name__ == "__main__":
    main()
