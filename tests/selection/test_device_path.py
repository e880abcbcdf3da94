"""The path of a batch on a device: the lines that a GPU runs, with the kernels compiled by g++ and tensors on a CPU."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import gpu_memory
import numpy as np
import pytest
import torch

from gstds_cache.config import SelectConfig
from gstds_cache.errors import KernelError, SolverError, UsageError, in_words
from gstds_cache.selection import device_path, device_run, throughput
from gstds_cache.selection.device_rows import DeviceRows, StreamedRows, choose_rows
from gstds_cache.selection.run import BatchSelector
from gstds_cache.selection.selected_batch import SelectedBatch
from gstds_cache.selection.spectra import Spectra
from gstds_cache.spectral import fiedler
from gstds_cache.spectral.status import Status
from gstds_cache.store.reader import EmbeddingStore
from gstds_cache.stream import record_writer, writer
from gstds_cache.stream.writer import write_file

CONFIG = SelectConfig(batch_size=64, epochs=3, knn=6, device="cpu", guidance="none")


@pytest.fixture
def store(copied_store, tmp_path: Path, request: pytest.FixtureRequest) -> EmbeddingStore:
    return copied_store(tmp_path / "store", 300, frozenset({5, 150}), getattr(request, "param", "float16"))


def everything(selections: list[SelectedBatch]) -> list[object]:
    return [
        (s.seq, s.epoch, s.batch_id, s.n_in, s.kept.tobytes(), s.score.tobytes(), s.status, s.value, s.residual)
        for s in selections
    ]


@pytest.fixture
def on_device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[..., BatchSelector]:
    """Makes selectors whose stacks run by emulated kernels; what the path leaves to the CPU runs as on any CPU."""

    def make(store: EmbeddingStore, **changes) -> BatchSelector:
        request.getfixturevalue("emulated_kernels")
        monkeypatch.setattr(fiedler, "why_not_solved", lambda *_: "this is the CPU")
        selector = BatchSelector(store, replace(CONFIG, knn_backend="cuda", **changes))
        assert not selector.device_run.why_not
        return selector

    return make


@pytest.mark.parametrize("store", ["float16", "float32"], indirect=True)
@pytest.mark.parametrize("rule", ["cells", "cells-squared", "coverage", "spread"])
def test_the_same_rows_as_on_the_cpu(store: EmbeddingStore, on_device, rule: str) -> None:
    reference = BatchSelector(store, replace(CONFIG, rule=rule))
    assert reference.device_run.why_not
    theirs = list(reference.run())
    selector = on_device(store, rule=rule)
    assert selector.device_run.has_rule == rule.startswith("cells")
    ours = list(selector.run())
    assert [len(s.kept) for s in ours] == [len(s.kept) for s in theirs]
    same = [np.isin(a.kept, b.kept).mean() for a, b in zip(ours, theirs, strict=True)]
    assert np.mean(same) >= 0.99, same
    assert [s.status for s in ours] == [s.status for s in theirs]
    for field in ("batches", "rows", "kept", "classes", "status"):
        assert getattr(selector.counts, field) == getattr(reference.counts, field), field
    assert everything(list(on_device(store, rule=rule).run(7))) == everything(ours)[7:]


def test_candidates_have_the_strata_that_they_have_on_the_cpu(store: EmbeddingStore, on_device) -> None:
    settings = {"draw": "loss", "strata": 4}
    theirs = list(BatchSelector(store, replace(CONFIG, **settings)).run())
    selector = on_device(store, **settings)
    assert not selector.device_run.has_rule
    for mine, other in zip(selector.run(), theirs, strict=True):
        np.testing.assert_array_equal(mine.kept, other.kept)
        assert (mine.count, mine.candidates.keep) == (other.count, other.candidates.keep)
        assert (mine.candidates.stratum == other.candidates.stratum).mean() > 0.95
    assert selector.digest == BatchSelector(store, replace(CONFIG, **settings)).digest


def test_stacks_of_any_size_and_whoever_looks_on_change_nothing(store: EmbeddingStore, on_device, monkeypatch) -> None:
    whole = everything(list(on_device(store).run()))
    for at_once in (1, 3):
        monkeypatch.setattr(device_path, "WITHOUT_DEVICE", at_once)
        assert everything(list(on_device(store).run())) == whole
    watched = list(on_device(store).watch())
    assert everything([selection for selection, _ in watched]) == whole  # here the rule ran on the CPU
    for selection, seen in watched:
        assert seen.neighbors.shape == (selection.n_in, 6)
        assert seen.vector[np.isin(seen.vector.astype(np.float32), selection.score)].size >= len(selection.score)


@pytest.mark.parametrize("guidance", ["disagreement", "file"])
@pytest.mark.parametrize(("assignments", "floor"), [(0, 0), (1, 2), (2, 3)])
def test_guidance_floors_and_assignments(store, on_device, tmp_path, guidance, assignments, floor) -> None:
    if guidance == "file":
        np.save(tmp_path / "scores.npy", np.random.default_rng(0).random(300))
        guidance = f"file:{tmp_path / 'scores.npy'}"
    changes = {
        "guidance": guidance,
        "batch_assignments": assignments,
        "min_per_class": floor,
        "schedule": "linear:0.3:0.7",
        "epochs": 4,
    }
    theirs = list(BatchSelector(store, replace(CONFIG, **changes)).run())
    selector = on_device(store, **changes)
    ours = list(selector.run())
    assert selector.device_run.has_rule
    same = [np.isin(a.kept, b.kept).mean() for a, b in zip(ours, theirs, strict=True)]
    assert np.mean(same) >= 0.99, same
    # The rule and the floor on the device are those of the CPU for the same eigenvectors.
    assert everything([selection for selection, _ in on_device(store, **changes).watch()]) == everything(ours)
    for selection in ours if floor else []:
        labels = store.labels[selector.plan.batch(selection.seq).indices]
        for label, count in zip(*np.unique(labels[labels >= 0], return_counts=True), strict=True):
            assert (store.labels[selection.kept] == label).sum() >= min(floor, count)


def test_graphs_that_do_not_converge_go_to_the_cpu(store: EmbeddingStore, on_device) -> None:
    changes = {"max_iterations": 1, "knn": 1}
    theirs, selector = list(BatchSelector(store, replace(CONFIG, **changes)).run()), on_device(store, **changes)
    ours = list(selector.run())
    solved_again = [s for s in ours if Status.DENSE_FALLBACK in s.status]
    assert len(solved_again) > len(ours) // 2
    assert any(Status.BRIDGED in s.status for s in ours)
    assert [s.status for s in ours] == [s.status for s in theirs]
    assert np.mean([np.isin(a.kept, b.kept).mean() for a, b in zip(ours, theirs, strict=True)]) >= 0.99
    assert everything([selection for selection, _ in on_device(store, **changes).watch()]) == everything(ours)


def test_rows_that_are_copied_batch_by_batch_give_the_same(store: EmbeddingStore, on_device) -> None:
    whole = on_device(store)
    copied = EmbeddingStore(store.location, access="memory")
    selector = on_device(copied)
    assert everything(list(selector.run())) == everything(list(whole.run()))
    assert isinstance(selector.device_run.rows, StreamedRows)
    assert isinstance(whole.device_run.rows, DeviceRows)
    assert "batch by batch" in selector.device_run.rows_reason
    assert "all on cpu" in whole.device_run.rows_reason


def test_rows_on_the_device_are_for_a_path_that_is_all_there(store: EmbeddingStore, on_device) -> None:
    asked = EmbeddingStore(store.location, access="device")
    with pytest.raises(UsageError, match=r"`access='device'`: neighbours are found by torch"):
        BatchSelector(asked, CONFIG)
    with pytest.raises(UsageError, match=r"`access='device'`: rule random makes no graph"):
        BatchSelector(asked, replace(CONFIG, rule="random"))
    assert isinstance(on_device(asked).device_run.rows, DeviceRows)


def test_a_file_written_in_whole_groups_has_the_bytes_of_one_that_was_interrupted(
    store: EmbeddingStore, on_device, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(record_writer, "GROUP_RECORDS", 8)
    changes = {"epochs": 4, "rule": "cells", "batch_assignments": 1}
    finished: list[Path] = []
    finish = writer._finish
    monkeypatch.setattr(writer, "_finish", lambda partial, path: finished.append(path) or finish(partial, path))
    total = len(list(write_file(on_device(store, **changes), tmp_path / "whole.arrow")))
    assert total == 20  # 5 batches an epoch: two full groups and a part
    assert not finished  # it needed no second pass
    running = write_file(on_device(store, **changes), tmp_path / "stopped.arrow")
    for _ in range(10):
        next(running)
    running.close()
    assert not (tmp_path / "stopped.arrow").exists()
    rest = list(write_file(on_device(store, **changes), tmp_path / "stopped.arrow"))
    assert rest[0].seq in {8, 16}
    assert finished == [tmp_path / "stopped.arrow"]
    assert (tmp_path / "stopped.arrow").read_bytes() == (tmp_path / "whole.arrow").read_bytes()


def test_a_row_that_is_no_number_is_named(store: EmbeddingStore, on_device, monkeypatch) -> None:
    shard = EmbeddingStore.shard

    def damaged(self: EmbeddingStore, number: int) -> np.ndarray:
        rows = np.array(shard(self, number))
        if number == 1:
            rows[3, 1] = np.nan
        return rows

    monkeypatch.setattr(EmbeddingStore, "shard", damaged)
    for access in ("device", "memory"):
        opened = EmbeddingStore(store.location, access=access)
        with pytest.raises(SolverError, match=r"rows \[.*\] .*hold NaN or Inf"):
            list(on_device(opened).run())


ERROR = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB.\nGPU 0 has 79 GiB")


def test_where_memory_runs_short_stacks_become_smaller(store: EmbeddingStore, on_device, monkeypatch) -> None:
    whole = everything(list(on_device(store).run()))
    stack, sizes = device_path.graph_stack, list[int]()

    def graph_stack(rows: torch.Tensor, *arguments, **options):
        sizes.append(len(rows))
        if len(rows) > 2:
            raise ERROR
        return stack(rows, *arguments, **options)

    monkeypatch.setattr(device_path, "graph_stack", graph_stack)
    selector = on_device(store)
    assert everything(list(selector.run())) == whole
    assert sizes.count(4) == 1  # 4 full batches an epoch; later stacks are as small as the first had to be
    assert set(sizes) == {4, 2}
    assert everything([selection for selection, _ in on_device(store).watch()]) == whole


DRIVERS = KernelError("loading solve.cu: the CUDA driver answered CUDA_ERROR_OUT_OF_MEMORY")
PINNED = RuntimeError("CUDA error: out of memory")


@pytest.mark.parametrize("error", [ERROR, DRIVERS, PINNED])
def test_batches_that_have_no_room_even_alone_go_to_the_cpu(
    store: EmbeddingStore, on_device, monkeypatch, error
) -> None:
    def refuse(*_arguments, **_options):
        raise error

    logged: list[str] = []
    monkeypatch.setattr(device_path, "graph_stack", refuse)
    monkeypatch.setattr(device_path, "log_fallback", lambda _device, reason: logged.append(reason))
    selector = on_device(store)
    assert everything(list(selector.run())) == everything(list(BatchSelector(store, CONFIG).run()))
    assert logged == [in_words(error)] * 12
    assert "\n" not in logged[0]

    def broken(*_arguments, **_options):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(device_path, "graph_stack", broken)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        list(on_device(store).run())


def test_rows_that_do_not_fit_after_all_are_copied_batch_by_batch(
    store: EmbeddingStore, on_device, monkeypatch
) -> None:
    def refuse(*_arguments, **_options):
        raise ERROR

    whole = everything(list(on_device(store).run()))
    monkeypatch.setattr(device_run, "DeviceRows", refuse)
    selector = on_device(store)
    assert everything(list(selector.run())) == whole
    assert not selector.device_run.has_rows
    assert "batch by batch, since OutOfMemoryError: CUDA out of memory" in selector.device_run.rows_reason
    with pytest.raises(UsageError, match=r"`access='device'`: OutOfMemoryError"):
        list(on_device(EmbeddingStore(store.location, access="device")).run())


def test_memory_that_torch_keeps_for_later_is_free(store: EmbeddingStore, monkeypatch) -> None:
    numbers = {"memory_reserved": 3 * store.nbytes, "memory_allocated": store.nbytes, "mem_get_info": (0, 1 << 40)}
    for name, number in numbers.items():
        monkeypatch.setattr(torch.cuda, name, lambda _device, number=number: number)
    assert choose_rows(store, torch.device("cuda", 0))[0]
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _device: 2 * store.nbytes)
    assert not choose_rows(store, torch.device("cuda", 0))[0]


@pytest.mark.parametrize("watched", [False, True])
def test_a_run_that_is_left_early_lets_its_threads_end_first(store, on_device, monkeypatch, watched) -> None:
    order: list[str] = []
    of, close = Spectra.of, Spectra.close

    def slowly(self: Spectra, batches):
        time.sleep(0.5)
        made = of(self, batches)
        order.append("asked")
        return made

    monkeypatch.setattr(Spectra, "of", slowly)
    monkeypatch.setattr(Spectra, "close", lambda self: (order.append("closed"), close(self)))
    selector = on_device(store)
    running = selector.watch() if watched else selector.run()
    next(running)
    running.close()
    assert order[-1] == "closed"
    assert "asked" in order


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_the_rows_are_those_of_the_cpu_in_every_stack(store: EmbeddingStore, monkeypatch) -> None:
    np.save(store.location.path.parent / "scores.npy", np.random.default_rng(0).random(300))
    changes = {"epochs": 8, "guidance": f"file:{store.location.path.parent / 'scores.npy'}", "min_per_class": 2}
    theirs = list(BatchSelector(store, replace(CONFIG, **changes)).run())

    def select(opened: EmbeddingStore) -> list[SelectedBatch]:
        selector = BatchSelector(opened, replace(CONFIG, **changes, device="cuda"))
        assert selector.device_run.has_rule, selector.device_run.why_not
        return list(selector.run())

    ours = select(store)
    assert np.mean([np.isin(a.kept, b.kept).mean() for a, b in zip(ours, theirs, strict=True)]) >= 0.99
    assert [s.status for s in ours] == [s.status for s in theirs]
    watched = BatchSelector(store, replace(CONFIG, **changes, device="cuda")).watch()
    assert everything([selection for selection, _ in watched]) == everything(ours)
    assert everything(select(EmbeddingStore(store.location, access="memory"))) == everything(ours)
    monkeypatch.setattr(device_path, "GRAPHS_A_PROCESSOR", 1 / 100)
    assert everything(select(store)) == everything(ours)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_whose_memory_runs_out_the_rows_are_the_same(copied_store, tmp_path: Path, monkeypatch) -> None:
    store = copied_store(tmp_path / "large", 4096, frozenset(), "float16")
    stack, sizes, logged = device_path.graph_stack, list[int](), list[str]()

    def graph_stack(rows: torch.Tensor, *arguments, **options):
        made = stack(rows, *arguments, **options)
        sizes.append(len(rows))
        return made

    def select() -> list[SelectedBatch]:
        opened = EmbeddingStore(store.location, access="memory")
        return list(BatchSelector(opened, replace(CONFIG, batch_size=1024, device="cuda", solver="cuda")).run())

    monkeypatch.setattr(device_path, "graph_stack", graph_stack)
    monkeypatch.setattr(device_path, "log_fallback", lambda _device, reason: logged.append(reason))
    whole, most = select(), max(sizes)
    assert len(whole) == 12
    assert most > 1
    assert not logged
    found = set()
    for mebibytes in (96, 64, 48, 32, 24, 16, 12, 8, 6, 4, 2, 0):
        sizes.clear()
        logged.clear()
        with gpu_memory.left(mebibytes << 20):
            ours = select()
        same = np.mean([np.isin(a.kept, b.kept).mean() for a, b in zip(ours, whole, strict=True)])
        print(mebibytes, "MiB:", sizes, len(logged), "on the CPU,", same)
        assert [s.status for s in ours] == [s.status for s in whole]
        assert same >= 0.99
        if not logged:
            assert everything(ours) == everything(whole)
        found.add(("smaller" if max(sizes, default=0) < most else "whole", "on the CPU" if logged else "on the GPU"))
    assert ("smaller", "on the GPU") in found
    assert any(where == "on the CPU" for _, where in found)


def test_the_rate_of_a_run_is_that_of_its_stacks(store: EmbeddingStore, on_device) -> None:
    selector = on_device(store)
    rate = throughput.samples_per_second(selector)
    assert rate == pytest.approx(selector.counts.rows / selector.counts.elapsed, rel=0.9)
    assert selector.counts.rows == 3 * 298
    candidates = on_device(store, draw="loss", strata=4, epochs=30, batch_assignments=1)
    rate, counts = throughput.samples_per_second(candidates), candidates.counts
    assert counts.rows == 298, "one epoch is computed, and stands for 30"
    assert rate == pytest.approx(30 * 298 / counts.elapsed, rel=0.9)
