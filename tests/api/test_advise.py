"""``gstds-cache advise``: probes that draw in several ways, and what is said of them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from gstds_cache.cli.cache_command import main

from gstds_cache.api.advise import Advice, advise, table
from gstds_cache.api.embed import embed
from gstds_cache.config import EmbedConfig
from gstds_cache.costs.records import recall_store
from gstds_cache.embedding.run import embed_dataset
from gstds_cache.errors import UsageError
from gstds_cache.selection.advice import WAYS, Forecast, compared, preferred
from gstds_cache.store.reader import EmbeddingStore

QUICK = {"ratios": (0.5, 0.9), "epochs": 2, "device": "cpu", "progress": False}


@pytest.fixture
def store(tiny_model, tmp_path, monkeypatch) -> EmbeddingStore:
    monkeypatch.setenv("GSTDS_CACHE", str(tmp_path / "cache"))
    return embed("digits?split=test", tmp_path / "store", model=tiny_model, workers=0, device="cpu", progress=False)


def test_every_way_is_tried_at_every_ratio_and_the_same_on_any_number_of_threads(store) -> None:
    one, two = (advise(store, threads=threads, **QUICK) for threads in (1, 2))
    assert one.forecasts == two.forecasts
    assert [(f.way, f.ratio) for f in one.forecasts] == [
        ("full", 0.0), *((way, ratio) for ratio in (0.5, 0.9) for way in WAYS[1:])
    ]  # fmt: skip
    assert (one.rows, one.classes) == (385, 10)
    full, by_way = one.forecasts[0], {(f.way, f.ratio): f for f in one.forecasts}
    assert 0.3 < full.accuracy <= one.probe_accuracy + 0.2
    assert by_way["random", 0.9].accuracy < full.accuracy  # a tenth of a few rows is too little for a probe
    assert all(f.over_random == f.margin == 0 for f in one.forecasts if f.way == "random")
    assert len(table(one)) == 1 + len(one.forecasts)


def test_a_difference_and_its_interval_are_mcnemars() -> None:
    rng = np.random.default_rng(0)
    right, random = rng.random(1000) < 0.8, rng.random(1000) < 0.7
    found = compared("loss", 0.5, right, random, right)
    difference = right.astype(float) - random
    assert found.over_random == pytest.approx(difference.mean())
    assert found.margin == pytest.approx(1.96 * difference.std() / np.sqrt(1000))
    assert found.accuracy == right.mean()


@pytest.mark.parametrize(
    ("over", "margin", "way", "words", "command"),
    [
        (
            0.02,
            0.01,
            "damped-loss",
            "select: adaptive at a filter ratio of 0.75; damped-loss, a part of it, is ahead of",
            "--keep 0.25 --draw adaptive",
        ),
        (
            0.02,
            0.01,
            "loss-minus-reference",
            "select: adaptive at a filter ratio of 0.75; loss-minus-reference, a part",
            "--keep 0.25 --draw adaptive",
        ),
        (
            0.02,
            0.01,
            "loss-squared",
            "select: loss-squared at a filter ratio of 0.75 is ahead of",
            "--keep 0.25 --draw loss-squared",
        ),
        (0.02, 0.01, "default", "select: default", "--keep 0.25"),
        (0.02, 0.03, "damped-loss", "do not select", "--rule random --schedule constant:0"),
        (-0.02, 0.01, "damped-loss", "do not select", "--rule random --schedule constant:0"),
    ],
)
def test_what_is_clearly_ahead_of_random_is_advised_and_nothing_else(over, margin, way, words, command) -> None:
    forecasts = (Forecast("full", 0.0, 0.9, 0.0, 0.0), Forecast(way, 0.75, 0.8, over, margin))
    advice = Advice(store="s", rows=1000, classes=2, class_rows=(400, 600), probe_accuracy=0.89, forecasts=forecasts,
                    epochs=20, embedding_seconds=None, seconds=0.25)  # fmt: skip
    assert advice.verdict.startswith(words)
    assert ("all rows are 10.0% ahead of it" in advice.verdict) == words.startswith("select")
    assert "linear classifier" not in advice.verdict
    easy = replace(advice, probe_accuracy=0.92)
    assert easy.verdict.startswith(words)
    assert "right on 92.0% of held-out rows" in easy.verdict
    assert advice.command == f"gstds-select s {command}"
    few = replace(advice, rows=999)
    assert few.verdict == "do not select: 999 labelled rows are too few to leave any out; train on all of them"
    assert repr(few) == f"Advice('s', rows=999, {few.verdict!r})"
    assert few.command == "gstds-select s --rule random --schedule constant:0"
    assert [advice.gradient_samples(forecast) for forecast in forecasts] == [20_000, 5_000]
    assert advice.cost == "embedding not written down; this advice 0.2 s"
    assert replace(advice, embedding_seconds=1234.5).cost == (
        "embedding 1,234.5 s, once for all runs; this advice 0.2 s"
    )


def test_notes_say_what_probes_cannot_tell() -> None:
    ahead, behind = Forecast("damped-loss", 0.75, 0.8, 0.02, 0.01), Forecast("damped-loss", 0.75, 0.8, 0.0, 0.01)
    advice = Advice(store="s", rows=6250, classes=2, class_rows=(600, 5650), probe_accuracy=0.89, forecasts=(ahead,),
                    epochs=8, embedding_seconds=None, seconds=0.25)  # fmt: skip
    assert advice.notes == ()
    few, rare = replace(advice, rows=6249), replace(advice, class_rows=(600, 6000))
    assert [note.partition(":")[0] for note in few.notes] == ["6,249 rows in 8 epochs are few"]
    assert replace(few, forecasts=(behind,)).notes == ()  # it is not advised to select
    assert [note.partition(";")[0] for note in rare.notes] == [
        "the largest class has 10 times the rows of the smallest"
    ]
    assert "--order class-balanced" in rare.notes[0]
    assert rare.to_dict()["notes"] == list(rare.notes)


@pytest.mark.parametrize(
    ("found", "advised"),
    [
        ([], None),
        ([("default", 0.5, 0.01, 0.02)], None),
        # Of those that are ahead, the usual one, unless another is clearly ahead of it.
        ([("loss-minus-reference", 0.5, 0.05, 0.01), ("damped-loss", 0.5, 0.02, 0.01)], ("damped-loss", 0.5)),
        (
            [("loss-minus-reference", 0.5, 0.05, 0.01, 0.03, 0.02), ("damped-loss", 0.5, 0.02, 0.01)],
            ("loss-minus-reference", 0.5),
        ),
        ([("loss-minus-reference", 0.5, 0.05, 0.01), ("damped-loss", 0.5, 0.02, 0.03)], ("loss-minus-reference", 0.5)),
        ([("default", 0.5, 0.05, 0.01), ("loss-minus-reference", 0.5, 0.05, 0.04)], ("default", 0.5)),
        # Of the ratios the one that leaves out least, however far ahead others are of as few random rows.
        (
            [("damped-loss", 0.9, 0.09, 0.01), ("default", 0.75, 0.02, 0.01), ("default", 0.5, 0.0, 0.01)],
            ("default", 0.75),
        ),
    ],
)
def test_what_is_advised_of_what_is_ahead(found, advised) -> None:
    forecasts = [Forecast(way, ratio, 0.8, *more) for way, ratio, *more in found]
    best = preferred(forecasts)
    assert (best and (best.way, best.ratio)) == advised


def test_arguments_and_stores_that_cannot_be_meant_are_refused(store, array_source, tiny_model, tmp_path) -> None:
    for wrong in ({"ratios": ()}, {"ratios": (0.5, 1.0)}, {"ratios": (0.5, 0.5)}, {"epochs": 0}, {"threads": -1}):
        with pytest.raises(UsageError, match="expected"):
            advise(store, **(QUICK | wrong))
    source = array_source(64)
    source.labels[:] = -1
    config = EmbedConfig(model=tiny_model, batch_size=16, shard_rows=64, workers=0, device="cpu")
    embed_dataset(source, config, where=tmp_path / "plain")
    with pytest.raises(UsageError, match="no labels that a probe could learn"):
        advise(tmp_path / "plain", **QUICK)


def test_the_command_prints_a_table_the_advice_and_what_to_type(store) -> None:
    words = ["advise", str(store.location), "--ratio", "0.5", "--epochs", "1", "--device", "cpu", "--json"]
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert [part.strip() for part in lines[0].split("  ") if part] == [
        "ratio", "drawn", "gradient samples", "held-out accuracy", "minus random, 95 % interval"
    ]  # fmt: skip
    result = json.loads(lines[-1])
    assert result["verdict"] in done.stdout
    assert f"next: {result['command']}" in lines
    assert lines[2].split()[:3] == ["0.5", "random", "192"]  # half of 385 rows, once
    assert f"embedding {recall_store(store.location).seconds:,.1f} s, once for all runs" in done.stdout
    assert result["embedding_seconds"] == recall_store(store.location).seconds
    assert len(result["forecasts"]) == len(WAYS)
    assert Path(result["store"]) == Path(str(store.location))
