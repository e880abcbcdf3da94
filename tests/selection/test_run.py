from __future__ import annotations

import errno
import importlib
import os
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import IO

import numpy as np
import pytest
import scipy.linalg
import torch

from gstds_cache.config import SelectConfig
from gstds_cache.errors import SolverError, UsageError
from gstds_cache.files import mapped
from gstds_cache.runtime.notify import log_once
from gstds_cache.selection import offers, spectra, throughput
from gstds_cache.selection import run as run_module
from gstds_cache.selection.counts import FEW, counts_by_label
from gstds_cache.selection.rule import RuleBatch
from gstds_cache.selection.rules import coverage
from gstds_cache.selection.run import BatchSelector
from gstds_cache.selection.selected_batch import SelectedBatch
from gstds_cache.spectral.status import Status
from gstds_cache.store.reader import EmbeddingStore

CONFIG = SelectConfig(rule="coverage", batch_size=64, epochs=2, knn=6, device="cpu")

THIRD = """
import numpy as np
from gstds_cache.selection.rule import Rule

def far_end(batch):
    return np.sort(np.argsort(-batch.basis[:, 2], kind="stable")[: batch.keep])

ends = Rule("ends", "far end of the third eigenvector", far_end, vectors=3)
"""


@pytest.fixture
def store(copied_store, tmp_path: Path) -> EmbeddingStore:
    return copied_store(tmp_path / "store", 200, frozenset({5, 150}), "float32")


def run(store: EmbeddingStore, start: int = 0, **changes) -> list[SelectedBatch]:
    return list(BatchSelector(store, replace(CONFIG, **changes)).run(start))


def naive_fiedler(x: np.ndarray, k: int) -> np.ndarray:
    """The definition, densely: cosine kNN, W = max(W, W^T), L = D - W, second eigenvector."""
    similarity = x @ x.T
    np.fill_diagonal(similarity, -np.inf)
    weight = np.zeros_like(similarity)
    for i, row in enumerate(similarity):
        nearest = np.argsort(-row, kind="stable")[:k]
        weight[i, nearest] = np.maximum(row[nearest], 0)
    weight = np.maximum(weight, weight.T)
    vector = scipy.linalg.eigh(np.diag(weight.sum(1)) - weight)[1][:, 1]
    return vector * np.sign(vector[np.argmax(np.abs(vector))])


def test_kept_rows_are_those_of_the_definition_written_out(store: EmbeddingStore) -> None:
    selector = BatchSelector(store, CONFIG)
    for selection in selector.run():
        batch = selector.plan.batch(selection.seq)
        assert Status.BRIDGED not in selection.status  # the naive version does not bridge
        vector = naive_fiedler(store.gather(batch.indices).astype(np.float64), 6)
        expected = batch.indices[coverage(RuleBatch(vector, batch.keep))]
        overlap = len(np.intersect1d(selection.kept, expected)) / batch.keep
        assert overlap >= 0.99, selection.seq
        assert selection.score is not None
        assert len(selection.score) == len(selection.kept) == batch.keep


def test_rows_without_an_embedding_are_never_kept(store: EmbeddingStore) -> None:
    kept = np.concatenate([s.kept for s in run(store, schedule="constant:0.0")])
    assert sorted(np.unique(kept)) == sorted(set(range(200)) - {5, 150})
    assert (np.bincount(kept)[np.unique(kept)] == 2).all()


def test_the_same_seed_gives_the_same_selection_and_another_does_not(store: EmbeddingStore) -> None:
    def kept(**changes):
        return [s.kept.tolist() for s in run(store, **changes)]

    assert kept() == kept()
    assert kept() != kept(seed=1)


@pytest.mark.parametrize("start", [1, 2, 3, 5])
def test_starting_anywhere_gives_the_rest_of_the_same_selection(store: EmbeddingStore, start: int) -> None:
    whole, rest = run(store), run(store, start)
    assert [s.seq for s in rest] == list(range(start, 6))
    for a, b in zip(whole[start:], rest, strict=True):
        assert a.kept.tolist() == b.kept.tolist()
        assert (a.value, a.residual, a.status) == (b.value, b.residual, b.status)
        assert a.score.tobytes() == b.score.tobytes()


def test_the_same_bytes_twenty_times_with_one_thread_and_with_more(store: EmbeddingStore) -> None:
    def everything(threads: int) -> list[object]:
        return [
            (s.kept.tobytes(), s.score.tobytes(), s.value, s.residual, s.status) for s in run(store, threads=threads)
        ]

    first = everything(1)
    assert len(first) == 6
    for turn in range(20):
        assert everything(1 + turn % 3) == first


def test_a_batch_that_comes_again_finds_its_graph_and_is_drawn_from_anew(store: EmbeddingStore, monkeypatch) -> None:
    computed: list[int] = []
    nearest = spectra.nearest
    monkeypatch.setattr(spectra, "nearest", lambda rows, *a, **k: computed.append(len(rows)) or nearest(rows, *a, **k))
    config = replace(CONFIG, epochs=5, rule="cells-squared", batch_assignments=2)
    selector = BatchSelector(store, config)
    found = list(selector.run())
    assert sum(computed) == sum(selector.counts.iterations.values()) == 2 * 3
    assert selector.counts.reused == 3 * 3
    assert selector.graphs_note == ""
    plan = selector.plan
    of_group: dict[tuple[int, int], list[SelectedBatch]] = {}
    for selection in found:
        batch = plan.batch(selection.seq)
        assert np.isin(selection.kept, batch.indices).all()
        of_group.setdefault((batch.assignment, batch.group), []).append(selection)
    assert sorted(map(len, of_group.values())) == [2] * 3 + [3] * 3
    for (assignment, group), selections in of_group.items():
        first = plan.batch(assignment * 3 + group).indices
        for selection in selections:
            assert plan.batch(selection.seq).indices.tolist() == first.tolist()
            assert (selection.value, selection.residual) == (selections[0].value, selections[0].residual)
        assert len({selection.kept.tobytes() for selection in selections}) > 1  # another draw
    # What a rule sees of a batch is the same, found or computed.
    assert_found_is_computed(store, config, 6)


SEEN = ("vector", "basis", "values", "neighbors", "similarities", "guidance", "labels")


def assert_found_is_computed(store: EmbeddingStore, config: SelectConfig, start: int) -> None:
    """A run from the beginning finds the graphs from batch ``start`` on; one that begins there makes them."""
    finds, makes = BatchSelector(store, config), BatchSelector(store, config)
    found = list(finds.watch())[start:]
    assert finds.counts.reused >= len(found)
    for (one, mine), (other, theirs) in zip(found, makes.watch(start), strict=True):
        assert one.kept.tolist() == other.kept.tolist()
        for name in SEEN:
            assert np.array_equal(getattr(mine, name), getattr(theirs, name)), name
            assert not getattr(mine, name).flags.writeable, name
            assert not getattr(theirs, name).flags.writeable, name


# 198 rows: in batches of 12 the last one has 6, of 16 it has 22, of 10 there is none that has another size.
@pytest.mark.parametrize("batch_size", [12, 16, 99])
def test_a_last_batch_of_another_size_is_found_as_it_was_computed(store: EmbeddingStore, batch_size: int) -> None:
    config = replace(CONFIG, rule="cells-squared", batch_size=batch_size, knn=10, threads=1)
    selector = BatchSelector(store, config)
    sizes = [len(selector.plan.batch(seq).indices) for seq in range(selector.plan.batches_per_epoch)]
    assert sizes[-1] == {12: 6, 16: 22, 99: 99}[batch_size]
    assert_found_is_computed(store, config, selector.plan.batches_per_epoch)


def test_what_does_not_come_back_from_the_file_whole_is_computed(store: EmbeddingStore, monkeypatch) -> None:
    config = replace(CONFIG, epochs=2)
    expected = [(s.kept.tobytes(), s.score.tobytes()) for s in run(store, epochs=2)]
    pread = os.pread

    def turned(file: int, size: int, at: int) -> bytes:
        data = bytearray(pread(file, size, at))
        data[size // 2] ^= 1
        return bytes(data)

    def fails(*_arguments: int) -> bytes:
        raise OSError(errno.EIO, "Input/output error")

    for read in (turned, fails, lambda file, size, at: pread(file, size // 2, at)):
        monkeypatch.setattr(spectra.os, "pread", read)
        selector = BatchSelector(store, config)
        assert [(s.kept.tobytes(), s.score.tobytes()) for s in selector.run()] == expected
        assert selector.counts.reused == 0
        assert ("Input/output error" in selector.graphs_note) == (read is fails)


@pytest.fixture
def files(monkeypatch: pytest.MonkeyPatch) -> list[IO[bytes]]:
    """The temporary files that are made."""
    made: list[IO[bytes]] = []
    make = tempfile.TemporaryFile
    monkeypatch.setattr(mapped.tempfile, "TemporaryFile", lambda **how: made.append(make(**how)) or made[-1])
    return made


def test_a_runs_file_is_gone_with_the_run_however_it_ends(store: EmbeddingStore, monkeypatch, files) -> None:
    selector = BatchSelector(store, CONFIG)
    one, two = selector.run(), selector.run()  # two at a time
    assert next(one).kept.tolist() == next(two).kept.tolist()
    assert [file.closed for file in files] == [False, False]
    list(one)
    assert [file.closed for file in files] == [True, False]
    two.close()  # before its end
    monkeypatch.setattr(store, "gather", None)
    with pytest.raises(TypeError):
        next(selector.run())
    assert [file.closed for file in files] == [True] * 3


def test_nothing_is_put_down_that_does_not_come_again(store: EmbeddingStore, monkeypatch, files) -> None:
    pwrite, written = os.pwrite, []
    monkeypatch.setattr(spectra.os, "pwrite", lambda *to: written.append(pwrite(*to)) or written[-1])
    selector = BatchSelector(store, replace(CONFIG, epochs=5, batch_assignments=3))
    list(selector.run())
    assert (len(written), selector.counts.reused) == (2 * 3, 2 * 3)  # the third assignment comes once
    list(selector.run(3 * 3))
    assert len(written) == 2 * 3
    list(BatchSelector(store, replace(CONFIG, rule="random", batch_assignments=1)).run())
    assert len(files) == 2  # none for a rule that makes no graph


def test_batches_of_several_epochs_are_not_worked_on_at_once(store: EmbeddingStore, monkeypatch) -> None:
    monkeypatch.setitem(run_module.STACK, "cpu", 64)  # as on CUDA
    selector = BatchSelector(store, replace(CONFIG, epochs=8, batch_size=99, threads=1))
    assert len(list(selector.run())) == 16
    assert selector.counts.reused == 14
    stacks = BatchSelector(store, replace(CONFIG, epochs=8, batch_size=99, batch_assignments=0))._stacks(0, 16, 64)
    assert list(map(len, stacks)) == [16]


OFFERED = SelectConfig(draw="loss-minus-reference", strata=4, batch_size=30, epochs=6, knn=6, device="cpu",
                       schedule="linear:0.2:0.8")  # fmt: skip


def offered(store: EmbeddingStore, config: SelectConfig, start: int) -> tuple[list[tuple[object, ...]], BatchSelector]:
    selector = BatchSelector(store, config)
    numbers = [
        (
            *(s.seq, s.epoch, s.batch_id, s.n_in, s.status, s.value, s.residual, s.candidates.keep, s.kept.tobytes()),
            *(getattr(s.candidates, name).tobytes() for name in ("stratum", "reference", "prior")),
        )
        for s in selector.run(start)
    ]
    return numbers, selector


@pytest.mark.parametrize("assignments", [1, 2])
@pytest.mark.parametrize("start", [0, 3, 7, 10, 41])
def test_candidates_that_come_again_are_offered_from_memory(store, monkeypatch, start: int, assignments: int) -> None:
    computed: list[int] = []
    nearest = spectra.nearest
    monkeypatch.setattr(spectra, "nearest", lambda rows, *a, **k: computed.append(len(rows)) or nearest(rows, *a, **k))
    config = replace(OFFERED, batch_assignments=assignments, threads=1)  # of several, two may make the same graph
    found, selector = offered(store, config, start)
    a_epoch = selector.plan.batches_per_epoch
    assert a_epoch == 7
    assert len({keep for *_, keep, _, _, _, _ in found}) > 1 or start == 41
    different = len({selector.plan.place(seq) for seq in range(start, selector.plan.total_batches)})
    assert sum(computed) == different
    assert selector.counts.reused == selector.plan.total_batches - start - different
    assert selector.counts.batches == len(found) == selector.plan.total_batches - start
    monkeypatch.setattr(offers, "MOST_HELD", -1)
    assert selector.offers_again_from(start) == selector.plan.total_batches
    again, other = offered(store, config, start)
    assert found == again
    for name in ("kept", "status", "batches", "rows", "reused"):
        assert getattr(selector.counts, name) == getattr(other.counts, name), name


def test_candidates_of_batches_that_never_come_again_are_made_in_each_epoch(store) -> None:
    found, selector = offered(store, replace(OFFERED, batch_assignments=0), 0)
    assert selector.counts.reused == 0
    assert len({rows for *_, rows, _, _, _ in found}) == selector.plan.total_batches


def test_a_rule_that_writes_into_what_it_is_given_is_told_so_at_once(
    store: EmbeddingStore, tmp_path, monkeypatch
) -> None:
    (tmp_path / "writing.py").write_text("def turn(batch):\n    batch.basis[:] = 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    for start in (0, 3):
        with pytest.raises(ValueError, match="read-only"):
            run(store, start, rule="writing:turn")


def test_an_epoch_has_every_row_once_whatever_the_partitions(store: EmbeddingStore) -> None:
    orders = {}
    for batch_assignments in (0, 1, 2):
        plan = BatchSelector(store, replace(CONFIG, epochs=4, batch_assignments=batch_assignments, batch_size=16)).plan
        orders[batch_assignments] = [
            np.concatenate([plan.batch(12 * epoch + i).indices for i in range(12)]).tolist() for epoch in range(4)
        ]
        assert all(sorted(order) == plan.rows.all().tolist() for order in orders[batch_assignments])
        assert len({tuple(order) for order in orders[batch_assignments]}) == 4  # another sequence, at least
        assert [len(plan.batch(12 * epoch + 11).indices) for epoch in range(4)] == [22] * 4
    assert orders[0][:2] == orders[2][:2] == [orders[1][0], orders[0][1]]


def test_rules_that_make_no_graph_deal_anew_in_every_epoch(store: EmbeddingStore) -> None:
    assert BatchSelector(store, CONFIG).plan.batch_assignments == 1
    assert BatchSelector(store, replace(CONFIG, rule="random")).plan.batch_assignments == 0
    assert BatchSelector(store, CONFIG).digest == BatchSelector(store, replace(CONFIG, batch_assignments=1)).digest
    with pytest.raises(UsageError, match="`batch_assignments`: got -1, expected 0 to"):
        replace(CONFIG, batch_assignments=-1)


@pytest.mark.parametrize("fails", ["write", "short write", "open", "no folder"])
def test_a_full_disk_makes_selection_slower_and_nothing_else(store: EmbeddingStore, monkeypatch, fails: str) -> None:
    expected = [(s.kept.tobytes(), s.score.tobytes()) for s in run(store, epochs=3)]
    full = OSError(errno.ENOSPC, "No space left on device")

    def refuse(*_args, **_options):
        raise full

    words = "No space left on device"
    if fails == "open":
        monkeypatch.setattr(mapped.tempfile, "TemporaryFile", refuse)
    elif fails == "no folder":  # neither TMPDIR nor /tmp nor the current folder can be written to
        monkeypatch.setattr(mapped, "folder", lambda: None)
        words = "no temporary folder can be written"
    else:
        monkeypatch.setattr(
            spectra.os, "pwrite", refuse if fails == "write" else lambda _file, data, _at: len(data) // 2
        )
    selector = BatchSelector(store, replace(CONFIG, epochs=3))
    assert [(s.kept.tobytes(), s.score.tobytes()) for s in selector.run()] == expected
    assert selector.counts.reused == 0
    assert (words in selector.graphs_note) == (fails != "short write")


def test_a_bad_row_ends_the_run_whatever_the_threads(store: EmbeddingStore, monkeypatch: pytest.MonkeyPatch) -> None:
    gather = store.gather

    def broken(rows, out):
        gather(rows, out)
        out[3] = np.nan
        return out

    monkeypatch.setattr(store, "gather", broken)
    for threads in (1, 2):
        with pytest.raises(SolverError, match=r"rows \[3\] of graph 0"):
            run(store, threads=threads)


def test_random_computes_no_graph(store: EmbeddingStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gstds_cache.selection.spectra.nearest", None)
    selections = run(store, rule="random")
    assert {s.status for s in selections} == {Status.NOT_COMPUTED}
    assert all(s.score is None for s in selections)
    assert [len(s.kept) for s in selections] == [16, 16, 18] * 2


def test_the_digest_covers_what_decides_the_outcome_and_nothing_else(store: EmbeddingStore) -> None:
    def digest(**changes):
        return BatchSelector(store, replace(CONFIG, **changes)).digest

    others = {"batch_size": 32, "epochs": 3, "schedule": "constant:0.5", "knn": 5, "rule": "gap", "seed": 1,
              "order": "window:64", "min_per_class": 1, "batch_assignments": 2,
              "laplacian": "normalized", "tolerance": 1e-3, "max_iterations": 9}  # fmt: skip
    digests = {digest()} | {digest(**{name: value}) for name, value in others.items()}
    assert len(digests) == 1 + len(others)
    assert digest(threads=2, knn_backend="faiss-cpu", solver="cpu") == digest()


def test_solving_on_a_gpu_needs_one(store: EmbeddingStore) -> None:
    with pytest.raises(UsageError, match="`solver='cuda'`: `device='cpu'` is cpu here"):
        BatchSelector(store, replace(CONFIG, device="cpu", solver="cuda"))


@pytest.mark.parametrize(
    ("solver", "reason", "expected"),
    [("auto", "", "cuda"), ("auto", "an old driver", "cpu"), ("cpu", "", "cpu"), ("cuda", "an old driver", "cuda")],
)
def test_auto_solves_on_a_gpu_where_its_kernels_run(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, solver: str, reason: str, expected: str
) -> None:
    monkeypatch.setattr(run_module, "why_not_solved", lambda *_: reason)
    log_once.cache_clear()
    device = torch.device("cuda", 0)
    assert run_module._solver(replace(CONFIG, solver=solver), device, 512, 1).type == expected
    assert ("an old driver" in caplog.text) == (solver == "auto" and bool(reason))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("solver", ["auto", "cuda"])
@pytest.mark.parametrize("rule", ["coverage", "cells-squared"])
def test_a_gpu_keeps_the_rows_that_a_cpu_keeps(store: EmbeddingStore, rule: str, solver: str) -> None:
    pairs = zip(run(store, rule=rule, device="cuda", solver=solver), run(store, rule=rule, device="cpu"), strict=True)
    assert np.mean([np.isin(there.kept, here.kept).mean() for there, here in pairs]) >= 0.99


def test_batches_of_another_size_are_selected_as_well(store: EmbeddingStore) -> None:
    # 198 rows in batches of 40 leave 38.
    selections = run(store, batch_size=40)
    assert [(s.n_in, len(s.kept)) for s in selections[:5]] == [(40, 10)] * 4 + [(38, 10)]
    assert all(np.isfinite(s.score).all() for s in selections)


def test_the_smallest_batches_there_may_be(store: EmbeddingStore) -> None:
    selections = run(store, batch_size=4, knn=3, epochs=1)
    assert [len(s.kept) for s in selections[:-1]] == [1] * 49
    assert sum(s.n_in for s in selections) == 198
    assert all(np.isfinite(s.score).all() for s in selections)


def test_a_batch_size_above_the_rows_is_refused(store: EmbeddingStore) -> None:
    with pytest.raises(UsageError, match="only 198 rows"):
        BatchSelector(store, replace(CONFIG, batch_size=199))


def test_a_rule_sees_as_many_eigenvectors_as_it_asks_for(store: EmbeddingStore, tmp_path, monkeypatch) -> None:
    (tmp_path / "third_vector.py").write_text(THIRD)
    monkeypatch.syspath_prepend(tmp_path)
    selector = BatchSelector(store, replace(CONFIG, rule="third_vector:ends"))
    for selection, seen in selector.watch():
        batch = selector.plan.batch(selection.seq)
        assert seen.basis.shape == (len(batch.indices), 3)
        assert seen.neighbors.shape == (len(batch.indices), 6)
        assert seen.labels.tolist() == store.labels[batch.indices].tolist()
        assert (seen.vector == seen.basis[:, 0]).all()
        assert (np.diff(seen.values) >= 0).all()
        assert seen.ratio == 0.75
        expected = np.sort(np.argsort(-seen.basis[:, 2], kind="stable")[: batch.keep])
        assert selection.kept.tolist() == batch.indices[expected].tolist()
    before = selector.digest
    (tmp_path / "third_vector.py").write_text(THIRD + "# changed\n")
    assert BatchSelector(store, selector.config).digest == before  # the code that runs is the same
    importlib.reload(sys.modules["third_vector"])  # as another process would import it
    assert BatchSelector(store, selector.config).digest != before


@pytest.mark.parametrize("lowest", [-1, 0, 40, FEW - 2, 10**15])  # below the bound, around it, and far above it
def test_labels_are_counted_as_sorting_counts_them(lowest) -> None:
    rng = np.random.default_rng(lowest + 1)
    labels = lowest + rng.integers(0, 5, 64)
    for kept in (labels[:7], labels[:0], labels):
        expected = [(int(c), int((labels == c).sum()), int((kept == c).sum())) for c in np.unique(labels)]
        assert list(zip(*counts_by_label(labels, kept), strict=True)) == expected


def test_rules_without_a_graph_take_one_thread_and_your_own_all(store, tmp_path, monkeypatch) -> None:
    taken, real = list[int](), run_module.in_threads

    def watched(work, items, threads):
        taken.append(threads)
        return real(work, items, threads)

    monkeypatch.setattr(run_module, "in_threads", watched)
    (tmp_path / "first_rows.py").write_text(
        "import numpy as np\nfrom gstds_cache.selection.rule import Rule\n"
        "first = Rule('first', 'the first', lambda batch: np.arange(batch.keep), vectors=0)\n"
        "from functools import partial\n"
        "def some(step, batch): return np.arange(0, batch.keep * step, step)\n"
        "part = Rule('part', 'a partial, of which no file is known', partial(some, 1), vectors=0)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    for rule in ("random", "guided", "coverage", "first_rows:first", "first_rows:part"):
        run(store, rule=rule, threads=3)
    assert taken == [1, 1, 3, 3, 3]


def test_floors_and_the_report_of_what_was_dropped_by_class(store: EmbeddingStore) -> None:
    config = replace(CONFIG, schedule="constant:0.9", min_per_class=2, rule="extremes")
    selector = BatchSelector(store, config)
    kept = list(selector.run())
    for selection in kept:
        assert len(selection.kept) == selector.plan.keep(selection.seq)
        assert (np.bincount(store.labels[selection.kept], minlength=3) >= 2).all()
    all_kept = np.bincount(store.labels[np.concatenate([s.kept for s in kept])])
    seen = 2 * np.bincount(store.labels[selector.plan.rows.all()])
    assert selector.counts.classes == {c: (seen[c], all_kept[c]) for c in range(3)}
    plain = run(store, schedule="constant:0.9", rule="extremes")
    assert any((np.bincount(store.labels[s.kept], minlength=3) < 2).any() for s in plain)  # or nothing was tested
    with pytest.raises(UsageError, match=r"batch 0 of epoch 0 keeps 7 of 64 rows(.|\n)*need 9"):
        run(store, schedule="constant:0.9", min_per_class=3)
    with pytest.raises(UsageError, match="in the whole data set"):
        BatchSelector(store, replace(CONFIG, min_per_class=70))


def test_a_store_read_in_windows_is_selected_shard_by_shard(store: EmbeddingStore, tmp_path, monkeypatch) -> None:
    nbytes = store.spec.shard_rows * store.spec.dim * 4
    windows = EmbeddingStore(tmp_path / "store", access="window", memory_budget=2 * nbytes)
    reads: list[int] = []
    shard = windows.shard
    monkeypatch.setattr(windows, "shard", lambda number: reads.append(number) or shard(number))
    config = replace(CONFIG, order="window:64")
    selector = BatchSelector(windows, config)
    assert selector.slow_order == ""
    kept = [s.kept.tolist() for s in selector.run()]
    # Four shards; an epoch begins with the last one of the epoch before, if at all.
    assert len(reads) <= 2 * 4
    assert kept == [s.kept.tolist() for s in BatchSelector(store, config).run()]
    assert "use `order='window'`" in BatchSelector(windows, CONFIG).slow_order
    balanced = BatchSelector(windows, replace(CONFIG, order="class-balanced"))
    assert balanced.slow_order.endswith("in random order: use a larger `memory_budget`")
    assert "two windows of rows take" in BatchSelector(windows, replace(CONFIG, order="window:128")).slow_order
    assert BatchSelector(store, CONFIG).slow_order == ""


@pytest.mark.parametrize("schedule", ["budget:123", "cosine:0.2:0.9", "step:0.2:0.8", "linear:0.1:0.9+full:0.5"])
def test_the_totals_of_the_plan_are_what_is_kept(store: EmbeddingStore, schedule: str) -> None:
    selector = BatchSelector(store, replace(CONFIG, schedule=schedule, rule="random"))
    kept = [len(s.kept) for s in selector.run()]
    assert sum(kept) == selector.plan.total_kept
    assert selector.plan.total_rows == 2 * 198
    if schedule.startswith("budget"):
        assert sum(kept) == 123


def test_a_schedule_file_is_known_by_its_content(store: EmbeddingStore, tmp_path) -> None:
    def selector(name: str) -> BatchSelector:
        return BatchSelector(store, replace(CONFIG, schedule=f"file:{tmp_path / name}"))

    (tmp_path / "a.txt").write_text("0.5\n0.75\n")
    (tmp_path / "b.txt").write_text("0.5  # the same\n0.75\n")
    assert selector("a.txt").digest == selector("b.txt").digest
    before = selector("a.txt").digest
    (tmp_path / "a.txt").write_text("0.5\n0.5\n")
    assert selector("a.txt").digest != before


class Clocked(BatchSelector):
    """Its rule takes 0.4 s of one thread's time a batch."""

    def run(self, start: int = 0):
        for batch in super().run(start):
            self.counts.seconds["rule"] = 0.4 * (batch.seq + 1)
            yield batch


def test_the_rate_of_a_run_counts_the_threads_where_graphs_are_solved(store: EmbeddingStore, monkeypatch) -> None:
    """Beside a GPU graphs are solved, and rows are chosen, by the CPU's threads."""
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _device: None)
    config = replace(CONFIG, rule="random", batch_assignments=1, epochs=1000, threads=4)
    for device in ("cpu", "cuda"):
        selector, seconds = Clocked(store, config), iter(range(10))
        selector.device = torch.device(device)  # a rule without graphs computes nothing on it
        monkeypatch.setattr(throughput, "time", SimpleNamespace(perf_counter=lambda seconds=seconds: next(seconds)))
        rows = sum(selector.plan.rows_in(group) for group in (1, 2))
        # Of 1000 epochs one takes 2 s for these rows, the others 0.8 s / 4 threads.
        expected = rows / (0.001 * 2 + 0.999 * 0.2)
        assert throughput.samples_per_second(selector) == pytest.approx(expected, rel=0.05)
    candidates = Clocked(store, replace(OFFERED, batch_assignments=1, epochs=1000, threads=4))
    seconds = iter(range(10))
    monkeypatch.setattr(throughput, "time", SimpleNamespace(perf_counter=lambda: next(seconds)))
    rows = sum(candidates.plan.rows_in(group) for group in (1, 2))
    assert throughput.samples_per_second(candidates) == pytest.approx(
        rows / (0.001 * 2), rel=0.05
    )  # the others come free
