"""Variants of drawing by training losses: each part by its definition, and the plain variant as the library draws."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import offered
import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.study import references, variant_tables, variants  # noqa: E402
from benchmarks.study.document import placed  # noqa: E402
from benchmarks.study.lines import append  # noqa: E402
from benchmarks.study.methods import find_method  # noqa: E402
from benchmarks.study.screen import Screen  # noqa: E402
from benchmarks.study.settings import load_setting  # noqa: E402
from benchmarks.study.variants import (  # noqa: E402
    Variant,
    VariantFeedback,
    by_class,
    calibrated,
    dense_strata,
    parse_variant,
    score,
)
from gstds_cache.errors import UsageError  # noqa: E402
from gstds_cache.seeding import rng_for  # noqa: E402
from gstds_cache.selection.draws import DRAWS, PASSED_AT  # noqa: E402
from gstds_cache.training.feedback import Feedback  # noqa: E402

LAST, REFERENCE = np.array([0.5, 2.0, -0.1, 3.0]), np.array([1.0, 0.5, 0.2, 4.0])


def loss_of(rows: np.ndarray, epoch: int) -> np.ndarray:
    return ((rows * 7919 % 101) / 20 / (1 + epoch)).astype(np.float32)


def trained(feedback: Feedback, epochs: int = offered.EPOCHS) -> list[list[np.ndarray]]:
    """The rows drawn in each epoch, all reported."""
    drawn = []
    for epoch in range(epochs):
        rows = [feedback.rows_of(offered.batch(epoch * offered.BATCHES + part)) for part in range(offered.BATCHES)]
        for step, part in enumerate(rows):
            feedback.report(epoch * offered.BATCHES + step, part, torch.from_numpy(loss_of(part, epoch)))
        feedback.share(None)
        feedback.end_epoch()
        drawn.append(rows)
    return drawn


def test_a_variant_is_read_from_its_name() -> None:
    method = find_method("variant:form=ratio+c=0.5+strata=32+decay=1+step=16+reference=neighbours")
    assert method.variant == Variant(form="ratio", c=0.5, strata=32, decay=True, step=16, reference="neighbours")
    assert (method.draw, method.strata, method.needs) == ("loss-minus-reference", 32, {"probe", "neighbours"})
    assert not find_method("variant:form=uniform+strata=1").embeds
    dense = find_method("variant:graph=dense")
    assert (dense.strata, dense.batch_assignments, dense.embeds) == (1, 1, True)
    for wrong in ("shape=ratio", "form=none"):
        with pytest.raises(UsageError):
            parse_variant(wrong)


def test_scores_are_their_formulas() -> None:
    found = {form: score(Variant(form=form, c=0.5), LAST, REFERENCE) for form in ("subtract", "ratio", "loss")}
    np.testing.assert_allclose(found["subtract"], [0.0, 1.75, 0.0, 1.0])
    np.testing.assert_allclose(found["ratio"], [0.5 / 1.5, 2.0, 0.0, 3 / 4.5])
    np.testing.assert_allclose(found["loss"], [0.5, 2.0, 0.0, 3.0])
    damped = score(Variant(form="damped", steep=1), LAST, REFERENCE)
    np.testing.assert_allclose(damped[[0, 3]], [0.5 / (1 + np.exp(-1)), 3 / (1 + np.exp(2))])
    # The reference model is sure of the second and third row, and the network better on one of them.
    for share, form in ((0.5, "subtract"), (0.4, "damped")):
        of_form = score(Variant(form=form), LAST, REFERENCE)
        np.testing.assert_array_equal(score(Variant(form="passed", c=share), LAST, REFERENCE), of_form)
    adaptive = DRAWS["adaptive"](LAST, REFERENCE, np.ones(4))
    np.testing.assert_array_equal(score(Variant(form="passed", c=PASSED_AT), LAST, REFERENCE), adaptive)


def test_reference_losses_come_to_the_learners_scale() -> None:
    last = np.array([np.nan, 2.0, 4.0, 6.0])
    reference = np.array([0.5, 0.1, 0.2, 0.3])
    assert calibrated("mean", reference, last)[1:].mean() == pytest.approx(4.0)
    np.testing.assert_allclose(calibrated("quantile", reference, last), [6.0, 2.0, 4.0, 6.0])
    assert calibrated("mean", reference, np.full(4, np.nan)) is reference


def test_reference_losses_by_class() -> None:
    reference, labels = np.array([1.0, 3.0, 0.0, 1.0, 2.0, np.nan]), np.array([0, 0, 1, 1, 1, 1])
    of_class = by_class("class", reference, labels)
    np.testing.assert_allclose(of_class[:5] - 1.4, [-1, 1, -1, 0, 1], atol=1e-12)
    by_share = by_class("prior", reference, labels)
    np.testing.assert_allclose((by_share - reference)[:2], (by_share - reference)[2] - np.log(3 / 2))
    for shifted in (of_class, by_share):
        assert np.nanmean(shifted) == pytest.approx(np.nanmean(reference))
        assert np.isnan(shifted[5])


def test_the_plain_variant_draws_what_the_library_draws() -> None:
    ours, library = trained(VariantFeedback(offered.header(), Variant())), trained(Feedback(offered.header()))
    for own, others in zip(ours, library, strict=True):
        np.testing.assert_array_equal(np.concatenate(own), np.concatenate(others))
    other = trained(VariantFeedback(offered.header(), Variant(power=3.0)))
    assert any((a != b).any() for a, b in zip(other[1], ours[1], strict=True))


def test_losses_of_two_visits_are_averaged_and_old_ones_aged() -> None:
    drawn = [np.concatenate(rows) for rows in trained(Feedback(offered.header()), 2)]
    both = VariantFeedback(offered.header(), Variant(visits=2))
    aged = VariantFeedback(offered.header(), Variant(aged=True))
    for feedback in (both, aged):
        for epoch, rows in enumerate(drawn):
            feedback.report(epoch, rows, torch.from_numpy(loss_of(rows, epoch)))
            feedback.end_epoch()
    again = np.intersect1d(*drawn)
    np.testing.assert_allclose(both.losses[again], (loss_of(again, 0) + loss_of(again, 1)) / 2)
    once = np.setdiff1d(drawn[0], drawn[1])
    factor = loss_of(drawn[1], 1).mean() / loss_of(drawn[0], 0).mean()
    np.testing.assert_allclose(aged.losses[once], loss_of(once, 0) * factor, rtol=1e-6)
    np.testing.assert_allclose(aged.losses[drawn[1]], loss_of(drawn[1], 1))


def test_rows_used_lately_count_less_and_the_last_epochs_are_at_random() -> None:
    def twice(feedback: Feedback) -> int:
        first, second = trained(feedback, 2)
        return len(np.intersect1d(np.concatenate(first), np.concatenate(second)))

    plain = Variant(form="uniform")
    assert twice(VariantFeedback(offered.header(), Variant(rotate=0.01))) < twice(
        VariantFeedback(offered.header(), Variant(rotate=100.0))
    )
    ends = trained(VariantFeedback(offered.header(), Variant(random_end=0.34)))
    uniform = trained(VariantFeedback(offered.header("uniform"), plain))
    np.testing.assert_array_equal(np.concatenate(ends[2]), np.concatenate(uniform[2]))
    decayed = trained(VariantFeedback(offered.header(), Variant(decay=True)))
    assert np.concatenate(decayed[1]).tolist() != np.concatenate(uniform[1]).tolist()


def test_dense_strata_part_what_is_far_apart() -> None:
    rng = np.random.default_rng(0)
    centres = np.repeat(np.eye(2, 16), 8, axis=0)
    rows = (centres + 0.01 * rng.normal(size=(16, 16))).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    strata = dense_strata(rows, 2)
    assert len(set(strata[:8])) == len(set(strata[8:])) == 1
    assert strata[0] != strata[8]


def test_dense_strata_take_the_place_of_the_streams(monkeypatch) -> None:
    rows = np.random.default_rng(0).normal(size=(offered.ITEMS, 4)).astype(np.float32)
    feedback = VariantFeedback(offered.header(), Variant(graph="dense", strata=2), embeddings=rows)
    given = []
    monkeypatch.setattr(
        variants, "draw_rows", lambda offered, *_, **__: given.append(offered) or np.arange(offered.keep)
    )
    batch = offered.batch(0)
    feedback.rows_of(batch)
    order = np.argsort(batch.kept)
    np.testing.assert_array_equal(given[0].stratum[order], dense_strata(rows[batch.kept[order]], 2))


def test_strata_that_are_classes_give_each_its_share(monkeypatch) -> None:
    labels = np.random.default_rng(0).integers(0, 3, offered.ITEMS)
    feedback = VariantFeedback(offered.header(), Variant(graph="label"), labels=labels)
    given = []
    monkeypatch.setattr(
        variants, "draw_rows", lambda offered, *_, **__: given.append(offered) or np.arange(offered.keep)
    )
    batch = offered.batch(0)
    feedback.rows_of(batch)
    np.testing.assert_array_equal(np.unique(labels[batch.kept])[given[0].stratum], labels[batch.kept])


def test_a_variant_takes_the_largest_scores_or_nearly_those() -> None:
    assert find_method("variant:top=1+anew=1").batch_assignments == 0
    unseen = {"guidance": "none", "strata": 1}
    for sharp, most in ((0.0, 0), (60.0, 1), (0.5, 99)):
        feedback = VariantFeedback(offered.header(), Variant(top=not sharp, sharp=sharp, **unseen))
        batch = offered.batch(0)
        batch = replace(
            batch,
            candidates=replace(
                batch.candidates,
                stratum=np.zeros(len(batch.kept), np.int16),
                prior=np.ones(len(batch.kept), np.float32),
            ),
        )
        feedback.losses = loss_of(np.arange(offered.ITEMS), 0)
        scores = DRAWS["loss-minus-reference"].scores(batch.candidates, feedback.losses[batch.kept])
        expected = batch.kept[np.sort(np.argsort(-scores)[: batch.candidates.keep])]
        others = len(np.setdiff1d(feedback.rows_of(batch), expected))
        assert others <= most
        assert others > 0 or sharp != 0.5


def test_neighbours_judge_a_row_by_the_labels_around_it() -> None:
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(60, 6)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    labels = rng.integers(0, 3, 60)
    cosines = rows @ rows.T - 3 * np.eye(60)
    near = np.argsort(-cosines, axis=1)[:, :5]
    expected = -np.log(((labels[near] == labels[:, None]).sum(1) + 1 / 3) / 6)
    np.testing.assert_allclose(references.neighbours_losses(rows, labels, 5), expected, rtol=1e-5)


def test_a_proxy_judges_rows_that_it_did_not_learn_from() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 128)
    pixels = torch.from_numpy(
        rng.integers(0, 100, (128, 3, 16, 16), dtype=np.uint8) + 100 * labels[:, None, None, None].astype(np.uint8)
    )
    losses = references.proxy_losses(pixels, labels, "conv3", 0.05)
    half = rng_for(0, "proxy").permutation(128)[:64]
    wrong = labels.copy()
    wrong[half[:32]] ^= 1  # the other half's network does not see them
    again = references.proxy_losses(pixels, wrong, "conv3", 0.05)
    np.testing.assert_array_equal(again[half[32:]], losses[half[32:]])
    assert again[half[:32]].mean() > losses[half[:32]].mean()


def test_the_screen_trains_on_what_a_variant_draws_and_learns() -> None:
    rng = np.random.default_rng(0)
    labels = torch.from_numpy(rng.integers(0, 2, 512))
    screen = object.__new__(Screen)
    screen.setting, screen.lr = replace(load_setting("glyphs-smoke"), epochs=4, batch=64), 0.1
    screen.labels = screen.test_labels = labels
    shades = (60 + 120 * labels).to(torch.uint8)[:, None, None, None]
    screen.train = screen.test = shades.expand(512, 3, 8, 8) + torch.from_numpy(
        rng.integers(0, 40, (512, 3, 8, 8), dtype=np.uint8)
    )
    screen.references = {"probe": rng.gamma(1.0, 0.1, 512).astype(np.float32)}
    screen.priors = {"none": np.ones(512), "uncertainty": rng.uniform(0.5, 1.0, 512)}
    found = screen.accuracy(Variant(), 0)
    assert found > 0.9
    assert screen.accuracy(Variant(), 0) == found


def test_lines_of_the_study_and_of_the_screen_are_named_alike(tmp_path) -> None:
    def line(method: str, seed: int, accuracy: float) -> dict:
        return {"kind": "run", "method": method, "ratio": 0.75, "lr": 0.8, "seed": seed, "test_accuracy": accuracy}

    names = {
        "random": "form=uniform+strata=1",
        "draw:loss^32": "form=loss+strata=32",
        "draw:loss-minus-reference": "form=subtract",
        "draw:loss-minus-reference^1/none": "guidance=none+strata=1",
        "variant:strata=1+power=2": "power=2+strata=1",
        "variant:impute=both": "form=subtract",
    }
    assert {method: variant_tables.key_of(line(method, 0, 0.5)) for method in names} == names
    assert variant_tables.key_of({"kind": "screen", "variant": "form=subtract"}) == "strata=1"
    for seed, gain in enumerate((0.01, 0.03)):
        append(tmp_path / "cifar10-validation.jsonl", line("draw:loss-minus-reference^1", seed, 0.5))
        append(tmp_path / "cifar10-validation.jsonl", line("variant:strata=1+power=2", seed, 0.5 + gain))
    append(tmp_path / "cifar10-validation.jsonl", line("variant:strata=1+impute=none+power=2", 0, 0.4))
    append(tmp_path / "cifar10-validation.jsonl", line("variant:strata=1+impute=none+c=2", 0, 0.45))
    text = variant_tables.render(tmp_path)
    assert "| `power=2+strata=1` | 52.00 (+2.00 ± 1.00), 2 |" in text
    assert "| `strata=1` | 50.00, 2 |" in text
    assert "`c=2+impute=none+strata=1` | 45.00, 1" in text
    assert "`impute=none+power=2+strata=1`" not in text  # run again since


def test_the_document_has_the_table_of_the_lines() -> None:
    text = variant_tables.DOCUMENT.read_text()
    assert placed(text, variant_tables.render(), variant_tables.BEGIN, variant_tables.END) == text, (
        "run: python -m benchmarks.study.variant_tables"
    )
