from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gstds_cache.errors import UsageError
from gstds_cache.graph.components import BRIDGE_FLOOR, bridge_components, label_components, spanning_bridges
from gstds_cache.graph.knn import knn_graph
from gstds_cache.graph.laplacian import SparseGraph, symmetrise
from gstds_cache.graph.neighbors import normalized_rows


def edges(*pairs, shape):
    row, col, weight = (torch.tensor(list(column)) for column in zip(*pairs, strict=True))
    return SparseGraph.from_edges(row, col, weight.double(), shape)


def clusters(c, each, d=16, seed=0, noise=0.05):
    gen = torch.Generator().manual_seed(seed)
    centres = torch.randn(c, d, generator=gen)
    return (centres.repeat_interleave(each, 0) + noise * torch.randn(c * each, d, generator=gen))[None]


def grown_from(component, similarity, label):
    small = np.flatnonzero(label != component)
    return spanning_bridges(similarity[small], small, label)


def naive_tree_weight(similarity, label):
    """Total similarity of a maximum spanning tree over components, by Kruskal on the strongest pairs."""
    strongest = sorted(
        (
            (similarity[np.ix_(label == a, label == b)].max(), a, b)
            for a in range(label.max() + 1)
            for b in range(a + 1, label.max() + 1)
        ),
        reverse=True,
    )
    parent = np.arange(label.max() + 1)
    total = 0.0
    for weight, a, b in strongest:
        if parent[a] != parent[b]:
            parent[parent == parent[b]] = parent[a]
            total += weight
    return total


def test_labels_are_per_graph_and_numbered_by_lowest_node():
    graph = edges((0, 3, 1.0), (1, 2, 1.0), (6, 7, 1.0), (7, 8, 1.0), (8, 9, 1.0), shape=(3, 5))
    count, label = label_components(graph)
    assert count.tolist() == [3, 2, 5]
    assert label.tolist() == [[0, 1, 1, 0, 2], [0, 1, 1, 1, 1], [0, 1, 2, 3, 4]]


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 14), st.integers(1, 6), st.integers(0, 10**6))
def test_bridges_are_a_maximum_spanning_tree_of_strongest_pairs(nodes, parts, seed):
    rng = np.random.default_rng(seed)
    similarity = rng.random((nodes, nodes), dtype=np.float32)
    similarity = np.maximum(similarity, similarity.T)
    _, label = np.unique(rng.integers(0, parts, nodes), return_inverse=True)
    label = label.astype(np.int64)
    bridges = grown_from(0, similarity, label)
    assert len(bridges) == label.max()
    for i, j, value in bridges:
        assert value == similarity[i, j] == similarity[np.ix_(label == label[i], label == label[j])].max()
    total = sum(value for _, _, value in bridges)
    assert total == pytest.approx(naive_tree_weight(similarity, label), rel=1e-6)


def test_ties_go_to_the_lowest_nodes():
    label = np.array([0, 0, 1, 1, 2], dtype=np.int64)
    bridges = grown_from(0, np.zeros((5, 5), dtype=np.float32), label)
    assert bridges == [(0, 2, 0.0), (0, 4, 0.0)]


def test_a_later_component_with_a_lower_node_wins_a_tie():
    label = np.array([0, 1, 2, 0], dtype=np.int64)
    similarity = np.zeros((4, 4), dtype=np.float32)
    similarity[3, 1] = similarity[1, 3] = 0.9
    similarity[3, 2] = similarity[2, 3] = similarity[1, 2] = similarity[2, 1] = 0.5
    assert grown_from(0, similarity, label) == [(3, 1, pytest.approx(0.9)), (1, 2, 0.5)]


def test_bridging_connects_by_the_strongest_pair():
    x = torch.cat([clusters(4, 8), clusters(1, 32, seed=1)])
    graph = symmetrise(knn_graph(x, 4))
    bridged, components = bridge_components(graph, normalized_rows(x))
    assert components.tolist() == [4, 1]
    assert label_components(bridged)[0].tolist() == [1, 1]
    assert len(bridged.weight) == len(graph.weight) + 2 * 3
    assert bridged.component[0].tolist() == [n // 8 for n in range(32)]
    assert not bridged.component[1].any()
    unit = torch.nn.functional.normalize(x[0].double())
    across = (unit @ unit.T).masked_fill(bridged.component[0][:, None] == bridged.component[0][None], -1)
    strongest = int(across.argmax())
    i, j = sorted(divmod(strongest, 32))
    found = bridged.weight[(bridged.row == i) & (bridged.col == j)]
    assert found.item() == pytest.approx(max(float(across.max()), BRIDGE_FLOOR), abs=1e-6)


def test_opposite_clusters_are_joined_by_the_floor():
    x = torch.cat([torch.ones(1, 5, 3), -torch.ones(1, 5, 3)], dim=1)
    bridged, components = bridge_components(symmetrise(knn_graph(x, 3)), normalized_rows(x))
    assert components.tolist() == [2]
    assert bridged.weight.min() == BRIDGE_FLOOR
    assert (bridged.weight == BRIDGE_FLOOR).sum() == 2


def test_zero_rows_are_joined_by_the_floor():
    x = torch.zeros(2, 7, 3)
    bridged, components = bridge_components(symmetrise(knn_graph(x, 3)), normalized_rows(x))
    assert components.tolist() == [7, 7]
    assert label_components(bridged)[0].tolist() == [1, 1]
    assert (bridged.weight == BRIDGE_FLOOR).all()


def test_connected_graphs_are_returned_as_they_are():
    x = clusters(1, 20)
    graph = symmetrise(knn_graph(x, 5))
    bridged, components = bridge_components(graph, normalized_rows(x))
    assert bridged is graph
    assert components.tolist() == [1]


def test_bridging_a_graph_does_not_depend_on_its_stack():
    x = torch.cat([clusters(5, 6, seed=s) for s in range(4)])
    whole, _ = bridge_components(symmetrise(knn_graph(x, 3)), normalized_rows(x))
    alone, _ = bridge_components(symmetrise(knn_graph(x[2:3], 3)), normalized_rows(x[2:3]))
    part = whole.subset([2])
    assert torch.equal(part.weight, alone.weight)
    assert torch.equal(part.col, alone.col)
    assert torch.equal(part.component, alone.component)


def test_wrong_embeddings_are_refused():
    graph = symmetrise(knn_graph(clusters(2, 5), 3))
    with pytest.raises(UsageError, match=r"got \[1, 9, 16\], expected \[1, 10, D\]"):
        bridge_components(graph, normalized_rows(clusters(1, 9)))
