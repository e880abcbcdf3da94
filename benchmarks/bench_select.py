"""The whole path of a batch (gather, nearest neighbours, graph, Fiedler vector, rule) beside its limit and its peers.

    python benchmarks/bench_select.py STORE... [--batch-sizes 128 256 512 1024 2048 4096]

The limit is the bare float32 matrix product of the same similarities, by whichever is quicker: ``torch.bmm`` of the
stacked batches with all cores, or NumPy's product of batch after batch, one in each of as many threads as there are
cores. (NumPy is given a copy as the second factor: of a matrix and itself it computes half, as ours does, and no limit
is that lucky.) The peers are compositions of libraries, written as one would who knows them: float16 rows gathered and
converted by torch, faiss.knn or a NumPy product and argpartition, SciPy's sparse union and Laplacian, eigsh. They
solve to the same tolerance, start ARPACK from the same vector each time, and run ``coverage`` as the rule. They do not
join disconnected graphs, as ours does, and of many exact duplicates they take some, so that vectors agree to four or
five digits where there are any. Each is measured with one thread
in every library and with all cores, faiss also in a process where OPENBLAS_CORETYPE is Haswell (the OpenBLAS in its
wheel is twice as quick with these kernels on some newer processors), and the quickest counts; and once more with a
batch in each of as many processes as there are cores, which is what ours does with threads. OpenMP's threads wait
without spinning here: torch's and faiss's would take each other's cores.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import groupby
from pathlib import Path

os.environ["OMP_WAIT_POLICY"] = "PASSIVE"

import faiss
import numpy as np
import scipy.sparse
import scipy.sparse.linalg
import threadpoolctl
import torch
from batches import made_up
from bench_store import Ours
from harness import interleaved, limit_threads, parser, report, spread

from gstds_cache.config import DEFAULT_RULE, SelectConfig
from gstds_cache.runtime.allocator import keep_freed_memory
from gstds_cache.runtime.threads import cores, in_threads
from gstds_cache.selection.plan import BatchPlan
from gstds_cache.selection.rule import RuleBatch, round_ties
from gstds_cache.selection.rules import coverage
from gstds_cache.selection.run import BatchSelector
from gstds_cache.spectral.fiedler import fiedler_vectors
from gstds_cache.store.layout import OK
from gstds_cache.store.reader import EmbeddingStore


class Composition:
    """What a user would write with libraries alone, for one batch."""

    def __init__(self, table: np.ndarray, knn: int, tolerance: float) -> None:
        self.table, self.knn, self.tolerance = torch.from_numpy(table), knn, tolerance
        self.start = np.random.default_rng(0).normal(size=len(table))

    def rows(self, indices: np.ndarray) -> np.ndarray:
        return torch.nn.functional.normalize(self.table[torch.from_numpy(indices)].float(), dim=1).numpy()

    def by_faiss(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        similarity, index = faiss.knn(rows, rows, self.knn + 1, metric=faiss.METRIC_INNER_PRODUCT)
        return similarity, index

    def by_numpy(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        similarity = rows @ rows.T
        index = np.argpartition(similarity, -self.knn - 1, axis=1)[:, -self.knn - 1 :]
        return np.take_along_axis(similarity, index, axis=1), index

    def vector(self, indices: np.ndarray, search: str) -> np.ndarray:
        rows = self.rows(indices)
        similarity, index = self.by_faiss(rows) if search == "faiss" else self.by_numpy(rows)
        near = np.repeat(np.arange(len(rows)), index.shape[1])
        far, weight = index.ravel(), np.maximum(similarity.ravel(), 0).astype(np.float64)
        other = near != far
        w = scipy.sparse.csr_array((weight[other], (near[other], far[other])), shape=(len(rows), len(rows)))
        w = w.maximum(w.T)
        laplacian = scipy.sparse.diags_array(w.sum(axis=1)) - w
        start = self.start[: len(rows)]
        values, vectors = scipy.sparse.linalg.eigsh(laplacian.tocsr(), k=2, which="SA", tol=self.tolerance, v0=start)
        # ARPACK skips the trivial eigenvalue now and then.
        return vectors[:, np.argmin(np.where(values > 1e-9, values, np.inf))]

    def select(self, batch: BatchPlan, search: str) -> np.ndarray:
        vector = self.vector(batch.indices, search)
        return batch.indices[coverage(RuleBatch(round_ties(vector), batch.keep))]


_composition: Composition | None = None


def begin_process(table: np.ndarray, knn: int, tolerance: float) -> None:
    global _composition  # noqa: PLW0603 - one per process, made before the clock starts
    limit_threads(1)
    _composition = Composition(table, knn, tolerance)


def started_pool(workers: int, *arguments: object, **environment: str) -> ProcessPoolExecutor:
    """Processes that have loaded their libraries in an environment of their own."""
    before = dict(os.environ)
    os.environ.update(environment)
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), begin_process, arguments)
    list(pool.map(abs, range(workers)))
    os.environ.clear()
    os.environ.update(before)
    return pool


def in_process(batch: BatchPlan, search: str) -> np.ndarray:
    assert _composition is not None
    return _composition.select(batch, search)


def whole_path(store: EmbeddingStore, config: SelectConfig, batches: int, trials: int) -> dict[str, object]:
    """Ours, its limit and its peers over the same batches."""
    table = np.zeros((len(store), store.spec.dim), store.spec.dtype)
    there = np.flatnonzero(store.valid == OK)
    table[there] = store.gather(there)
    plan = BatchSelector(store, config).plan
    plans = [plan.batch(seq) for seq in range(batches)]
    peer = Composition(table, config.knn, config.tolerance)
    rows = [torch.from_numpy(peer.rows(one.indices)) for one in plans]
    by_size = [list(group) for _, group in groupby(rows, key=len)]  # the last batch of an epoch is of another size
    stacks = [torch.stack(group[g : g + 8]) for group in by_size for g in range(0, len(group), 8)]
    products = [torch.empty(*stack.shape[:2], stack.shape[1]) for stack in stacks]
    work: dict[str, list[float]] = {}

    def product_torch() -> None:
        for stack, product in zip(stacks, products, strict=True):
            torch.bmm(stack, stack.transpose(1, 2), out=product)

    pairs = [(one.numpy(), one.clone().numpy()) for one in rows]

    def product_numpy() -> None:
        for _ in in_threads(lambda pair: np.matmul(pair[0], pair[1].T), pairs, cores()):
            pass

    def ours(threads: int = 0, **changes: str) -> list[np.ndarray]:
        selector, kept = BatchSelector(store, replace(config, threads=threads, **changes)), []
        for selection in selector.run():
            kept.append(selection.kept)
            if len(kept) == batches:
                break
        for phase, spent in selector.counts.seconds.items() if not changes else ():
            work.setdefault(phase, []).append(spent / sum(selector.counts.seconds.values()))
        return kept

    def composed(search: str, threads: int) -> None:
        with threadpoolctl.threadpool_limits(threads):
            for one in plans:
                peer.select(one, search)

    shared = (table, config.knn, config.tolerance)
    pool = started_pool(cores(), *shared)
    haswell = started_pool(1, *shared, OPENBLAS_CORETYPE="Haswell")

    def in_processes(search: str) -> None:
        list(pool.map(in_process, plans, [search] * len(plans), chunksize=4))

    def faiss_haswell() -> None:
        list(haswell.map(in_process, plans, ["faiss"] * len(plans), chunksize=len(plans)))

    with pool, haswell:
        timed = interleaved(
            trials,
            product_torch=product_torch,
            product_numpy=product_numpy,
            ours=ours,
            ours_1_thread=lambda: ours(1),
            ours_default_rule=lambda: ours(rule=DEFAULT_RULE, guidance="auto"),
            **{
                f"{search}_scipy_eigsh_{threads}_threads": partial(composed, search, threads)
                for search in ("faiss", "numpy")
                for threads in (1, cores())
            },
            faiss_scipy_eigsh_haswell=faiss_haswell,
            **{f"{search}_scipy_eigsh_processes": partial(in_processes, search) for search in ("faiss", "numpy")},
        )
    cosine = [
        abs(
            float(fiedler_vectors(peer.rows(one.indices), k=config.knn).vector[0].numpy() @ peer.vector(one.indices, s))
        )
        for one in plans
        for s in ("faiss", "numpy")
    ]
    median = {name: spent["median"] for name, spent in timed.items()}
    settings = [f"{n}_threads" for n in (1, cores())]
    best = {
        "faiss": min((f"faiss_scipy_eigsh_{how}" for how in (*settings, "haswell")), key=median.__getitem__),
        "numpy": min((f"numpy_scipy_eigsh_{how}" for how in settings), key=median.__getitem__),
    }

    limit = min(("product_torch", "product_numpy"), key=median.__getitem__)

    def over_ours(name: str) -> dict[str, object]:
        return spread([a / b for a, b in zip(timed[name]["trials"], timed["ours"]["trials"], strict=True)])

    return {
        "batches": batches,
        "dim": store.spec.dim,
        "ms_per_batch": {name: 1e3 * seconds / batches for name, seconds in median.items()},
        "seconds": timed,
        "limit": limit,
        "ours_over_the_product": spread([1 / ratio for ratio in over_ours(limit)["trials"]]),
        "best_composition_over_ours": {name: over_ours(name) for name in best.values()},
        "composition_in_processes_over_ours": {s: over_ours(f"{s}_scipy_eigsh_processes") for s in ("faiss", "numpy")},
        "default_rule": DEFAULT_RULE,
        "default_rule_over_ours": over_ours("ours_default_rule"),
        "one_thread_over_ours": over_ours("ours_1_thread"),
        "work": {phase: float(np.median(shares)) for phase, shares in work.items()},
        "cosine_with_peers": {"median": float(np.median(cosine)), "min": min(cosine)},
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
        keep_freed_memory()  # as our commands do; it holds for everyone in this process
        limit_threads(cores())
        results: dict[str, dict[str, object]] = {}
        for path in arguments.stores:
            store = EmbeddingStore(path, access="memory")
            for size in arguments.batch_sizes:
                for tolerance in (1e-6, 1e-3) if size == 512 else (1e-6,):
                    batches = max(3, min(arguments.batches, arguments.batches * 512 // size))
                    epochs = 1 + batches * size // (len(store) // 2)
                    config = SelectConfig(
                        batch_size=size,
                        knn=arguments.knn,
                        epochs=epochs,
                        batch_assignments=0,  # every batch makes its graph
                        tolerance=tolerance,
                        device="cpu",
                        rule="coverage",
                        guidance="none",
                    )
                    name = f"{path.name} B={size} tol={tolerance:g}"
                    results[name] = whole_path(store, config, batches, arguments.trials)
    report("select", {"knn": arguments.knn, "whole_path": results}, arguments)


def smoke_store(folder: Path) -> Path:
    """A small store of made-up rows."""
    Ours().write(folder / "made-up.store", made_up(1, 300)[0].astype(np.float16))
    return folder / "made-up.store"


if __name__ == "__main__":
    main()
