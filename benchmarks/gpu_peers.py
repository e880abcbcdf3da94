"""What else solves and searches on a GPU: the peers of the kernels, on the same graphs and rows, each at its best."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

SECONDS_OF_A_TRIAL = 0.4
Way = Callable[[int], object]  # how many graphs -> whatever it computes


def wait(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Solvers:
    """Graphs as each library takes them, and a way to solve the first ``n`` of them for each.

    All stop where their own tolerance comes closest to a residual of ``tolerance`` times the eigenvalue; what they
    reached is told beside their times.
    """

    def __init__(self, dense: Tensor, q: int, tolerance: float, values: list[float]) -> None:
        """Take Laplacians, ``[G, B, B]`` float64, and the lowest nontrivial eigenvalue of each."""
        self.dense, self.q, self.tolerance, self.value = dense, q, tolerance, values
        self.device = dense.device
        self.start = torch.from_numpy(np.random.default_rng(0).normal(size=(dense.shape[1], q + 1))).to(dense.device)

    def ways(self) -> dict[str, Way]:
        """Every peer by name."""
        single = self.dense.float()
        return {
            "torch.linalg.eigh, float64": lambda n: torch.linalg.eigh(self.dense[:n])[1][..., 1 : self.q + 1],
            "torch.linalg.eigh, float32": lambda n: torch.linalg.eigh(single[:n])[1][..., 1 : self.q + 1],
            "torch.lobpcg": self.torch_lobpcg(),
            "cupyx lobpcg": self.cupyx_lobpcg(),
        }

    def torch_lobpcg(self) -> Way:
        """One graph at a time, as torch itself does with a stack; sparse, with the Jacobi preconditioner."""
        sparse = [dense.to_sparse_csr() for dense in self.dense]
        inverse = [torch.diag(1 / dense.diagonal()).to_sparse_csr() for dense in self.dense]

        def solve(n: int) -> Tensor:
            found = [
                torch.lobpcg(
                    sparse[g], X=self.start, iK=inverse[g], tol=self.tolerance * self.value[g], niter=500, largest=False
                )[1]
                for g in range(n)
            ]
            return torch.stack(found)[..., 1:]

        return solve

    def cupyx_lobpcg(self) -> Way:
        """One graph at a time; sparse, with the Jacobi preconditioner and the null vector as a constraint."""
        if self.device.type != "cuda":

            def not_here(_: int) -> Tensor:
                raise RuntimeError(f"CuPy computes on CUDA, not on {self.device}")

            return not_here
        import cupy
        import cupyx.scipy.sparse as sparse
        from cupyx.scipy.sparse.linalg import lobpcg

        dense = [cupy.from_dlpack(matrix.contiguous()) for matrix in self.dense]
        matrices = [sparse.csr_matrix(matrix) for matrix in dense]
        inverse = [sparse.diags(1 / cupy.diag(matrix), format="csr") for matrix in dense]
        start = cupy.from_dlpack(self.start[:, : self.q].contiguous())
        ones = cupy.ones((self.dense.shape[1], 1))

        def solve(n: int) -> Tensor:
            found = []
            for g in range(n):
                values, vectors = lobpcg(
                    matrices[g], start.copy(), M=inverse[g], Y=ones, tol=self.tolerance * self.value[g], maxiter=500,
                    largest=False,
                )  # fmt: skip
                found.append(torch.from_dlpack(vectors[:, cupy.argsort(values)]))
            return torch.stack(found)

        return solve

    def residual(self, vectors: Tensor) -> float:
        """Largest relative residual of vectors ``[n, B, q]``, with the values that fit them best."""
        basis = vectors.double() - vectors.double().mean(dim=1, keepdim=True)
        basis = basis / basis.norm(dim=1, keepdim=True)
        product = self.dense[: len(basis)] @ basis
        values = (basis * product).sum(dim=1, keepdim=True)
        return float(((product - basis * values).norm(dim=1, keepdim=True) / values).max())


def how_many(way: Way, most: int, device: torch.device) -> int | str:
    """Graphs of a trial that takes about ``SECONDS_OF_A_TRIAL``, or why the way cannot be taken."""
    try:
        way(1)
        wait(device)
        begun = time.perf_counter()
        way(1)
        wait(device)
        one = time.perf_counter() - begun
        if one * 4 > SECONDS_OF_A_TRIAL:
            return 1
        begun = time.perf_counter()
        way(min(4, most))
        wait(device)
        one = (time.perf_counter() - begun) / min(4, most)  # a stack at once may be quicker than one after the other
    except Exception as error:  # a library that is not there, or gives up
        return f"{type(error).__name__}: {error}"[:500]
    return max(1, min(most, int(SECONDS_OF_A_TRIAL / one)))


def searches(rows16: Tensor, rows32: Tensor, k: int) -> dict[str, Way]:
    """Ways to the k nearest of each row's own graph, rows included: neighbours alone, no graph made of them.

    Args:
        rows16: Rows as stored, ``[G, B, D]`` float16.
        rows32: The same of unit length, ``[G, B, D]`` float32.
        k: Neighbours.
    """
    out_dtype: dict[str, Any] = {"out_dtype": torch.float32} if rows16.is_cuda else {}
    at_once = max(1, (1 << 31) // (4 * rows16.shape[1] ** 2))

    def topk(rows: Tensor, n: int, **options: Any) -> object:
        parts = [rows[g : min(g + at_once, n)] for g in range(0, n, at_once)]
        return [torch.bmm(part, part.mT, **options).topk(k + 1, dim=2) for part in parts]

    ways: dict[str, Way] = {
        "bmm and topk, float32": lambda n: topk(rows32, n),
        "bmm and topk, float16": lambda n: topk(rows16, n, **out_dtype),
    }
    if not rows16.is_cuda:
        return ways
    try:
        import faiss
        import faiss.contrib.torch_utils  # noqa: F401 - from here on knn_gpu takes tensors
    except ImportError as error:
        ways["faiss.knn_gpu"] = refused(f"{error}")
        return ways
    resources = faiss.StandardGpuResources()

    def knn_gpu(n: int) -> object:
        return [
            faiss.knn_gpu(resources, rows32[g], rows32[g], k + 1, metric=faiss.METRIC_INNER_PRODUCT) for g in range(n)
        ]

    ways["faiss.knn_gpu"] = knn_gpu
    return ways


def refused(why: str) -> Way:
    """A way that cannot be taken."""

    def way(_: int) -> object:
        raise RuntimeError(why)

    return way
