"""The whole path of a batch (gather, nearest neighbours, graph, Fiedler vector, rule) beside its limit and its peers.

    python benchmarks/bench_select.py STORE... [--batch-sizes 128 256 512 1024 2048 4096]

The limit is the bare float32 matrix product of the same similarities, ``torch.bmm`` of the stacked batches with all
cores. The peers are compositions of libraries, written as one would who knows them: float16 rows gathered and
converted by torch, faiss.knn or a NumPy product and argpartition, SciPy's sparse union and Laplacian, eigsh. They
solve to the same tolerance, start ARPACK from the same vector each time, and run ``coverage`` as the rule. They do not
join disconnected graphs, as ours does, so that the rows kept differ where a graph is.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import faiss
import numpy as np
import scipy.sparse
import scipy.sparse.linalg
import torch
from batches import made_up
from bench_store import Ours
from harness import interleaved, parser, report, spread

from gstds_cache.config import SelectConfig
from gstds_cache.devices import cores, limit_threads
from gstds_cache.selection.rules import coverage, settle_ties
from gstds_cache.selection.run import BatchSelector
from gstds_cache.store.reader import EmbeddingStore


class Composition:
    """What a user would write with libraries alone, for one batch."""

    def __init__(self, table: np.ndarray, knn: int, tolerance: float) -> None:
        self.table, self.knn, self.tolerance = torch.from_numpy(table), knn, tolerance

    def rows(self, indices: np.ndarray) -> np.ndarray:
        return torch.nn.functional.normalize(self.table[torch.from_numpy(indices)].float(), dim=1).numpy()

    def by_faiss(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        similarity, index = faiss.knn(rows, rows, self.knn + 1, metric=faiss.METRIC_INNER_PRODUCT)
        return similarity, index

    def by_numpy(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        similarity = rows @ rows.T
        index = np.argpartition(similarity, -self.knn - 1, axis=1)[:, -self.knn - 1 :]
        return np.take_along_axis(similarity, index, axis=1), index

    def select(self, indices: np.ndarray, keep: int, search: str) -> np.ndarray:
        rows = self.rows(indices)
        similarity, index = self.by_faiss(rows) if search == "faiss" else self.by_numpy(rows)
        near = np.repeat(np.arange(len(rows)), index.shape[1])
        far, weight = index.ravel(), np.maximum(similarity.ravel(), 0).astype(np.float64)
        other = near != far
        w = scipy.sparse.csr_array((weight[other], (near[other], far[other])), shape=(len(rows), len(rows)))
        w = w.maximum(w.T)
        laplacian = scipy.sparse.diags_array(w.sum(axis=1)) - w
        start = np.linspace(-1, 1, len(rows))
        values, vectors = scipy.sparse.linalg.eigsh(laplacian.tocsr(), k=2, which="SA", tol=self.tolerance, v0=start)
        return indices[coverage(settle_ties(vectors[:, np.argmax(values)]), keep, np.random.default_rng(0))]


def whole_path(store: EmbeddingStore, config: SelectConfig, batches: int, trials: int) -> dict[str, object]:
    """Ours, its limit and its peers over the same batches."""
    table = store.gather(np.arange(len(store)))
    plan = BatchSelector(store, config).plan
    plans = [plan.batch(seq) for seq in range(batches)]
    peer = Composition(table, config.knn, config.tolerance)
    stacked = torch.stack([torch.from_numpy(peer.rows(one.indices)) for one in plans])
    product = torch.empty(8, config.batch_size, config.batch_size)
    work: dict[str, list[float]] = {}

    def limit() -> None:
        for g in range(0, batches, 8):
            part = stacked[g : g + 8]
            torch.bmm(part, part.transpose(1, 2), out=product[: len(part)])

    def ours(threads: int = 0) -> list[np.ndarray]:
        selector, kept = BatchSelector(store, replace(config, threads=threads)), []
        for selection in selector.run():
            kept.append(selection.kept)
            if len(kept) == batches:
                break
        for phase, spent in selector.counts.seconds.items():
            work.setdefault(phase, []).append(spent / sum(selector.counts.seconds.values()))
        return kept

    def composed(search: str) -> list[np.ndarray]:
        return [peer.select(one.indices, one.keep, search) for one in plans]

    timed = interleaved(
        trials,
        limit=limit,
        ours=ours,
        ours_1_thread=lambda: ours(1),
        faiss_scipy_eigsh=lambda: composed("faiss"),
        numpy_scipy_eigsh=lambda: composed("numpy"),
    )
    mine = ours()
    overlap = {
        search: float(
            np.mean([len(np.intersect1d(a, b)) / len(a) for a, b in zip(mine, composed(search), strict=True)])
        )
        for search in ("faiss", "numpy")
    }
    ratio = {
        name: spread([a / b for a, b in zip(spent["trials"], timed["ours"]["trials"], strict=True)])
        for name, spent in timed.items()
        if name != "ours"
    }
    return {
        "batches": batches,
        "dim": store.spec.dim,
        "ms_per_batch": {name: 1e3 * spent["median"] / batches for name, spent in timed.items()},
        "seconds": timed,
        "ours_over_the_product": spread([1 / value for value in ratio["limit"]["trials"]]),
        "peer_over_ours": {name: ratio[name] for name in ("faiss_scipy_eigsh", "numpy_scipy_eigsh")},
        "two_threads_over_one": ratio["ours_1_thread"],
        "work": {phase: float(np.median(shares)) for phase, shares in work.items()},
        "kept_overlap_with_peers": overlap,
    }


def main() -> None:
    made = parser(__doc__)
    made.add_argument("stores", type=Path, nargs="*", help="stores of real images; not needed with --smoke")
    made.add_argument("--batch-sizes", type=int, nargs="+", default=[128, 256, 512, 1024, 2048, 4096])
    made.add_argument("--batches", type=int, default=48)
    made.add_argument("--knn", type=int, default=10)
    arguments = made.parse_args()
    if not arguments.stores and not arguments.smoke:
        made.error("give a STORE, or --smoke")
    with tempfile.TemporaryDirectory() as folder:
        if arguments.smoke:
            arguments.stores, arguments.batch_sizes = [smoke_store(Path(folder))], [64]
            arguments.batches, arguments.trials = 3, 1
        limit_threads(cores())
        results: dict[str, dict[str, object]] = {}
        for path in arguments.stores:
            store = EmbeddingStore(path, access="memory")
            for size in arguments.batch_sizes:
                for tolerance in (1e-6, 1e-3) if size == 512 else (1e-6,):
                    config = SelectConfig(
                        batch_size=size, knn=arguments.knn, epochs=10_000, tolerance=tolerance, device="cpu"
                    )
                    batches = max(3, min(arguments.batches, arguments.batches * 512 // size))
                    name = f"{path.name} B={size} tol={tolerance:g}"
                    results[name] = whole_path(store, config, batches, arguments.trials)
    report("select", {"knn": arguments.knn, "whole_path": results}, arguments)


def smoke_store(folder: Path) -> Path:
    """A small store of made-up rows."""
    Ours().write(folder / "made-up.store", made_up(1, 300)[0].astype(np.float16))
    return folder / "made-up.store"


if __name__ == "__main__":
    main()
