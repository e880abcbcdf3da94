"""``draw="auto"``: probes try the draws out, once, and what they say is what is selected."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from gstds_cache.api.embed import embed
from gstds_cache.api.select_batches import select
from gstds_cache.config import EmbedConfig, SelectConfig
from gstds_cache.embedding.run import embed_dataset
from gstds_cache.errors import UsageError
from gstds_cache.selection import draw_choice
from gstds_cache.selection.advice import Forecast
from gstds_cache.selection.difficulty import Difficulty
from gstds_cache.selection.draws import find_draw
from gstds_cache.selection.reference import by_class
from gstds_cache.store.reader import EmbeddingStore
from gstds_cache.stream.reader import open_selection
from gstds_cache.training.sampler import SelectedBatchSampler

SMALL = {"batch_size": 96, "epochs": 2, "knn": 6, "device": "cpu", "progress": False, "keep": 0.25}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GSTDS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def store(tiny_model, tmp_path) -> EmbeddingStore:
    return embed("digits?split=test", tmp_path / "store", model=tiny_model, workers=0, device="cpu", progress=False)


def test_the_probes_are_asked_once_and_the_selection_is_that_of_the_draw_by_its_name(store, monkeypatch) -> None:
    notes: list[str] = []
    auto = select(store, draw="auto", notify=notes.append, **SMALL)
    (said,) = [note for note in notes if note.startswith("draw auto: ")]
    assert "a probe that learns from rows drawn " in said
    monkeypatch.setattr(draw_choice, "forecasts", lambda *_a, **_k: pytest.fail("the probes were asked again"))
    again = select(store, draw="auto", notify=notes.append, **SMALL)
    assert (again.path, notes[-1].startswith("cache hit")) == (auto.path, True)
    with open_selection(auto) as stream:
        settled = stream.header.settings.get("draw")
    assert said.startswith(f"draw auto: {settled or ''}")
    assert select(store, draw=settled, **SMALL).digest == auto.digest


def test_an_outcome_whose_record_was_altered_is_not_believed(store, monkeypatch) -> None:
    notes: list[str] = []
    select(store, draw="auto", notify=notes.append, **SMALL)
    said = [note for note in notes if note.startswith("draw auto: ")]
    probes = draw_choice.forecasts
    asked: list[int] = []
    monkeypatch.setattr(draw_choice, "forecasts", lambda *a, **k: asked.append(1) or probes(*a, **k))
    (record,) = (path for path in Path("store.guidance").glob("*.trial.json") if b'"draws"' in path.read_bytes())
    written = record.read_bytes()
    for times, at in enumerate((written.index(b"0.") + 3, len(written) // 2), 1):
        record.write_bytes(written[:at] + bytes([written[at] ^ 1]) + written[at + 1 :])
        notes.clear()
        select(store, draw="auto", notify=notes.append, **SMALL)
        assert [note for note in notes if note.startswith("draw auto: ")] == said
        assert (len(asked), record.read_bytes()) == (times, written)


@pytest.mark.parametrize(
    ("ahead", "draw", "words"),
    [
        ({"default": (0.01, 0.005), "loss-minus-reference": (0.03, 0.01, 0.01, 0.005), "damped-loss": (0.02, 0.01)},
         "adaptive", "adaptive: a probe that learns from rows drawn by loss-minus-reference, a part of it, is right"),
        ({"default": (0.01, 0.005), "loss-minus-reference": (0.03, 0.01, 0.01, 0.02), "damped-loss": (0.02, 0.01)},
         "adaptive", "adaptive: a probe that learns from rows drawn by damped-loss, a part of it, is right"),
        ({"default": (0.01, 0.005), "loss-minus-reference": (0.03, 0.03), "damped-loss": (0.02, 0.01)},
         "adaptive", "adaptive: a probe that learns from rows drawn by damped-loss, a part of it, is"),
        ({"default": (0.03, 0.01, 0.01, 0.005), "loss-minus-reference": (0.02, 0.01), "damped-loss": (0.02, 0.01)},
         None, "the rule keeps rows: a probe"),
        ({"damped-loss": (0.02, 0.01), "loss-squared": (0.03, 0.01, 0.01, 0.005)}, "loss-squared", "loss-squared: a"),
        ({"damped-loss": (0.02, 0.01), "loss-squared": (0.03, 0.01, 0.01, 0.02)},
         "adaptive", "adaptive: a probe that learns from rows drawn by damped-loss, a part of it, is right"),
        ({"default": (-0.03, 0.01), "loss-minus-reference": (0.01, 0.02), "damped-loss": (0.0, 0.01)},
         None, "no draw is clearly ahead of random rows"),
    ],
)  # fmt: skip
def test_what_is_furthest_ahead_for_certain_is_taken(store, monkeypatch, ahead, draw, words) -> None:
    monkeypatch.setattr(
        draw_choice,
        "forecasts",
        lambda *_a, **_k: [Forecast(way, 0.75, 0.9, *numbers) for way, numbers in ahead.items()],
    )
    asked = SelectConfig(draw="auto", strata=4, reference="by-class", batch_size=96)
    config, why = draw_choice.choose_draw(store, asked, 0.25, threads=1, device=torch.device("cpu"))
    assert (config.draw, config.strata) == (draw, 4 if draw else None)
    assert config.reference == ("by-class" if draw == "adaptive" else "raw")
    assert why.startswith(words)


def test_without_labels_or_without_anything_left_out_the_rule_keeps_rows(store, array_source, tiny_model, tmp_path):
    source = array_source(200)
    source.labels[:] = -1
    config = EmbedConfig(model=tiny_model, batch_size=16, shard_rows=64, workers=0, device="cpu")
    embed_dataset(source, config, where=tmp_path / "plain")
    notes: list[str] = []
    selection = select(tmp_path / "plain", draw="auto", notify=notes.append, **SMALL)
    assert any("no labels that a probe could learn" in note for note in notes)
    with open_selection(selection) as stream:
        assert stream.header.format != 3
    select(store, draw="auto", notify=notes.append, **(SMALL | {"keep": 1.0}))
    assert any("nothing is left out" in note for note in notes)
    assert not any("strata" in note for note in notes)
    select(store, draw="auto", strata=4, notify=notes.append, **(SMALL | {"keep": 1.0}))
    assert "note: `strata` 4 is not used: it is for draws, and the rule keeps rows" in notes
    assert not any("`reference`" in note for note in notes)
    select(store, draw="auto", reference="by-class", notify=notes.append, **(SMALL | {"keep": 1.0}))
    assert "note: `reference` by-class is not used: reference losses are not looked at" in notes


def test_draws_are_tried_with_the_reference_losses_that_they_are_to_have(store, monkeypatch) -> None:
    seen: list[np.ndarray] = []
    whole = draw_choice.forecasts

    def watched(store, difficulty, reference, **rest):
        seen.append(reference.of(np.arange(len(store))))
        return whole(store, difficulty, reference, **rest)

    monkeypatch.setattr(draw_choice, "forecasts", watched)
    for reference in ("raw", "by-class", "raw"):
        select(store, draw="auto", reference=reference, **SMALL)
    raw, relative = seen  # the outcome of the first is found by the third
    expected = by_class(Difficulty(raw.astype(np.float32)), store.labels).all()
    np.testing.assert_allclose(relative, expected, atol=1e-6)
    assert np.abs(relative - raw).max() > 0.1


def test_a_loop_may_report_losses_whatever_auto_settled_on(store) -> None:
    sampler = SelectedBatchSampler(select(store, **SMALL))
    for rows in sampler:
        sampler.report(torch.ones(len(rows)))
    assert sampler.epoch == 1
    with pytest.raises(UsageError, match="keeps rows"):
        _ = sampler.losses


def test_auto_is_no_draw_of_a_selection() -> None:
    with pytest.raises(UsageError, match="settled where a selection is made"):
        find_draw("auto")
