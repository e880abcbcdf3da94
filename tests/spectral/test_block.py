"""The host's side of LOBPCG by a CUDA kernel, run on CPU tensors with the kernels that g++ compiled."""

from __future__ import annotations

import logging
from dataclasses import replace

import numpy as np
import pytest
import scipy.linalg
import torch

from gstds_cache.cuda import build, launch
from gstds_cache.cuda.build import log_fallback
from gstds_cache.errors import KernelError, SolverError, UsageError
from gstds_cache.graph import cuda, knn
from gstds_cache.graph.cuda import graph_stack
from gstds_cache.graph.knn import knn_graph
from gstds_cache.graph.laplacian import Laplacian, SparseGraph
from gstds_cache.runtime.notify import log_once
from gstds_cache.spectral import block, fiedler
from gstds_cache.spectral.block import fiedler_of_stack, solve_graphs, solve_stack, why_not_solved
from gstds_cache.spectral.compiled import block_size
from gstds_cache.spectral.fiedler import fiedler_of_graph, fiedler_vectors
from gstds_cache.spectral.status import Status

OPTIONS = {"laplacian": "combinatorial", "tolerance": 1e-6, "max_iterations": 500, "seed": 0}


def batches(g=5, b=70, d=24, noise=0.3, seed=0):
    gen = torch.Generator().manual_seed(seed)
    centres = 3 * torch.randn(6, d, generator=gen)
    return (centres[torch.randint(6, (g, b), generator=gen)] + noise * torch.randn(g, b, d, generator=gen)).half()


def path(n, graphs=1):
    near = torch.cat([torch.arange(n - 1) + n * g for g in range(graphs)])
    return SparseGraph.from_edges(near, near + 1, torch.ones(len(near), dtype=torch.float64), (graphs, n))


def launches(emulated_kernels):
    """Launches of the solver."""
    return [one for key, kernel in emulated_kernels.kernels.items() if key[0] == "solve.cu" for one in kernel.launches]


@pytest.mark.parametrize("laplacian", ["combinatorial", "normalized"])
@pytest.mark.parametrize("q", [1, 3, 6, 16])
@pytest.mark.parametrize("noise", [0.2, 2.0], ids=["components", "connected"])
def test_what_the_cpu_finds(emulated_kernels, noise, q, laplacian):
    x = batches(noise=noise)
    assert x.shape[1] > 3 * block_size(q)  # else it is solved densely
    mine = fiedler_vectors(x, k=8, q=q, laplacian=laplacian, backend="cuda")
    graph = graph_stack(x, 8).on_cpu(range(5))
    for g in range(5):
        values, vectors = scipy.linalg.eigh(Laplacian(graph, laplacian).dense(g).numpy())
        np.testing.assert_allclose(mine.values[g].numpy(), values[1 : q + 1], rtol=1e-8)
        for n in range(q):
            below, above = values[n + 1] - values[n], values[n + 2] - values[n + 1]
            if min(below, above) > 1e-2 * values[n + 2]:
                assert abs(mine.basis[g, :, n].numpy() @ vectors[:, n + 1]) > 1 - 1e-9
    assert (mine.residual <= 1e-6).all()
    assert torch.equal(mine.components, graph.component.amax(dim=1) + 1)
    assert [bool(status & Status.BRIDGED) for status in mine.status.tolist()] == (mine.components > 1).tolist()
    size = mine.basis.abs()
    assert (mine.basis.gather(1, size.argmax(dim=1, keepdim=True)) > 0).all(), "signs are canonical"


def test_the_same_bits_in_every_stack_and_again(emulated_kernels):
    x = torch.cat([batches(g=2), batches(g=3, noise=3.0)])
    whole = fiedler_vectors(x, k=7, q=2, backend="cuda")
    for keep in ([0, 1, 2, 3, 4], [4], [3, 0]):
        part = fiedler_vectors(x[keep], k=7, q=2, backend="cuda")
        for name, value in vars(part).items():
            assert torch.equal(value, getattr(whole, name)[keep]), name


def test_graphs_that_do_not_converge_and_only_those_go_to_the_cpu(emulated_kernels, monkeypatch):
    stacked = []
    monkeypatch.setattr(
        block, "lobpcg_compiled", lambda A, q, **o: stacked.append(A.graph.graphs) or compiled(A, q, **o)
    )
    compiled = fiedler.lobpcg_compiled
    easy = graph_stack(batches(g=3, noise=3.0), 7).on_cpu(range(3))
    both = SparseGraph(
        crow=torch.cat([easy.crow, path(70).crow[1:] + easy.crow[-1]]),
        col=torch.cat([easy.col, path(70).col + 210]),
        weight=torch.cat([easy.weight, path(70).weight]),
        degree=torch.cat([easy.degree, path(70).degree]),
        component=torch.cat([easy.component, path(70).component]),
    )
    result = fiedler_of_graph(both, max_iterations=14)
    assert stacked == [1]
    assert [Status(status) for status in result.status.tolist()] == [Status.CONVERGED] * 3 + [Status.DENSE_FALLBACK]
    np.testing.assert_allclose(result.values[3, 0], 2 - 2 * np.cos(np.pi / 70), rtol=1e-7)
    enough = fiedler_of_graph(both, max_iterations=500)
    assert stacked == [1]
    assert (enough.status == 0).all()


def test_what_the_cpu_solves_without_a_dense_fallback_has_no_flag(emulated_kernels, monkeypatch):
    """The kernel stops early, and the CPU, which takes fewer iterations, has enough of them."""
    x = batches(g=2, noise=3.0)
    stack = graph_stack(x, 7)
    solved = solve_stack(stack, 1, **{**OPTIONS, "max_iterations": 2})
    assert solved.converged.tolist() == [0, 0]
    result = fiedler_of_stack(stack, solved, x, **OPTIONS)
    assert not (result.status & (Status.DENSE_FALLBACK | Status.MAX_ITERATIONS)).any()
    assert (result.residual <= 1e-6).all()
    assert (result.iterations > 2).all()


def test_a_stack_without_room_for_a_graphs_edges(emulated_kernels):
    x = torch.cat([batches(g=1, noise=0.02), batches(g=1, noise=3.0)])
    stack = graph_stack(x, 7)
    whole = fiedler_of_stack(stack, solve_stack(stack, 1, **OPTIONS), x)
    assert whole.components.tolist()[0] > 1
    # As the kernel leaves a graph whose bridges found no room.
    stack.components[0] = -1
    solved = solve_stack(stack, 1, **OPTIONS)
    solved.converged[0] = -1
    solved.values[0] = solved.basis[0] = torch.nan
    result = fiedler_of_stack(stack, solved, x)
    assert torch.equal(result.components, whole.components)
    assert torch.equal(result.status, whole.status)
    torch.testing.assert_close(result.values, whole.values, rtol=1e-5, atol=0)
    assert torch.equal(result.values[1], whole.values[1])


def test_rows_of_nan_are_named(emulated_kernels):
    x = batches()
    x[2, 11] = torch.inf
    with pytest.raises(SolverError, match=r"rows \[11\] of graph 2 hold NaN or Inf"):
        fiedler_vectors(x, k=5, backend="cuda")


@pytest.mark.parametrize("size", [1, 3, 32])
def test_few_rows_are_solved_densely(emulated_kernels, size):
    x = batches(g=2, b=size)
    result = fiedler_vectors(x, k=5, backend="cuda")
    assert not launches(emulated_kernels)
    reference = fiedler_vectors(x, k=5, backend="torch")
    assert torch.equal(result.status, reference.status)
    torch.testing.assert_close(result.values, reference.values, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("options", [{"k": 0}, {"k": 3, "q": 0}, {"k": 3, "tolerance": 2.0}, {"k": 3, "seed": -1}])
def test_bad_arguments(emulated_kernels, options):
    with pytest.raises(UsageError):
        fiedler_vectors(batches(g=1), backend="cuda", **options)


def test_a_graph_that_does_not_fit_into_shared_memory_is_solved_with_a_workspace(emulated_kernels, monkeypatch):
    """Which of the two a graph takes follows from its own size: its bits do not depend on the stack."""
    x = torch.cat([batches(g=2, noise=3.0), batches(g=2, noise=0.3)])
    graph = graph_stack(x, 9).on_cpu(range(4))
    edges = [part.crow[-1].item() for part in map(graph.subset, ([0], [1], [2], [3]))]
    middle = sorted(edges)[1]
    limit = block.solve_bytes(70, middle, 2, normalized=False)
    whole = solve_graphs(graph, 1, **OPTIONS)
    monkeypatch.setattr(launch, "shared_memory_limit", lambda device: limit)  # noqa: ARG005
    split = solve_graphs(graph, 1, **OPTIONS)
    assert {key[2] for key in emulated_kernels.kernels if key[0] == "solve.cu"} == {("M=2",), ("M=2", "SPILL")}
    for name, value in vars(whole).items():
        assert torch.equal(getattr(split, name), value), name


def test_workspaces_stay_within_their_limit(emulated_kernels, monkeypatch):
    x = batches(g=5)
    stack = graph_stack(x, 6)
    whole = solve_stack(stack, 1, **OPTIONS)
    monkeypatch.setattr(launch, "shared_memory_limit", lambda device: 8 << 10)  # noqa: ARG005
    needed = block.solve_bytes(70, stack.col.shape[1], 2, normalized=False)
    monkeypatch.setattr(block, "WORKSPACE_BYTES", 2 * needed)
    parts = solve_stack(stack, 1, **OPTIONS)
    launches = emulated_kernels("solve.cu", "fiedler_block", ("M=2", "SPILL")).launches
    assert [grid for grid, *_ in launches[-3:]] == [2, 2, 1]
    for name, value in vars(whole).items():
        assert torch.equal(getattr(parts, name), value), name


@pytest.fixture
def said(caplog):
    log_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        yield caplog
    log_once.cache_clear()


def test_weights_that_are_no_float32_are_solved_without_the_kernel(emulated_kernels, said):
    graph = path(60)
    odd = replace(graph, weight=graph.weight * 0.1, degree=graph.degree * 0.1)
    result = fiedler_of_graph(odd, tolerance=1e-9)
    np.testing.assert_allclose(result.values[0, 0], 0.1 * (2 - 2 * np.cos(np.pi / 60)), rtol=1e-12)
    assert not launches(emulated_kernels)
    assert not said.messages


def test_a_start_is_taken_by_the_solvers_that_know_one(emulated_kernels):
    known = fiedler_of_graph(path(60))
    assert len(launches(emulated_kernels)) == 1
    again = fiedler_of_graph(path(60), start=known.basis)
    assert len(launches(emulated_kernels)) == 1
    torch.testing.assert_close(again.values, known.values)


@pytest.mark.parametrize(
    ("nodes", "q", "reason"),
    [(512, 1, ""), (512, 16, ""), (512, 17, "17 eigenvectors of 512 nodes are more than"), (33, 12, "leave no room")],
)
def test_sizes_that_the_kernel_takes(emulated_kernels, nodes, q, reason):
    found = why_not_solved(torch.device("cuda", 0), nodes, q)
    assert reason in found
    assert bool(found) == bool(reason)


def test_the_variant_for_graphs_that_shared_memory_does_not_hold_is_compiled_before_the_run(monkeypatch):
    """In the middle of one it would take seconds, and a failure there would end it."""
    asked = []
    monkeypatch.setattr(build, "why_not", lambda device: "")  # noqa: ARG005
    monkeypatch.setattr(block, "solve_kernel", lambda _device, m, spill: asked.append((m, spill)))
    monkeypatch.setattr(launch, "shared_memory_limit", lambda device: 227 << 10)  # noqa: ARG005
    gpu = torch.device("cuda", 0)
    assert why_not_solved(gpu, 512, 1, 2 * 512 * 10) == ""
    assert asked == [(2, False)]
    assert why_not_solved(gpu, 1024, 8, 2 * 1024 * 10) == ""
    assert asked[1:] == [(10, False), (10, True)]

    def fails(_device, _m, spill):
        if spill:
            raise KernelError("does not compile")

    monkeypatch.setattr(block, "solve_kernel", fails)
    assert why_not_solved(gpu, 1024, 8, 2 * 1024 * 10) == "does not compile"


def test_a_kernel_that_does_not_compile_is_said_once_and_done_without(monkeypatch, said):
    def fails(*arguments, device):
        raise KernelError(f"does not compile {arguments[0]}\nits log")

    monkeypatch.setattr(build, "why_not", lambda device: "")  # noqa: ARG005
    monkeypatch.setattr(build, "kernel", fails)
    monkeypatch.setattr(launch, "shared_memory_limit", lambda device: 227 << 10)  # noqa: ARG005
    monkeypatch.setattr(fiedler, "log_fallback", lambda _, reason: log_fallback(torch.device("cuda"), reason))
    for _ in range(2):
        assert (fiedler_of_graph(path(60)).status == 0).all()
    assert len(said.messages) == 1
    assert "its log" in said.messages[0]


def test_too_little_memory_on_the_gpu_is_said_and_the_cpu_takes_over(emulated_kernels, monkeypatch, said):
    def full(*arguments, **options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB.")

    reasons = []
    x = batches(g=2)
    expected = fiedler_vectors(x, k=6)
    near = knn_graph(x, 6)
    for module in (fiedler, cuda):
        monkeypatch.setattr(module, "graph_stack", full)
    for module in (fiedler, knn):
        monkeypatch.setattr(module, "log_fallback", lambda device, reason: reasons.append((str(device), reason)))
    result = fiedler_vectors(x, k=6, backend="cuda")
    assert torch.equal(result.status, expected.status)
    torch.testing.assert_close(result.values, expected.values)
    assert torch.equal(knn_graph(x, 6, backend="cuda").neighbors, near.neighbors)
    assert reasons == [("cpu", "OutOfMemoryError: CUDA out of memory. Tried to allocate 1.00 GiB.")] * 2
