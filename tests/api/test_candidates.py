"""Candidates as a user makes and uses them: a real store of digits, training, commands and a service."""

from __future__ import annotations

import importlib
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from gstds_cache.cli.select_command import main as select_command
from gstds_cache.cli.train_command import main as train_command

from gstds_cache.api.embed import embed
from gstds_cache.api.export import export_scores
from gstds_cache.api.hide import hide_rows
from gstds_cache.api.report import write_report
from gstds_cache.api.select_batches import select
from gstds_cache.api.serve import serve
from gstds_cache.api.train import estimate_training, train
from gstds_cache.config import EmbedConfig, SelectConfig
from gstds_cache.data.label_counts import LabelCounts
from gstds_cache.embedding.run import embed_dataset
from gstds_cache.errors import FingerprintMismatchError, StreamError, UsageError
from gstds_cache.report.recompute import selector_of
from gstds_cache.selection.guidance import load_or_make_guidance
from gstds_cache.selection.guidance_spec import key_of, parse_guidance
from gstds_cache.selection.run import BatchSelector
from gstds_cache.store.reader import EmbeddingStore
from gstds_cache.stream.reader import open_selection
from gstds_cache.training.feedback import Feedback
from gstds_cache.training.sampler import SelectedBatchSampler
from gstds_cache.training.steps import StepReader

DATASET = "digits?split=test"  # 385 items
SMALL = {"batch_size": 96, "epochs": 3, "knn": 6, "device": "cpu", "progress": False, "keep": 0.25}
TRAIN = {"arch": "conv3", "lr": 0.02, "device": "cpu", "progress": False}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GSTDS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def store(tiny_model, tmp_path) -> EmbeddingStore:
    return embed(DATASET, tmp_path / "store", model=tiny_model, workers=0, device="cpu", progress=False)


def test_candidates_are_all_rows_of_each_batch_with_what_is_known_of_them(store) -> None:
    selection = select(store, draw="loss-minus-reference", guidance="uncertainty", **SMALL)
    probe = load_or_make_guidance(store, key_of(store, parse_guidance("probe")))
    with open_selection(selection) as stream:
        assert (stream.header.format, stream.header.settings["draw"]) == (3, "loss-minus-reference")
        batches = list(stream)
        assert stream.header.total_kept == sum(batch.count for batch in batches)
    for epoch in range(3):
        rows = np.concatenate([batch.kept for batch in batches if batch.epoch == epoch])
        np.testing.assert_array_equal(np.sort(rows), np.arange(385))
    for batch in batches:
        offered = batch.candidates
        assert offered.keep == len(batch.kept) // 4 or len(batch.kept) % 4
        sizes = np.bincount(offered.stratum)
        assert len(sizes) == 8
        assert sizes.max() - sizes.min() <= 8
        np.testing.assert_array_equal(offered.reference, probe.columns["loss"][batch.kept])
        assert offered.prior.mean() == pytest.approx(1, abs=1e-5)
        assert offered.prior.std() > 0
    assert selection.summary.rule == "draw loss-minus-reference"
    assert selection.summary.classes == {}
    assert selection.summary.kept == sum(batch.count for batch in batches)


def test_reference_losses_are_relative_to_their_class_where_that_is_asked_for(store, tmp_path) -> None:
    raw, relative = (
        select(store, draw="adaptive", reference=how, out=tmp_path / f"{how}.arrow", **SMALL)
        for how in ("raw", "by-class")
    )
    assert select(store, draw="adaptive", **SMALL).digest == raw.digest != relative.digest
    found = np.full((2, 385), np.nan)
    for of, selection in zip(found, (raw, relative), strict=True):
        for batch in selection:
            of[batch.kept] = batch.candidates.reference
    thresholds = -np.log([np.exp(-found[0, store.labels == label]).mean() for label in range(10)])
    expected = found[0] - thresholds[store.labels] + thresholds[store.labels].mean()
    np.testing.assert_allclose(found[1], np.maximum(expected, 0), atol=1e-5)
    assert np.ptp(thresholds) > 0.01
    with open_selection(raw) as stream, open_selection(relative) as other:
        # As selections were made before there was a choice, so that they are found, and computed again.
        assert "reference" not in stream.header.settings
        assert other.header.settings["reference"] == "by-class"
    for selection in (raw, relative):
        with open_selection(selection) as stream:
            assert selector_of(store, stream.header).digest == selection.digest
        write_report(selection.path, out=tmp_path / "page.html", cache=store, replace=True, progress=False)
        assert ("by-class" in (tmp_path / "page.html").read_text()) == (selection is relative)


def test_rows_without_a_label_keep_the_median_and_hidden_ones_are_not_of_a_class(
    array_source, tiny_model, tmp_path
) -> None:
    source = array_source(200)
    source.labels[:] = np.arange(200) % 4
    source.labels[::10] = -1
    config = EmbedConfig(model=tiny_model, batch_size=16, shard_rows=64, workers=0, device="cpu")
    embed_dataset(source, config, where=tmp_path / "some")
    hide_rows(tmp_path / "some", range(1, 41, 4))
    store = EmbeddingStore(tmp_path / "some")
    losses = load_or_make_guidance(store, key_of(store, parse_guidance("probe"))).columns["loss"]
    found = np.full(200, np.nan)
    for batch in select(store, draw="adaptive", reference="by-class", **(SMALL | {"batch_size": 40})):
        found[batch.kept] = batch.candidates.reference
    assert np.flatnonzero(np.isnan(found)).tolist() == store.hidden.tolist()
    bare = source.labels < 0
    assert found[bare & np.isfinite(found)] == pytest.approx(np.nanmedian(losses), abs=1e-6)
    for label in range(4):
        mine = (source.labels == label) & np.isfinite(losses) & np.isfinite(found)
        shift = (losses - found)[mine & (found > 0)]
        assert np.ptp(shift) < 1e-5


def test_strata_are_parts_of_the_spectrum_and_one_stratum_makes_no_graph(store) -> None:
    two = next(iter(select(store, draw="damped-loss", strata=2, **SMALL)))
    selector = BatchSelector(store, SelectConfig(rule="cells", batch_size=96, epochs=3, knn=6, device="cpu"))
    _, seen = next(iter(selector.watch()))
    widest = int(np.argmax(((seen.basis - seen.basis.mean(0)) ** 2).sum(0) / seen.values))
    parts = [seen.basis[two.candidates.stratum == part, widest] for part in (0, 1)]
    assert parts[0].max() <= parts[1].min()
    one = select(store, draw="damped-loss", strata=1, **SMALL)
    assert one.summary.status == {"not_computed": 15 - 3}
    assert not next(iter(one)).candidates.stratum.any()


def test_a_draw_has_the_strata_that_suit_it_unless_they_are_named(store, tmp_path, monkeypatch) -> None:
    (tmp_path / "own_draw.py").write_text(
        "from gstds_cache.selection.draws import Draw\n"
        "mine = Draw('mine', 'last losses', lambda last, *_: last.clip(0), needs_reference=False, strata=3)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    for draw, strata in (
        ("loss", 8),
        ("damped-loss", 8),
        ("loss-squared", 1),
        ("largest-damped-loss", 8),
        ("largest-loss-minus-reference", 1),
        ("own_draw:mine", 3),
    ):
        for asked, expected in ((None, strata), (4, 4)):
            selection = select(store, draw=draw, strata=asked, **SMALL)
            first = next(iter(selection))
            assert len(np.bincount(first.candidates.stratum)) == expected, (draw, asked)
    named, left = (select(store, draw="damped-loss", strata=strata, **SMALL).digest for strata in (8, None))
    assert named == left


def test_draws_of_the_largest_scores_have_no_prior(store) -> None:
    for draw in ("largest-damped-loss", "largest-loss-minus-reference"):
        batches = list(select(store, draw=draw, **SMALL))
        assert all((batch.candidates.prior == 1).all() for batch in batches)
        assert len(np.unique(np.concatenate([batch.candidates.reference for batch in batches]))) > 10
        with pytest.raises(UsageError, match=f"draw {draw} does not look at guidance"):
            select(store, draw=draw, guidance="probe", **SMALL)


def test_a_selection_of_candidates_is_found_again_by_all_that_decides_it(store) -> None:
    first = select(store, draw="loss-minus-reference", **SMALL)
    again = select(store, draw="loss-minus-reference", **SMALL)
    assert (first.digest, first.path) == (again.digest, again.path)
    assert again.summary.cache_hit
    digests = {first.digest}
    for changes in (
        *({"draw": "damped-loss"}, {"strata": 4}, {"reference": "by-class"}, {"guidance": "none"}, {"seed": 1}),
        {"draw": None},
    ):
        digests.add(select(store, **(SMALL | {"draw": "loss-minus-reference"} | changes)).digest)
    assert len(digests) == 7


def test_kept_rows_have_the_identity_they_had_before_there_were_candidates(store) -> None:
    selector = BatchSelector(store, SelectConfig(batch_size=96, rule="coverage", device="cpu"))
    assert set(selector.identity) == {"algorithm", "cache", "select"}
    assert not {"draw", "strata", "reference"} & set(selector.identity["select"])


def test_settings_that_say_nothing_with_or_without_draw_are_refused(store) -> None:
    for settings, words in (
        ({"strata": 4}, "no such setting without `draw`"),
        ({"strata": 8}, "no such setting without `draw`"),
        ({"draw": "loss", "rule": "coverage"}, "no rule beside `draw`"),
        ({"draw": "loss", "min_per_class": 1}, "0 with `draw`"),
        ({"draw": "los"}, "unknown draw 'los'"),
        ({"draw": "uniform", "guidance": "probe"}, "draw uniform does not look at guidance\n  leave `guidance` out$"),
        ({"draw": "loss", "strata": -1}, "`strata`"),
        ({"reference": "by-class"}, "no such setting without `draw`"),
        ({"draw": "loss", "reference": "by-class"}, "`draw='loss'` looks at no reference losses\n  leave it out$"),
    ):
        with pytest.raises(UsageError, match=words):
            select(store, **(SMALL | settings))


def test_strata_of_a_row_or_two_are_said_to_leave_scores_no_choice(store) -> None:
    lines: list[str] = []
    select(store, draw="loss", strata=49, notify=lines.append, **SMALL)
    assert any("`strata`: 49 of a batch of 96 rows" in line and "lower it to 6 or so" in line for line in lines)
    lines.clear()
    select(store, draw="loss", notify=lines.append, **SMALL)
    assert not any("strata" in line for line in lines)


def test_classes_come_by_turns_and_are_the_strata_that_rows_are_drawn_from(store) -> None:
    selection = select(store, draw="loss", order="class-balanced", **SMALL)
    spectral = select(store, draw="loss", order="class-balanced", strata=4, **SMALL)
    assert spectral.digest != selection.digest
    for batch in selection:
        labels = store.labels[batch.kept]
        assert len(set(batch.kept.tolist())) == len(batch.kept)
        assert np.bincount(labels).max() - np.bincount(labels).min() <= 1
        np.testing.assert_array_equal(batch.candidates.stratum, labels)
    assert selection.summary.status == {"not_computed": 4 * 3}
    assert max(batch.candidates.stratum.max() for batch in spectral) == 3
    train(DATASET, selection, out="run", **TRAIN)
    with pytest.raises(UsageError, match="`importance_weights`: with `order='class-balanced'`"):
        SelectedBatchSampler(selection.path, importance_weights=True)
    kept = list(select(store, rule="random", order="class-balanced", **SMALL))
    assert len({row for batch in kept if batch.epoch == 0 for row in batch.kept.tolist()}) > 60


def test_classes_are_strata_by_name_and_labels_part_of_what_decides(store, monkeypatch) -> None:
    selection = select(store, draw="loss", strata=0, **SMALL)
    for batch in selection:
        np.testing.assert_array_equal(np.unique(batch.candidates.stratum), np.arange(10))
        np.testing.assert_array_equal(batch.candidates.stratum, store.labels[batch.kept])
    lines: list[str] = []
    select(store, draw="loss", strata=0, notify=lines.append, **(SMALL | {"batch_size": 16}))
    assert any("16 rows of 10 classes" in line and "raise it to 160 or so" in line for line in lines)
    config = SelectConfig(batch_size=96, draw="loss", strata=0, device="cpu")
    before = BatchSelector(store, config).digest
    monkeypatch.setattr("gstds_cache.selection.run.labels_digest", lambda _store: "other labels")
    assert BatchSelector(store, config).digest != before


def test_what_needs_classes_says_so_where_there_are_none(array_source, tiny_model, tmp_path) -> None:
    source = array_source(64)
    source.labels[:] = -1
    config = EmbedConfig(model=tiny_model, batch_size=16, shard_rows=64, workers=0, device="cpu")
    embed_dataset(source, config, where=tmp_path / "plain")
    few = SMALL | {"batch_size": 16}
    with pytest.raises(UsageError, match="`strata=0` takes the classes, and .* has none"):
        select(tmp_path / "plain", draw="loss", strata=0, **few)
    with pytest.raises(UsageError, match="`order='class-balanced'`: 64 of 64 rows have no label"):
        select(tmp_path / "plain", rule="random", order="class-balanced", **few)


def test_what_needs_classes_names_the_setting_that_asked_for_them(store, monkeypatch) -> None:
    ids = LabelCounts(labelled=385, different=385, largest=384)
    monkeypatch.setattr("gstds_cache.data.label_counts.MANY", 0)
    monkeypatch.setattr("gstds_cache.selection.run.count_labels", lambda _store: ids)
    with pytest.raises(UsageError, match="`strata=0` takes the classes, and .* has none\n  leave it out"):
        BatchSelector(store, SelectConfig(batch_size=96, draw="loss", strata=0, device="cpu"))
    with pytest.raises(UsageError, match="has none\n  leave `order` out"):
        BatchSelector(store, SelectConfig(batch_size=96, draw="loss", order="class-balanced", device="cpu"))


def test_reference_losses_need_labels_and_training_losses_do_not(array_source, tiny_model, tmp_path) -> None:
    source = array_source(64)
    source.labels[:] = -1
    config = EmbedConfig(model=tiny_model, batch_size=16, shard_rows=64, workers=0, device="cpu")
    embed_dataset(source, config, where=tmp_path / "plain")
    with pytest.raises(UsageError, match="has no labels that a probe could learn"):
        select(tmp_path / "plain", draw="loss-minus-reference", **(SMALL | {"batch_size": 16}))
    offered = next(iter(select(tmp_path / "plain", draw="loss", **(SMALL | {"batch_size": 16})))).candidates
    assert np.isnan(offered.reference).all()
    assert (offered.prior == 1).all()


def test_training_reports_by_itself_and_goes_on_after_an_interrupt(store) -> None:
    selection = select(store, draw="loss-minus-reference", **SMALL)
    report = train(DATASET, selection, evaluation=DATASET, cache=store, out="run", **TRAIN)
    assert report.gradient_samples == selection.summary.total_kept
    assert report.left_over == 0
    state = torch.load("run/checkpoint.pt", weights_only=True)["feedback"]
    assert state["epoch"] == 3
    plan = estimate_training(DATASET, selection, **TRAIN)
    assert plan.gradient_samples == report.gradient_samples
    weighted = train(DATASET, selection, out="weighted", importance_weights=True, **TRAIN)
    assert weighted.loss != report.loss
    kept = select(store, **SMALL)
    with pytest.raises(UsageError, match="the selection keeps rows"):
        train(DATASET, kept, out="other", importance_weights=True, **TRAIN)


OWN = "def far(last, reference, prior):\n    return last + reference\n"


def test_a_draw_of_ones_own_is_named_when_selecting_and_when_training(store, tmp_path) -> None:
    (tmp_path / "own_far.py").write_text(OWN)
    runner = CliRunner()
    words = ["--batch-size", "96", "--epochs", "2", "--knn", "6", "--device", "cpu"]
    made = runner.invoke(select_command, [str(store.location), *words, "--draw", "own_far:far", "--out", "s.arrow"])
    assert made.exit_code == 0, made.output
    assert f"next: gstds-train '{DATASET}' --selection s.arrow --draw own_far:far" in made.output
    training = [DATASET, "--selection", "s.arrow", "--arch", "conv3", "--lr", "0.02", "--device", "cpu"]
    refused = runner.invoke(train_command, training)
    assert refused.exit_code == 2
    assert "pass --draw own_far:far as well" in refused.output
    done = runner.invoke(train_command, [*training, "--draw", "own_far:far"])
    assert done.exit_code == 0, done.output
    (tmp_path / "own_far.py").write_text(OWN + "# changed\n")
    importlib.reload(sys.modules["own_far"])  # as another process would import it; until then the code is the same
    with pytest.raises(FingerprintMismatchError, match="its file was changed"):
        SelectedBatchSampler("s.arrow", draw="own_far:far")


def test_pages_and_scores_say_that_rows_are_drawn_while_training(store) -> None:
    selection = select(store, draw="loss", **SMALL)
    write_report(selection.path, out="page.html", cache=store, progress=False)
    assert "decided while training" in Path("page.html").read_text()
    with pytest.raises(UsageError, match="decided while training"):
        export_scores(store, selection, "scores.parquet", progress=False)


def test_a_service_gives_candidates_to_trainers_that_each_have_their_own_losses(store) -> None:
    lines: list[str] = []
    stop, said = threading.Event(), threading.Event()

    def tell(line: str) -> None:
        lines.append(line)
        said.set()

    settings = {name: value for name, value in SMALL.items() if name != "progress"}
    thread = threading.Thread(
        target=serve, args=(store, "127.0.0.1:0"), kwargs=settings | {"draw": "loss", "stop": stop, "notify": tell}
    )
    thread.start()
    try:
        assert said.wait(60)
        where = lines[0].split('"location": "')[1].split('"')[0]
        drawn = []
        for scale in (0.0, 1.0):
            sampler, batches = SelectedBatchSampler(where), []
            for _ in range(sampler.epochs):
                for rows in sampler:
                    sampler.report([1 + scale * row for row in rows])
                    batches.append(rows)
            drawn.append(batches)
    finally:
        stop.set()
        thread.join()
    per_epoch = len(drawn[0]) // 3
    assert drawn[0][:per_epoch] == drawn[1][:per_epoch]
    assert drawn[0][per_epoch:] != drawn[1][per_epoch:]
    assert np.mean(np.concatenate(drawn[1][per_epoch:])) > np.mean(np.concatenate(drawn[0][per_epoch:]))


def test_a_reader_of_kept_rows_alone_says_what_to_use(store) -> None:
    selection = select(store, draw="loss", **SMALL)
    with pytest.raises(UsageError, match="use SelectedBatchSampler"):
        StepReader(selection)
    kept = next(iter(select(store, **SMALL)))
    with open_selection(selection) as stream, pytest.raises(StreamError, match="offers no candidates"):
        Feedback(stream.header).rows_of(kept)
