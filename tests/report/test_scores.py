"""Scores against a naive count over the same selection."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from real_store import BAD, ITEMS, Images, embed

from gstds_cache.config import SelectConfig
from gstds_cache.errors import FingerprintMismatchError, UsageError
from gstds_cache.report.recompute import RecomputeSettings, selector_of, spans, watch_again
from gstds_cache.report.scores import SampleScores, check_target, percentile, spacing, write_scores
from gstds_cache.selection.rules import RULES
from gstds_cache.selection.run import BatchSelector
from gstds_cache.store.reader import EmbeddingStore
from gstds_cache.stream.reader import open_selection
from gstds_cache.stream.writer import write_file

CONFIG = SelectConfig(batch_size=7, epochs=2, knn=3, schedule="constant:0.5", guidance="none", device="cpu")


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> EmbeddingStore:
    return EmbeddingStore(embed(tmp_path_factory.mktemp("scores") / "store").location)


def select(store: EmbeddingStore, file: Path, config: SelectConfig = CONFIG) -> Path:
    list(write_file(BatchSelector(store, config), file))
    return file


def scored(store: EmbeddingStore, file: Path) -> SampleScores:
    scores = SampleScores(len(store))
    with open_selection(file) as stream:
        for batch in watch_again(selector_of(store, stream.header), stream):
            scores.add(batch)
    return scores


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_a_row_per_sample_as_a_plain_count_gives_it(store, tmp_path, suffix) -> None:
    file = select(store, tmp_path / "s.arrow")
    target = tmp_path / f"scores{suffix}"
    with open_selection(file) as stream:
        header = stream.header
    write_scores(scored(store, file), store, header, target)
    table = pa.parquet.read_table(target) if suffix == ".parquet" else pa.ipc.open_file(str(target)).read_all()
    assert table.schema.metadata[b"gstds.selection_digest"].decode() == header.selection_digest

    selector = BatchSelector(store, CONFIG)
    seen, kept, places, gaps = (defaultdict(list) for _ in range(4))
    for selection, batch in selector.watch():
        indices = selector.plan.batch(selection.seq).indices.tolist()
        ordered = sorted(range(len(indices)), key=lambda i: (batch.vector[i], i))
        values = [batch.vector[i] for i in ordered]
        mean_step = (values[-1] - values[0]) / (len(values) - 1)
        for rank, position in enumerate(ordered):
            row = indices[position]
            seen[row].append(1)
            kept[row].append(row in selection.kept)
            equal = [r for r, value in enumerate(values) if value == values[rank]]
            places[row].append(np.mean(equal) / (len(values) - 1))
            near = [abs(values[rank] - values[r]) for r in (rank - 1, rank + 1) if 0 <= r < len(values)]
            gaps[row].append(np.mean(near) / mean_step)
    rows = table.to_pylist()
    assert [(r["row"], r["id"], r["label"]) for r in rows] == [(i, f"item/{i:04d}", i % 3) for i in range(ITEMS)]
    for r in rows:
        if r["row"] == BAD:
            assert (r["seen"], r["kept"], r["percentile"], r["spacing"]) == (0, 0, None, None)
            continue
        assert (r["seen"], r["kept"]) == (2, sum(kept[r["row"]]))
        assert r["percentile"] == pytest.approx(np.mean(places[r["row"]]))
        assert r["from_middle"] == pytest.approx(np.mean([abs(2 * p - 1) for p in places[r["row"]]]))
        assert r["spacing"] == pytest.approx(np.mean(gaps[r["row"]]))
    assert sum(r["kept"] for r in rows) == header.total_kept


def test_a_rule_without_a_graph_has_counts_and_no_places(store, tmp_path) -> None:
    file = select(store, tmp_path / "s.arrow", SelectConfig(batch_size=7, epochs=1, knn=3, rule="random", device="cpu"))
    columns = scored(store, file).columns
    assert sum(columns["seen"].to_pylist()) == ITEMS - 1
    assert columns["percentile"].null_count == columns["difficulty"].null_count == ITEMS


def test_guidance_is_found_by_its_digest_or_has_to_be_named(store, tmp_path) -> None:
    rule = next(name for name, rule in RULES.items() if rule.needs_guidance and rule.vectors)
    config = replace(CONFIG, rule=rule, guidance="disagreement")
    scores = scored(store, select(store, tmp_path / "s.arrow", config))
    difficulty = scores.columns["difficulty"].to_pylist()
    assert difficulty[BAD] is None
    assert all(0 <= value <= 1 for row, value in enumerate(difficulty) if row != BAD)
    assert max(value or 0 for value in difficulty) > 0

    tried = select(store, tmp_path / "auto.arrow", replace(CONFIG, rule=rule, guidance="auto"))
    with open_selection(tried) as stream:
        assert selector_of(store, stream.header).config.guidance == "auto"

    own = tmp_path / "own.npy"
    np.save(own, np.arange(ITEMS, dtype=np.float32))
    file = select(store, tmp_path / "own.arrow", replace(CONFIG, rule=rule, guidance=f"file:{own}"))
    with open_selection(file) as stream:
        with pytest.raises(FingerprintMismatchError, match="give the --guidance"):
            selector_of(store, stream.header)
        selector = selector_of(store, stream.header, RecomputeSettings(guidance=f"file:{own}"))
        for batch in watch_again(selector, stream):
            assert batch.seen.guidance.tolist() == batch.indices.tolist()


def test_a_schedule_of_a_file_has_to_be_named(store, tmp_path) -> None:
    path = tmp_path / "ratios.txt"
    path.write_text("0.25\n0.75\n")
    file = select(store, tmp_path / "s.arrow", replace(CONFIG, epochs=2, schedule=f"file:{path}"))
    with open_selection(file) as stream:
        with pytest.raises(UsageError, match="give the --schedule file:PATH"):
            selector_of(store, stream.header)
        kept = [
            len(batch.selection.kept)
            for batch in watch_again(
                selector_of(store, stream.header, RecomputeSettings(schedule=f"file:{path}")), stream
            )
        ]
        assert sum(kept) == stream.header.total_kept
    path.write_text("0.25\n0.5\n")
    with open_selection(file) as stream, pytest.raises(FingerprintMismatchError, match="same settings now give"):
        selector_of(store, stream.header, RecomputeSettings(schedule=f"file:{path}"))


def test_places_and_spacing_of_equals() -> None:
    assert percentile(np.array([3.0, 1.0, 1.0, 2.0])).tolist() == pytest.approx([1.0, 1 / 6, 1 / 6, 2 / 3])
    assert spacing(np.array([0.0, 0.0, 4.0])).tolist() == pytest.approx([0.0, 1.0, 2.0])
    assert spacing(np.zeros(3)).tolist() == [1, 1, 1]
    assert (percentile(np.zeros(1)).tolist(), spacing(np.zeros(1)).tolist()) == ([0.5], [1.0])


def test_a_selection_of_another_store_is_refused(store, tmp_path) -> None:
    other = EmbeddingStore(embed(tmp_path / "other", Images(seed=1)).location)
    file = select(other, tmp_path / "s.arrow")
    with open_selection(file) as stream, pytest.raises(FingerprintMismatchError, match="made from cache"):
        selector_of(store, stream.header)


def test_a_batch_that_comes_out_otherwise_is_an_error_and_no_score(store, tmp_path, monkeypatch) -> None:
    with open_selection(select(store, tmp_path / "s.arrow")) as stream:
        stored = list(stream)
        selector = selector_of(store, stream.header)
    stored[1].kept[0], stored[1].kept[1] = stored[1].kept[1], stored[1].kept[0]
    with pytest.raises(FingerprintMismatchError, match="batch 1 of the selection keeps other rows"):
        list(watch_again(selector, stored))


def test_from_the_middle_of_a_run(store, tmp_path) -> None:
    with open_selection(select(store, tmp_path / "s.arrow")) as stream:
        stored = list(stream)
        selector = selector_of(store, stream.header)
    assert [batch.selection.seq for batch in watch_again(selector, stored[2:5])] == [2, 3, 4]
    assert [[batch.seq for batch in span] for span in spans(stored, most=3)] == [[0], [2], [5]]
    assert spans(stored, most=6) == [stored]


def test_where_scores_may_go(tmp_path) -> None:
    with pytest.raises(UsageError, match=r"got the ending '.csv', expected one of .parquet, .arrow"):
        check_target(tmp_path / "s.csv", replace=False)
    (tmp_path / "s.parquet").touch()
    with pytest.raises(UsageError, match="there already"):
        check_target(tmp_path / "s.parquet", replace=False)
    check_target(tmp_path / "s.parquet", replace=True)
