"""cuda/graph.cu on a CPU: what the compiled CPU functions make of the same products, to the bit, for any threads."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
import torch
from emulated import graph_launch

from gstds_cache.graph.compiled import nearest_in_rows
from gstds_cache.graph.components import BRIDGE_FLOOR, label_components, spanning_bridges
from gstds_cache.graph.cuda import graph_bytes, lists_bytes, unsigned
from gstds_cache.graph.laplacian import KnnGraph, affinity, symmetrise


def by_cpu(similarity, k):
    """Neighbours, similarities and the bridged graph of one batch's similarities, by the CPU's functions."""
    nodes = len(similarity)
    neighbors, found = np.zeros((nodes, k), np.int64), np.zeros((nodes, k), np.float32)
    nearest_in_rows(similarity, 0, neighbors, found)
    graph = symmetrise(KnnGraph(torch.from_numpy(neighbors)[None], torch.from_numpy(found)[None]))
    components, label = label_components(graph)
    if int(components) > 1:
        small = np.flatnonzero(label[0] != np.bincount(label[0]).argmax())
        near, far, cosine = zip(*spanning_bridges(similarity[small], small, label[0]), strict=True)
        weight = affinity(torch.tensor(cosine)).clamp(min=float(np.float32(BRIDGE_FLOOR)))
        graph = graph.with_edges(torch.tensor(near), torch.tensor(far), weight)
    return neighbors, found, graph, int(components), label[0]


def assert_same(out, expected, g=0):
    neighbors, found, graph, components, label = expected
    edges = len(graph.col)
    np.testing.assert_array_equal(unsigned(out["neighbors"][g]).numpy(), neighbors)
    np.testing.assert_array_equal(out["similarities"][g].numpy(), found)
    np.testing.assert_array_equal(out["crow"][g].numpy(), graph.crow.numpy())
    np.testing.assert_array_equal(unsigned(out["col"][g, :edges]).numpy(), graph.col.numpy())
    np.testing.assert_array_equal(out["weight"][g, :edges].double().numpy(), graph.weight.numpy())
    assert int(out["components"][g]) == components
    lowest = np.array([np.flatnonzero(label == part)[0] for part in range(components)])
    np.testing.assert_array_equal(unsigned(out["label"][g]).numpy(), lowest[label])


@pytest.mark.parametrize("k", [3, 10])
def test_the_same_bytes_as_the_cpu(graph_kernel, rows, k):
    products = rows @ rows.mT
    products = torch.maximum(products, products.mT)  # symmetric, to the bit, as cuBLAS has them
    launch, out = graph_launch(products, None, k)
    graph_kernel.run(launch, threads=1)
    assert_same(out, by_cpu(products[0].clamp(-1, 1).numpy(), k))


def test_products_of_rows_of_any_length(graph_kernel, rows):
    length = torch.rand(rows.shape[:2], generator=torch.Generator().manual_seed(1)) * 9 + 1
    raw = rows * length[..., None]
    norm = torch.linalg.vector_norm(raw, dim=2)
    inverse = torch.where(norm > 0, 1 / norm, 0)
    products = raw @ raw.mT
    products = torch.maximum(products, products.mT)
    launch, out = graph_launch(products, inverse, 10)
    graph_kernel.run(launch, threads=1)
    # As the kernel multiplies: r_i r_j first, so that it is symmetric.
    similarity = products[0] * (inverse[0][:, None] * inverse[0][None])
    assert_same(out, by_cpu(similarity.clamp(-1, 1).numpy(), 10))


@pytest.mark.parametrize("held", [16, 32])
def test_variants_that_keep_more_neighbours(emulated_kernels, rows, held):
    products = rows @ rows.mT
    products = torch.maximum(products, products.mT)
    k = min(held - 3, rows.shape[1] - 1)
    launch, out = graph_launch(products, None, k, held=held)
    emulated_kernels("graph.cu", "graph_block", (f"KNN={held}",)).run(launch, threads=1)
    assert_same(out, by_cpu(products[0].clamp(-1, 1).numpy(), k))


def test_threads_and_their_order_change_nothing(graph_kernel, rows):
    products = torch.cat([rows @ rows.mT, (rows @ rows.mT).flip(1, 2)])
    launch, out = graph_launch(products, None, 5)
    graph_kernel.run(launch, threads=1)
    first = {name: value.clone() for name, value in out.items()}
    for threads in (7, 32, 64, 256):
        for schedule in ("ascending", "descending", "shuffled"):
            for value in out.values():
                value.zero_()
            graph_kernel.run(launch, threads, schedule)
            for name, value in out.items():
                assert torch.equal(value.view(torch.uint8), first[name].view(torch.uint8)), (name, threads, schedule)


def test_lists_in_global_memory_give_the_same_bytes(emulated_kernels, graph_kernel, rows):
    products = rows @ rows.mT
    launch, near = graph_launch(products, None, 8)
    graph_kernel.run(launch, threads=32)
    launch, far = graph_launch(products, None, 8, spill=True)
    emulated_kernels("graph.cu", "graph_block", ("KNN=10", "SPILL")).run(launch, threads=32)
    for name, value in near.items():
        assert torch.equal(value.view(torch.uint8), far[name].view(torch.uint8)), name


@pytest.mark.parametrize(("edges", "bridges"), [(30, 39), (400, 3), (250, 39)])
def test_a_graph_without_room_says_so(graph_kernel, edges, bridges):
    x = torch.eye(10).repeat_interleave(4, 0)[None]  # ten components of four equal rows, 120 edges
    x = torch.cat([x, torch.nn.functional.normalize(torch.randn(1, 40, 10), dim=2)])
    launch, out = graph_launch(x @ x.mT, None, 3, edges=edges, bridges=bridges)
    graph_kernel.run(launch, threads=32)
    full = edges >= int(by_cpu((x @ x.mT)[1].numpy(), 3)[2].crow[-1])
    assert out["components"].tolist() == [10 if (edges, bridges) == (250, 39) else -1, 1 if full else -1]
    expected = by_cpu((x @ x.mT)[0].clamp(-1, 1).numpy(), 3)
    np.testing.assert_array_equal(unsigned(out["neighbors"][0]).numpy(), expected[0])  # known all the same


@pytest.mark.parametrize("variant", [(10, False), (10, True), (16, False), (32, False)])
def test_shared_memory_is_what_the_kernel_takes(emulated_kernels, variant):
    held, spill = variant
    defines = (f"KNN={held}", *(["SPILL"] if spill else []))
    library = emulated_kernels("graph.cu", "graph_block", defines).library
    for nodes in (1, 2, 33, 512, 8192):
        assert library.graph_bytes(ctypes.c_int(nodes)) == graph_bytes(nodes, held, spill=spill)
        assert library.graph_lists_bytes(ctypes.c_int(nodes)) == lists_bytes(nodes, held)
