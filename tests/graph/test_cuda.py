"""The host's side of graphs by CUDA kernels, run on CPU tensors with the kernels that g++ compiled."""

from __future__ import annotations

import logging

import pytest
import torch

from gstds_cache.cuda import build, launch
from gstds_cache.errors import KernelError, SolverError, UsageError
from gstds_cache.graph import cuda, faiss_search
from gstds_cache.graph.components import bridge_components
from gstds_cache.graph.cuda import graph_stack, inverse_lengths, products, stack_of, unsigned, why_not_graphs
from gstds_cache.graph.knn import knn_graph, nearest, resolve_backend
from gstds_cache.graph.laplacian import symmetrise
from gstds_cache.graph.neighbors import normalized_rows
from gstds_cache.runtime.notify import log_once

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def batches(g=5, b=70, d=24, dtype=torch.float16, noise=0.3, seed=0):
    gen = torch.Generator().manual_seed(seed)
    centres = 3 * torch.randn(6, d, generator=gen)
    return (centres[torch.randint(6, (g, b), generator=gen)] + noise * torch.randn(g, b, d, generator=gen)).to(dtype)


@pytest.fixture
def small_chunks(monkeypatch):
    """Two graphs at once where there are more, so that stacks of a few graphs take several rounds."""
    monkeypatch.setattr(cuda, "CHUNK", {torch.float16: 2, torch.float32: 2})
    monkeypatch.setattr(cuda, "PRODUCT_BYTES", 1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("noise", [0.2, 2.0], ids=["components", "connected"])
def test_the_graphs_that_the_cpu_makes(emulated_kernels, small_chunks, dtype, noise):
    x = batches(dtype=dtype, noise=noise)
    stack = graph_stack(x, 8)
    stack.require_finite(x)
    rows = normalized_rows(x)
    near = nearest(rows, 8, backend="torch")
    graph, components = bridge_components(symmetrise(near), rows)
    mine = stack.on_cpu(range(5))
    torch.testing.assert_close(stack.knn().similarities, near.similarities, atol=2e-6, rtol=0)
    same = (stack.knn().neighbors == near.neighbors).float().mean()
    assert same > 0.99, "up to rows that are equally near in float32"
    assert torch.equal(stack.components.long(), components)
    assert torch.equal(mine.component, graph.component)
    if same == 1:
        assert torch.equal(mine.crow, graph.crow)
        assert torch.equal(mine.col, graph.col)
    torch.testing.assert_close(mine.degree.sum(), graph.degree.sum(), atol=1e-2, rtol=0)
    # Symmetric, and its degrees are its own.
    again = type(mine).from_edges(mine.row, mine.col, mine.weight, (5, 70))
    assert torch.equal(again.col, mine.col)
    assert torch.equal(again.weight, mine.weight)
    torch.testing.assert_close(again.degree, mine.degree)


def test_some_of_the_graphs_in_any_order(emulated_kernels):
    stack = graph_stack(batches(noise=0.02), 5)
    whole, some = stack.on_cpu(range(5)), stack.on_cpu([3, 0])
    for name, value in vars(whole.subset([3, 0])).items():
        assert torch.equal(getattr(some, name), value), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_the_same_bits_in_every_stack(emulated_kernels, small_chunks, dtype):
    x = batches(dtype=dtype, b=61, d=19)
    whole = graph_stack(x, 6)
    for keep in ([4], [0, 1], [3, 2, 1, 0, 4]):
        part = graph_stack(x[keep], 6)
        for name in ("crow", "components", "label", "neighbors", "similarities"):
            assert torch.equal(getattr(part, name), getattr(whole, name)[keep]), name
        for n, g in enumerate(keep):
            edges = int(whole.crow[g, -1])
            assert torch.equal(part.col[n, :edges], whole.col[g, :edges])
            assert torch.equal(part.weight[n, :edges], whole.weight[g, :edges])


def test_products_come_in_chunks_of_one_shape(monkeypatch):
    shapes = []
    one = cuda._inner_products
    monkeypatch.setattr(
        cuda, "_inner_products", lambda rows, out: (shapes.append((rows.shape, out.shape)), one(rows, out))
    )
    x = batches(g=35, b=16, d=8)
    found = products(x)
    assert shapes == [((32, 16, 8), (32, 16, 16))] * 2
    torch.testing.assert_close(found, x.float() @ x.float().mT, atol=0, rtol=1e-6)
    assert cuda.chunk_of(8192, torch.float16) == 2


def test_lengths_of_float16_rows():
    x = torch.tensor([[3.0, 4.0], [0, 0], [65504, 65504], [6e-8, 0], [torch.nan, 0], [torch.inf, 1]]).half()
    found = inverse_lengths(x)
    exact = 1 / torch.linalg.vector_norm(x.double(), dim=1)
    torch.testing.assert_close(found[[0, 2, 3]].double(), exact[[0, 2, 3]], rtol=1e-6, atol=0)
    assert found[1] == 0
    assert found[4:].isnan().all()


def test_known_lengths_are_taken(emulated_kernels):
    x = batches()
    known = graph_stack(x, 4, inverse=inverse_lengths(x))
    assert torch.equal(known.similarities, graph_stack(x, 4).similarities)


def test_rows_of_nan_are_named_after_the_launch(emulated_kernels):
    x = batches()
    x[3, 8, 1] = torch.nan
    stack = graph_stack(x, 4)
    with pytest.raises(SolverError, match=r"rows \[8\] of graph 3 hold NaN or Inf"):
        stack.require_finite(x)


def test_no_neighbours_among_one_row(emulated_kernels):
    graph = knn_graph(torch.ones(2, 1, 4), 5, backend="cuda")
    assert graph.neighbors.shape == graph.similarities.shape == (2, 1, 0)


def test_sparse_graphs_there_and_back(emulated_kernels):
    x = batches(noise=0.02, dtype=torch.float32)
    graph, _ = bridge_components(symmetrise(nearest(normalized_rows(x), 5, backend="torch")), normalized_rows(x))
    stack = stack_of(graph)
    back = stack.on_cpu(range(5))
    for name in ("crow", "col"):
        assert torch.equal(getattr(back, name), getattr(graph, name))
    torch.testing.assert_close(back.weight, graph.weight, rtol=1e-7, atol=0)
    assert torch.equal(stack.components.long(), graph.component.amax(dim=1) + 1)
    weight = graph.weight.clone()
    weight[7] = 0.1  # no float32
    assert stack_of(type(graph)(**{**vars(graph), "weight": weight})) is None


def test_columns_beyond_32767(emulated_kernels):
    assert unsigned(torch.tensor([0, -1, -32768], dtype=torch.int16)).tolist() == [0, 65535, 32768]


@pytest.fixture
def said(caplog):
    """Lines that were logged, also those of which another test had the first."""
    log_once.cache_clear()
    yield caplog
    log_once.cache_clear()


@pytest.mark.parametrize(
    ("nodes", "k", "expected"), [(512, 10, "cuda"), (8192, 32, "cuda"), (8193, 10, "faiss-gpu"), (512, 33, "faiss-gpu")]
)
def test_auto_on_a_gpu(emulated_kernels, monkeypatch, said, nodes, k, expected):
    monkeypatch.setattr(faiss_search, "gpus", lambda: 1)
    with said.at_level(logging.WARNING):
        assert resolve_backend("auto", GPU, nodes, k) == expected
    assert bool(said.messages) == (expected != "cuda")


def test_auto_where_kernels_do_not_run_says_why_once(monkeypatch, said):
    monkeypatch.setattr(build, "why_not", lambda device: "the driver is of 2014")  # noqa: ARG005
    monkeypatch.setattr(faiss_search, "gpus", lambda: 0)
    for _ in range(3):
        assert resolve_backend("auto", GPU, 512, 10) == "torch"
    assert said.messages == [
        "CUDA kernels are not used (the driver is of 2014): other ways are taken, which are slower"
    ]


def test_too_little_shared_memory(emulated_kernels, monkeypatch):
    monkeypatch.setattr(launch, "shared_memory_limit", lambda device: 48 << 10)  # noqa: ARG005
    assert why_not_graphs(GPU, 512, 10) == ""
    assert (
        why_not_graphs(GPU, 4096, 10) == "a block has 49,152 bytes of shared memory here, and 4,096 rows need 106,560"
    )
    with pytest.raises(UsageError, match="cuda was asked for as kNN backend, which cannot run: a block has 49,152"):
        resolve_backend("cuda", GPU, 4096, 10)


def test_a_kernel_that_does_not_compile(monkeypatch, said):
    def fails(*arguments, device):
        raise KernelError("NVRTC does not compile graph.cu\nthe log")

    monkeypatch.setattr(build, "why_not", lambda device: "")  # noqa: ARG005
    monkeypatch.setattr(build, "kernel", fails)
    monkeypatch.setattr(launch, "shared_memory_limit", lambda device: 227 << 10)  # noqa: ARG005
    monkeypatch.setattr(faiss_search, "gpus", lambda: 1)
    assert resolve_backend("auto", GPU, 512, 10) == "faiss-gpu"
    assert "the log" in said.text
    with pytest.raises(UsageError, match="does not compile graph.cu\nthe log"):
        resolve_backend("cuda", GPU, 512, 10)


def test_cuda_on_a_cpu_is_refused():
    with pytest.raises(UsageError, match="cuda was asked for as kNN backend, which cannot run: cpu is no CUDA device"):
        knn_graph(torch.ones(1, 4, 2), 1, backend="cuda")
    assert resolve_backend("auto", CPU, 512, 10) == "torch"
