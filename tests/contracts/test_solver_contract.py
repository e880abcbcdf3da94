"""Every solver finds the lowest nontrivial eigenpairs that scipy.linalg.eigh finds, and says how well it did."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch

from gstds_cache.graph.components import bridge_components
from gstds_cache.graph.knn import knn_graph
from gstds_cache.graph.laplacian import Laplacian, SparseGraph, symmetrise
from gstds_cache.graph.neighbors import normalized_rows
from gstds_cache.spectral.block import solve_graphs
from gstds_cache.spectral.compiled import lobpcg_compiled
from gstds_cache.spectral.dense import solve_dense
from gstds_cache.spectral.lobpcg import lobpcg

TOLERANCE = 1e-4


def by_dense(laplacian, q):
    return solve_dense(laplacian, q, tolerance=TOLERANCE)


def by_lobpcg(laplacian, q):
    return lobpcg(laplacian, q, tolerance=TOLERANCE, max_iterations=500, seed=0)


def by_compiled(laplacian, q):
    return lobpcg_compiled(laplacian, q, tolerance=TOLERANCE, max_iterations=500, seed=0, threads=2)


def by_block(laplacian, q):
    ritz = solve_graphs(laplacian.graph, q, laplacian=laplacian.kind, tolerance=TOLERANCE, max_iterations=500, seed=0)
    assert ritz is not None
    return ritz


CUDA = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.fixture(
    params=[
        pytest.param((by_dense, "cpu"), id="dense-on-cpu"),
        pytest.param((by_lobpcg, "cpu"), id="lobpcg-on-cpu"),
        pytest.param((by_compiled, "cpu"), id="compiled-on-cpu"),
        pytest.param((by_block, "cpu"), id="block-emulated"),
        pytest.param((by_block, "cuda"), id="block-on-cuda", marks=CUDA),
        pytest.param((by_dense, "cuda"), id="dense-on-cuda", marks=CUDA),
        pytest.param((by_lobpcg, "cuda"), id="lobpcg-on-cuda", marks=CUDA),
    ]
)
def solve(request):
    solver, device = request.param
    if (solver, device) == (by_block, "cpu"):
        request.getfixturevalue("emulated_kernels")

    def run(graph, q=2, kind="combinatorial"):
        moved = SparseGraph(**{name: value.to(device) for name, value in vars(graph).items()})
        ritz = solver(Laplacian(moved, kind), q)
        assert {value.device.type for value in vars(ritz).values()} == {device}
        return type(ritz)(**{name: value.cpu() for name, value in vars(ritz).items()})

    return run


def embeddings(g, b, d=24, classes=5, noise=1.0, seed=0):
    gen = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, d, generator=gen)
    return centres[torch.randint(classes, (g, b), generator=gen)] + noise * torch.randn(g, b, d, generator=gen)


def connected(x, k=8):
    return bridge_components(symmetrise(knn_graph(x, k)), normalized_rows(x))[0]


def assert_solved(graph, ritz, q, kind="combinatorial", *, every=True):
    laplacian = Laplacian(graph, kind)
    b = graph.nodes
    assert ritz.values.shape == ritz.residual.shape == (graph.graphs, q)
    assert ritz.basis.shape == (graph.graphs, b, q)
    assert all(value.isfinite().all() for value in vars(ritz).values())
    assert not every or ritz.converged.all()
    for g in range(graph.graphs):
        dense = laplacian.dense(g).numpy()
        values, vectors = scipy.linalg.eigh(dense)
        values, vectors = values[1:], vectors[:, 1:]
        mine, basis = ritz.values[g].numpy(), ritz.basis[g].numpy()
        np.testing.assert_allclose(basis.T @ basis, np.eye(q), atol=1e-9)
        np.testing.assert_allclose(laplacian.null_vector[g].numpy() @ basis, 0, atol=1e-9)
        residual = np.linalg.norm(dense @ basis - basis * mine, axis=0) / mine
        np.testing.assert_allclose(ritz.residual[g].numpy(), residual, rtol=1e-3, atol=1e-8)
        assert ritz.converged[g] == (ritz.residual[g] <= TOLERANCE).all()
        if not ritz.converged[g]:
            continue
        np.testing.assert_allclose(mine, values[:q], rtol=1e-6)
        for n in range(q):
            below = values[n] - values[n - 1] if n else np.inf
            if min(below, values[n + 1] - values[n]) > 1e-2 * values[n + 1]:
                assert abs(basis[:, n] @ vectors[:, n]) >= 0.9999


@pytest.mark.parametrize("kind", ["combinatorial", "normalized"])
@pytest.mark.parametrize(
    ("b", "k", "noise", "q"), [(40, 4, 1.0, 2), (130, 10, 0.4, 2), (257, 10, 2.0, 3), (300, 6, 0.1, 8)]
)
def test_batches_of_clustered_embeddings(solve, b, k, noise, q, kind):
    graph = connected(embeddings(3, b, noise=noise, seed=b), k)
    assert_solved(graph, solve(graph, q, kind), q, kind)


def test_no_structure_at_all(solve):
    graph = connected(torch.randn(2, 200, 64, generator=torch.Generator().manual_seed(1)), 10)
    assert_solved(graph, solve(graph), 2)


def test_many_tight_classes_bridged(solve):
    graph = connected(embeddings(2, 256, classes=20, noise=0.01), 5)
    assert (graph.component.amax(dim=1) == 19).all()
    assert_solved(graph, solve(graph, 4), 4)


@pytest.mark.parametrize("kind", ["combinatorial", "normalized"])
def test_weights_over_six_orders_of_magnitude(solve, kind):
    rng = np.random.default_rng(0)
    b = 60
    row, col = np.triu_indices(b, 1)
    kept = rng.random(len(row)) < 0.15
    kept |= col == row + 1
    weight = (10.0 ** rng.uniform(-6, 0, kept.sum())).astype(np.float32).astype(np.float64)  # as cosines are
    graph = SparseGraph.from_edges(*(torch.from_numpy(a) for a in (row[kept], col[kept], weight)), (1, b))
    ritz = solve(graph, 2, kind)
    assert_solved(graph, ritz, 2, kind, every=False)


def test_a_degenerate_pair_is_a_basis_of_its_plane(solve):
    n = torch.arange(64)
    graph = SparseGraph.from_edges(n, (n + 1) % 64, torch.ones(64, dtype=torch.float64), (1, 64))
    ritz = solve(graph)
    assert ritz.converged.all()
    np.testing.assert_allclose(ritz.values[0].numpy(), 2 - 2 * np.cos(2 * np.pi / 64), rtol=1e-7)
    angle = 2 * np.pi * n.numpy() / 64
    plane = np.stack([np.cos(angle), np.sin(angle)], 1) / np.sqrt(32)
    np.testing.assert_allclose(np.linalg.svd(plane.T @ ritz.basis[0].numpy())[1], 1, atol=1e-6)


def test_the_same_bits_every_time(solve):
    graph = connected(embeddings(4, 150, noise=0.6))
    first = solve(graph)
    for _ in range(4):
        again = solve(graph)
        assert all(torch.equal(value, getattr(first, name)) for name, value in vars(again).items())


@pytest.mark.parametrize("kind", ["combinatorial", "normalized"])
def test_the_same_bits_in_every_stack(solve, kind):
    """Easy and hard, bridged and connected graphs, stacked in several ways: none sees the others."""
    x = torch.cat([embeddings(1, 120, noise=noise, seed=s) for s, noise in enumerate((2.0, 0.05, 0.5, 0.3, 1.0))])
    graph = connected(x, 6)
    whole = solve(graph, 2, kind)
    for keep in ([0], [3], [1, 4], [4, 2, 0, 3, 1]):
        part = solve(graph.subset(keep), 2, kind)
        for name, value in vars(part).items():
            assert torch.equal(value, getattr(whole, name)[keep]), name
