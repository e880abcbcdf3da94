from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse.csgraph
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gstds_cache.errors import UsageError
from gstds_cache.graph.knn import knn_graph
from gstds_cache.graph.laplacian import Laplacian, SparseGraph, csr_sum, segment_sum, symmetrise
from gstds_cache.graph.neighbors import KnnGraph


def dense_weights(graph: SparseGraph):
    """The stack as dense matrices, [G, B, B] float64, by the definition of CSR."""
    out = np.zeros((graph.graphs * graph.nodes,) * 2)
    crow, col, weight = graph.crow.numpy(), graph.col.numpy(), graph.weight.numpy()
    for i in range(len(crow) - 1):
        for e in range(crow[i], crow[i + 1]):
            assert out[i, col[e]] == 0, "an edge is stored twice"
            out[i, col[e]] = weight[e]
    b = graph.nodes
    blocks = np.stack([out[g * b : (g + 1) * b, g * b : (g + 1) * b] for g in range(graph.graphs)])
    assert blocks.sum() == pytest.approx(out.sum()), "an edge leads out of its graph"
    return blocks


def naive_union(knn: KnnGraph):
    """W = max(W, W^T) of max(0, cos), densely."""
    g, b, _ = knn.neighbors.shape
    out = np.zeros((g, b, b))
    for n in range(g):
        for i in range(b):
            for j, s in zip(knn.neighbors[n, i].tolist(), knn.similarities[n, i].tolist(), strict=True):
                if j >= 0:
                    out[n, i, j] = max(0.0, s)
    return np.maximum(out, out.transpose(0, 2, 1))


def random_graph(g=3, b=40, k=6, seed=0):
    x = torch.randn(g, b, 8, generator=torch.Generator().manual_seed(seed))
    return symmetrise(knn_graph(x, k))


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 3), st.integers(1, 20), st.integers(1, 6), st.integers(0, 10**6))
def test_symmetrise_is_the_dense_union(g, b, k, seed):
    knn = knn_graph(torch.randn(g, b, 3, generator=torch.Generator().manual_seed(seed)), k)
    graph = symmetrise(knn)
    np.testing.assert_array_equal(dense_weights(graph), naive_union(knn))
    np.testing.assert_allclose(graph.degree.numpy(), naive_union(knn).sum(2), rtol=1e-14, atol=0)
    assert (graph.weight > 0).all()
    assert torch.equal(graph.row * 10**6 + graph.col, (graph.row * 10**6 + graph.col).sort().values)


def edges_of(knn: KnnGraph):
    """Directed edges of a neighbour graph, as torch would merge them on CUDA."""
    g, b, k = knn.neighbors.shape
    near = torch.arange(g * b).repeat_interleave(k)
    return near, (knn.neighbors + torch.arange(g)[:, None, None] * b).flatten(), knn.similarities.flatten().double()


@pytest.mark.parametrize("seed", range(4))
def test_the_compiled_union_is_the_one_of_torch(seed):
    knn = knn_graph(torch.randn(3, 50, 4, generator=torch.Generator().manual_seed(seed)), 7)
    compiled, by_torch = symmetrise(knn), SparseGraph.from_edges(*edges_of(knn), (3, 50))
    for name, value in vars(by_torch).items():
        torch.testing.assert_close(getattr(compiled, name), value, rtol=1e-15, atol=0)


def test_edges_are_inserted_where_they_belong():
    graph = random_graph(g=2, b=30, k=3)
    every = {(i, j) for g in range(2) for i in range(30 * g, 30 * g + 30) for j in range(30 * g, 30 * g + 30) if i < j}
    new = sorted(every - set(zip(graph.row.tolist(), graph.col.tolist(), strict=True)))[::7]
    near, far = (torch.tensor(end) for end in zip(*new[::-1], strict=True))
    weight = torch.linspace(0.1, 2, len(new), dtype=torch.float64)
    inserted = graph.with_edges(near, far, weight)
    ends = (torch.cat([graph.row, near]), torch.cat([graph.col, far]), torch.cat([graph.weight, weight]))
    for name, value in vars(SparseGraph.from_edges(*ends, (2, 30))).items():
        torch.testing.assert_close(getattr(inserted, name), value, rtol=1e-14, atol=0)


def test_padding_and_opposite_rows_are_no_edges():
    knn = KnnGraph(
        neighbors=torch.tensor([[[1, -1], [0, 2], [1, 0]]]),
        similarities=torch.tensor([[[0.5, 0.0], [0.25, -1.0], [-1.0, 0.0]]]),
    )
    graph = symmetrise(knn)
    assert dense_weights(graph)[0].tolist() == [[0, 0.5, 0], [0.5, 0, 0], [0, 0, 0]]
    assert graph.degree.tolist() == [[0.5, 0.5, 0.0]]


def test_from_edges_drops_loops_and_keeps_the_heaviest_of_repeats():
    row, col = torch.tensor([0, 1, 1, 0, 2, 3]), torch.tensor([1, 0, 0, 0, 3, 2])
    weight = torch.tensor([1.0, 3.0, 2.0, 9.0, 0.0, -1.0], dtype=torch.float64)
    graph = SparseGraph.from_edges(row, col, weight, (2, 2))
    assert dense_weights(graph).tolist() == [[[0, 3], [3, 0]], [[0, 0], [0, 0]]]


@pytest.mark.parametrize("keep", [[0], [2, 0], [1, 2, 0]])
def test_subset_is_the_same_graphs(keep):
    graph = random_graph()
    part = graph.subset(keep)
    np.testing.assert_array_equal(dense_weights(part), dense_weights(graph)[keep])
    assert torch.equal(part.degree, graph.degree[keep])


@pytest.mark.parametrize("kind", ["combinatorial", "normalized"])
def test_operator_and_dense_form_match_scipy(kind):
    graph = random_graph()
    laplacian = Laplacian(graph, kind)
    x = torch.randn(3, 40, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    product = laplacian @ x
    for g, weights in enumerate(dense_weights(graph)):
        expected = scipy.sparse.csgraph.laplacian(weights, normed=kind == "normalized")
        np.testing.assert_allclose(laplacian.dense(g).numpy(), expected, atol=1e-14)
        np.testing.assert_allclose(product[g].numpy(), expected @ x[g].numpy(), atol=1e-12)
        largest = np.linalg.eigvalsh(expected)[-1]
        assert largest <= laplacian.bound[g]
    null = laplacian.null_vector
    torch.testing.assert_close(torch.linalg.vector_norm(null, dim=1), torch.ones(3, dtype=torch.float64))
    torch.testing.assert_close(laplacian @ null[..., None], torch.zeros(3, 40, 1, dtype=torch.float64))


@pytest.mark.parametrize("kind", ["combinatorial", "normalized"])
def test_isolated_nodes_give_zero_rows(kind):
    pair = torch.tensor([0]), torch.tensor([1]), torch.tensor([2.0], dtype=torch.float64)
    laplacian = Laplacian(SparseGraph.from_edges(*pair, (2, 3)), kind)
    product = laplacian @ torch.eye(3, dtype=torch.float64).expand(2, 3, 3)
    scale = 2.0 if kind == "combinatorial" else 1.0
    expected = scale * torch.tensor([[1.0, -1, 0], [-1, 1, 0], [0, 0, 0]], dtype=torch.float64)
    torch.testing.assert_close(product[0], expected)
    assert not product[1].any()
    assert torch.isfinite(laplacian.null_vector).all()


@pytest.mark.parametrize("build", [csr_sum, segment_sum])
@pytest.mark.parametrize("q", [1, 2, 9])
def test_both_neighbour_sums_are_the_dense_product(build, q):
    graph = random_graph(g=2, b=30)
    x = torch.randn(60, q, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    expected = np.einsum("gij,gjq->giq", dense_weights(graph), x.view(2, 30, q).numpy())
    got = build(graph.crow, graph.col, graph.weight)(x)
    np.testing.assert_allclose(got.view(2, 30, q).numpy(), expected, atol=1e-13)


@pytest.mark.parametrize("kind", ["combinatorial", "normalized"])
def test_a_graph_has_the_same_bits_in_any_stack(kind):
    graph = random_graph(g=5, b=67)
    x = torch.randn(5, 67, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    whole = Laplacian(graph, kind)
    for keep in ([0], [3], [4, 1], [2, 0, 4, 3, 1]):
        part = Laplacian(graph.subset(keep), kind)
        assert torch.equal(part @ x[keep], (whole @ x)[keep])
        assert torch.equal(part.null_vector, whole.null_vector[keep])


def test_unknown_kind_is_a_usage_error():
    with pytest.raises(UsageError, match="got 'normalised', expected one of combinatorial, normalized"):
        Laplacian(random_graph(), "normalised")
