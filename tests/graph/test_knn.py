from __future__ import annotations

import numpy as np
import pytest
import torch

from gstds_cache.errors import SolverError, UsageError
from gstds_cache.graph import faiss_search, knn
from gstds_cache.graph.knn import by_candidates, knn_graph, resolve_backend, search_torch, top_k
from gstds_cache.graph.neighbors import normalized_rows

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("device", "gpus", "expected"),
    [(CPU, 0, "torch"), (CPU, 2, "torch"), (CUDA, 0, "torch"), (CUDA, 1, "faiss-gpu")],
)
def test_auto_backend(monkeypatch, device, gpus, expected):
    monkeypatch.setattr(faiss_search, "gpus", lambda: gpus)
    assert resolve_backend("auto", device, 512, 10) == expected


def test_unknown_backend_lists_the_known_ones():
    with pytest.raises(UsageError, match="unknown kNN backend 'fais-cpu'.*faiss-cpu") as error:
        resolve_backend("fais-cpu", CPU, 512, 10)
    assert "'faiss-cpu'" in error.value.hint


def test_more_candidates_than_a_search_can_find_are_found_by_torch():
    asked = []

    def search(rows, candidates):
        asked.append(candidates)
        return search_torch(rows, candidates)

    x = torch.cat([torch.ones(1, 50, 3), torch.randn(1, 50, 3, generator=torch.Generator().manual_seed(0))])
    graph = by_candidates(search, normalized_rows(x), 5, largest=20)
    assert asked == [7, 14]  # 28 are more than it can find, and 14 enough for the other graph
    assert graph.neighbors[0, 7].tolist() == [0, 1, 2, 3, 4]
    assert torch.equal(graph.neighbors, knn_graph(x, 5).neighbors)
    assert knn.BACKENDS["faiss-cpu"](normalized_rows(x), 5).neighbors[0, 7].tolist() == [0, 1, 2, 3, 4]


def test_top_k_takes_the_row_out_by_index_wherever_it_stands():
    similarity = torch.tensor([[1.0, 1.0, 0.5], [1.0, 1.0, 1.0], [1.0, 0.9, 0.2]])
    index = torch.tensor([[2, 0, 1], [4, 3, 2], [1, 0, 2]])
    taken, open_end = top_k(similarity[None], index[None], 2)
    # Row 1 is not in its own list: the last of (similarity, index) goes. Row 2 stands last itself.
    assert taken.neighbors[0].tolist() == [[2, 1], [2, 3], [1, 0]]
    torch.testing.assert_close(taken.similarities[0], torch.tensor([[1.0, 0.5], [1.0, 1.0], [1.0, 0.9]]))
    assert open_end.tolist() == [True]  # in row 1 a fourth could be as near
    assert top_k(similarity[None, :1], index[None, :1], 1)[1].tolist() == [False]


@pytest.mark.parametrize("values", [[0.5, 0.25], [0.0, -0.0, 0.25], [-0.5, -0.25, 1e-40, -1e-40, 1.0, -1.0]])
def test_top_k_orders_as_a_sort_by_both_numbers_does(values):
    generator = np.random.default_rng(0)
    similarity = generator.choice(np.array(values, np.float32), (3, 40, 12))
    index = np.argsort(generator.random((3, 40, 40)), axis=2)[..., :12]
    taken, open_end = top_k(torch.from_numpy(similarity), torch.from_numpy(index), 4)
    for graph in range(3):
        could_go_on = False
        for row in range(40):
            found = sorted(zip(-similarity[graph, row], index[graph, row], strict=True))
            best = [(s, i) for s, i in found if i != row][:4]
            assert taken.neighbors[graph, row].tolist() == [i for _, i in best]
            assert taken.similarities[graph, row].tolist() == [-s for s, _ in best]
            could_go_on |= found[-1][0] == best[-1][0]
        assert bool(open_end[graph]) == could_go_on


def test_settle_clips_rounding_before_it_orders_ties():
    taken, _ = top_k(torch.tensor([[[1.0, 1.0000001, 1.0000002]]]), torch.tensor([[[0, 2, 1]]]), 2)
    assert taken.neighbors[0, 0].tolist() == [1, 2]
    assert taken.similarities.max() == 1


def test_blocks_of_rows_and_graphs_change_nothing(monkeypatch):
    x = torch.randn(5, 40, 8, generator=torch.Generator().manual_seed(2))
    whole, searched = knn_graph(x, 6, backend="torch"), search_torch(normalized_rows(x), 8)
    for limit in (4 * 40 * 7, 4 * 40 * 40 * 2):  # 7 rows at once; 2 graphs
        monkeypatch.setattr(knn, "BLOCK_BYTES", limit)
        again = knn_graph(x, 6, backend="torch")
        assert torch.equal(again.neighbors, whole.neighbors)
        torch.testing.assert_close(again.similarities, whole.similarities, atol=1e-6, rtol=0)
        assert torch.equal(search_torch(normalized_rows(x), 8)[1], searched[1])


@pytest.mark.parametrize("scale", [1e-45, 1e-30, 1.0, 1e38])
def test_unit_rows_of_any_finite_length(scale):
    rows = normalized_rows(torch.tensor([[[3.0, -3.0, 0.0], [0.0, 0.0, 0.0]]]) * scale)[0]
    expected = torch.tensor([[0.5**0.5, -(0.5**0.5), 0], [0, 0, 0]])
    torch.testing.assert_close(rows, expected)


def test_unit_rows_of_float16_are_computed_in_float32():
    x = torch.randn(1, 20, 50, generator=torch.Generator().manual_seed(1)).half()
    expected = torch.nn.functional.normalize(x.float(), dim=2)
    torch.testing.assert_close(normalized_rows(x), expected, atol=1e-6, rtol=0)


def test_one_batch_and_numpy_arrays_are_taken_as_well():
    x = torch.randn(1, 30, 4, generator=torch.Generator().manual_seed(3))
    expected = knn_graph(x, 5)
    for given in (x[0], x.numpy(), x[0].numpy().astype("float64")):
        graph = knn_graph(given, 5, device="cpu")
        assert torch.equal(graph.neighbors, expected.neighbors)
    with pytest.raises(UsageError, match=r"got shape \[1, 2, 30, 3\], expected"):
        knn_graph(torch.ones(1, 2, 30, 3), 5)


def test_every_float16_is_converted_exactly():
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.float16)
    every = every[every.isfinite()]
    rows = torch.stack([every, torch.ones_like(every)], dim=1)[None]
    expected = torch.nn.functional.normalize(rows.double(), dim=2).float()
    torch.testing.assert_close(normalized_rows(rows), expected, rtol=3e-7, atol=1e-45)
    assert normalized_rows(torch.zeros(1, 2, 3).half()).tolist() == [[[0.0] * 3] * 2]
    for bad in (torch.inf, -torch.inf, torch.nan):
        with pytest.raises(SolverError, match=r"rows \[1\] of graph 0"):
            normalized_rows(torch.tensor([[[1.0], [bad]]]).half())


def test_many_bad_rows_are_counted():
    with pytest.raises(SolverError, match=r"rows \[0, 1, 2, 3, 4, 5, 6, 7, 8, 9\] and 15 more of graph 0"):
        normalized_rows(torch.full((1, 25, 2), torch.nan))
