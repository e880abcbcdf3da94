"""Hidden rows are left out of every selection made from then on; no byte of the store changes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from real_store import GROWN, Images, append, embed

import gstds_cache
from gstds_cache.api import hide
from gstds_cache.config import SelectConfig
from gstds_cache.errors import IntegrityError, UsageError
from gstds_cache.selection import draw_choice
from gstds_cache.selection.advice import Forecast
from gstds_cache.selection.run import BatchSelector
from gstds_cache.store.describe import summarise
from gstds_cache.store.hidden import HiddenRows, record_key
from gstds_cache.store.reader import EmbeddingStore
from gstds_cache.store.verify import verify

N, D = 80, 8
CONFIG = {"batch_size": 20, "epochs": 2, "knn": 5, "guidance": "none", "device": "cpu"}


@pytest.fixture
def store(tmp_path: Path) -> Path:
    rng = np.random.default_rng(3)
    rows = np.eye(D)[np.arange(N) % 3] * 2 + rng.normal(size=(N, D))
    rows[2] = 0  # quarantined
    ids, labels = [f"i{row}" for row in range(N)], np.arange(N) % 3
    options = {"ids": ids, "labels": labels, "shard_rows": 16, "progress": False, "notify": lambda _: None}
    gstds_cache.import_embeddings(rows.astype(np.float32), tmp_path / "s", **options)
    return tmp_path / "s"


def contents(store: Path) -> dict[str, bytes]:
    return {p.relative_to(store).as_posix(): p.read_bytes() for p in store.rglob("*")
            if p.is_file() and p.parent.name != "hidden"}  # fmt: skip


def select(store: Path, **changes) -> gstds_cache.Selection:
    return gstds_cache.select(store, keep=0.5, progress=False, notify=lambda _: None, **(CONFIG | changes))


def kept(selection: gstds_cache.Selection) -> set[int]:
    with gstds_cache.open_selection(selection.path) as stream:
        return {row for batch in stream for row in batch.kept.tolist()}


@pytest.mark.parametrize("order", ["permutation", "window:32"])
def test_hidden_rows_are_in_no_batch_and_the_selection_is_another(store, order) -> None:
    before, whole = contents(store), select(store, order=order)
    hidden = gstds_cache.hide_rows(store, [40, 7, 41, 7])
    assert (hidden.rows, hidden.ids, hidden.changed) == ((7, 40, 41), ("i7", "i40", "i41"), 3)
    assert contents(store) == before
    opened = EmbeddingStore(store)
    assert opened.hidden.tolist() == [7, 40, 41]
    selector = BatchSelector(opened, SelectConfig(order=order, **CONFIG))
    rows = np.concatenate([selector.plan.batch(seq).indices for seq in range(selector.plan.batches_per_epoch)])
    assert sorted(rows.tolist()) == [row for row in range(N) if row not in {2, 7, 40, 41}]
    fewer = select(opened, order=order)
    assert fewer.summary.selection_digest != whole.summary.selection_digest
    assert fewer.summary.total_rows == 2 * (N - 4)
    assert sum(counts["seen"] for counts in fewer.summary.classes.values()) == 2 * (N - 4)
    assert not kept(fewer) & {2, 7, 40, 41}
    # What was selected before is found again once nothing is hidden, and an equal set is the same selection.
    assert gstds_cache.unhide_rows(store).rows == ()
    assert select(store, order=order).summary.cache_hit
    gstds_cache.hide_rows(store, ids=["i41", "i7"])
    gstds_cache.hide_rows(store, range(40, 42))
    assert select(store, order=order).summary.cache_hit


def test_an_old_selection_stays_what_it_was_and_can_be_computed_again(store, tmp_path) -> None:
    whole = select(store, out=tmp_path / "whole.arrow")
    gstds_cache.hide_rows(store, [3, 4])
    fewer = select(store, out=tmp_path / "fewer.arrow")
    gstds_cache.hide_rows(store, [5])
    for selection, without in ((whole, set()), (fewer, {3, 4})):
        file = tmp_path / "scores.parquet"
        report = gstds_cache.export_scores(store, selection.path, file, replace=True, progress=False)
        assert report.rows == N
        assert report.unseen == len({2} | without)
    (store / record_key(1)).unlink()
    with pytest.raises(IntegrityError, match="no record in hidden/"):
        gstds_cache.export_scores(store, fewer.path, tmp_path / "none.parquet", progress=False)


def test_hidden_rows_teach_no_probe(store) -> None:
    settings = CONFIG | {"guidance": "probe?steps=20"}
    plain = BatchSelector(EmbeddingStore(store), SelectConfig(**settings))
    gstds_cache.hide_rows(store, range(50, 70))
    guided = BatchSelector(EmbeddingStore(store), SelectConfig(**settings))
    assert guided.guidance_digest != plain.guidance_digest
    assert np.isfinite(plain.guidance.columns["loss"][50:70]).all()
    assert np.isnan(guided.guidance.columns["loss"][50:70]).all()
    assert np.isfinite(guided.guidance.columns["loss"][[0, 1, *range(3, 50)]]).all()
    scores = store.parent / "scores.npy"
    np.save(scores, np.where(np.arange(N) == 50, np.nan, 1.0))
    own = BatchSelector(EmbeddingStore(store), SelectConfig(**CONFIG | {"guidance": f"file:{scores}"}))
    assert own.guidance.of_rows is not None


def test_of_labels_that_are_hidden_no_probe_is_asked(store) -> None:
    """One class is left: the default selection has no guidance, and ``draw="auto"`` no draw."""
    gstds_cache.hide_rows(store, [row for row in range(N) if row % 3])
    summary = select(store, **{"guidance": SelectConfig.guidance}).summary
    assert (summary.guidance, summary.total_rows) == ("none", 2 * 27)
    config = SelectConfig(draw="auto", device="cpu")
    chosen, why = draw_choice.choose_draw(EmbeddingStore(store), config, 0.5, threads=1, device=torch.device("cpu"))
    assert (chosen.draw, "no labels that a probe could learn" in why) == (None, True)
    with pytest.raises(UsageError, match="no labels that a probe could learn"):
        gstds_cache.advise(store, progress=False)


def test_draws_are_tried_again_where_other_rows_are_hidden(store, monkeypatch) -> None:
    asked: list[int] = []

    def tried(store, *_) -> list[Forecast]:
        asked.append(len(store.hidden))
        return [Forecast(way, 0.5, 0.9, 0.0, 0.1, 0.0, 0.1) for way in draw_choice.TRIED]

    monkeypatch.setattr(draw_choice, "_try_out", tried)
    for rows in ([], [], [4], [5], []):
        if rows:
            gstds_cache.hide_rows(store, rows)
        config = SelectConfig(draw="auto", device="cpu", epochs=2)
        draw_choice.choose_draw(EmbeddingStore(store), config, 0.5, threads=1, device=torch.device("cpu"))
    assert asked == [0, 1, 2]


def test_a_core_set_counts_the_rows_that_it_was_chosen_from(store) -> None:
    gstds_cache.hide_rows(store, [3, 4, 6])
    summary = gstds_cache.select_once(store, 20, epochs=1, batch_size=20, device="cpu", progress=False).summary
    assert {name: counts["seen"] for name, counts in summary.classes.items()} == {
        "class 0": 25,
        "class 1": 26,
        "class 2": 25,
    }
    assert summary.total_rows == 25 + 26 + 25


def test_what_another_process_appended_and_hid_meanwhile_stays_hidden(tmp_path, monkeypatch) -> None:
    where, named = tmp_path / "g", hide._rows_named
    embed(where)

    def meanwhile(*args):
        monkeypatch.setattr(hide, "_rows_named", named)
        append(where, Images(GROWN))
        gstds_cache.hide_rows(where, [30])
        return named(*args)

    monkeypatch.setattr(hide, "_rows_named", meanwhile)
    assert gstds_cache.hide_rows(where, [4]).rows == (4, 30)
    assert EmbeddingStore(where).hidden.tolist() == [4, 30]


def test_the_number_is_shown_and_damage_is_found(store) -> None:
    gstds_cache.hide_rows(store, [1, 2, 9])
    assert summarise(store).hidden == verify(store).hidden == 3
    record = store / record_key(1)
    record.write_bytes(record.read_bytes().replace(b"9", b"8"))
    assert "the list of hidden rows, is damaged" in str(verify(store).problems[0])
    with pytest.raises(IntegrityError, match="hidden/1.json, the list of hidden rows, is damaged"):
        EmbeddingStore(store)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"rows": [80]}, "`rows`: got 80, expected 0 to 79"),
        ({"rows": [-1]}, "`rows`: got -1"),
        ({"rows": [0.5]}, "expected row numbers"),
        ({"rows": range(N)}, "got all 80 rows"),
        ({"ids": ["i3", "i80"]}, "1 of 2 ids are not in .*first 'i80'"),
        ({}, "expected one of them"),
        ({"rows": [1], "ids": ["i1"]}, "expected one of them"),
    ],
)
@pytest.mark.usefixtures("no_type_checks")
def test_what_cannot_be_hidden_is_refused_and_nothing_is(store, how, words) -> None:
    with pytest.raises(UsageError, match=words):
        gstds_cache.hide_rows(store, **how)
    assert gstds_cache.list_hidden(store).rows == ()


def test_too_few_rows_that_are_left_say_so(store) -> None:
    gstds_cache.hide_rows(store, range(3, N))
    with pytest.raises(UsageError, match="too few images: 2 rows"):
        select(store)


def test_rows_as_ranges_are_what_they_were() -> None:
    for rows in ([], [0], [3, 4, 5, 9, 11, 12]):
        hidden = HiddenRows(np.array(rows, np.int64), 4)
        assert HiddenRows.from_bytes(hidden.to_bytes()).rows.tolist() == rows
    assert HiddenRows(np.array([3, 4, 9]), 1).ranges == [[3, 5], [9, 10]]


def test_the_commands(store, command, result_of, tmp_path) -> None:
    (tmp_path / "ids.txt").write_text("i5\ni6\n")
    assert (
        "hid 2 rows of s; 2 are hidden, 78 are left" in command("gstds-cache", "hide", "s", "--ids", "ids.txt").stdout
    )
    assert result_of(command("gstds-cache", "hide", "s", "10-12,20", "--json"))["rows"] == [5, 6, 10, 11, 12, 20]
    assert command("gstds-cache", "hidden", "s").stdout.splitlines()[0] == "5\ti5"
    assert "80 (6 hidden)" in command("gstds-cache", "ls", ".").stdout
    assert "6 hidden from selections" in command("gstds-cache", "info", "s").stdout
    assert "6 rows are hidden" in command("gstds-cache", "verify", "s").stdout
    assert "got 'x'" in command("gstds-cache", "hide", "s", "x", code=2).stderr
    (tmp_path / "ids.txt").write_text("i5\nx\n")
    assert "--ids: 1 of 2 ids" in command("gstds-cache", "hide", "s", "--ids", "ids.txt", code=2).stderr


def test_a_bucket(store, s3_prefix) -> None:
    rows = EmbeddingStore(store).gather(np.array([0, 1, *range(3, 60)]))
    gstds_cache.import_embeddings(rows, s3_prefix, progress=False)
    gstds_cache.hide_rows(s3_prefix, [4])
    assert EmbeddingStore(s3_prefix).hidden.tolist() == [4]
    assert gstds_cache.unhide_rows(s3_prefix, [4]).rows == ()
