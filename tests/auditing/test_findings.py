"""Groups, leaks and doubts beside their naive versions, on rows where the answer is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from vector_store import clustered, vector_store

from gstds_cache.api.hide import hide_rows
from gstds_cache.api.import_rows import import_embeddings
from gstds_cache.auditing import run
from gstds_cache.auditing.duplicates import around, group_rows, pairs_above
from gstds_cache.auditing.labels import (
    CLASSES_KEPT,
    Predictions,
    find_doubts,
    flip_labels,
    flip_test,
    predict,
    why_no_labels,
)
from gstds_cache.auditing.run import audit_store, require_same_model
from gstds_cache.auditing.search import find_nearest
from gstds_cache.auditing.view import Pictures, view_labels, view_leaks
from gstds_cache.config import AuditConfig
from gstds_cache.errors import FingerprintMismatchError, UsageError
from gstds_cache.selection.linear_probe import ProbeSettings
from gstds_cache.selection.unit_rows import UnitRows
from gstds_cache.store.reader import EmbeddingStore

CPU = torch.device("cpu")


def look(store, other=None, **settings):
    config = AuditConfig(device="cpu", threads=1, **settings)
    return audit_store(store, other, config, CPU, lambda *_: None)


def test_groups_are_what_pairs_connect(tmp_path) -> None:
    rows = np.eye(12)
    rows[5] = rows[2] + 0.05 * rows[3]  # a chain: 2 - 5 - 9
    rows[9] = rows[5] + 0.05 * rows[4]
    rows[11] = rows[7]
    store = UnitRows.of(vector_store(tmp_path / "s", rows, same_bytes=[(0, 10)], bad=(1,)))
    hashes = store.store.manifest().sha256
    found = find_nearest(store, store, 4, device=CPU, exact_rows=100)
    pairs = pairs_above(found, store, store, 0.99, (hashes, hashes))
    assert {(int(a), int(b)) for a, b in zip(pairs.one, pairs.other, strict=True)} == {(2, 5), (5, 9), (2, 9), (7, 11)}
    groups = group_rows(pairs, found, store, hashes, 0.99)
    assert groups.row.tolist() == [2, 5, 9, 0, 10, 7, 11]
    assert groups.group.tolist() == [0, 0, 0, 1, 1, 2, 2]
    assert groups.same_bytes.tolist() == [False, False, False, True, True, False, False]
    assert (groups.count, groups.spare) == (3, 4)
    assert groups.keep.tolist() == [True, False, False, True, False, True, False]
    chain = pairs_above(found, store, store, 0.9985, (hashes, hashes))  # 2 - 5 - 9, but not 2 - 9
    apart = group_rows(chain, found, store, hashes, 0.9985)
    assert dict(zip(apart.row.tolist(), apart.keep.tolist(), strict=True)) == {
        2: True, 5: False, 9: True, 0: True, 10: False, 7: True, 11: False,
    }  # fmt: skip
    above, below = around(found, store, store, 0.9985, pairs_above(found, store, store, 0.9985, (hashes, hashes)))
    assert (above.cosine >= 0.9985).all()
    assert (below.cosine < 0.9985).all()
    assert len(below) > 0


def test_all_rows_equal_and_no_duplicate_at_all(tmp_path) -> None:
    equal = look(vector_store(tmp_path / "equal", np.ones((40, 4)), [0] * 40), knn=3)
    assert (equal.groups.count, equal.groups.spare) == (1, 39)
    assert equal.no_doubts == "all 40 labelled rows have the same label"
    apart = look(vector_store(tmp_path / "apart", np.eye(6)))
    assert (apart.groups.count, len(apart.pairs)) == (0, 0)
    assert apart.no_doubts == "the store has no labels"
    np.testing.assert_allclose(apart.mean, 0, atol=1e-6)
    with pytest.raises(UsageError, match="1 rows have an embedding, an audit compares two"):
        look(vector_store(tmp_path / "one", np.eye(3), bad=(0, 2)))


def test_what_stays_of_a_large_group_is_compared_with_all_of_it(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("gstds_cache.auditing.duplicates.AT_ONCE", 64)
    rows = np.random.default_rng(0).normal(size=(500, 3))
    findings = look(vector_store(tmp_path / "s", rows), knn=5, threshold=0.95)
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    stay = findings.groups.row[findings.groups.keep]
    goes = findings.groups.row[~findings.groups.keep]
    assert len(goes) > 400
    among = unit[stay] @ unit[stay].T - 2 * np.eye(len(stay))
    assert among.max() < 0.95
    assert (unit[goes] @ unit[stay].T).max(axis=1).min() >= 0.9499


def test_hidden_rows_are_not_looked_at(tmp_path) -> None:
    rows, labels = clustered(60)
    rows[7] = rows[3]
    vector_store(tmp_path / "s", rows, labels)
    assert look(EmbeddingStore(tmp_path / "s"), threshold=0.999, flipped=0.0, folds=2).groups.row.tolist() == [3, 7]
    hide_rows(tmp_path / "s", [3, 10])
    findings = look(EmbeddingStore(tmp_path / "s"), threshold=0.999, flipped=0.0, folds=2)
    assert (len(findings.rows), findings.groups.count) == (58, 0)
    assert findings.doubts is not None
    assert not {3, 10} & set(findings.doubts.row.tolist())


def test_what_labels_cannot_be_judged(tmp_path) -> None:
    rows = np.random.default_rng(0).normal(size=(1200, 4))
    assert "look like ids" in why_no_labels(vector_store(tmp_path / "ids", rows, np.arange(1200)), 5)
    few = vector_store(tmp_path / "few", rows[:6], [0, 1, -1, -1, -1, 0])
    assert why_no_labels(few, 5) == "3 labelled rows are fewer than 5"
    assert why_no_labels(vector_store(tmp_path / "fine", rows[:6], [0, 1, 0, 1, 1, 0]), 5) == ""


def test_leaks_name_both_rows_and_other_models_are_refused(tmp_path) -> None:
    rows, labels = clustered(80)
    train = vector_store(tmp_path / "train", rows, labels)
    copies = np.concatenate([rows[[7, 30]] * 3, np.random.default_rng(5).normal(size=(10, 16))])
    test = vector_store(tmp_path / "test", copies, [0] * 12)
    findings = look(train, test, flipped=0.0, threshold=0.999, folds=2)
    assert findings.leaks is not None
    assert (findings.leaks.one.tolist(), findings.leaks.other.tolist()) == ([0, 1], [7, 30])
    other = vector_store(tmp_path / "other", copies, model="another")
    with pytest.raises(FingerprintMismatchError, match=r"(?s)different models.*encoder\.model.*'m'.*'another'"):
        require_same_model(train, other)
    with pytest.raises(FingerprintMismatchError, match="dim"):
        require_same_model(train, vector_store(tmp_path / "longer", np.eye(20)))


def naive_confident_learning(chances: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Northcutt et al., equation 1: for each row the most probable class among those that reach their threshold."""
    classes = chances.shape[1]
    thresholds = np.array([chances[labels == c, c].mean() for c in range(classes)])
    joint = np.zeros((classes, classes), np.int64)
    for chance, label in zip(chances, labels, strict=True):
        reached = [c for c in range(classes) if chance[c] >= thresholds[c] - 1e-6]
        if reached:
            joint[label, max(reached, key=lambda c: chance[c])] += 1
    return joint


def test_the_joint_is_confident_learnings() -> None:
    rng = np.random.default_rng(3)
    labels = rng.integers(0, 5, 400)
    chances = rng.dirichlet(np.ones(5) * 0.5, 400) + 0.3 * np.eye(5)[labels]
    chances = (chances / chances.sum(axis=1, keepdims=True)).astype(np.float32)
    order = np.argsort(-chances, axis=1).astype(np.int32)
    predictions = Predictions(chances[np.arange(400), labels], order, np.take_along_axis(chances, order, axis=1))
    assert order.shape[1] <= CLASSES_KEPT
    for rank in ("normalized-margin", "self-confidence"):
        doubts = find_doubts(predictions, labels, rank)
        joint = np.zeros((5, 5), np.int64)
        for given, counted, rows in doubts.joint:
            joint[given, counted] = rows
        np.testing.assert_array_equal(joint, naive_confident_learning(chances, labels))
        assert int(doubts.doubted.sum()) == joint.sum() - np.trace(joint)
        others = np.where(np.eye(5, dtype=bool)[labels], -1, chances)
        score = chances[np.arange(400), labels] - (others.max(axis=1) if rank == "normalized-margin" else 0)
        np.testing.assert_allclose(doubts.score, np.sort(score), atol=1e-6)
        assert (doubts.suggested == others.argmax(axis=1)[doubts.row]).all()


def test_flipped_labels_are_found_and_counted(tmp_path) -> None:
    rows, labels = clustered(600, classes=3, spread=0.4)
    store = vector_store(tmp_path / "s", rows, labels, bad=(8,))
    changed, flipped = flip_labels(store.labels, np.delete(np.arange(600), 8), 0.1, seed=0)
    assert len(flipped) == 60
    assert (np.flatnonzero(changed != labels) == flipped).all()
    settings = ProbeSettings(folds=5, steps=60)
    told: list[tuple[int, int]] = []
    predictions = predict(store, settings, labels=changed, threads=2, device=CPU, progress=lambda *at: told.append(at))
    assert np.isnan(predictions.own[8])
    doubts = find_doubts(predictions, changed, "normalized-margin")
    test = flip_test(doubts, flipped)
    assert (test.flipped, test.left) == (60, 539)
    assert test.recall > 0.9
    assert test.precision > 0.9
    assert test.false_positive_rate < 0.05
    naive = set(doubts.row[doubts.doubted].tolist())
    assert test.found == len(naive & set(flipped.tolist()))
    assert test.doubted == len(naive - set(flipped.tolist()))
    assert told[-1][0] == told[-1][1] - 1
    again = predict(store, settings, labels=changed, threads=1, device=CPU)
    assert again.own.tobytes() == predictions.own.tobytes()


def test_equal_rows_reach_a_threshold_of_1(tmp_path) -> None:
    rows = np.random.default_rng(0).normal(size=(40, 33))
    rows[20:] = rows[:20] * np.linspace(0.1, 9, 20)[:, None]
    findings = look(vector_store(tmp_path / "s", rows), threshold=1.0)
    assert (findings.groups.count, findings.groups.spare, len(findings.pairs)) == (20, 20, 20)


def test_leaks_compare_labels_by_the_names_of_their_classes(tmp_path) -> None:
    rows = np.eye(6)
    train = vector_store(tmp_path / "train", rows, [0, 1, 2, 0, 1, -1])
    test = vector_store(tmp_path / "test", rows, [2, 1, 0, 0, 3, 1], classes=("c", "b", "a", "d"))
    findings = look(train, test, flipped=0.0, folds=2)
    assert findings.leaks is not None
    ones, others = (Pictures(store, None, "", str) for store in (test, train))
    part = view_leaks(findings.leaks, findings.leaks.at(np.arange(0)), ones, others, 0.9, 5)
    assert "In 2 pairs labels differ." in part.text[0]  # the fourth, c and a, and the fifth, d and b
    assert _differing(tmp_path, rows) == 4  # by number, where one has no names


def _differing(folder, rows) -> int:
    train = vector_store(folder / "named", rows, [0, 1, 2, 0, 1, -1])
    test = vector_store(folder / "unnamed", rows, [2, 1, 0, 1, 3, 1], classes=())
    findings = look(train, test, flipped=0.0, folds=2)
    assert findings.leaks is not None
    ones, others = (Pictures(store, None, "", str) for store in (test, train))
    text = view_leaks(findings.leaks, findings.leaks.at(np.arange(0)), ones, others, 0.9, 5).text[0]
    return int(text.split(" pairs labels differ")[0].split()[-1])


def test_a_flip_that_leaves_one_class_is_not_measured(tmp_path) -> None:
    rows, _ = clustered(60)
    labels = np.zeros(60, np.int64)
    labels[7] = 1
    store = vector_store(tmp_path / "s", rows, labels)
    only = np.zeros(60, np.int64), np.array([7])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "flip_labels", lambda *_: only)  # what the seed decides
        findings = look(store, folds=2)
    assert findings.doubts is not None
    assert findings.test is None
    text = view_labels(findings.doubts, None, findings.no_test, Pictures(store, None, "", str), "x", 1).text[1]
    assert text.endswith("was not measured: with 1 of them flipped all 60 labels are the same.")


def test_hashes_of_imported_rows_are_not_known_and_their_model_is_compared_by_name(tmp_path) -> None:
    rows = np.random.default_rng(1).normal(size=(60, 32)).astype(np.float32)
    rows[[9, 30, 44]] = rows[2]

    def bring(name: str, vectors: np.ndarray, model: str) -> EmbeddingStore:
        return import_embeddings(vectors, tmp_path / name, model=model, progress=False, notify=lambda _line: None)

    one, other = bring("one", rows, "mine"), bring("other", rows[20:40] + 0, "mine")
    findings = look(one, other)
    assert findings.groups.row.tolist() == [2, 9, 30, 44]
    assert findings.groups.count == 1
    assert not findings.groups.same_bytes.any()
    assert findings.leaks is not None
    assert len(findings.leaks) == 19 + 4  # each row with itself, and row 30 with its four equals
    assert not findings.leaks.same_bytes.any()
    with pytest.raises(FingerprintMismatchError, match=r"encoder\.model.*mine.*yours"):
        require_same_model(one, bring("yours", rows[:30], "yours"))
