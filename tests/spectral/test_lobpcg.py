from __future__ import annotations

import numpy as np
import pytest
import torch

from gstds_cache.graph.components import bridge_components
from gstds_cache.graph.knn import knn_graph
from gstds_cache.graph.laplacian import Laplacian, SparseGraph, symmetrise
from gstds_cache.graph.neighbors import normalized_rows
from gstds_cache.spectral import lobpcg as module
from gstds_cache.spectral.lobpcg import combine, gram, lobpcg, ordered_sum, orthonormalise, pairwise_sum
from gstds_cache.spectral.preconditioner import Preconditioner, coarse_factor, strong_part


def rand(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def solve(laplacian, q=2, *, tolerance=1e-4, max_iterations=500, seed=0):
    return lobpcg(laplacian, q, tolerance=tolerance, max_iterations=max_iterations, seed=seed)


def batch(g=3, b=120, noise=0.5, seed=0, k=8):
    centres = rand(6, 16, seed=seed)
    label = torch.randint(6, (g, b), generator=torch.Generator().manual_seed(seed))
    x = centres[label] + noise * rand(g, b, 16, seed=seed + 1)
    return bridge_components(symmetrise(knn_graph(x, k)), normalized_rows(x))[0]


def path(b):
    n = torch.arange(b - 1)
    return SparseGraph.from_edges(n, n + 1, torch.ones(b - 1, dtype=torch.float64), (1, b))


@pytest.mark.parametrize("b", [1, 2, 3, 7, 64, 513])
@pytest.mark.parametrize("add_up", [pairwise_sum, ordered_sum])
def test_sums_are_sums_whose_order_knows_no_neighbours(add_up, b):
    x = rand(5, 4, b)
    before = x.clone()
    whole = add_up(x)
    torch.testing.assert_close(whole, before.sum(-1), atol=1e-12, rtol=0)
    assert torch.equal(x, before), "the argument was changed"
    assert all(torch.equal(add_up(x[:, g : g + 1].contiguous())[:, 0], whole[:, g]) for g in range(4))


def test_gram_and_combine_are_the_matrix_products():
    left, right = rand(3, 2, 50), rand(4, 2, 50, seed=1)
    np.testing.assert_allclose(gram(left, right), np.einsum("mgb,ngb->gmn", left, right), atol=1e-12)
    c = rand(2, 3, 5, seed=2).numpy()
    np.testing.assert_allclose(combine(left, c).numpy(), np.einsum("mgb,gmn->ngb", left, c), atol=1e-12)


def dimensions(v):
    return (v.abs().amax(dim=-1) > 0).sum(dim=0).tolist()


def assert_orthonormal(v, against):
    for g in range(v.shape[1]):
        own = v[:, g][v[:, g].abs().amax(dim=-1) > 0]
        torch.testing.assert_close(own @ own.T, torch.eye(len(own), dtype=torch.float64), atol=1e-12, rtol=0)
        assert (own @ against[:, g].T).abs().max() < 1e-12


def test_orthonormalise_spans_the_same_space():
    against = orthonormalise(rand(2, 3, 60), torch.zeros(0, 3, 60, dtype=torch.float64))
    v = rand(4, 3, 60, seed=1) * torch.tensor([1e-9, 1.0, 1e6, 1e-150], dtype=torch.float64)[:, None, None]
    out = orthonormalise(v, against)
    assert dimensions(out) == [4, 4, 4]
    assert_orthonormal(out, against)
    for g in range(3):
        basis = torch.cat([against, out])[:, g]
        unit = v[:, g] / torch.linalg.vector_norm(v[:, g], dim=1, keepdim=True)
        torch.testing.assert_close(unit @ basis.T @ basis, unit, atol=1e-8, rtol=0)


def test_orthonormalise_drops_what_adds_nothing():
    against = orthonormalise(rand(2, 2, 60), torch.zeros(0, 2, 60, dtype=torch.float64))
    a, b = rand(1, 2, 60, seed=1), rand(1, 2, 60, seed=2)
    for v, expected in (
        (torch.cat([a, b, a + b]), 2),
        (torch.cat([a, a, a]), 1),
        (torch.cat([a, 0 * a, b]), 2),
        (torch.cat([against, a]), 1),
        (torch.cat([a, a + 1e-5 * b]), 2),
        (0 * torch.cat([a, b]), 0),
    ):
        out = orthonormalise(v, against)
        assert dimensions(out) == [expected, expected]
        if expected:
            assert_orthonormal(out, against)


def test_a_graph_stops_when_it_has_converged_and_not_before():
    laplacian = Laplacian(batch(4, noise=1.5))
    ritz = solve(laplacian)
    assert ritz.converged.all()
    assert len(set(ritz.iterations.tolist())) > 1, "graphs of one difficulty show nothing"
    for g, taken in enumerate(ritz.iterations.tolist()):
        short = solve(laplacian.subset([g]), max_iterations=taken - 1)
        assert not short.converged.any()
        assert short.iterations.tolist() == [taken - 1]


def test_a_converged_graph_is_not_touched_again():
    """Three more orders for the slowest graph's sake would change the quickest, were it still iterated."""
    laplacian = Laplacian(batch(4, noise=1.5))
    ritz = solve(laplacian)
    quick = int(ritz.iterations.argmin())
    alone = solve(laplacian.subset([quick]), max_iterations=int(ritz.iterations[quick]))
    assert torch.equal(alone.basis[0], ritz.basis[quick])
    assert torch.equal(alone.residual[0], ritz.residual[quick])


def test_what_did_not_converge_says_so():
    ritz = solve(Laplacian(path(400)), max_iterations=5)
    assert ritz.converged.tolist() == [False]
    assert ritz.iterations.tolist() == [5]
    assert ritz.residual.max() > 1e-4
    assert ritz.basis.isfinite().all()


def test_a_tighter_tolerance_is_kept():
    laplacian = Laplacian(batch())
    ritz = solve(laplacian, tolerance=1e-10)
    assert ritz.converged.all()
    residual = laplacian @ ritz.basis - ritz.basis * ritz.values[:, None]
    assert (torch.linalg.vector_norm(residual, dim=1) / ritz.values).max() < 2e-10


def test_iterating_on_after_every_direction_is_spent_is_harmless():
    """A complete graph has one nontrivial eigenvalue: the first residual is rounding, and the trial basis is empty."""
    row, col = torch.triu_indices(40, 40, 1)
    graph = SparseGraph.from_edges(row, col, torch.ones(len(row), dtype=torch.float64), (1, 40))
    ritz = solve(Laplacian(graph), tolerance=1e-300, max_iterations=20)
    assert ritz.iterations.tolist() == [20]
    torch.testing.assert_close(ritz.values, torch.full((1, 2), 40.0, dtype=torch.float64))
    torch.testing.assert_close(ritz.basis[0].T @ ritz.basis[0], torch.eye(2, dtype=torch.float64))


def test_other_seeds_start_elsewhere_and_end_in_the_same_place():
    laplacian = Laplacian(batch())
    one, two = solve(laplacian, seed=0), solve(laplacian, seed=1)
    assert not torch.equal(one.basis, two.basis)
    torch.testing.assert_close(one.values, two.values, rtol=1e-7, atol=0)


def test_guard_vectors_pay(monkeypatch):
    laplacian = Laplacian(batch(4, b=300, noise=2.0, k=10))
    guarded = solve(laplacian).iterations.sum()
    monkeypatch.setattr(module, "GUARD", 0)
    assert guarded < solve(laplacian).iterations.sum()


def test_the_coarse_term_inverts_the_laplacian_on_the_clusters():
    laplacian = Laplacian(batch(1, noise=0.05))
    cluster = laplacian.graph.component[0]
    assert cluster.max() > 2
    F = coarse_factor(laplacian, cluster)
    C = torch.nn.functional.one_hot(cluster).double()
    inverse = C @ torch.linalg.pinv(C.T @ laplacian.dense(0) @ C, rtol=1e-12, hermitian=True) @ C.T
    got = F @ F.T
    centre = torch.eye(len(C), dtype=torch.float64) - 1 / len(C)  # F leaves out the null vector, up to a constant
    torch.testing.assert_close(centre @ got @ centre, centre @ inverse @ centre, rtol=1e-6, atol=1e-6)


def test_bridged_graphs_converge_as_fast_as_connected_ones():
    ritz = solve(Laplacian(batch(3, b=240, noise=0.02)))
    assert ritz.converged.all()
    assert ritz.iterations.max() <= 30


def test_the_preconditioner_is_jacobi_where_there_is_one_cluster():
    laplacian = Laplacian(path(50))
    assert not Preconditioner.of(laplacian).coarse
    R = rand(3, 1, 50)
    assert torch.equal(Preconditioner.of(laplacian)(R), 1 / laplacian.diagonal * R)


def test_strong_edges_are_those_near_their_ends_heaviest():
    w = torch.tensor([1.0, 0.4, 0.3, 0.01], dtype=torch.float64)
    graph = SparseGraph.from_edges(torch.tensor([0, 1, 2, 3]), torch.tensor([1, 2, 3, 4]), w, (1, 5))
    # 0.4 < 0.5 sqrt(1.0 * 0.4) is false: 0.316. 0.01 < 0.5 sqrt(0.3 * 0.01) = 0.027 is true.
    assert strong_part(graph).degree.tolist() == [[1.0, 1.4, 0.7, 0.3, 0.0]]


def test_a_basis_that_has_broken_down_is_told_and_not_raised() -> None:
    from gstds_cache.spectral.small import rayleigh_ritz

    for bad in (np.nan, np.inf):
        for where in (0, 1):
            M, H = np.eye(24), np.eye(24)
            (M, H)[where][13, 5] = bad
            theta, Y = np.full(8, 7.0), np.full((24, 8), 7.0)
            assert rayleigh_ritz(M, H, 24, 8, np.zeros((3, 24, 24)), Y, theta) == 0
            assert (theta == 7).all()
            assert (Y == 7).all()


def test_a_dependent_direction_is_seen_behind_a_nearly_dependent_one():
    """A Cholesky pivot that should be 0 is rounding over the smallest pivot before it, and not below a fixed bound."""
    from gstds_cache.spectral.small import rayleigh_ritz

    nodes, size, wanted = 40, 30, 10
    A = np.diag(np.linspace(0.5, 20, nodes))
    for seed in range(60):
        rng = np.random.default_rng(seed)
        S = np.linalg.qr(rng.normal(size=(nodes, size - 1)))[0].T
        S[-1] = S[:-1].T @ rng.normal(size=size - 2) / 5 + 10 ** rng.uniform(-3.5, -2) * S[-1]
        S /= np.linalg.norm(S, axis=1)[:, None]
        Q = np.linalg.qr(S.T)[0]
        dependent = Q[:, -1] + 0.06 * Q[:, :-1] @ rng.normal(size=size - 2)
        S = np.vstack([S, dependent / np.linalg.norm(dependent)])
        Y, theta = np.zeros((size, wanted)), np.zeros(wanted)
        assert rayleigh_ritz(S @ S.T, S @ A @ S.T, size, wanted, np.zeros((3, size, size)), Y, theta) == size - 1
        np.testing.assert_allclose(theta, np.linalg.eigvalsh(Q.T @ A @ Q)[:wanted], rtol=1e-8)
        np.testing.assert_allclose(Y.T @ S @ S.T @ Y, np.eye(wanted), atol=1e-8)
