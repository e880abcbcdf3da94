from __future__ import annotations

import pytest
import torch

from gstds_cache.errors import SolverError, UsageError
from gstds_cache.graph import knn
from gstds_cache.graph.knn import drop_self, knn_graph, resolve_backend
from gstds_cache.graph.neighbors import check_rows, unit_rows

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("device", "gpus", "expected"),
    [(CPU, 0, "faiss-cpu"), (CPU, 2, "faiss-cpu"), (CUDA, 0, "faiss-cpu"), (CUDA, 1, "faiss-gpu")],
)
def test_auto_backend(monkeypatch, device, gpus, expected):
    monkeypatch.setattr(knn.faiss, "get_num_gpus", lambda: gpus)
    assert resolve_backend("auto", device) == expected


def test_faiss_gpu_without_a_gpu_says_what_to_pass(monkeypatch):
    monkeypatch.setattr(knn.faiss, "get_num_gpus", lambda: 0)
    with pytest.raises(UsageError, match="faiss sees no GPU") as error:
        knn_graph(torch.ones(1, 3, 2), 1, backend="faiss-gpu")
    assert "--knn-backend" in error.value.hint


def test_unknown_backend_lists_the_known_ones():
    with pytest.raises(UsageError, match="unknown kNN backend 'fais-cpu'.*faiss-cpu") as error:
        resolve_backend("fais-cpu", CPU)
    assert "'faiss-cpu'" in error.value.hint


def test_gpu_search_but_for_the_call_itself(monkeypatch):
    """The GPU path runs here with faiss's CPU search in place of the GPU's, on tensors, as knn_gpu takes them."""
    calls = []

    def knn_gpu(resources, xq, xb, k, *, metric, device):
        calls.append((resources, metric, device))
        return (xq @ xb.T).topk(k, dim=1)

    class OnGpu(torch.Tensor):
        is_cuda = True

    monkeypatch.setattr(knn, "_gpu_resources", lambda device: f"resources {device}")
    rows = unit_rows(torch.randn(40, 8, generator=torch.Generator().manual_seed(0)))
    pytest.importorskip("faiss.contrib.torch_utils")
    monkeypatch.setattr(knn.faiss, "knn_gpu", knn_gpu)
    similarity, index = knn.search_faiss_gpu(rows.as_subclass(OnGpu), 6)
    expected_similarity, expected_index = knn.search_faiss_cpu(rows, 6)
    assert torch.equal(index.as_subclass(torch.Tensor), expected_index)
    assert torch.allclose(similarity.as_subclass(torch.Tensor), expected_similarity, atol=1e-6)
    assert calls == [("resources None", knn.faiss.METRIC_INNER_PRODUCT, None)]


def test_gpu_search_refuses_more_than_faiss_can_select():
    with pytest.raises(UsageError, match="at most 2047 neighbours, got k=2048"):
        knn.search_faiss_gpu(torch.ones(1, 1), 2049)


def test_drop_self_takes_the_row_out_by_index_wherever_it_stands():
    similarity = torch.tensor([[1.0, 1.0, 0.5], [1.0, 1.0, 1.0], [1.0, 0.9, 0.2]])
    index = torch.tensor([[2, 0, 1], [4, 3, 2], [1, 0, 2]])
    found, neighbors = drop_self(similarity, index)
    # Row 1 is not in its own list: the last of (similarity, index) goes. Row 2 stands last itself.
    assert neighbors.tolist() == [[2, 1], [2, 3], [1, 0]]
    torch.testing.assert_close(found, torch.tensor([[1.0, 0.5], [1.0, 1.0], [1.0, 0.9]]))


def test_drop_self_clips_rounding_before_it_orders_ties():
    found, neighbors = drop_self(
        torch.tensor([[1.0, 1.0000001, 1.0000002], [0.0, 0.0, 0.0], [0, 0, 0]]),
        torch.tensor([[0, 2, 1], [0, 1, 2], [0, 1, 2]]),
    )
    assert neighbors[0].tolist() == [1, 2]
    assert found.max() == 1


@pytest.mark.parametrize("scale", [1e-45, 1e-30, 1.0, 1e38])
def test_unit_rows_of_any_finite_length(scale):
    rows = unit_rows(torch.tensor([[3.0, -3.0, 0.0], [0.0, 0.0, 0.0]]) * scale)
    expected = torch.tensor([[0.5**0.5, -(0.5**0.5), 0], [0, 0, 0]])
    torch.testing.assert_close(rows, expected)


def test_unit_rows_of_float16_are_computed_in_float32():
    x = torch.randn(20, 50, generator=torch.Generator().manual_seed(1)).half()
    torch.testing.assert_close(unit_rows(x), torch.nn.functional.normalize(x.float()), atol=1e-6, rtol=0)


def test_many_bad_rows_are_counted():
    with pytest.raises(SolverError, match=r"rows \[0, 1, 2, 3, 4, 5, 6, 7, 8, 9\] and 15 more of graph 0"):
        check_rows(torch.full((1, 25, 2), torch.nan))
