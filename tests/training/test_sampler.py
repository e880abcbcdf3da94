"""The sampler and the iterable data set: which rows come when, on which rank, after which resume."""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys
from itertools import chain, islice

import numpy as np
import offered
import pytest
from torch.utils.data import DataLoader, Dataset
from torchdata.stateful_dataloader import StatefulDataLoader
from torchvision.datasets import ImageFolder
from vector_store import vector_store

from gstds_cache.errors import FingerprintMismatchError, StreamError, TruncatedStreamError, UsageError
from gstds_cache.stream.reader import SelectionStream, open_selection
from gstds_cache.training.sampler import SelectedBatchSampler
from gstds_cache.training.selected_dataset import SelectedDataset


class Rows(Dataset):
    """Item i is i."""

    def __len__(self) -> int:
        return 72

    def __getitem__(self, index: int) -> int:
        return index


def epochs_of(sampler: SelectedBatchSampler) -> list[list[int]]:
    return [rows for _ in range(sampler.epoch, sampler.epochs) for rows in sampler]


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_every_rank_takes_equal_slices_of_the_same_batches(uneven, world) -> None:
    path, expected = uneven
    padded = [epochs_of(SelectedBatchSampler(path, rank=r, world_size=world, tail="pad")) for r in range(world)]
    for step, rows in enumerate(expected):
        slices = [rank[step] for rank in padded]
        assert len({len(part) for part in slices}) == 1
        assert list(chain(*slices)) == np.resize(rows, len(slices[0]) * world).tolist()
    if world <= 3:  # the smallest batch holds three rows
        dropped = [epochs_of(SelectedBatchSampler(path, rank=r, world_size=world)) for r in range(world)]
        for step, rows in enumerate(expected):
            assert list(chain(*(rank[step] for rank in dropped))) == rows[: len(rows) // world * world]
    else:
        with pytest.raises(UsageError, match="3 kept rows cannot be sliced over 4"):
            epochs_of(SelectedBatchSampler(path, rank=0, world_size=world))


def test_repacked_batches_are_constant_and_their_number_known(uneven) -> None:
    path, expected = uneven
    flat = list(chain(*expected))
    sampler = SelectedBatchSampler(path, batch_size=8)
    lengths, batches = [], []
    for _ in range(sampler.epochs):
        lengths.append(len(sampler))
        epoch = list(sampler)
        assert len(epoch) == lengths[-1]
        batches += epoch
    assert lengths == [25 // 8, 47 // 8 - 25 // 8, 74 // 8 - 47 // 8]
    assert sampler.total_steps == sum(lengths) == len(batches)
    assert list(chain(*batches)) == flat[: 74 // 8 * 8]
    assert [len(b) for b in epochs_of(SelectedBatchSampler(path, batch_size=24, remainder="drop"))] == [24, 24]
    one = SelectedBatchSampler(path, batch_size=23, remainder="drop")  # the second epoch keeps 22: no full batch
    assert [len(list(one)) for _ in range(one.epochs)] == [1, 0, 1]


@pytest.mark.parametrize("batch_size", [None, 5])
def test_a_state_resumes_at_every_step_and_with_another_world_size(uneven, batch_size) -> None:
    path, _ = uneven
    whole = epochs_of(SelectedBatchSampler(path, batch_size=batch_size, tail="pad"))
    for step in range(len(whole) + 1):
        sampler = SelectedBatchSampler(path, batch_size=batch_size, rank=1, world_size=3, tail="pad")
        taken = 0
        while taken < step:
            for _rows in sampler:
                taken += 1
                if taken == step:
                    break
        state = json.loads(json.dumps(sampler.state_dict()))
        ranks = [SelectedBatchSampler(path, batch_size=batch_size, rank=r, world_size=2, tail="pad") for r in range(2)]
        for rank in ranks:
            rank.load_state_dict(state)
            rank.load_state_dict(state)  # twice is once
            rank.set_epoch(0)  # what frameworks call with counters of their own undoes nothing
            assert rank.step == step
        rest = [list(chain(*parts)) for parts in zip(*map(epochs_of, ranks), strict=True)]
        assert [sorted(set(rows)) for rows in rest] == [sorted(set(rows)) for rows in whole[step:]]


def test_an_image_folder_that_lists_its_files_in_another_order_is_noted(uneven, tmp_path, caplog) -> None:
    """Of classes one of whose names begins with the other, and of nested folders, torchvision's order is its own."""
    path, _ = uneven
    items = SelectedBatchSampler(path).header.items
    for folder, other in (("plain", "b"), ("prefixed", "a-b")):
        for count, name in ((items - 3, "a"), (3, other)):
            (tmp_path / folder / name).mkdir(parents=True)
            for item in range(count):
                (tmp_path / folder / name / f"{item:04d}.png").touch()
    SelectedBatchSampler(path, dataset=ImageFolder(tmp_path / "plain"))
    assert not caplog.records
    SelectedBatchSampler(path, dataset=ImageFolder(tmp_path / "prefixed"))
    assert "a-b/0000.png behind" in caplog.text
    assert "row i is another item unless" in caplog.text


def test_what_a_state_refuses(uneven, write, tmp_path) -> None:
    path, _ = uneven
    sampler = SelectedBatchSampler(path)
    list(sampler)
    state = sampler.state_dict()
    write(tmp_path / "other.arrow", digest="e" * 64)
    with pytest.raises(FingerprintMismatchError, match="selection_digest"):
        SelectedBatchSampler(tmp_path / "other.arrow").load_state_dict(state)
    write(tmp_path / "altered.arrow", seed=1)
    with pytest.raises(FingerprintMismatchError, match="first 4 batches are not those"):
        SelectedBatchSampler(tmp_path / "altered.arrow").load_state_dict(state)
    with pytest.raises(FingerprintMismatchError, match="batch_size"):
        SelectedBatchSampler(path, batch_size=8).load_state_dict(state)
    with pytest.raises(FingerprintMismatchError, match="another selection_digest: it has 'f"):  # one of candidates
        SelectedBatchSampler(path).load_state_dict(state | {"selection_digest": "f" * 64, "feedback": {}})
    with pytest.raises(StreamError, match="no sampler's state"):
        SelectedBatchSampler(path).load_state_dict({"epoch": 1})
    with pytest.raises(UsageError, match="steps 0 to 4 can be saved"):
        sampler.state_dict(step=9)


@pytest.mark.parametrize("begun", [0, 2, 4, 6])
def test_a_state_that_is_refused_changes_nothing(uneven, begun) -> None:
    path, expected = uneven
    other = SelectedBatchSampler(path)
    batches = iter(other)
    state = [next(batches) for _ in range(3)] and other.state_dict() | {"sha256": "0" * 64}
    sampler = SelectedBatchSampler(path)
    sampler.seek(*divmod(begun, 4))
    with pytest.raises(FingerprintMismatchError, match="first 3 batches are not those"):
        sampler.load_state_dict(state)
    assert (sampler.step, sampler.epoch) == (begun, begun // 4)
    assert epochs_of(sampler) == expected[begun:]
    with open_selection(path) as stream:  # which cannot go back
        piped = SelectedBatchSampler(stream)
        with pytest.raises(FingerprintMismatchError, match="first 3 batches are not those"):
            piped.load_state_dict(state)
        with pytest.raises(StreamError, match="epoch 0 was started again at batch 3"):
            list(piped)


class FailsOnce:
    """``SelectionStream.__iter__`` whose batch ``at`` fails, before or after it is read."""

    def __init__(self, monkeypatch, at: int, error: BaseException, *, after: bool) -> None:
        self.at, self.error, self.after, self.failed, whole = at, error, after, False, SelectionStream.__iter__
        monkeypatch.setattr(SelectionStream, "__iter__", lambda stream: self.batches(whole(stream)))

    def batches(self, stream):
        for number, batch in enumerate(self.read(stream)):
            if number == self.at and self.after:
                self.fail()
            yield batch

    def read(self, stream):
        yield from islice(stream, self.at)
        if not self.after:
            self.fail()
        yield from stream

    def fail(self) -> None:
        if not self.failed:
            self.failed = True
            raise self.error


@pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError(), TruncatedStreamError("broke off")])
@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("batch_size", [None, 5])
@pytest.mark.parametrize("again", ["seek", "load"])
def test_after_an_error_while_a_batch_is_read_the_next_read_goes_on(
    uneven, monkeypatch, error, after, batch_size, again
) -> None:
    path, _ = uneven
    expected = epochs_of(SelectedBatchSampler(path, batch_size=batch_size))
    FailsOnce(monkeypatch, 3, error, after=after)
    sampler, batches = SelectedBatchSampler(path, batch_size=batch_size), []
    with pytest.raises(type(error)):
        batches.extend(sampler)
    assert sampler.step == len(batches) > 0
    with pytest.raises(StreamError, match="epoch 0 was started again at batch"):
        next(iter(sampler))
    sampler.seek(sampler.epoch, sampler.step) if again == "seek" else sampler.load_state_dict(sampler.state_dict())
    assert batches + epochs_of(sampler) == expected


def test_going_to_where_it_stands_opens_a_selection_that_was_closed(uneven) -> None:
    path, expected = uneven
    sampler = SelectedBatchSampler(path)
    list(sampler)
    sampler.close()
    path.rename(path.with_name("away.arrow"))
    for go in (lambda: sampler.seek(1), lambda: sampler.load_state_dict(sampler.state_dict())):
        with pytest.raises(UsageError, match="no selection at"):
            go()
    path.with_name("away.arrow").rename(path)
    sampler.seek(1)
    assert epochs_of(sampler) == expected[4:]
    sampler.seek(2, 4)  # all was read, and there is nothing to open


def test_a_stream_that_failed_or_ends_early_says_so_each_time(uneven, monkeypatch) -> None:
    path, _ = uneven
    FailsOnce(monkeypatch, 2, KeyboardInterrupt(), after=False)
    with open_selection(path) as stream:
        piped = SelectedBatchSampler(stream)
        with pytest.raises(KeyboardInterrupt):
            list(piped)
        piped.seek(0, 2)
        for _ in range(2):
            with pytest.raises(StreamError, match="through a stream that failed at step 2, and cannot be read on"):
                list(piped)
            piped.seek(0, 2)
    monkeypatch.setattr(FailsOnce, "batches", lambda _self, stream: iter([next(stream)]))
    with pytest.raises(StreamError, match="the selection ends after 1 of 12 steps"):
        list(SelectedBatchSampler(path))


def test_a_selection_of_another_data_set_is_refused(uneven, array_source) -> None:
    path, _ = uneven
    SelectedBatchSampler(path, dataset=range(72))
    with pytest.raises(FingerprintMismatchError, match="72 items, this one has 71"):
        SelectedBatchSampler(path, dataset=range(71))
    with pytest.raises(FingerprintMismatchError, match=r"another data set(.|\n)*gstds-embed"):
        SelectedBatchSampler(path, dataset=array_source(72))
    with pytest.raises(FingerprintMismatchError, match="72 items, this one has 50"):
        SelectedDataset(range(50), path)


def test_a_file_can_be_gone_through_again_and_a_stream_cannot(uneven) -> None:
    path, expected = uneven
    sampler = SelectedBatchSampler(path)
    assert epochs_of(sampler) == expected
    with pytest.raises(StreamError, match=r"all were used.*\n.*seek\(0\)"):
        list(sampler)
    sampler.seek(1, 2)
    assert epochs_of(sampler) == expected[6:]
    sampler.seek(0)
    assert epochs_of(sampler) == expected
    with pytest.raises(UsageError, match="no batch 5 of epoch 1: the selection has 3 epochs, and 4 batches"):
        sampler.seek(1, 5)
    with open_selection(path) as stream:
        piped = SelectedBatchSampler(stream)
        assert list(piped) == expected[:4]
        with pytest.raises(UsageError, match="cannot go back"):
            piped.seek(0)
        with pytest.raises(UsageError, match="path or address"):
            pickle.dumps(piped)
        assert epochs_of(piped) == expected[4:]


@pytest.mark.parametrize("other", [{"digest": "e" * 64}, {"seed": 1}, {"rows_seed": 1}, None])
@pytest.mark.parametrize(
    "again",
    [lambda s: s.seek(0) or s, lambda s: s.close() or s, lambda s: pickle.loads(pickle.dumps(s))],
    ids=["seek", "close", "pickle"],
)
def test_a_selection_that_was_replaced_is_not_read_on(uneven, write, tmp_path, other, again) -> None:
    """Candidates (None) would all be trained on; and the header may be the same where records differ."""
    path, expected = uneven
    new, old = tmp_path / "other.arrow", tmp_path / "old.arrow"
    shutil.copy(path, old)
    offered.write(new) if other is None else write(new, **other)
    sampler = SelectedBatchSampler(path)
    assert [*sampler, *sampler] == expected[:8]
    new.replace(path)
    for _ in range(2):  # nor after the first error
        with pytest.raises(FingerprintMismatchError, match=r"the selection at .* was replaced since it was opened"):
            list(again(sampler))
    old.replace(path)
    sampler.seek(1, 2)
    assert epochs_of(sampler) == expected[6:]


def test_an_iterable_data_set_does_not_read_a_selection_that_replaced_its_own(uneven, write, tmp_path) -> None:
    path, expected = uneven
    loader = DataLoader(SelectedDataset(Rows(), path), batch_size=None)
    assert [rows.tolist() for rows in loader] == expected
    write(tmp_path / "other.arrow", digest="e" * 64)
    (tmp_path / "other.arrow").replace(path)
    with pytest.raises(FingerprintMismatchError, match="was replaced since it was opened"):
        next(iter(loader))


def test_a_sampler_goes_to_another_process_where_it_is(uneven) -> None:
    path, expected = uneven
    sampler = SelectedBatchSampler(path)
    list(sampler)
    assert epochs_of(pickle.loads(pickle.dumps(sampler))) == expected[4:]
    assert epochs_of(sampler) == expected[4:]


def test_ranks_come_from_the_environment_as_torchrun_sets_it(uneven, monkeypatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "3")
    sampler = SelectedBatchSampler(uneven[0])
    assert (sampler.rank, sampler.world_size) == (1, 3)
    with pytest.raises(UsageError, match="both or neither"):
        SelectedBatchSampler(uneven[0], rank=0)


def test_whatever_would_slice_slices_again_is_told(uneven) -> None:
    path, _ = uneven
    with pytest.raises(UsageError, match=r"use_distributed_sampler=False"):
        getattr(SelectedBatchSampler(path, rank=0, world_size=2), "batch_size", None)
    assert getattr(SelectedBatchSampler(path), "batch_size", None) is None
    assert SelectedBatchSampler(path, batch_size=6).batch_size == 6


@pytest.mark.parametrize("stop", [0, 3, 4, 6])
def test_torchdata_resumes_in_the_middle_of_an_epoch(uneven, stop) -> None:
    path, expected = uneven
    loader = StatefulDataLoader(Rows(), batch_sampler=SelectedBatchSampler(path))
    seen, iterator = [], iter(loader)
    for _ in range(stop):
        try:
            seen.append(next(iterator).tolist())
        except StopIteration:
            iterator = iter(loader)
            seen.append(next(iterator).tolist())
    state = loader.state_dict()
    sampler = SelectedBatchSampler(path)
    resumed = StatefulDataLoader(Rows(), batch_sampler=sampler)
    resumed.load_state_dict(state)
    while sampler.step < sampler.total_steps:
        seen += [rows.tolist() for rows in resumed]
    assert seen == expected


def test_the_iterable_data_set_is_the_stream(uneven) -> None:
    path, expected = uneven
    dataset = SelectedDataset(Rows(), path)
    loader = DataLoader(dataset, batch_size=None)
    assert [rows.tolist() for rows in loader] == expected
    assert [rows.tolist() for rows in loader] == expected
    assert len(loader) == 12
    with open_selection(path) as stream:
        live = DataLoader(SelectedDataset(Rows(), stream, batch_size=5, rank=1, world_size=2), batch_size=None)
        flat = list(chain(*expected))
        assert [rows.tolist() for rows in live] == [flat[i + 2 : i + 4] for i in range(0, 70, 5)]
        with pytest.raises(UsageError, match="cannot go back"):
            next(iter(live))


def test_workers_share_a_selection_out_and_torchdata_resumes_them(uneven) -> None:
    path, expected = uneven
    spawned = {"batch_size": None, "num_workers": 2, "multiprocessing_context": "spawn", "prefetch_factor": 2}
    loader = StatefulDataLoader(SelectedDataset(Rows(), path), **spawned)
    iterator = iter(loader)
    seen = [next(iterator).tolist() for _ in range(5)]
    state = loader.state_dict()
    del iterator
    resumed = StatefulDataLoader(SelectedDataset(Rows(), path), **spawned)
    resumed.load_state_dict(state)
    assert seen + [rows.tolist() for rows in resumed] == expected


def test_workers_may_not_share_a_pipe(uneven, monkeypatch) -> None:
    path, _ = uneven
    with open_selection(path) as stream:
        dataset = SelectedDataset(Rows(), stream)
        with pytest.raises(UsageError, match="path or address"):
            pickle.dumps(dataset)  # what starting a worker by spawn does
        # Forked workers inherit the open stream: refused as well.
        info = type("Info", (), {"id": 0, "num_workers": 2})
        monkeypatch.setattr("gstds_cache.training.selected_dataset.get_worker_info", lambda: info)
        with pytest.raises(UsageError, match="2 DataLoader workers cannot share one open stream"):
            iter(dataset)


def test_a_truncated_selection_is_never_used_up(uneven, tmp_path) -> None:
    whole = uneven[0].read_bytes()
    cut = tmp_path / "cut.arrow"
    cut.write_bytes(whole[: len(whole) * 9 // 10])
    for batch_size in (None, 5, 74):
        with pytest.raises(TruncatedStreamError):
            epochs_of(SelectedBatchSampler(cut, batch_size=batch_size))
        with pytest.raises(TruncatedStreamError):
            list(SelectedDataset(Rows(), cut, batch_size=batch_size))


def test_training_imports_no_heavy_library() -> None:
    code = (
        "import sys; from gstds_cache import SelectedBatchSampler\n"
        "import gstds_cache.training.sampler, gstds_cache.training.selected_dataset, gstds_cache.training.loop\n"
        "print(sorted({'faiss', 'zarr', 'ray', 'timm'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.usefixtures("no_type_checks")
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda path: SelectedBatchSampler(path, batch_size="8"), "`batch_size`: got '8', expected a whole number"),
        (lambda path: SelectedBatchSampler(path, batch_size=True), "`batch_size`: got True, expected a whole number"),
        (lambda path: SelectedBatchSampler(path, rank="0", world_size=1), "`rank`: got '0', expected a whole number"),
        (lambda path: SelectedBatchSampler(path, rank=0.5, world_size=1), "`rank`: got 0.5, expected a whole number"),
        (lambda path: SelectedBatchSampler(path, dataset=3), "`dataset`: got 3, expected a data set with a length"),
        (lambda path: SelectedDataset(3, path), "`dataset`: got 3, expected a data set with a length"),
        (lambda path: SelectedBatchSampler(path).seek(None), "`epoch`: got None, expected a whole number"),
        (lambda path: SelectedBatchSampler(path).seek("1"), "`epoch`: got '1', expected a whole number"),
        (lambda path: SelectedBatchSampler(path).seek(0, 0.5), "`batch`: got 0.5, expected a whole number"),
        (lambda path: SelectedBatchSampler(path).load_state_dict(None), "`state`: got None, expected what state_dict"),
        (
            lambda path: iter(SelectedDataset(Rows(), path)).load_state_dict(None),
            "`state`: got None, expected what state_dict",
        ),
        (
            lambda path: (own := SelectedBatchSampler(path)).load_state_dict(own.state_dict() | {"step": "1"}),
            "`state`: got the step '1', expected what state_dict",
        ),
    ],
)
def test_an_argument_that_cannot_be_meant_is_named(uneven, call, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        call(uneven[0])
    assert str(caught.value).startswith(message)


@pytest.mark.usefixtures("no_type_checks")
def test_a_store_or_nothing_in_place_of_a_selection_is_named(tmp_path) -> None:
    store = vector_store(tmp_path / "photos.store", np.eye(8, 16, dtype=np.float32))
    for given, got in ((store, "EmbeddingStore"), (None, "None"), (3, "int")):
        for opened in (SelectedBatchSampler, open_selection, lambda given: SelectedDataset(Rows(), given)):
            with pytest.raises(
                UsageError, match=rf"`selection`: got {got}, expected a selection's file(.|\n)*select\("
            ):
                opened(given)
    where = str(store.location)
    with pytest.raises(UsageError) as caught:
        SelectedBatchSampler(where)
    assert caught.value.message == f"{where} is a store, and no selection"
    assert f"gstds_cache.select({where!r})" in caught.value.hint
    with pytest.raises(UsageError, match="no selection at"):
        SelectedBatchSampler(store.location.path.parent)


@pytest.mark.usefixtures("no_type_checks")
def test_numbers_of_numpy_are_numbers(uneven) -> None:
    path, expected = uneven
    sampler = SelectedBatchSampler(path, rank=np.int64(0), world_size=np.int64(1))
    sampler.seek(np.int64(1))
    json.dumps(sampler.state_dict())
    assert epochs_of(sampler) == expected[sampler.header.batches_per_epoch :]
