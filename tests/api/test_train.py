"""``gstds_cache.train``: what the command does, as a call that leaves nothing of its own behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import threadpoolctl
import torch
from PIL import Image

import gstds_cache
from gstds_cache.api.train import estimate_training, train
from gstds_cache.data.manifest import build_manifest
from gstds_cache.data.sources import open_source
from gstds_cache.errors import FingerprintMismatchError, UsageError
from gstds_cache.selection.selected_batch import SelectedBatch
from gstds_cache.spectral.status import Status
from gstds_cache.stream.schema import Header
from gstds_cache.stream.writer import SelectionWriter

DATASET = "digits?split=test"  # 385 items
EPOCHS, STEPS, KEPT = 2, 3, 20
SETTINGS: dict[str, Any] = {"arch": "conv3", "lr": 0.02, "device": "cpu", "progress": False}


@pytest.fixture(scope="module")
def selection(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random rows of the digits."""
    path = tmp_path_factory.mktemp("selection") / "s.arrow"
    manifest = build_manifest(open_source(DATASET))
    batches, kept = EPOCHS * STEPS, [STEPS * KEPT] * EPOCHS
    header = Header(
        "c" * 64, "d" * 64, len(manifest), manifest.root, 0, EPOCHS, STEPS, batches, batches * KEPT, kept, {}
    )
    rng = np.random.default_rng(0)
    with path.open("wb") as file, SelectionWriter(file, header) as writer:
        for seq in range(batches):
            rows = rng.permutation(len(manifest))[:KEPT]
            writer.write(SelectedBatch(seq, *divmod(seq, STEPS), 80, rows, None, Status.CONVERGED, 0.5, 0.0))
    return path


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GSTDS_CACHE", str(tmp_path / "cache"))


def test_a_second_thread_trains_after_the_first(selection) -> None:
    """Their steps would share torch's global random numbers."""
    phases, begun = [], threading.Event()

    def run(name: str) -> None:
        def progress(*_: object) -> None:
            phases.append(name)
            begun.set()
            time.sleep(0.01)  # room for the other one

        train(DATASET, selection, out=name, notify=lambda _: None, **(SETTINGS | {"progress": progress}))

    threads = [threading.Thread(target=run, args=(name,)) for name in ("a", "b")]
    threads[0].start()
    assert begun.wait(60)
    threads[1].start()
    for thread in threads:
        thread.join()
    assert phases == sorted(phases)
    assert set(phases) == {"a", "b"}


def test_a_call_trains_writes_its_ledger_and_goes_on(selection) -> None:
    phases, lines = set(), []
    report = train(
        DATASET,
        str(selection),
        evaluation=DATASET,
        notify=lines.append,
        **SETTINGS | {"progress": lambda phase, _done, _total, _shares: phases.add(phase)},
    )
    evaluated = build_manifest(open_source(DATASET)).root
    assert report.run_dir == Path(f"runs/conv3-dddddddd-s0-eval{evaluated[:8]}-lr0.02")
    assert (report.steps, report.gradient_samples, report.left_over) == (EPOCHS * STEPS, EPOCHS * STEPS * KEPT, 0)
    assert report.accuracy is not None
    assert 300 < report.accuracy.items < 400
    assert repr(report) == (
        f"TrainReport('{report.run_dir}', accuracy={report.accuracy.value:.4f}, loss={report.loss:.4f}, steps=6, "
        "gradient_samples=120)"
    )
    assert phases >= {"load", "train"}
    assert not lines
    written = json.loads((report.run_dir / "ledger.json").read_text())
    assert written == json.loads(json.dumps(report.ledger.to_dict()))
    assert written["seconds"]["open"] > 0
    assert json.loads(json.dumps(report.to_dict()))["ledger"] == written
    with pytest.raises(UsageError, match="pass `resume=True`"):
        train(DATASET, selection, evaluation=DATASET, **SETTINGS)
    again = train(DATASET, selection, evaluation=DATASET, resume=True, **SETTINGS)
    assert (again.steps, again.accuracy) == (report.steps, report.accuracy)
    assert again.ledger.saved_seconds == report.ledger.saved_seconds  # no step was taken, and what they took is known
    assert json.loads((report.run_dir / "ledger.json").read_text())["saved_seconds"] == report.ledger.saved_seconds


def test_the_cap_of_pixels_is_the_runs_and_a_default_one_leaves_its_name(selection) -> None:
    settings = SETTINGS | {"image_size": 8}  # the digits are arrays of 8 x 8, which no cap is for
    usual = train(DATASET, selection, norm_samples=0, **settings)
    assert "max_pixels" not in json.loads((usual.run_dir / "config.json").read_text())["config"]
    again = train(DATASET, selection, norm_samples=0, max_pixels=1 << 20, **settings)
    assert again.run_dir == usual.run_dir.with_name(
        f"{usual.run_dir.name.replace('-norm0', '')}-max_pixels1048576-norm0"
    )
    with pytest.raises(FingerprintMismatchError, match="max_pixels: the run has 1048576, now 2097152"):
        train(DATASET, selection, norm_samples=0, max_pixels=1 << 21, out=again.run_dir, resume=True, **settings)


def test_threads_random_numbers_and_the_interrupt_handler_are_put_back(selection, monkeypatch) -> None:
    seen: list[tuple[int, Any]] = []

    def look(phase: str, *_progress: Any) -> None:
        if phase == "train":
            seen.append((torch.get_num_threads(), signal.getsignal(signal.SIGINT)))

    def state() -> tuple[Any, ...]:
        pools = sorted((pool["filepath"], pool["num_threads"]) for pool in threadpoolctl.threadpool_info())
        return torch.get_num_threads(), pools, signal.getsignal(signal.SIGINT), torch.get_rng_state().tolist()

    before = state()
    train(DATASET, selection, **SETTINGS | {"progress": look, "threads": 2})
    assert {threads for threads, _ in seen} == {2}
    assert seen[-1][1] is not before[2]
    threads, pools, *rest = state()
    assert [threads, *rest] == [before[0], *before[2:]]
    assert set(before[1]) <= set(pools)


def test_ctrl_c_ends_it_after_a_step_and_the_error_names_the_run(selection) -> None:
    def interrupt(phase: str, done: int, _total: int, _shares: Any) -> None:
        if (phase, done) == ("train", 2):
            os.kill(os.getpid(), signal.SIGINT)

    lines: list[str] = []
    with pytest.raises(KeyboardInterrupt, match=r"with `resume=True` `out='a run'` to go on"):
        train(DATASET, selection, out="a run", notify=lines.append, **SETTINGS | {"progress": interrupt})
    assert lines == ["stopping after this step (Ctrl-C again: at once)"]
    assert torch.load("a run/checkpoint.pt", weights_only=True)["step"] == 3
    assert train(DATASET, selection, out="a run", resume=True, **SETTINGS).steps == EPOCHS * STEPS


def test_it_trains_in_a_thread_which_gets_no_signals(selection) -> None:
    reports: list[Any] = []
    thread = threading.Thread(target=lambda: reports.append(train(DATASET, selection, out="run", **SETTINGS)))
    thread.start()
    thread.join()
    assert reports[0].steps == EPOCHS * STEPS


def test_a_file_that_has_changed_since_it_was_embedded_is_named(tiny_model, tmp_path) -> None:
    folder, rng = tmp_path / "photos", np.random.default_rng(0)
    for number in range(24):
        path = folder / "ab"[number % 2] / f"{number:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (8, 8, 3), np.uint8)).save(path)
    settings = {"device": "cpu", "progress": False}
    gstds_cache.embed(f"imagefolder:{folder}", tmp_path / "store", model=tiny_model, workers=0, **settings)
    chosen = gstds_cache.select(
        tmp_path / "store", rule="random", batch_size=12, epochs=1, out=tmp_path / "s.arrow", **settings
    )

    def refused() -> str:
        with pytest.raises(FingerprintMismatchError, match="made from another data set") as caught:
            train(f"imagefolder:{folder}", chosen.path, **SETTINGS)
        return caught.value.message

    Image.new("RGB", (8, 8)).save(folder / "b" / "03.png")
    said = refused()
    assert "of 24 items 1 have other bytes, 0 another label" in said
    assert "the first with other bytes: item 13, 'b/03.png'" in said
    (folder / "b" / "03.png").rename(folder / "b" / "04.png")
    assert "the first that differs is item 13, 'b/04.png', and was 'b/03.png'" in refused()
    (tmp_path / "store").rename(tmp_path / "moved")  # where it is now is not known
    assert "item 13" not in refused()
    (folder / "a" / "00.png").rename(folder / "a" / "01.png")
    gstds_cache.embed(f"imagefolder:{folder}", tmp_path / "store", model=tiny_model, workers=0, **settings)
    (folder / "a" / "01.png").rename(folder / "a" / "00.png")  # of another store in its place nothing is said
    assert "item 0" not in refused()
    shutil.rmtree(tmp_path / "store")
    assert "item 13" not in refused()
    with pytest.raises(FingerprintMismatchError, match="item 13"):
        train(f"imagefolder:{folder}", chosen.path, cache=tmp_path / "moved", **SETTINGS)


def test_an_estimate_writes_nothing(selection, tmp_path) -> None:
    ledger = estimate_training(DATASET, selection, evaluation=DATASET, **SETTINGS, repack=16)
    assert not list(tmp_path.iterdir())
    assert ledger.planned
    assert ledger.gradient_samples == EPOCHS * STEPS * KEPT // 16 * 16
    assert all(ledger.seconds[phase] > 0 for phase in ("load", "step", "eval"))
    assert ledger.embed is ledger.select is ledger.select_seconds is None
    assert "(`cache`)" in ledger.select_source


@pytest.mark.usefixtures("no_type_checks")
@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"lr": 0.0}, "`lr`: got 0.0"),
        ({"repack": 2.5}, "`repack`: got 2.5, expected a whole number"),
        ({"augment": None}, "`augment`: got None, expected one of auto, none, crop"),
        ({"evaluation": "imagefolder:nowhere"}, "nowhere"),
        ({"arch": "resnet19"}, "unknown architecture 'resnet19'"),
        ({"device": "tpu"}, "tpu"),
    ],
)
def test_a_bad_argument_is_named_and_nothing_written(selection, tmp_path, settings, text) -> None:
    with pytest.raises(UsageError, match=text):
        train(DATASET, selection, **SETTINGS | settings)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("call", [train, estimate_training])
def test_a_misspelled_setting_is_named(selection, tmp_path, call) -> None:
    with pytest.raises(TypeError, match=rf"^{call.__name__}\(\) has no setting 'epoch_lr'; there are: arch, seed, lr"):
        call(DATASET, selection, epoch_lr=1.0)
    assert not list(tmp_path.iterdir())
