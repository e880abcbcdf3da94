"""cuda/solve.cu on a CPU: the eigenpairs that scipy.linalg.eigh finds, and the same bytes for any threads."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
import scipy.linalg
import torch
from emulated import solve_launch

from gstds_cache.graph.components import bridge_components
from gstds_cache.graph.cuda import stack_of
from gstds_cache.graph.knn import nearest
from gstds_cache.graph.laplacian import Laplacian, SparseGraph, symmetrise
from gstds_cache.spectral.block import solve_bytes


def from_pairs(pairs, nodes, weight=None):
    near, far = torch.tensor(pairs, dtype=torch.int64).T
    weight = torch.ones(len(near)) if weight is None else weight
    return SparseGraph.from_edges(near, far, weight.float().double(), (1, nodes))


def path(n=100):
    return from_pairs([(i, i + 1) for i in range(n - 1)], n)


def barbell(handle, m=30):
    ends = [(i + o, j + o) for o in (0, m) for i in range(m) for j in range(i)]
    return from_pairs([*ends, (0, m)], 2 * m, torch.tensor([*[1.0] * len(ends), handle]))


GRAPHS = {
    "path": path,
    "cycle": lambda: from_pairs([(i, (i + 1) % 64) for i in range(64)], 64),
    "star": lambda: from_pairs([(0, i) for i in range(1, 50)], 50),
    "complete": lambda: from_pairs([(i, j) for i in range(40) for j in range(i)], 40),
    "barbell": lambda: barbell(1e-3),
    "barbell with a thread for a handle": lambda: barbell(1e-6),
    "grid": lambda: from_pairs([(i, i + 1) for i in range(117) if i % 9 < 8] + [(i, i + 9) for i in range(108)], 117),
    "tree": lambda: from_pairs([((i - 1) // 3, i) for i in range(1, 80)], 80, 10 ** (torch.arange(79) % 3 - 2.0)),
}


def neighbours_graph(rows, k=6):
    graph = bridge_components(symmetrise(nearest(rows, k, backend="torch")), rows)[0]
    return SparseGraph.from_edges(graph.row, graph.col, graph.weight.float().double(), (1, graph.nodes))


def assert_solved(graph, out, q, kind, tolerance):
    laplacian = Laplacian(graph, kind)
    dense = laplacian.dense(0).numpy()
    values, vectors = scipy.linalg.eigh(dense)
    values, vectors = values[1:], vectors[:, 1:]
    mine, basis = out["values"][0].numpy(), out["basis"][0].numpy().T
    assert out["converged"].tolist() == [1]
    np.testing.assert_allclose(mine, values[:q], rtol=1e-7, atol=1e-14 * values[-1])  # what eigh can tell
    np.testing.assert_allclose(basis.T @ basis, np.eye(q), atol=1e-9)
    np.testing.assert_allclose(laplacian.null_vector[0].numpy() @ basis, 0, atol=1e-9)
    residual = np.linalg.norm(dense @ basis - basis * mine, axis=0) / mine
    assert (residual <= 1.01 * tolerance).all()
    rounding = 8 * np.finfo(np.float64).eps * values[-1] / mine  # of the product that the residual is taken from
    assert (np.abs(out["residual"][0].numpy() - residual) <= 0.05 * residual + 1e-9 + rounding).all()
    np.testing.assert_allclose(out["second"][0], values[1], rtol=1e-2)
    for n in range(q):
        below = values[n] - values[n - 1] if n else np.inf
        if min(below, values[n + 1] - values[n]) > 1e-2 * values[n + 1]:
            assert abs(basis[:, n] @ vectors[:, n]) > 1 - 1e-8


@pytest.mark.parametrize("kind", ["combinatorial", "normalized"])
@pytest.mark.parametrize(("m", "q"), [(2, 1), (10, 8)])
@pytest.mark.parametrize("name", list(GRAPHS))
def test_pairs_of_graphs_with_known_difficulties(solve_kernel, name, m, q, kind):
    graph = GRAPHS[name]()
    stack = stack_of(graph)
    launch, out = solve_launch(stack.crow, stack.col, stack.weight, q, m=m, normalized=kind == "normalized")
    solve_kernel(m).run(launch, threads=1)
    assert_solved(graph, out, q, kind, 1e-6)


@pytest.mark.parametrize("kind", ["combinatorial", "normalized"])
@pytest.mark.parametrize(("m", "q"), [(2, 1), (10, 8)])
def test_pairs_of_neighbour_graphs(solve_kernel, rows, m, q, kind):
    if rows.shape[1] <= 3 * m:
        assert rows.shape[1] <= 33  # the host solves these densely
        return
    graph = neighbours_graph(rows)
    stack = stack_of(graph)
    launch, out = solve_launch(stack.crow, stack.col, stack.weight, q, m=m, normalized=kind == "normalized")
    solve_kernel(m).run(launch, threads=1)
    assert_solved(graph, out, q, kind, 1e-6)


@pytest.mark.parametrize("kind", ["combinatorial", "normalized"])
@pytest.mark.parametrize(("m", "q"), [(2, 1), (4, 3)])
def test_threads_and_their_order_change_nothing(solve_kernel, m, q, kind):
    graph = barbell(0.3, 20)
    stack = stack_of(graph)
    launch, out = solve_launch(stack.crow, stack.col, stack.weight, q, m=m, normalized=kind == "normalized")
    kernel = solve_kernel(m)
    kernel.run(launch, threads=1)
    first = {name: value.clone() for name, value in out.items()}
    assert first["iterations"] > 1
    for threads in (7, 32, 64, 256):
        for schedule in ("ascending", "descending", "shuffled"):
            for value in out.values():
                value.zero_()
            kernel.run(launch, threads, schedule)
            for name, value in out.items():
                assert torch.equal(value.view(torch.uint8), first[name].view(torch.uint8)), (name, threads, schedule)


@pytest.mark.parametrize("share", [0.2, 0.6, 0.95])
@pytest.mark.parametrize("kind", ["combinatorial", "normalized"])
def test_what_lies_in_global_memory_changes_nothing(solve_kernel, share, kind):
    stack = stack_of(path(70))
    arguments = {"m": 2, "normalized": kind == "normalized"}
    launch, near = solve_launch(stack.crow, stack.col, stack.weight, 1, **arguments)
    solve_kernel(2).run(launch, threads=32)
    launch, far = solve_launch(
        stack.crow, stack.col, stack.weight, 1, shared=int(share * launch.shared) // 16 * 16, **arguments
    )
    solve_kernel(2, spill=True).run(launch, threads=32)
    for name, value in near.items():
        assert torch.equal(value.view(torch.uint8), far[name].view(torch.uint8)), name


def test_a_graph_that_does_not_converge_and_one_without_room_say_so(solve_kernel):
    stack = stack_of(path(60))
    launch, out = solve_launch(stack.crow, stack.col, stack.weight, 1, m=2, most=2)
    solve_kernel(2).run(launch, threads=32)
    assert (out["converged"].tolist(), out["iterations"].tolist()) == ([0], [2])
    assert out["residual"][0, 0] > 1e-6
    col, weight = stack.col[:, :-1].contiguous(), stack.weight[:, :-1].contiguous()
    launch, out = solve_launch(stack.crow, col, weight, 1, m=2)
    solve_kernel(2).run(launch, threads=32)
    assert (out["converged"].tolist(), out["iterations"].tolist()) == ([-1], [0])


@pytest.mark.parametrize("m", [2, 4, 10])
def test_shared_memory_is_what_the_kernel_takes(solve_kernel, m):
    library = solve_kernel(m).library
    for nodes, edges in ((33, 100), (512, 10240), (8192, 163840)):
        for normalized in (False, True):
            found = library.fiedler_bytes(ctypes.c_int(nodes), ctypes.c_int(edges), ctypes.c_int(normalized))
            assert found == solve_bytes(nodes, edges, m, normalized=normalized)


@pytest.mark.parametrize(("m", "q"), [(2, 1), (10, 8)])
@pytest.mark.parametrize("weight", [0.0, 1e-42, float("inf"), float("nan")])
def test_weights_that_lead_to_nan_end_without_a_result_and_inside_the_memory(solve_kernel, weight, m, q):
    stack = stack_of(path())
    launch, out = solve_launch(stack.crow, stack.col, torch.full_like(stack.weight, weight), q, m=m, most=3)
    solve_kernel(m).run(launch, threads=1)
    assert out["converged"].tolist() == [0]
    assert out["iterations"].tolist() == [3]
