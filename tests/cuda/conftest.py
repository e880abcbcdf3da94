"""Kernels to launch by hand, and batches of rows that are hard on a graph."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from emulated import EmulatedKernel, EmulatedKernels


@pytest.fixture
def graph_kernel(emulated_kernels: EmulatedKernels) -> EmulatedKernel:
    return emulated_kernels("graph.cu", "graph_block", ("KNN=10",))


@pytest.fixture
def solve_kernel(emulated_kernels: EmulatedKernels) -> Callable[..., EmulatedKernel]:
    def kernel(m: int = 2, *, spill: bool = False) -> EmulatedKernel:
        return emulated_kernels("solve.cu", "fiedler_block", (f"M={m}", *(["SPILL"] if spill else [])))

    return kernel


def _clusters(b: int, count: int, noise: float, seed: int = 0, d: int = 16) -> torch.Tensor:
    gen = torch.Generator().manual_seed(seed)
    centres = torch.randn(count, d, generator=gen)
    return centres[torch.randint(count, (b,), generator=gen)] + noise * torch.randn(b, d, generator=gen)


BATCHES = {
    "one cluster": lambda: _clusters(96, 1, 2.0),
    "clusters that hang together": lambda: _clusters(90, 4, 0.8),
    "eight components": lambda: _clusters(96, 8, 0.01),
    "duplicates": lambda: _clusters(7, 7, 1.0).repeat_interleave(12, 0),
    "all equal": lambda: torch.ones(40, 4),
    "zero rows": lambda: _clusters(60, 3, 0.5) * (torch.arange(60)[:, None] % 5 > 0),
    "only zero rows": lambda: torch.zeros(33, 3),
    "opposite clusters": lambda: torch.cat([_clusters(20, 1, 0.1), -_clusters(25, 1, 0.1)]),
    "few rows": lambda: _clusters(12, 2, 0.5),
    "ties": lambda: torch.eye(5).repeat(9, 1),
}


@pytest.fixture(params=list(BATCHES))
def rows(request: pytest.FixtureRequest) -> torch.Tensor:
    """Unit rows of one batch, ``[1, B, D]`` float32."""
    x = BATCHES[request.param]()
    length = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    return torch.where(length > 0, x / length, 0).float()[None]
