"""Every kNN backend finds what brute force finds. Run over all of them; those that need a GPU skip without one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from faiss_on_cpu import on_cpu

from gstds_cache.errors import SolverError, UsageError
from gstds_cache.graph import faiss_search
from gstds_cache.graph.knn import BACKENDS, by_candidates, knn_graph, search_torch

GPU = pytest.param(
    ("faiss-gpu", "cuda"),
    marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")],
)
TORCH_ON_CUDA = pytest.param(
    ("torch", "cuda"),
    marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")],
)
ON_CUDA = pytest.param(
    ("faiss-cpu", "cuda"),
    marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")],
)


KERNELS = pytest.param(
    ("cuda", "cuda"),
    marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")],
)


@pytest.fixture(
    params=[
        ("faiss-cpu", "cpu"),
        ("faiss-gpu", "cpu"),
        ("torch", "cpu"),
        ("torch stacked", "cpu"),
        ("cuda", "cpu"),
        ON_CUDA,
        TORCH_ON_CUDA,
        GPU,
        KERNELS,
    ],
    ids="-on-".join,
)
def search(request, monkeypatch):
    backend, device = request.param
    if device == "cuda" and backend.startswith("faiss"):
        pytest.importorskip("faiss")  # a machine with a GPU need not have it
    if (backend, device) == ("faiss-gpu", "cpu"):
        on_cpu(monkeypatch)
        monkeypatch.setattr(faiss_search, "require_faiss", lambda _backend: None)
    if (backend, device) == ("cuda", "cpu"):
        request.getfixturevalue("emulated_kernels")
    # What torch does on CUDA runs on a CPU as well.
    monkeypatch.setitem(BACKENDS, "torch stacked", lambda rows, k: by_candidates(search_torch, rows, k))
    return lambda x, k: knn_graph(x.to(device), k, backend=backend)


def cosine(x):
    """Naive cosine similarities, [G, B, B] float64."""
    x = x.double().numpy()
    length = np.linalg.norm(x, axis=2, keepdims=True)
    x = np.divide(x, length, out=np.zeros_like(x), where=length > 0)
    return x @ x.transpose(0, 2, 1)


def assert_nearest(x, graph, k):
    """Rows of the graph are the k largest cosines but the diagonal's, up to what float32 can tell apart."""
    similarity = cosine(x)
    g, b, _ = x.shape
    neighbors, found = graph.neighbors.cpu().numpy(), graph.similarities.cpu().numpy()
    assert neighbors.shape == found.shape == (g, b, k)
    assert not (neighbors == np.arange(b)[None, :, None]).any(), "a row is its own neighbour"
    assert all(len(set(row)) == k for row in neighbors.reshape(-1, k)), "a neighbour is listed twice"
    np.testing.assert_allclose(np.take_along_axis(similarity, neighbors, 2), found, atol=2e-6)
    similarity[:, np.arange(b), np.arange(b)] = -np.inf
    best = -np.sort(-similarity, axis=2)[:, :, :k]
    np.testing.assert_allclose(found, best, atol=2e-6)
    assert (np.diff(found, axis=2) <= 0).all()
    tied = np.diff(found, axis=2) == 0
    assert (np.diff(neighbors, axis=2)[tied] > 0).all(), "ties are not in the order of their indices"


def test_every_backend_is_under_contract():
    assert set(BACKENDS) == {"cuda", "faiss-cpu", "faiss-gpu", "torch"}


@pytest.mark.parametrize(("g", "b", "d", "k"), [(1, 2, 3, 1), (3, 17, 5, 4), (2, 65, 33, 10), (1, 300, 64, 20)])
def test_random_rows(search, g, b, d, k):
    x = torch.randn(g, b, d, generator=torch.Generator().manual_seed(b))
    assert_nearest(x, search(x, k), k)


def test_well_separated_neighbours_match_brute_force_exactly(search):
    x = torch.randn(2, 60, 16, generator=torch.Generator().manual_seed(3))
    similarity = cosine(x)
    similarity[:, range(60), range(60)] = -np.inf
    expected = np.argsort(-similarity, axis=2, kind="stable")[:, :, :5]
    np.testing.assert_array_equal(search(x, 5).neighbors.cpu().numpy(), expected)


def test_length_of_a_row_does_not_matter(search):
    x = torch.randn(1, 40, 8, generator=torch.Generator().manual_seed(4))
    scaled = x * torch.logspace(-30, 30, 40)[None, :, None]
    assert torch.equal(search(scaled, 6).neighbors, search(x, 6).neighbors)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_float_types(search, dtype):
    x = (torch.randn(2, 50, 12, generator=torch.Generator().manual_seed(5))).to(dtype)
    assert_nearest(x.float(), search(x, 7), 7)


def test_exact_duplicates_do_not_bring_a_row_back_to_itself(search):
    x = torch.randn(1, 6, 9, generator=torch.Generator().manual_seed(6)).repeat_interleave(8, dim=1)
    graph = search(x, 5)
    assert_nearest(x, graph, 5)
    same_group = torch.arange(48)[:, None] // 8 == graph.neighbors[0].cpu() // 8
    assert same_group.all()


def test_ties_at_the_last_place_go_to_the_lowest_index(search):
    x = torch.eye(3).repeat_interleave(20, 0)[None]
    lowest = torch.tensor([[j for j in range(r // 20 * 20, r // 20 * 20 + 20) if j != r][:6] for r in range(60)])
    assert torch.equal(search(x, 6).neighbors[0].cpu(), lowest)
    far = torch.cat([x[:, :3], -x[:, 20:30]], dim=1)  # rows 0 to 2 are equal, and ten others at 0 to them
    assert search(far, 5).neighbors[0, 0].tolist() == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("fill", [0.0, 1.0])
def test_all_rows_identical(search, fill):
    x = torch.full((2, 30, 4), fill)
    graph = search(x, 10)
    assert_nearest(x, graph, 10)
    assert torch.allclose(graph.similarities.cpu(), torch.tensor(fill), atol=1e-6)


def test_zero_rows_have_similarity_zero(search):
    x = torch.randn(1, 12, 4, generator=torch.Generator().manual_seed(7))
    x[0, 3] = 0
    graph = search(x, 11)
    assert_nearest(x, graph, 11)
    assert (graph.similarities[0, 3] == 0).all()


@pytest.mark.parametrize(("b", "k", "expected"), [(1, 5, 0), (2, 5, 1), (3, 3, 2), (8, 100, 7)])
def test_k_is_clipped_to_the_other_rows(search, b, k, expected):
    x = torch.randn(2, b, 6, generator=torch.Generator().manual_seed(8))
    graph = search(x, k)
    assert graph.neighbors.shape == (2, b, expected)
    assert graph.neighbors.dtype == torch.int64
    assert graph.similarities.dtype == torch.float32


def test_stack_order_changes_nothing(search):
    x = torch.randn(5, 70, 19, generator=torch.Generator().manual_seed(9))
    order = [3, 0, 4, 1, 2]
    whole, shuffled = search(x, 8), search(x[order], 8)
    assert torch.equal(whole.neighbors[order], shuffled.neighbors)
    assert torch.equal(whole.similarities[order], shuffled.similarities)
    assert torch.equal(search(x[2:3], 8).similarities[0], whole.similarities[2])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_rows_without_a_cosine_are_refused_by_name(search, bad, dtype):
    x = torch.zeros(2, 20, 4, dtype=dtype)
    x[1, 17, 0] = x[1, 3, 2] = bad
    with pytest.raises(SolverError, match=r"rows \[3, 17\] of graph 1 hold NaN or Inf"):
        search(x, 3)


@pytest.mark.parametrize("k", [0, -1])
def test_no_neighbours_is_a_usage_error(search, k):
    with pytest.raises(UsageError, match="expected at least 1"):
        search(torch.ones(1, 4, 2), k)


@pytest.mark.parametrize("shape", [(0, 4, 2), (1, 0, 2), (1, 4, 0)])
def test_empty_input_is_a_usage_error(search, shape):
    with pytest.raises(UsageError, match="every axis to be at least 1"):
        search(torch.ones(shape), 1)
