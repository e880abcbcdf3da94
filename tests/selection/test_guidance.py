"""Guidance: the probe against itself written slowly, and what is kept beside a store."""

from __future__ import annotations

import errno
import json
import math
import os
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from small_store import make_spec

from gstds_cache.config import SelectConfig
from gstds_cache.data.manifest import DatasetManifest
from gstds_cache.errors import UsageError
from gstds_cache.files.derived import derived_paths
from gstds_cache.seeding import rng_for
from gstds_cache.selection.difficulty import Difficulty
from gstds_cache.selection.guidance import DEFAULT, Guidance, disagreement, load_or_make_guidance
from gstds_cache.selection.guidance_spec import key_of, parse_guidance
from gstds_cache.selection.linear_probe import ProbeSettings, assign_folds, probe_columns
from gstds_cache.selection.rows import EligibleRows
from gstds_cache.selection.run import BatchSelector
from gstds_cache.selection.trial import Trial, TrialSettings, try_out
from gstds_cache.store.commit_record import Quarantined
from gstds_cache.store.layout import OK
from gstds_cache.store.reader import EmbeddingStore
from gstds_cache.store.writer import open_writer

N, D, C, SHARD = 400, 12, 4, 64
SETTINGS, RUN = ProbeSettings(), TrialSettings(power=2.0, share=0.25, epochs=8)
QUICK = "probe?steps=40&batch_size=32"
CONFIG = SelectConfig(batch_size=64, epochs=2, knn=6, device="cpu", rule="strata", guidance=QUICK)


def write_store(where: Path, labels: np.ndarray, rows: np.ndarray) -> None:
    sha256 = np.random.default_rng(0).integers(0, 256, (N, 32), dtype=np.uint8)
    items = DatasetManifest("test", tuple(f"item/{row}" for row in range(N)), sha256, labels, ("a",))
    spec = make_spec(items=N, items_root=items.root, dim=D, shard_rows=SHARD, batch_size=SHARD)
    attributes = {"kind": "test", "classes": ["a"], "provenance": {}}
    with open_writer(where, spec, labels=labels, items=items.to_arrow(), attributes=attributes) as writer:
        for shard in range(spec.shards):
            span = spec.rows_of(shard)
            bad = [Quarantined(7, "item/7", "broken")] if shard == 0 else []
            writer.commit(shard, rows[span.start : span.stop].astype(spec.dtype), bad)
        writer.finish()


def guidance_of(store: EmbeddingStore, text: str) -> Guidance:
    return load_or_make_guidance(store, key_of(store, parse_guidance(text)))


@pytest.fixture(scope="module")
def clusters() -> tuple[np.ndarray, np.ndarray]:
    """Labels and rows: four clusters, some rows half-way to the next one, row 7 undecodable."""
    rng = np.random.default_rng(1)
    labels = rng.integers(0, C, N)
    centres = 3 * rng.normal(size=(C, D))
    rows = centres[labels] + rng.normal(size=(N, D))
    rows[:40] = (centres[labels[:40]] + centres[(labels[:40] + 1) % C]) / 2 + rng.normal(size=(40, D))
    rows[7] = 0
    return labels.astype(np.int64), rows


@pytest.fixture
def store(clusters, tmp_path: Path) -> EmbeddingStore:
    write_store(tmp_path / "s.store", *clusters)
    return EmbeddingStore(tmp_path / "s.store")


def settings_of(text: str) -> ProbeSettings:
    return parse_guidance(text).settings


def test_folds_share_out_every_class_evenly(clusters, monkeypatch) -> None:
    labels, _ = clusters
    rows = EligibleRows(N, np.array([7]))
    for folds in (2, 5):
        fold = assign_folds(labels, rows, folds, seed=0)
        assert fold[7] == -1
        counts = np.array([[((fold == f) & (labels == c)).sum() for c in range(C)] for f in range(folds)])
        assert counts.sum() == N - 1
        assert (counts.max(axis=0) - counts.min(axis=0) <= 1).all()
        # The same with arrays of all rows.
        shuffled = rng_for(0, "probe-folds").permutation(rows.all())
        by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
        assert fold[by_class].tolist() == (np.arange(N - 1) % folds).tolist()
        monkeypatch.setattr("gstds_cache.selection.linear_probe.PIECE", 33)
        assert assign_folds(labels, rows, folds, seed=0).tolist() == fold.tolist()
    assert (assign_folds(labels, rows, 2, seed=0) != assign_folds(labels, rows, 2, seed=1)).any()


def test_nothing_is_left_of_a_probe_that_cannot_be_trained(clusters, tmp_path) -> None:
    write_store(tmp_path / "s.store", np.full(N, -1), clusters[1])
    with pytest.raises(UsageError, match="0 labelled rows of 0 classes"):
        guidance_of(EmbeddingStore(tmp_path / "s.store"), QUICK)
    assert [path.name for path in tmp_path.iterdir()] == ["s.store"]


def test_losses_are_held_out_and_close_to_those_of_a_regression_solved_to_the_end(store, clusters) -> None:
    from sklearn.linear_model import LogisticRegression

    labels, _ = clusters
    columns = probe_columns(store, ProbeSettings(steps=400, batch_size=32))
    there = np.flatnonzero(store.valid == OK)
    x = store.gather(there).astype(np.float64)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    x = (x - x.mean(0)) / x.std(0)
    fold = assign_folds(labels, EligibleRows(N, np.array([7])), 2, seed=0)[there]
    expected = np.zeros(len(there))
    for f in (0, 1):
        other = LogisticRegression(C=1.0, max_iter=1000).fit(x[fold != f], labels[there][fold != f])
        expected[fold == f] = -other.predict_log_proba(x[fold == f])[
            np.arange((fold == f).sum()), labels[there][fold == f]
        ]
    assert abs(columns["loss"][there].mean() - expected.mean()) < 0.3 * expected.mean()
    assert np.corrcoef(np.log(columns["loss"][there] + 0.01), np.log(expected + 0.01))[0, 1] > 0.9
    assert np.isnan(columns["loss"][7])
    assert columns["predicted"][7] == -1
    # The rows half-way to another cluster are the hard ones.
    assert np.median(columns["loss"][there[there < 40]]) > 5 * np.median(columns["loss"][there[there >= 40]])


def test_a_row_is_judged_by_a_probe_that_never_saw_its_label(store, clusters, tmp_path, monkeypatch) -> None:
    labels, rows = clusters
    settings = settings_of(QUICK)
    before = probe_columns(store, settings)
    fold = assign_folds(labels, EligibleRows(N, store.without_embedding), 2, seed=0)
    changed = np.where((fold == 0) & (np.arange(N) % 2 == 0), (labels + 1) % C, labels)  # half of fold 0's labels
    write_store(tmp_path / "changed.store", changed, rows)
    monkeypatch.setattr("gstds_cache.selection.linear_probe.assign_folds", lambda *_: fold)
    after = probe_columns(EmbeddingStore(tmp_path / "changed.store"), settings)
    assert (after["predicted"][fold == 0] == before["predicted"][fold == 0]).all()
    assert (after["entropy"][fold == 0] == before["entropy"][fold == 0]).all()
    assert (after["loss"] != before["loss"])[(fold == 0) & (labels != changed)].all()
    assert (after["entropy"] != before["entropy"])[fold == 1].any()


def test_the_same_bytes_whatever_the_threads_and_the_access(store, tmp_path) -> None:
    settings = settings_of(QUICK)
    first = probe_columns(store, settings, threads=1).tobytes()
    assert probe_columns(store, settings, threads=2).tobytes() == first
    windows = EmbeddingStore(tmp_path / "s.store", access="window", memory_budget=2 * SHARD * D * 2)
    assert probe_columns(windows, settings).tobytes() == first
    assert probe_columns(store, replace(settings, seed=1)).tobytes() != first


def test_it_is_kept_beside_the_store_and_found_again(store, tmp_path, monkeypatch) -> None:
    made = guidance_of(store, QUICK)
    assert made.seconds > 0
    assert made.kind == "probe"
    monkeypatch.setattr("gstds_cache.selection.guidance_files.probe_columns", None)
    found = guidance_of(EmbeddingStore(tmp_path / "s.store"), QUICK)
    assert found.seconds == 0
    assert found.digest == made.digest == key_of(store, parse_guidance(QUICK)).digest
    assert found.of_rows.all().tobytes() == made.of_rows.all().tobytes()
    assert found.columns.tobytes() == made.columns.tobytes()
    assert np.isfinite(found.of_rows.all()).all()
    # The same probe serves the other measure too.
    uncertain = guidance_of(store, QUICK.replace("probe?", "uncertainty?"))
    assert uncertain.seconds == 0
    assert uncertain.digest != made.digest
    there = store.valid == OK
    assert uncertain.of_rows.all()[there].tobytes() == made.columns["entropy"][there].tobytes()


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "record", "foreign"])
def test_a_damaged_file_is_made_again_and_said_so(store, damage) -> None:
    made = guidance_of(store, QUICK).of_rows.all()
    folder = derived_paths(store.location, ".guidance")[0]
    (rows,), (record,) = folder.glob("*.npy"), folder.glob("*.json")
    content = bytearray(rows.read_bytes())
    if damage == "flip":
        content[-5] ^= 1
    elif damage == "cut":
        del content[200:]
    elif damage == "empty":
        content.clear()
    rows.write_bytes(content)
    if damage == "record":
        record.write_text("{")
    if damage == "foreign":
        record.write_text(json.dumps({"digest": "0", "sha256": "0"}))
    again = guidance_of(store, QUICK)
    assert "made again" in again.note
    assert again.of_rows.all().tobytes() == made.tobytes()
    assert guidance_of(store, QUICK).note.startswith("found")
    assert sorted(path.suffix for path in folder.iterdir()) == [".json", ".npy"]


def test_a_cutoff_takes_the_hardest_for_mislabelled(store) -> None:
    plain = guidance_of(store, QUICK).of_rows.all()
    cut = guidance_of(store, QUICK + "&cutoff=0.1").of_rows.all()
    hardest = np.argsort(-np.where(store.valid == OK, plain, -1), kind="stable")[: int(0.1 * (N - 1))]
    assert (cut[hardest] == 0).all()
    others = np.setdiff1d(np.flatnonzero(store.valid == OK), hardest)
    assert (cut[others] == plain[others]).all()


def test_disagreement_counts_neighbours_of_another_label() -> None:
    labels = np.array([0, 0, 1, 1, -1])
    neighbors = np.array([[1, 2, 3], [0, 4, -1], [0, 1, 4], [2, -1, -1], [0, 1, 2]])
    assert disagreement(labels, neighbors).tolist() == [2 / 3, 0.0, 1.0, 0.0, 0.0]


def test_a_run_hands_guidance_to_the_rule(store, clusters, tmp_path) -> None:
    labels, _ = clusters
    for text in (QUICK, "disagreement", "none"):
        selector = BatchSelector(store, replace(CONFIG, guidance=text))
        for selection, seen in selector.watch():
            rows = selector.plan.batch(selection.seq).indices
            if text == "none":
                assert (seen.guidance == 1).all()
            elif text == "disagreement":
                assert seen.guidance.tolist() == disagreement(labels[rows], seen.neighbors).tolist()
            else:
                assert seen.guidance.tolist() == selector.guidance.of_rows.all()[rows].tolist()
    np.save(tmp_path / "own.npy", np.arange(N, dtype=np.float64))
    selector = BatchSelector(store, replace(CONFIG, guidance=f"file:{tmp_path / 'own.npy'}"))
    _, seen = next(iter(selector.watch()))
    assert seen.guidance.tolist() == selector.plan.batch(0).indices.tolist()


def test_guidance_is_part_of_the_identity_and_its_spelling_is_not(store, tmp_path) -> None:
    def digest(text: str, rule: str = "strata") -> str:
        return BatchSelector(store, replace(CONFIG, rule=rule, guidance=text)).digest

    np.save(tmp_path / "a.npy", np.ones(N))
    np.save(tmp_path / "b.npy", np.ones(N))
    np.save(tmp_path / "c.npy", np.zeros(N))
    a, b, c = (digest(f"file:{tmp_path / name}.npy") for name in "abc")
    assert a == b != c
    assert digest("probe") == digest("probe?cutoff=0&folds=2")
    assert len({digest("auto"), digest("uncertainty"), digest("auto", "cells-squared")}) == 3
    assert digest("auto") == digest("auto", "strata")
    tried = [
        BatchSelector(store, replace(CONFIG, guidance="auto", **others)).guidance_digest
        for others in ({}, {"seed": 3}, {"epochs": 3}, {"schedule": "constant:0.5"}, {"rule": "cells-squared"})
    ]
    assert tried[0] == tried[1]
    assert len(set(tried)) == 4  # the trial is for runs like this one
    texts = ("probe", "probe?cutoff=0.1", "probe?seed=1", "probe?folds=3", "uncertainty", "disagreement", "none")
    assert len({digest(text) for text in texts} | {a, c}) == len(texts) + 2
    assert digest("auto", "coverage") == digest("none", "coverage")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("prob", "did you mean 'probe'"),
        ("probe?cutof=1", "cutoff"),
        ("probe?cutoff=1.0", "expected from 0 to below 1"),
        ("probe?cutoff=nan", "expected from 0"),
        ("probe?folds=1", "expected from 2"),
        ("probe?folds=two", "expected a int"),
        ("none?cutoff=0.1", "unknown parameter"),
        ("file:nothing.npy", "not found: nothing.npy"),
    ],
)
def test_a_guidance_that_cannot_be_meant(store, text: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        BatchSelector(store, replace(CONFIG, guidance=text))


def test_guidance_is_not_accepted_and_ignored(store) -> None:
    with pytest.raises(UsageError, match=r"rule coverage does not look at guidance(.|\n)*strata"):
        BatchSelector(store, replace(CONFIG, rule="coverage", guidance="probe"))


@pytest.mark.parametrize(
    ("scores", "words"),
    [
        (np.ones(N - 1), "expected 400 numbers"),
        (np.full(N, -1.0), "row 0: got -1.0"),
        (np.where(np.arange(N) == 9, np.nan, 1.0), "row 9: got nan"),
        (np.array(["a"] * N), "expected 400 numbers"),
    ],
)
def test_scores_of_ones_own_that_do_not_fit(store, tmp_path, scores, words: str) -> None:
    np.save(tmp_path / "own.npy", scores)
    with pytest.raises(UsageError, match=words):
        guidance_of(store, f"file:{tmp_path / 'own.npy'}")
    (tmp_path / "own.npy").write_bytes(b"no numbers")
    with pytest.raises(UsageError, match="does not read"):
        guidance_of(store, f"file:{tmp_path / 'own.npy'}")


def _archive(path) -> None:
    with path.open("wb") as file:
        np.savez(file, scores=np.ones(N))


@pytest.mark.parametrize(
    ("write", "words"),
    [
        (lambda _path: None, "not found"),
        (lambda path: path.touch(), "is empty"),
        (lambda path: path.mkdir(), "got the folder"),
        (os.mkfifo, "got the device or pipe"),
        (_archive, "got an archive, as of np.savez, expected one array"),
        (lambda path: path.write_bytes(pickle.dumps([1.0] * N)), "got something else"),
        (lambda path: path.write_text("0.5\n" * N), "got something else"),
        (lambda path: np.save(path, np.array([1.0, None] * (N // 2)), allow_pickle=True), "one array of numbers"),
        (lambda path: np.save(path, np.ones(N, [("a", "f4"), ("b", "i8")])), "expected 400 numbers"),
        (lambda path: np.save(path, np.ones(N, complex)), r"got complex128 \[400\], expected 400 numbers"),
        (lambda path: np.save(path, np.ones((N, 1))), r"\[400, 1\], expected 400 numbers"),
        (lambda path: np.save(path, np.float64(1)), r"\[\], expected 400 numbers"),
        (lambda path: np.save(path, np.ones(N, bool)), "got bool"),
        (lambda path: np.save(path, np.full(N, np.inf)), "row 0: got inf"),
        (lambda path: np.save(path, np.full(N, 1e300)), r"the largest is 1e\+300, expected(.|\n)*divide them all"),
        (lambda path: np.save(path, np.full(N, 1e-300)), "the largest is 1e-300"),
        (lambda path: path.write_bytes(b"\x93NUMPY\x01\x00\xff\xff{'descr'"), "cannot be read as"),
        (lambda path: (np.save(path, np.ones(N)), path.write_bytes(path.read_bytes()[:500])), "cannot be read as"),
    ],
)
def test_a_file_of_scores_that_is_none(store, tmp_path, write, words: str) -> None:
    write(tmp_path / "own.npy")
    with pytest.raises(UsageError, match=words) as caught:
        guidance_of(store, f"file:{tmp_path / 'own.npy'}")
    assert str(tmp_path / "own.npy") in str(caught.value)


def test_scores_as_large_as_they_may_be_are_drawn_by(store, tmp_path) -> None:
    np.save(tmp_path / "own.npy", np.where(np.arange(N) % 2, 3e38, 1e38))
    for rule in ("guided", "cells-squared"):
        selector = BatchSelector(store, replace(CONFIG, rule=rule, guidance=f"file:{tmp_path / 'own.npy'}"))
        kept = np.concatenate([selection.kept for selection in selector.run()])
        assert (kept % 2 == 1).mean() > 0.6


def test_data_without_labels_are_told_what_to_do(clusters, tmp_path) -> None:
    _, rows = clusters
    write_store(tmp_path / "bare.store", np.full(N, -1), rows)
    store = EmbeddingStore(tmp_path / "bare.store")
    for text in (QUICK, "disagreement"):
        with pytest.raises(UsageError, match="use `guidance='none'`"):
            list(BatchSelector(store, replace(CONFIG, guidance=text)).run())
    assert len(list(BatchSelector(store, replace(CONFIG, guidance="none")).run())) == 12


def test_the_default_selects_without_labels_too(clusters, tmp_path) -> None:
    write_store(tmp_path / "bare.store", np.full(N, -1), clusters[1])
    config = SelectConfig(batch_size=64, epochs=1, knn=6, device="cpu")
    selector = BatchSelector(EmbeddingStore(tmp_path / "bare.store"), config)
    assert selector.guidance.kind == "none"
    assert sum(len(selection.kept) for selection in selector.run()) == selector.plan.total_kept


def easy_telling_and_noise() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Labels, rows, which rows tell something new, and which are noise; the others are much alike in each class."""
    rng = np.random.default_rng(5)
    labels, kind = rng.integers(0, C, N), rng.choice(3, N, p=[0.6, 0.2, 0.2])
    easy, telling = 3 * rng.normal(size=(C, D)), rng.normal(size=(C, D))
    rows = np.where((kind == 0)[:, None], easy[labels], telling[labels]) + 0.3 * rng.normal(size=(N, D))
    rows[kind == 2] = rng.normal(size=(int((kind == 2).sum()), D))
    return labels.astype(np.int64), rows, kind == 1, kind == 2


def test_the_trial_tells_difficulty_that_teaches_from_difficulty_that_does_not(tmp_path) -> None:
    labels, rows, telling, noise = easy_telling_and_noise()
    write_store(tmp_path / "s.store", labels, rows)
    store = EmbeddingStore(tmp_path / "s.store")

    def trial(hard: np.ndarray, threads: int = 1):
        return try_out(store, Difficulty(hard.astype(np.float32)), run=RUN, settings=SETTINGS, threads=threads)

    teaches, misleads = trial(0.5 + telling), trial(noise)
    assert teaches.helps
    assert teaches.guided > teaches.uniform + 2 * math.sqrt(teaches.discordant)
    assert not misleads.helps
    assert misleads.uniform == teaches.uniform == trial(np.ones(N)).guided
    assert trial(noise, threads=4) == misleads
    assert trial(np.ones(N)).discordant == 0
    # Not as good is not enough to leave it out, clearly worse is: 10 more of 25 are two standard errors.
    assert [Trial(100, 50, uniform, 25).helps for uniform in (49, 60, 61)] == [True, True, False]


def test_guidance_that_does_not_help_is_left_out_and_what_was_asked_for_by_name_is_not(tmp_path, monkeypatch) -> None:
    write_store(tmp_path / "s.store", *easy_telling_and_noise()[:2])
    store = EmbeddingStore(tmp_path / "s.store")
    answers = {True: Trial(N, 300, 300, 20), False: Trial(N, 280, 320, 60)}
    for helps, answer in answers.items():
        monkeypatch.setattr("gstds_cache.selection.guidance_files.try_out", lambda *_, answer=answer, **__: answer)
        selector = BatchSelector(store, replace(CONFIG, guidance="auto", rule="cells" if helps else "cells-squared"))
        _, seen = next(iter(selector.watch()))
        assert (len(set(seen.guidance.tolist())) > 1) == helps
        assert ("guidance is used: " if helps else "guidance is left out, all rows count the same: ") in (
            selector.guidance.note
        )
        # Found again, without another trial; a record that is damaged is made again.
        record = next(derived_paths(store.location, ".guidance")[0].glob(f"{selector.guidance_digest[:16]}.trial.json"))
        monkeypatch.setattr("gstds_cache.selection.guidance_files.try_out", None)
        assert BatchSelector(store, selector.config).guidance.note.startswith("guidance is")
        record.write_bytes(record.read_bytes()[:-9])
        with pytest.raises(TypeError):
            _ = BatchSelector(store, selector.config).guidance
        asked_for = BatchSelector(store, replace(selector.config, guidance="uncertainty"))
        assert len(set(next(iter(asked_for.watch()))[1].guidance.tolist())) > 1


def test_where_the_trial_cannot_be_kept_it_is_made_each_time(tmp_path, monkeypatch) -> None:
    write_store(tmp_path / "s.store", *easy_telling_and_noise()[:2])
    store = EmbeddingStore(tmp_path / "s.store")
    guidance_of(store, DEFAULT)  # the probe is there

    def read_only(*_: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("gstds_cache.selection.guidance_files._put", read_only)
    first, second = (BatchSelector(store, replace(CONFIG, guidance="auto")).guidance.note for _ in range(2))
    assert first == second
    assert first.startswith("guidance is")
    assert not list(derived_paths(store.location, ".guidance")[0].glob("*.trial.json"))


def test_a_trial_whose_record_was_altered_or_has_no_hash_is_made_again(tmp_path, monkeypatch) -> None:
    write_store(tmp_path / "s.store", *easy_telling_and_noise()[:2])
    store = EmbeddingStore(tmp_path / "s.store")
    config = replace(CONFIG, guidance="auto", rule="cells")
    note = BatchSelector(store, config).guidance.note.partition(";")[0]
    (record,) = derived_paths(store.location, ".guidance")[0].glob("*.trial.json")
    written = record.read_bytes()
    facts = json.loads(written)
    before = {name: value for name, value in facts.items() if name != "sha256"}
    flipped = [written[:at] + bytes([written[at] ^ 1]) + written[at + 1 :] for at in range(1, len(written), 7)]
    for damaged in (*flipped, json.dumps(before).encode(), b"[]", b"1"):
        record.write_bytes(damaged)
        assert BatchSelector(store, config).guidance.note.partition(";")[0] == note
        assert record.read_bytes() == written
    monkeypatch.setattr("gstds_cache.selection.guidance_files.try_out", None)
    assert BatchSelector(store, config).guidance.note.partition(";")[0] == note  # no trial is needed


def test_a_trial_has_no_more_rows_right_than_rows() -> None:
    for numbers in ((10, 15, 3, 2), (10, 3, 15, 2), (10, 3, 3, 11), (0, 0, 0, 0), (10, -1, 3, 2)):
        with pytest.raises(ValueError, match=f"a trial of {numbers[0]} rows"):
            Trial(*numbers)


def test_a_parameter_of_the_probe_that_was_renamed_works_and_says_so() -> None:
    with pytest.warns(FutureWarning, match="pace is now called lr_scale"):
        spec = parse_guidance("probe?pace=2.0")
    assert spec == parse_guidance("probe?lr_scale=2.0")
