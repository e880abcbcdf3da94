from __future__ import annotations

import subprocess
import sys
import threading

import pytest
import torch
from faiss_on_cpu import bf_knn, on_cpu, streams

from gstds_cache.errors import UsageError
from gstds_cache.graph import faiss_search
from gstds_cache.graph.faiss_search import LARGEST_SCRATCH, scratch_bytes, search_faiss_cpu, search_faiss_gpu
from gstds_cache.graph.knn import knn_graph, resolve_backend
from gstds_cache.graph.neighbors import normalized_rows

faiss = pytest.importorskip("faiss")


def unit_rows(graphs, nodes, dim=8):
    return normalized_rows(torch.randn(graphs, nodes, dim, generator=torch.Generator().manual_seed(graphs)))


@pytest.mark.parametrize("threads", [1, 3, 8])
@pytest.mark.parametrize("graphs", [1, 7, 8, 21])
def test_every_graph_is_searched_and_its_results_stand_in_its_place(monkeypatch, graphs, threads):
    on_cpu(monkeypatch)
    made = streams(threads=threads)
    monkeypatch.setattr(faiss_search, "_streams_of", lambda _device: made)
    rows = unit_rows(graphs, 40)
    for _ in range(2):  # streams are used again
        similarity, index = search_faiss_gpu(rows, 6)
        expected_similarity, expected_index = search_faiss_cpu(rows, 6)
        assert torch.equal(index, expected_index)
        assert torch.equal(similarity, expected_similarity)


def test_rows_in_float16_are_read_as_they_are(monkeypatch):
    on_cpu(monkeypatch)
    rows = unit_rows(3, 40).half()
    similarity, index = search_faiss_gpu(rows, 6)
    expected_similarity, expected_index = search_faiss_cpu(rows.float(), 6)
    assert torch.equal(index, expected_index)
    assert torch.equal(similarity, expected_similarity)
    transposed = rows.mT.contiguous().mT
    assert torch.equal(search_faiss_gpu(transposed, 6)[1], expected_index)


def test_streams_wait_for_the_one_that_asks_and_it_waits_for_them(monkeypatch):
    log = on_cpu(monkeypatch)
    made = streams(4)
    del log[:]
    rows = unit_rows(3, 20)
    found = torch.empty(3, 20, 5), torch.empty(3, 20, 5, dtype=torch.int64)
    made.search(rows, *found)
    # Three of the four are needed.
    assert [entry[1:] for entry in log[:3]] == [("waits for", "current")] * 3
    assert [entry[0] for entry in log[3:6]] == ["search"] * 3
    assert len({entry[1] for entry in log[3:6]}) == 3
    assert log[6:] == [("current", "waits for", entry[0]) for entry in log[:3]]


@pytest.mark.parametrize("threads", [1, 4])
def test_an_error_comes_out_after_all_searches_have_ended(monkeypatch, threads):
    begun, going = threading.Semaphore(0), []

    def search(resources, description):
        if not going:
            going.append(1)
            begun.release()
            raise RuntimeError("alloc fail")
        bf_knn(resources, description)
        going.append(1)

    log = on_cpu(monkeypatch, search)
    made = streams(4, threads=threads)
    rows = unit_rows(4, 20)
    found = torch.empty(4, 20, 5), torch.empty(4, 20, 5, dtype=torch.int64)
    with pytest.raises(RuntimeError, match="alloc fail"):
        made.search(rows, *found)
    assert len(going) == (4 if threads == 4 else 1)
    assert [entry[:2] for entry in log[-4:]] == [("current", "waits for")] * 4
    made.search(rows, *found)
    assert torch.equal(found[1], search_faiss_cpu(rows, 5)[1])


def test_threads_that_search_at_once_take_turns(monkeypatch):
    log = on_cpu(monkeypatch)
    stacks, found = [unit_rows(graphs, 30) for graphs in (5, 6, 7, 9)], {}
    search_faiss_gpu(stacks[0], 4)
    del log[:]
    asking = [
        threading.Thread(target=lambda rows=rows: found.update({len(rows): search_faiss_gpu(rows, 4)}))
        for rows in stacks
    ]
    for thread in asking:
        thread.start()
    for thread in asking:
        thread.join()
    for rows in stacks:
        assert torch.equal(found[len(rows)][1], search_faiss_cpu(rows, 4)[1])
    # Between the first wait of a stack and its last search no other stack waits or searches.
    kinds = "".join("s" if entry[0] == "search" else "c" if entry[0] == "current" else "l" for entry in log)
    assert sorted(len(part) for part in kinds.replace("cl", "c l").split()) == sorted(
        len(rows) + 2 * min(len(rows), faiss_search.STREAMS) for rows in stacks
    )


def test_scratch_memory_grows_with_the_graphs_and_large_ones_share_fewer_streams(monkeypatch):
    searched, rooms = [], []
    log = on_cpu(monkeypatch, lambda resources, _description: searched.append(id(resources)))
    monkeypatch.setattr(faiss.StandardGpuResources, "setTempMemory", lambda _self, size: rooms.append(size))
    made = streams(8, threads=1)
    assert rooms == [8 << 20] * 8
    for nodes, streams_used, room in [(512, 8, []), (2048, 8, [16 << 20] * 8), (100_000, 3, [512 << 20] * 3)]:
        del searched[:], rooms[:], log[:]
        found = torch.empty(9, nodes, 3), torch.empty(9, nodes, 3, dtype=torch.int64)
        made.search(torch.empty(9, nodes, 40), *found)
        assert (len(searched), len(set(searched)), rooms) == (9, streams_used, room)
    assert scratch_bytes(512, 1280, 12) < 8 << 20
    del rooms[:], searched[:]
    monkeypatch.setattr(faiss_search, "scratch_bytes", lambda *_: 5 * LARGEST_SCRATCH)
    for _ in range(2):
        made.search(torch.empty(2, 10, 2), torch.empty(2, 10, 1), torch.empty(2, 10, 1, dtype=torch.int64))
    assert (len(set(searched)), rooms) == (1, [LARGEST_SCRATCH])


def test_faiss_gpu_without_a_gpu_says_what_to_pass(monkeypatch):
    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 0)
    with pytest.raises(UsageError, match="faiss sees no GPU") as error:
        knn_graph(torch.ones(1, 3, 2), 1, backend="faiss-gpu")
    assert "auto, torch or faiss-cpu" in error.value.hint


@pytest.mark.parametrize("backend", ["faiss-cpu", "faiss-gpu"])
def test_without_faiss_the_rest_works_and_its_backends_say_what_to_install(monkeypatch, tmp_path, backend):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(UsageError, match=f"{backend} was asked for, but faiss is not installed") as error:
        knn_graph(torch.ones(1, 3, 2), 1, backend=backend)
    assert "pip install faiss-gpu" in error.value.hint
    assert resolve_backend("auto", torch.device("cuda"), 9000, 10) != "faiss-gpu"
    assert knn_graph(torch.ones(1, 3, 2), 1).neighbors.tolist() == [[[1], [0], [0]]]

    monkeypatch.delitem(sys.modules, "faiss")
    (tmp_path / "faiss").mkdir()
    (tmp_path / "faiss" / "__init__.py").write_text("raise RuntimeError('libcublas.so.12 is missing')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UsageError, match="faiss cannot be loaded: libcublas.so.12 is missing"):
        resolve_backend(backend, torch.device("cuda"), 9000, 10)
    assert resolve_backend("auto", torch.device("cuda"), 9000, 10) != "faiss-gpu"


def test_faiss_is_loaded_when_it_is_asked_for():
    program = (
        "import sys, torch; from gstds_cache.graph.knn import knn_graph, resolve_backend;"
        "knn_graph(torch.ones(3, 2), 1); assert 'faiss' not in sys.modules;"
        "resolve_backend('faiss-cpu', torch.device('cpu'), 9, 1); assert 'faiss' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


ON_A_GPU = [pytest.mark.gpu, pytest.mark.skipif(faiss.get_num_gpus() == 0, reason="needs a GPU, and faiss for it")]


@pytest.mark.parametrize(
    "kind", [pytest.param(torch.float32, marks=ON_A_GPU), pytest.param(torch.float16, marks=ON_A_GPU)]
)
def test_on_a_gpu_rows_may_still_be_on_their_way_and_results_follow(kind):
    """Rows are computed late on a stream of our own, and results read there at once, with nobody waiting in between."""
    rows = unit_rows(19, 200, 64)
    expected_similarity, expected_index = search_faiss_cpu(rows.to(kind).float(), 6)
    source = rows.to("cuda", kind)
    mine = torch.cuda.Stream()
    mine.wait_stream(torch.cuda.current_stream())
    for _ in range(3):
        with torch.cuda.stream(mine):
            torch.cuda._sleep(20_000_000)  # some 10 ms
            similarity, index = search_faiss_gpu(source * 1, 6)
            similarity, index = similarity * 1, index * 1
        mine.synchronize()
        torch.testing.assert_close(similarity.cpu(), expected_similarity, atol=2e-6, rtol=0)
        assert (index.cpu() == expected_index).float().mean() > 0.999


@pytest.mark.parametrize("nodes", [pytest.param(nodes, marks=ON_A_GPU) for nodes in (2_000, 9_000, 20_000)])
def test_on_a_gpu_graphs_of_any_size_are_searched_beside_each_other(nodes):
    rows = unit_rows(3, nodes, 48)
    found = knn_graph(rows.to("cuda"), 10, backend="faiss-gpu")
    expected = knn_graph(rows[:1], 10, backend="torch")
    assert (found.neighbors[:1].cpu() == expected.neighbors).float().mean() > 0.999
    alone = knn_graph(rows[1:2].to("cuda"), 10, backend="faiss-gpu")
    assert torch.equal(alone.neighbors[0], found.neighbors[1])
    assert torch.equal(alone.similarities[0], found.similarities[1])
