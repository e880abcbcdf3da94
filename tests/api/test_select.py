"""``select``, ``stream_selection`` and ``serve`` as a Python user calls them, and the identity of what they make."""

from __future__ import annotations

import io
import json
import logging
import pickle
import re
import signal
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from fractions import Fraction
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import small_store
import threadpoolctl
import torch
from click.testing import CliRunner
from small_store import fill

from gstds_cache.api import select_batches as module
from gstds_cache.api.export import export_scores
from gstds_cache.api.report import write_report
from gstds_cache.api.select_batches import select, stream_selection
from gstds_cache.api.serve import serve
from gstds_cache.config import SelectConfig
from gstds_cache.errors import UsageError
from gstds_cache.selection import guidance_spec
from gstds_cache.selection.run import BatchSelector
from gstds_cache.selection.schedule import RunSchedule
from gstds_cache.store.access import KINDS
from gstds_cache.store.reader import EmbeddingStore
from gstds_cache.stream.reader import open_selection
from gstds_cache.stream.writer import header_of
from gstds_cache.training.sampler import SelectedBatchSampler

SMALL = {"batch_size": 8, "epochs": 2, "knn": 3, "device": "cpu"}
QUICK = SMALL | {"rule": "random"}


@pytest.fixture
def store(tmp_path: Path) -> Path:
    fill(tmp_path / "store")
    return tmp_path / "store"


def test_a_selection_is_a_short_value_and_stays_where_it_was(store, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    opened = EmbeddingStore("store")
    made, found = (select(opened, out="s.arrow", progress=False, notify=lambda _: None, **QUICK) for _ in range(2))
    assert made.summary != found.summary  # one was computed, the other found
    assert len({made, found}) == 1
    assert repr(made) == f"Selection('{tmp_path}/s.arrow', 'random', epochs=2, total_steps=6)"
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert len(list(made)) == 6
    assert repr(made.sampler()).endswith("epochs=2, total_steps=6, rank=0 of 1)")
    beside = select(opened, progress=False, notify=lambda _: None, **(QUICK | {"seed": 1}))
    assert beside.path.parent == tmp_path / "store.selections"
    assert not list(Path().iterdir())
    with open_selection(made.path) as stream:
        next(iter(stream))
        assert repr(stream) == f"SelectionStream({made.digest[:16]}, batch 1 of 6)"


def test_a_batch_size_that_nobody_gave_fits_a_store_of_few_rows(store, tmp_path) -> None:
    """A quarter of the 21 rows would be 5; ten neighbours need more than that, three do not."""
    quiet = {"progress": False, "device": "cpu", "epochs": 1, "rule": "random"}
    for knn, size in ((10, 21), (3, 8), (1, 5)):
        fitted = select(store, out=tmp_path / f"{knn}.arrow", knn=knn, **quiet)
        assert fitted == select(store, out=tmp_path / f"{knn}.arrow", knn=knn, batch_size=size, **quiet)
    with pytest.raises(UsageError, match="`batch_size`: got 512, but only 21 rows have an embedding"):
        select(store, batch_size=512, **quiet)
    with pytest.raises(UsageError, match=r"`knn`: got 30, expected from 1 to batch size - 1 = 20"):
        select(store, knn=30, **quiet)


def test_a_service_outside_the_main_thread_needs_to_be_told_when_to_stop(store) -> None:
    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(serve, store, "127.0.0.1:0", **QUICK)
        with pytest.raises(UsageError, match="`stop`: got None outside the main thread"):
            done.result()


def test_a_selection_is_made_once_and_found_from_then_on(store, monkeypatch) -> None:
    lines: list[str] = []
    made = select(store, progress=False, notify=lines.append, **QUICK)
    assert made.path == store.with_name("store.selections") / f"{made.digest[:16]}.arrow"
    assert (made.epochs, made.total_steps, made.summary.cache_hit) == (2, 6, False)
    assert made.summary.batches == made.summary.total_batches == 6
    assert [line.partition(":")[0] for line in lines] == ["plan", "rows"]
    kept = [batch.kept.tolist() for batch in made]
    assert kept == [batch.kept.tolist() for batch in made]  # it can be read again
    sampler = made.sampler(batch_size=5)
    assert sampler.total_steps == sum(map(len, kept)) // 5
    assert json.loads(made.path.with_name(f".{made.path.name}.cost.json").read_text())["samples"] == 42

    monkeypatch.setattr(BatchSelector, "run", None)
    found = select(EmbeddingStore(store), progress=False, notify=lines.append, **QUICK)
    assert (found.path, found.digest, found.summary.cache_hit) == (made.path, made.digest, True)
    assert lines[-1] == f"cache hit: this selection is in {made.path} already, nothing was computed"
    copy = select(store, out=store.with_name("copy.arrow"), progress=False, **QUICK)
    assert copy.path.read_bytes() == made.path.read_bytes()
    stream = io.BytesIO()
    assert stream_selection(store, stream, progress=False, **QUICK).cache_hit
    assert stream.getvalue() == made.path.read_bytes()


def test_a_selection_goes_where_its_path_does(store, tmp_path) -> None:
    made = select(store, progress=False, **QUICK)
    with open_selection(made) as stream:
        assert stream.header.selection_digest == made.digest
    sampler = SelectedBatchSampler(made)
    assert pickle.loads(pickle.dumps(sampler)).total_steps == sampler.total_steps == made.total_steps
    assert export_scores(store, made, tmp_path / "scores.arrow", device="cpu", progress=False).epochs == made.epochs
    assert write_report(made, out=tmp_path / "page.html", batches=3, device="cpu", progress=False).selections == 1


def test_how_a_store_is_read_is_said_where_it_is_opened(store, tmp_path) -> None:
    lines: list[str] = []
    mirror = tmp_path / "mirror"
    made = select(store, memory_budget=0, mirror=mirror, progress=False, notify=lines.append, **QUICK)
    assert any(str(mirror) in line for line in lines if line.startswith("rows: "))
    stream = io.BytesIO()
    assert stream_selection(store, stream, memory_budget=0, access="window", progress=False, **QUICK).cache_hit
    assert made.path.read_bytes() == stream.getvalue()
    opened = EmbeddingStore(store)
    for reading in ({"memory_budget": 1}, {"access": "memory"}, {"mirror": mirror}):
        with pytest.raises(UsageError, match="open already"):
            select(opened, progress=False, **reading, **QUICK)
    with pytest.raises(UsageError, match="open already"):
        serve(opened, "127.0.0.1:0", access="memory", **QUICK)


def test_a_stream_gets_the_bytes_of_the_file_and_leaves_the_file(store) -> None:
    stream = io.BytesIO()
    summary = stream_selection(store, stream, progress=False, **QUICK)
    assert (summary.out, summary.batches) == ("-", 6)
    found = select(store, progress=False, **QUICK)
    assert found.summary.cache_hit
    stream.seek(0)
    with open_selection(found.path) as kept:
        from gstds_cache.stream.reader import SelectionStream

        assert [a.kept.tolist() for a in SelectionStream(stream)] == [b.kept.tolist() for b in kept]


def test_threads_are_what_they_were_when_a_call_returns_or_fails(store) -> None:
    def now() -> list[int]:
        return [torch.get_num_threads(), *(pool["num_threads"] for pool in threadpoolctl.threadpool_info())]

    before, within = now(), []
    select(store, progress=lambda *_: within.append(now()), threads=3, **QUICK)
    assert within[0][0] == 3
    assert now() == before
    with pytest.raises(UsageError):
        select(store, threads=3, progress=False, **QUICK | {"batch_size": 100})
    assert now() == before


def test_progress_is_told_of_every_batch(store, capsys) -> None:
    calls = []
    select(store, progress=lambda *call: calls.append(call), **QUICK)
    assert [call[:3] for call in calls] == [("select", done, 6) for done in range(1, 7)]
    assert capsys.readouterr() == ("", "")


def test_warnings_are_logged_where_nobody_is_told(store, tmp_path, monkeypatch, caplog) -> None:
    monkeypatch.setenv("GSTDS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "store.selections").write_text("a file in the place of the folder")
    with caplog.at_level(logging.INFO, "gstds_cache"):
        made = select(store, progress=False, **QUICK)
    assert made.path.is_relative_to(tmp_path / "cache")
    levels = {record.message.partition(":")[0]: record.levelname for record in caplog.records}
    assert levels == {"plan": "INFO", "rows": "INFO", "note": "WARNING"}


def test_a_file_that_holds_something_else_is_replaced_by_force(store, tmp_path) -> None:
    (tmp_path / "notes.txt").write_text("my notes")
    with pytest.raises(UsageError, match="`force=True`"):
        select(store, out=tmp_path / "notes.txt", progress=False, **QUICK)
    select(store, out=tmp_path / "notes.txt", force=True, progress=False, **QUICK)
    with open_selection(tmp_path / "notes.txt") as stream:
        assert stream.header.total_batches == 6


@pytest.mark.parametrize(
    ("keep", "schedule"), [(0.25, "constant:0.75"), (0.8, "constant:0.2"), (1.0, "constant:0.0"), (0.1, "constant:0.9")]
)
def test_the_share_that_stays_is_the_constant_schedule(keep: float, schedule: str) -> None:
    assert module.config_of(keep, {}).schedule == schedule
    assert module.config_of(None, {"schedule": schedule}) == module.config_of(keep, {})


@pytest.mark.usefixtures("no_type_checks")
def test_a_share_may_be_any_real_number() -> None:
    for keep in (Fraction(1, 4), np.float32(0.25), np.float16(0.25), Decimal("0.25"), np.float64(0.25)):
        assert module.config_of(keep, {}).schedule == "constant:0.75"
    assert module.config_of(np.float32(0.8), {}).schedule == "constant:0.2"
    assert module.config_of(1, {}).schedule == module.config_of(np.int64(1), {}).schedule == "constant:0.0"


@pytest.mark.usefixtures("no_type_checks")
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda store: stream_selection(store, None), "`stream`: got None, expected a binary stream"),
        (lambda store: serve(store, None), "`address`: got None, expected HOST:PORT"),
        (lambda store: serve(store, 8815), "`address`: got 8815, expected HOST:PORT"),
    ],
)
def test_an_argument_that_cannot_be_meant_is_named(store, call, message: str) -> None:
    with pytest.raises(UsageError, match=f"^{message}"):
        call(store)


def test_a_misspelled_setting_is_named(store) -> None:
    for call, arguments in ((select, ()), (stream_selection, (io.BytesIO(),)), (serve, ("127.0.0.1:0",))):
        with pytest.raises(TypeError, match=rf"^{call.__name__}\(\) has no setting 'kep'; did you mean 'keep'\?$"):
            call(store, *arguments, kep=0.5)


@pytest.mark.usefixtures("no_type_checks")
def test_a_share_that_cannot_be_meant() -> None:
    for keep in (0.0, -0.5, 1.5, float("nan"), Fraction(5, 4)):
        with pytest.raises(UsageError, match="`keep`: got"):
            module.config_of(keep, {})
    for keep in (True, "0.25", [0.25], 1j):
        with pytest.raises(UsageError, match=f"`keep`: got {re.escape(repr(keep))}, expected a number"):
            module.config_of(keep, {})
    with pytest.raises(UsageError, match="`keep` and `schedule`"):
        module.config_of(0.5, {"schedule": "constant:0.5"})


# What commit a7dbd0c, the last with stores of format 1, computes from the same store and settings.
DIGESTS = [
    ({}, "533de6b3a0073b1bb6723445ee9796ad5737b615cfed78e2fe7a297d9fc29500"),
    ({"rule": "random"}, "57e1f41c97f63b8d52fdc5e62cc26f07e287cd3dc23995406cf24bd44dc939a7"),
    (
        {"rule": "cells", "guidance": "probe?lr_scale=2.0&cutoff=0.1", "order": "window:16"},
        "dfc8714dbd6f4c73dab97eb32e6ca9aacf09195f4567de9272eb8c4958e5be50",
    ),
    (
        {"batch_assignments": 2, "schedule": "linear:0.25:0.75", "epochs": 3},
        "5b4a667651afe4b5430568bdeecc14ada39bbc3446622687bd8d283177ec6082",
    ),
    (
        {"rule": "strata", "guidance": "disagreement", "batch_assignments": 0},
        "982ca576ad6691435c686554279f0db127c6afc2a35f7f4ccfe2bd7dca670747",
    ),
    ({"schedule": "file:ratios.txt"}, "85fce7b0f751623afb20c526a0c681f87ee83f78d993cb82962dfa3a7f67d98a"),
    ({"schedule": "budget:20"}, "4f3f4893afe510b444864b74874317064fd51fef50d599df3a29984bbd07c329"),
    (
        {"rule": "guided", "guidance": "file:scores.npy"},
        "d8892cb57b20c67ccb60be79dd695623d899f875483092bc2fd4f29d3eb0f3b4",
    ),
    ({"order": "window"}, "01270b6c92f4d0db29ac30a9c85158336aa33f2b8808b625f42f1ba881621238"),
]


@pytest.mark.parametrize(("settings", "digest"), DIGESTS, ids=[str(settings) for settings, _ in DIGESTS])
def test_selections_of_earlier_versions_are_found(tmp_path, settings, digest: str, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(small_store, "make_spec", partial(small_store.make_spec, format=1))
    fill("store")
    Path("ratios.txt").write_text("0.5\n0.25\n")
    np.save("scores.npy", np.arange(22, dtype=np.float64))
    selector = BatchSelector(EmbeddingStore("store"), SelectConfig(**SMALL | settings))
    assert selector.digest == digest
    assert "partitions" in header_of(selector).settings  # headers are compared whole


def test_labels_are_hashed_and_the_plan_is_summed_up_once_a_selection(store, monkeypatch) -> None:
    calls: Counter[str] = Counter()
    pieces, kept_per_epoch = guidance_spec.pieces, RunSchedule.kept_per_epoch.func
    monkeypatch.setattr(guidance_spec, "pieces", lambda labels: calls.update(["labels"]) or pieces(labels))

    def counted(run: RunSchedule) -> np.ndarray:
        calls["plan"] += 1
        return kept_per_epoch(run)

    monkeypatch.setattr(RunSchedule, "kept_per_epoch", property(counted))
    select(store, progress=False, **SMALL | {"guidance": "disagreement", "rule": "strata"})
    assert calls == {"labels": 1, "plan": 1}


def test_a_service_ends_when_its_event_is_set_and_leaves_signal_handlers_alone(store) -> None:
    lines: list[dict[str, object]] = []
    stop, serving = threading.Event(), threading.Event()

    def notify(line: str) -> None:
        lines.append(json.loads(line))
        serving.set()

    before, ended = signal.getsignal(signal.SIGTERM), []
    service = threading.Thread(
        target=lambda: ended.append(serve(store, "127.0.0.1:0", stop=stop, notify=notify, **QUICK))
    )
    service.start()
    assert serving.wait(30)
    with open_selection(str(lines[0]["location"])) as stream:
        assert len(list(stream)) == 6
    stop.set()
    service.join(30)
    assert ended == [0]
    assert signal.getsignal(signal.SIGTERM) is before
    assert [lines[0]["event"], lines[-1]["event"]] == ["serving", "stopped"]


def run(*words: str):
    from gstds_cache.cli.select_command import main

    return CliRunner().invoke(main, [*words, "--batch-size", "8", "--epochs", "2", "--knn", "3", "--rule", "random"])


def test_the_command_keeps_a_share_and_takes_the_old_name_of_a_flag(store) -> None:
    done = run(str(store), "--keep", "0.5", "--partitions=2", "--json")
    assert done.exit_code == 0, done.output
    assert "note: --partitions is now called --batch-assignments" in done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    with open_selection(result["out"]) as stream:
        settings = stream.header.settings
    assert (settings["schedule"], settings["partitions"]) == ("constant:0.5", 2)
    both = run(str(store), "--keep", "0.5", "--schedule", "constant:0.5")
    assert both.exit_code == 2
    assert "--keep and --schedule both say" in both.stderr


def test_the_command_offers_every_way_to_read_rows() -> None:
    from gstds_cache.cli.select_command import main

    (access,) = (option for option in main.params if option.name == "access")
    assert tuple(access.type.choices) == KINDS
