"""Analytic spectra, edge cases, and the promise that a result is accurate or its status says otherwise."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gstds_cache.errors import SolverError, UsageError
from gstds_cache.graph.components import bridge_components
from gstds_cache.graph.knn import knn_graph
from gstds_cache.graph.laplacian import Laplacian, SparseGraph, symmetrise
from gstds_cache.graph.neighbors import normalized_rows
from gstds_cache.spectral import dense, fiedler
from gstds_cache.spectral.fiedler import fiedler_of_graph, fiedler_vectors
from gstds_cache.spectral.status import Status


def from_pairs(pairs, nodes, weight=None):
    row, col = torch.tensor(pairs).T
    weight = torch.ones(len(row)) if weight is None else torch.as_tensor(weight)
    return SparseGraph.from_edges(row.contiguous(), col.contiguous(), weight.double(), (1, nodes))


def path(n):
    return from_pairs([(i, i + 1) for i in range(n - 1)], n)


def cycle(n):
    return from_pairs([(i, (i + 1) % n) for i in range(n)], n)


def complete(n):
    return from_pairs(list(itertools.combinations(range(n), 2)), n)


def star(n):
    return from_pairs([(0, i) for i in range(1, n)], n)


def barbell(m):
    pairs = list(itertools.combinations(range(m), 2))
    return from_pairs(pairs + [(i + m, j + m) for i, j in pairs] + [(m - 1, m)], 2 * m)


def grid(p, q):
    down = [(i * q + j, (i + 1) * q + j) for i in range(p - 1) for j in range(q)]
    across = [(i * q + j, i * q + j + 1) for i in range(p) for j in range(q - 1)]
    return from_pairs(down + across, p * q)


def path_value(n, j=1):
    return 2 - 2 * np.cos(np.pi * j / n)


def status(result):
    return [Status(s) for s in result.status.tolist()]


def finite(result):
    assert result.basis.isfinite().all()
    assert result.residual.isfinite().all()
    assert not result.values.isnan().any()
    assert (result.values >= 0).all()
    assert result.status.dtype == torch.int8
    return result


# Sizes below and above the border between the dense solver and LOBPCG.
@pytest.mark.parametrize("n", [4, 20, 60])
def test_path(n):
    result = fiedler_of_graph(path(n), q=2)
    assert status(result) == [Status.CONVERGED]
    np.testing.assert_allclose(result.values[0], [path_value(n), path_value(n, 2)], rtol=1e-7)
    expected = np.cos(np.pi * (np.arange(n) + 0.5) / n)
    assert abs(expected @ result.vector[0].numpy()) / np.linalg.norm(expected) >= 0.9999
    assert (np.diff(result.vector[0]) < 0).all() or (np.diff(result.vector[0]) > 0).all()


@pytest.mark.parametrize("n", [5, 64])
def test_cycle_is_degenerate(n):
    result = fiedler_of_graph(cycle(n), q=2)
    assert status(result) == [Status.DEGENERATE]
    np.testing.assert_allclose(result.values[0], 2 - 2 * np.cos(2 * np.pi / n), rtol=1e-7)
    normalized = fiedler_of_graph(cycle(n), q=2, laplacian="normalized")
    np.testing.assert_allclose(normalized.values[0], 1 - np.cos(2 * np.pi / n), rtol=1e-7)


@pytest.mark.parametrize("n", [6, 50])
def test_complete_is_degenerate(n):
    result = fiedler_of_graph(complete(n), q=3)
    assert status(result) == [Status.DEGENERATE]
    np.testing.assert_allclose(result.values[0], n, rtol=1e-9)
    np.testing.assert_allclose(fiedler_of_graph(complete(n), laplacian="normalized").values[0], n / (n - 1), rtol=1e-9)


@pytest.mark.parametrize("n", [6, 50])
def test_star_is_degenerate(n):
    result = fiedler_of_graph(star(n))
    assert status(result) == [Status.DEGENERATE]
    np.testing.assert_allclose(result.values[0], 1, rtol=1e-9)


@pytest.mark.parametrize("m", [5, 40])
def test_barbell_cuts_the_handle(m):
    result = fiedler_of_graph(barbell(m))
    assert status(result) == [Status.CONVERGED]
    # The quotient by symmetry is [[1, -1], [1 - m, m + 1]]: trace m + 2, determinant 2.
    assert result.values[0, 0].item() == pytest.approx(((m + 2) - np.sqrt((m + 2) ** 2 - 8)) / 2, rel=1e-7)
    side = result.vector[0] > 0
    assert (side[:m].all() and not side[m:].any()) or (side[m:].all() and not side[:m].any())


@pytest.mark.parametrize(("p", "q"), [(3, 5), (7, 11)])
def test_grid_values_are_sums_of_path_values(p, q):
    result = fiedler_of_graph(grid(p, q), q=5)
    every = sorted(path_value(p, i) + path_value(q, j) for i in range(p) for j in range(q))
    np.testing.assert_allclose(result.values[0], every[1:6], rtol=1e-6)
    assert status(result) == [Status.CONVERGED]
    assert status(fiedler_of_graph(grid(p, p))) == [Status.DEGENERATE]


def test_a_long_path_falls_back_to_the_dense_solver():
    result = finite(fiedler_of_graph(path(2048), max_iterations=8, q=2))
    assert status(result) == [Status.DENSE_FALLBACK]
    assert result.iterations.tolist() == [8]
    np.testing.assert_allclose(result.values[0], [path_value(2048), path_value(2048, 2)], rtol=1e-6)
    assert (result.residual <= 1e-4).all()


def test_a_path_of_4096_nodes():
    result = finite(fiedler_of_graph(path(4096)))
    assert status(result) == [Status.CONVERGED]
    assert result.values[0, 0].item() == pytest.approx(path_value(4096), rel=1e-6)
    assert (np.diff(result.vector[0]) < 0).all() or (np.diff(result.vector[0]) > 0).all()


def test_threads_change_nothing():
    graph = bridge_components(symmetrise(knn_graph(rand(5, 90, 8), 4)), normalized_rows(rand(5, 90, 8)))[0]
    one, more = fiedler_of_graph(graph, threads=1), fiedler_of_graph(graph, threads=3)
    assert all(torch.equal(value, getattr(one, name)) for name, value in vars(more).items())


@pytest.mark.parametrize("q", [1, 3])
def test_a_known_vector_to_start_from_saves_iterations(q):
    graph = bridge_components(symmetrise(knn_graph(rand(3, 200, 8), 6)), normalized_rows(rand(3, 200, 8)))[0]
    cold = fiedler_of_graph(graph, q=q)
    noise = 1e-4 * rand(3, 200, q, seed=5).double()
    warm = fiedler_of_graph(graph, q=q, start=cold.basis + noise)
    assert (warm.iterations < cold.iterations).all()
    torch.testing.assert_close(warm.basis, cold.basis, atol=1e-5, rtol=0)


def test_beyond_the_dense_limit_the_status_says_not_converged(monkeypatch):
    monkeypatch.setattr(dense, "DENSE_LIMIT", 100)
    result = finite(fiedler_of_graph(path(400), max_iterations=5))
    assert status(result) == [Status.MAX_ITERATIONS]
    assert result.residual.max() > 1e-4


def test_only_the_graphs_that_need_it_fall_back():
    both = SparseGraph.from_edges(
        torch.cat([path(200).row, complete(200).row + 200]),
        torch.cat([path(200).col, complete(200).col + 200]),
        torch.cat([path(200).weight, complete(200).weight]),
        (2, 200),
    )
    result = fiedler_of_graph(both, max_iterations=10)
    assert status(result) == [Status.DENSE_FALLBACK, Status.DEGENERATE]
    assert result.values[0, 0].item() == pytest.approx(path_value(200), rel=1e-7)
    assert result.values[1, 0].item() == pytest.approx(200, rel=1e-7)


def test_what_float64_cannot_tell_from_zero_is_not_called_converged():
    graph = from_pairs([(0, 1), (1, 2), (2, 3)], 4, [1.0, 1e-18, 1.0])
    result = finite(fiedler_of_graph(graph))
    assert status(result)[0] & Status.MAX_ITERATIONS


def test_a_disconnected_graph_is_refused():
    two = from_pairs([(0, 1), (2, 3)], 4)
    with pytest.raises(SolverError, match="graph 0 has 2 components") as error:
        fiedler_of_graph(two)
    assert "bridge_components" in error.value.hint


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"q": 0}, "q: got 0"),
        ({"tolerance": 0.0}, "tolerance: got 0.0"),
        ({"tolerance": 1.0}, "tolerance: got 1.0"),
        ({"max_iterations": 0}, "max_iterations: got 0"),
        ({"seed": -1}, "seed: got -1"),
        ({"laplacian": "signless"}, "got 'signless'"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(UsageError, match=message):
        fiedler_of_graph(path(5), **arguments)


# Embeddings: every edge case has a defined result with a status.


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("laplacian", ["combinatorial", "normalized"])
@pytest.mark.parametrize("q", [1, 2, 4])
@pytest.mark.parametrize("b", [1, 2, 3, 4, 5])
def test_a_handful_of_rows(b, q, laplacian):
    result = finite(fiedler_vectors(rand(3, b, 6) + 2, k=10, q=q, laplacian=laplacian))
    assert result.values.shape == result.residual.shape == (3, q)
    assert result.basis.shape == (3, b, q)
    for s in status(result):
        assert bool(s & Status.TOO_SMALL) == (b < 4)
        assert not s & (Status.MAX_ITERATIONS | Status.DENSE_FALLBACK)
    exist = min(q, b - 1)
    torch.testing.assert_close(
        torch.linalg.vector_norm(result.basis, dim=1)[:, :exist], torch.ones(3, exist, dtype=torch.float64)
    )
    assert (result.values[:, max(exist, 1) :] == torch.inf).all()
    assert not result.basis[..., exist:].any()
    if b == 1:
        assert result.values[:, 0].tolist() == [0, 0, 0]
        assert result.vector.tolist() == [[0], [0], [0]]


def test_two_rows_exactly():
    x = torch.tensor([[[1.0, 0.0], [0.6, 0.8]]])
    result = fiedler_vectors(x, k=1)
    np.testing.assert_allclose(result.values[0, 0], 2 * 0.6, rtol=1e-6)
    np.testing.assert_allclose(result.vector[0], [0.5**0.5, -(0.5**0.5)], rtol=1e-12)


@pytest.mark.parametrize("b", [5, 40])
@pytest.mark.parametrize("fill", [0.0, 1.0, -3.0])
def test_all_rows_identical(b, fill):
    result = finite(fiedler_vectors(torch.full((2, b, 3), fill), k=4))
    expected = Status.DEGENERATE | (Status.BRIDGED if fill == 0 else Status.CONVERGED)
    assert status(result) == [expected, expected]
    assert result.components.tolist() == ([b, b] if fill == 0 else [1, 1])


@pytest.mark.parametrize("each", [10, 60])
def test_two_identical_clusters_are_told_apart(each):
    x = torch.eye(2).repeat_interleave(each, 0)[None]
    result = finite(fiedler_vectors(x, k=5))
    assert status(result)[0] & Status.BRIDGED
    assert not status(result)[0] & (Status.DEGENERATE | Status.MAX_ITERATIONS)
    assert result.components.tolist() == [2]
    side = result.vector[0] > 0
    assert len(set(side[:each].tolist())) == len(set(side[each:].tolist())) == 1
    assert side[0] != side[each]


def test_perfectly_disconnected_classes():
    x = torch.eye(5).repeat_interleave(20, 0)[None] + 0.01 * rand(1, 100, 5).abs()
    result = finite(fiedler_vectors(x, k=6, q=4))
    assert result.components.tolist() == [5]
    assert status(result)[0] & Status.BRIDGED
    assert not status(result)[0] & Status.MAX_ITERATIONS
    label = torch.arange(100) // 20
    within = torch.stack([result.basis[0][label == c].var(dim=0).sum() for c in range(5)]).sum()
    assert within < 0.02 * result.basis[0].var(dim=0).sum()


@pytest.mark.parametrize("b", [20, 100])
def test_one_far_outlier(b):
    x = rand(1, b, 4, seed=1) * 0.1 + torch.tensor([1.0, 0, 0, 0])
    x[0, 7] = torch.tensor([-50.0, 0, 0, 0])
    result = finite(fiedler_vectors(x, k=5))
    assert status(result) == [Status.BRIDGED]
    assert result.components.tolist() == [2]
    assert result.vector[0].abs().argmax() == 7


def test_float16_rows_are_those_of_float32():
    x = rand(2, 80, 16).half()
    half, single = fiedler_vectors(x, k=8), fiedler_vectors(x.float(), k=8)
    torch.testing.assert_close(half.basis, single.basis, atol=1e-5, rtol=0)
    assert status(half) == [Status.CONVERGED] * 2


def test_a_row_of_nan_is_refused():
    x = rand(2, 10, 3)
    x[1, 4] = torch.nan
    with pytest.raises(SolverError, match=r"rows \[4\] of graph 1"):
        fiedler_vectors(x, k=3)


def test_one_pair_is_the_first_of_two_and_knows_the_gap():
    x = rand(2, 90, 8)
    one, two = fiedler_vectors(x, k=6, q=1), fiedler_vectors(x, k=6, q=2)
    torch.testing.assert_close(one.basis, two.basis[..., :1], atol=1e-5, rtol=0)
    torch.testing.assert_close(one.values, two.values[:, :1])
    assert status(fiedler_of_graph(cycle(40), q=1)) == [Status.DEGENERATE]


def test_signs_are_canonical():
    basis = fiedler_vectors(rand(4, 70, 8), k=6, q=3).basis
    assert (basis.gather(1, basis.abs().argmax(dim=1, keepdim=True)) > 0).all()


def test_same_seed_same_bytes_and_any_stack():
    x = torch.cat([rand(2, 100, 12), rand(2, 100, 12, seed=1).sign() * 3, torch.zeros(1, 100, 12)])
    first = fiedler_vectors(x, k=7)
    for _ in range(4):
        again = fiedler_vectors(x.clone(), k=7)
        assert all(torch.equal(value, getattr(first, name)) for name, value in vars(again).items())
    order = [4, 2, 0, 3, 1]
    shuffled = fiedler_vectors(x[order], k=7)
    assert all(torch.equal(value, getattr(first, name)[order]) for name, value in vars(shuffled).items())
    alone = fiedler_vectors(x[3:4], k=7)
    assert all(torch.equal(value[0], getattr(first, name)[3]) for name, value in vars(alone).items())


def random_embedding_graph(rng, b, classes, k, noise):
    """Neighbour graphs of every tightness, bridged where they need it."""
    centres = rng.normal(size=(classes, 6))
    x = torch.from_numpy(centres[rng.integers(classes, size=b)] + noise * rng.normal(size=(b, 6)))[None]
    return bridge_components(symmetrise(knn_graph(x, k)), normalized_rows(x))[0]


def random_tree_graph(rng, b, reach, extra, decades):
    """A random tree, from a path to a bush, and ``extra`` edges; weights span ``decades`` powers of ten."""
    pairs = [(int(rng.integers(max(0, i - reach), i)), i) for i in range(1, b)]
    pairs += [tuple(rng.integers(b, size=2).tolist()) for _ in range(extra)]
    return from_pairs(pairs, b, 10.0 ** rng.uniform(-decades, 0, len(pairs)))


def by_torch(A, q, *, threads, **options):
    return fiedler.lobpcg(A, q, **options)


GRAPHS = st.one_of(
    st.tuples(
        st.just(random_embedding_graph), st.integers(1, 8), st.integers(1, 12), st.sampled_from([1e-3, 0.1, 0.5, 1, 10])
    ),
    st.tuples(st.just(random_tree_graph), st.sampled_from([1, 3, 90]), st.integers(0, 270), st.integers(0, 6)),
)


@pytest.mark.parametrize("solver", ["compiled", "torch"])
@settings(
    deadline=None,
    max_examples=150,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@given(
    GRAPHS,
    st.integers(4, 90),
    st.integers(1, 4),
    st.sampled_from(["combinatorial", "normalized"]),
    st.integers(0, 2**32),
)
def test_accurate_or_the_status_says_otherwise(monkeypatch, solver, drawn, b, q, laplacian, seed):
    if solver == "torch":  # what CUDA runs
        monkeypatch.setattr(fiedler, "lobpcg_compiled", by_torch)
    make, *arguments = drawn
    graph = make(np.random.default_rng(seed), b, *arguments)
    result = finite(fiedler_of_graph(graph, q=q, laplacian=laplacian, seed=seed, max_iterations=200))
    dense = Laplacian(graph, laplacian).dense(0).numpy()
    values, vectors = scipy.linalg.eigh(dense)
    values, vectors = values[1:], vectors[:, 1:]
    exist = min(q, graph.nodes - 1)
    mine, basis = result.values[0, :exist].numpy(), result.basis[0, :, :exist].numpy()
    flags = status(result)[0]
    if flags & Status.MAX_ITERATIONS:
        assert values[0] < 1e-9 * values[-1], "the dense solver gave up on an easy problem"
        return
    residual = np.linalg.norm(dense @ basis - basis * mine, axis=0)
    assert (residual <= 1.01e-4 * mine).all()
    np.testing.assert_allclose(mine, values[:exist], rtol=1e-5)
    gap = (values[1] - values[0]) / values[1]
    assert bool(flags & Status.DEGENERATE) == (gap <= 1e-3) or abs(gap - 1e-3) < 1e-5
    if gap > 1e-2:
        assert abs(basis[:, 0] @ vectors[:, 0]) >= 0.9999
