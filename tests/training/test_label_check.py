"""A data set in another order has as many items: its labels tell."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import ConcatDataset, Dataset, Subset

import gstds_cache
from gstds_cache.training.label_check import agreement, labels_of

N, CLASSES = 60, 4


class Labelled(Dataset):
    """Rows with a label each, and an attribute that holds the labels."""

    def __init__(self, labels, name: str = "targets") -> None:
        self.labels_in_order = labels
        setattr(self, name, labels)

    def __len__(self) -> int:
        return len(self.labels_in_order)

    def __getitem__(self, row: int) -> tuple[int, object]:
        return row, self.labels_in_order[row]


@pytest.fixture(scope="module")
def labels() -> list[int]:
    return np.random.default_rng(0).integers(0, CLASSES, N).tolist()


@pytest.fixture
def selection(labels, tmp_path) -> gstds_cache.Selection:
    rows = np.random.default_rng(1).normal(size=(N, 8)).astype(np.float32)
    store = gstds_cache.import_embeddings(rows, tmp_path / "store", labels=labels)
    return gstds_cache.select(store, rule="random", batch_size=20, epochs=1, out=tmp_path / "s.arrow", progress=False)


def notes(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if "labels of `dataset`" in record.getMessage()]


@pytest.mark.parametrize("kind", ["sampler", "dataset"])
def test_a_shuffled_data_set_is_noted_and_the_one_that_was_embedded_is_not(selection, labels, caplog, kind) -> None:
    def check(dataset: Dataset) -> list[str]:
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            if kind == "sampler":
                gstds_cache.SelectedBatchSampler(selection, dataset=dataset)
            else:
                gstds_cache.SelectedDataset(dataset, selection)
        return notes(caplog)

    named = [("ant", "bee", "cat", "dog")[label] for label in labels]
    assert check(Labelled(labels)) == []
    assert check(Labelled(torch.tensor(labels), "labels")) == []
    assert check(Labelled(named, "_labels")) == []  # the same classes by other names
    assert check(Labelled([row % 7 for row in range(N)], "numbers")) == []  # no labels that can be seen
    halves = ConcatDataset([Labelled(named[:30]), Labelled(named[30:])])
    assert check(halves) == []
    order = np.random.default_rng(2).permutation(N).tolist()
    (note,) = check(Subset(Labelled(labels), order))
    first = next(row for row in range(N) if f"row {row}." in note)
    assert labels[order[first]] != labels[first]
    assert "is it shuffled" in note
    assert len(check(Subset(halves, order))) == 1
    assert check(Labelled([100 * label + row % 3 for row, label in enumerate(labels)])) == []  # species beside genera
    assert check(Labelled([f"caption {row}" for row in range(N)])) == []  # no classes
    some = list(labels)
    some[3] = (some[3] + 1) % CLASSES  # a label that was corrected
    assert check(Labelled(some)) == []


def test_nothing_is_said_where_the_store_is_gone(selection, labels, tmp_path, caplog) -> None:
    shuffled = Labelled(labels[::-1])
    with caplog.at_level(logging.WARNING):
        gstds_cache.SelectedBatchSampler(selection, dataset=shuffled)
        assert len(notes(caplog)) == 1
        (tmp_path / "store").rename(tmp_path / "moved")
        gstds_cache.SelectedBatchSampler(selection, dataset=shuffled)
        (tmp_path / "moved").rename(tmp_path / "store")
        copied = Path(tmp_path / "alone" / "s.arrow")
        copied.parent.mkdir()
        copied.write_bytes(selection.path.read_bytes())
        gstds_cache.SelectedBatchSampler(copied, dataset=shuffled)
    assert len(notes(caplog)) == 1


def test_another_store_that_took_its_place_tells_nothing(selection, labels, tmp_path, caplog) -> None:
    (tmp_path / "store").rename(tmp_path / "moved")
    rows = np.random.default_rng(3).normal(size=(N, 8)).astype(np.float32)
    gstds_cache.import_embeddings(rows, tmp_path / "store", labels=labels[::-1])
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        gstds_cache.SelectedBatchSampler(selection, dataset=Labelled(labels))
    assert notes(caplog) == []


def test_agreement_is_of_the_commonest_labels_and_beyond_chance() -> None:
    stored = np.array([0, 0, 0, 1, 1, 2])
    assert agreement(np.array(list("xxxyyz")), stored) == (1.0, 1.0, 0)
    share, kappa, first = agreement(np.array([5, 5, 6, 6, 6, 5]), stored)
    assert (share, first) == (pytest.approx(5 / 6), 2)
    assert kappa == pytest.approx((5 / 6 - 1 / 2) / (1 / 2))
    rare = np.zeros(100, np.int64)
    rare[:3] = 1
    assert agreement(np.roll(rare, 50), rare)[:2] == (pytest.approx(0.97), pytest.approx(0.0))
    assert agreement(np.zeros(6), stored)[1] == 1.0  # one class: nothing to tell apart


def test_labels_that_are_none_are_none() -> None:
    class Failing(Labelled):
        @property
        def targets(self):
            raise RuntimeError("not yet")

        @targets.setter
        def targets(self, value) -> None: ...

    assert labels_of(Failing([1, 2])) is None
    assert labels_of(Labelled([[1, 2], [3, 4]])) is None
    assert labels_of(Labelled([0.5, 1.5])) is None
    assert labels_of(Subset(Labelled([0.5, 1.5]), [1])) is None
    assert labels_of(ConcatDataset([Labelled([1]), Labelled([0.5])])) is None
    np.testing.assert_array_equal(labels_of(Subset(Labelled([7, 8, 9]), [2, 0])), [9, 7])
    np.testing.assert_array_equal(labels_of(Subset(Labelled([7, 8, 9]), torch.tensor([1, 1]))), [8, 8])
    assert labels_of(Subset(Labelled([7, 8]), ["k0", "k1"])) is None  # keys of a data set of another kind
    assert labels_of(Subset(Labelled([7, 8]), [(0, 1), (1, 0)])) is None
