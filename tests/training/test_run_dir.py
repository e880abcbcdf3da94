"""A run's directory has one writer, from before anything is checked until the ledger is there."""

from __future__ import annotations

import os
import re
import signal
import threading
from contextlib import suppress
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import FORKS

from gstds_cache.config import TrainConfig
from gstds_cache.errors import IncompleteError, IntegrityError, UsageError
from gstds_cache.training.checkpoint import Checkpoint
from gstds_cache.training.flops import SMALL_STEP, flops_per_sample, step_threads
from gstds_cache.training.identity import NOT_IDENTITY, default_name
from gstds_cache.training.run_dir import RunDir

CHECKPOINT = Checkpoint(network={}, optimizer={}, step=1, samples=2, loss_sum=0.5, loss=0.5, sha="", seconds={})
HOLD = """
import sys, time
from pathlib import Path
from gstds_cache.training.checkpoint import Checkpoint
from gstds_cache.training.run_dir import RunDir
with RunDir(Path(sys.argv[1]), {"lr": 0.1}, provenance={}, resume=True) as run_dir:
    run_dir.begin()
    counts = {"step": 1, "samples": 2, "loss_sum": 0.5, "loss": 0.5, "sha": "", "seconds": {}}
    run_dir.save_checkpoint(Checkpoint(network={}, optimizer={}, **counts))
    (run_dir.path / ".checkpoint.pt.9-0123abcd.tmp").write_bytes(b"half")
    (run_dir.path / ".metrics.jsonl.tmp").write_bytes(b"half")  # as they were called before
    print("held", flush=True)
    time.sleep(60)
"""


def opened(path: Path, *, resume: bool = True, **config: Any) -> RunDir:
    return RunDir(path, config or {"lr": 0.1}, provenance={}, resume=resume)


def test_a_second_process_is_refused_until_the_first_is_killed_and_then_resumes(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "a"
    readable, writable = os.pipe()
    holder = FORKS.start(["-c", HOLD, str(path)], cwd=tmp_path, stdout=writable)
    os.close(writable)
    with open(readable) as said:  # noqa: PTH123 - a descriptor is no path
        assert said.readline() == "held\n"
    for resume, config in ((True, {}), (False, {}), (True, {"lr": 0.5})):  # whatever else there is to say
        with pytest.raises(IncompleteError, match="is being written by another process"):
            opened(path, resume=resume, **config)
    holder.send_signal(signal.SIGKILL)
    holder.communicate(30)
    with pytest.raises(UsageError, match="pass `resume=True`"):
        opened(path, resume=False)
    with opened(path) as run_dir:
        run_dir.begin()
        assert run_dir.load_checkpoint() == CHECKPOINT
    assert {entry.name for entry in path.iterdir()} == {".lock", "config.json", "checkpoint.pt"}


def test_a_checkpoint_with_a_flipped_bit_is_refused_wherever_it_counts(tmp_path: Path) -> None:
    path = tmp_path / "run" / "checkpoint.pt"
    saved = replace(CHECKPOINT, network={"weight": torch.arange(64.0)}, optimizer={"momentum": torch.ones(64)})
    with opened(tmp_path / "run") as run_dir:
        run_dir.begin()
        run_dir.save_checkpoint(saved)
        written = path.read_bytes()

        def state() -> dict[str, Any]:
            return {name: str(value) for name, value in vars(run_dir.load_checkpoint()).items()}

        expected = state()
        values = written.index(torch.arange(64.0).numpy().tobytes())
        for at in (values + 7, values + 255, *range(0, len(written), 37)):
            path.write_bytes(written[:at] + bytes([written[at] ^ 4]) + written[at + 1 :])
            if at in range(values, values + 256):
                with pytest.raises(IntegrityError, match=r"checkpoint\.pt is damaged: (.|\n)*`out`"):
                    state()
                continue
            with suppress(IntegrityError):
                assert state() == expected  # a date, or what lies between the entries
        path.write_bytes(written)
        assert state() == expected


@pytest.mark.parametrize("place", [3, 22])
def test_a_damaged_line_of_metrics_is_dropped_with_a_note(tmp_path: Path, place: int, caplog: Any) -> None:
    path = tmp_path / "run" / "metrics.jsonl"
    with opened(tmp_path / "run") as run_dir:
        run_dir.begin()
        for step in range(4):
            run_dir.log({"loss": 0.5, "step": step})
        lines = path.read_bytes().splitlines(keepends=True)
        path.write_bytes(lines[0] + lines[1][:place] + b"\xff" + lines[1][place + 1 :] + lines[2] + lines[3] + b'{"lo')
        run_dir.drop_metrics_from(3)
        assert path.read_bytes() == lines[0] + lines[2]
    assert f"{path}: 1 of 4 lines were damaged" in caplog.text


def test_threads_with_a_run_dir_each_and_with_one_between_them(tmp_path: Path) -> None:
    met: list[str] = []

    def enter(run_dir: RunDir | None) -> None:
        try:
            with run_dir or opened(tmp_path / "run"):
                met.append("entered")
        except IncompleteError as error:
            met.append(error.message.partition("run is ")[2])

    with opened(tmp_path / "run") as run_dir:
        for other in (None, run_dir):
            thread = threading.Thread(target=enter, args=(other,))
            thread.start()
            thread.join()
        with run_dir:  # as train() does within gstds-train
            pass
        enter(None)
    assert met == ["being written by another thread of this process"] * 3
    enter(None)
    assert met[-1] == "entered"


def test_nothing_is_left_where_nothing_was_written(tmp_path: Path) -> None:
    with opened(tmp_path / "runs" / "a"):
        assert (tmp_path / "runs" / "a" / ".lock").exists()
    assert not (tmp_path / "runs").exists()
    (tmp_path / "empty").mkdir()
    with opened(tmp_path / "empty"):
        pass
    assert (tmp_path / "empty").is_dir()  # it was there before


def test_a_ledger_may_follow_the_run_of_the_same_object(tmp_path: Path) -> None:
    run_dir = opened(tmp_path / "run", resume=False)
    with run_dir:
        run_dir.begin()
        run_dir.save_checkpoint(CHECKPOINT)
    run_dir.write_ledger({"pays": True})
    assert (tmp_path / "run" / "ledger.json").exists()


OTHER = {"lr": 0.3, "momentum": 0.5, "weight_decay": 0.0, "image_size": 48, "augment": "none", "repack": 64, "seed": 3,
         "arch": "timm:resnet18", "norm_samples": 128, "label_smoothing": 0.1, "precision": "bfloat16",
         "importance_weights": True, "accumulate": 4, "max_pixels": 10_000}  # fmt: skip


def identity(config: TrainConfig, **more: Any) -> dict[str, Any]:
    kept = {name: value for name, value in asdict(config).items() if name not in NOT_IDENTITY}
    return (
        kept
        | {"selection_digest": "59aa9565" * 8, "items_root": "r", "cache_fingerprint": "c", "eval_root": None}
        | more
    )


@pytest.mark.parametrize("field", [field.name for field in fields(TrainConfig) if field.name not in NOT_IDENTITY])
def test_every_setting_that_decides_the_outcome_is_in_the_default_name(field: str) -> None:
    config = TrainConfig(image_size=64, augment="crop")
    defaults = identity(config)
    assert default_name(defaults, defaults) == "resnet18-59aa9565-s0"
    other = replace(config, **{field: OTHER[field]})
    theirs = identity(replace(config, arch=other.arch, seed=other.seed))
    assert default_name(identity(other), theirs) not in {default_name(defaults, defaults), "resnet18-59aa9565-s0"}


def test_a_path_in_the_name_of_a_network_makes_no_folders() -> None:
    defaults = {"arch": "a", "seed": 0, "selection_digest": "59aa9565"}
    names = {
        default_name(run, run)
        for weights in ("../../w.pth", "/w.pth")
        for run in [defaults | {"arch": f"timm:resnet18?weights={weights}"}]
    }
    assert len(names) == 2
    assert all(re.fullmatch(r"timm-resnet18-[0-9a-f]{8}-59aa9565-s0", name) for name in names)


def test_default_names_are_read_by_people() -> None:
    defaults = identity(TrainConfig(image_size=64, augment="crop"))
    config = replace(TrainConfig(image_size=64, augment="crop"), lr=0.3, weight_decay=1e-4, repack=32)
    assert default_name(identity(config, eval_root="e" * 64), defaults) == (
        "resnet18-59aa9565-s0-b32-evaleeeeeeee-lr0.3-wd0.0001"
    )


def test_two_commands_at_once_by_learning_rate_and_with_the_same_settings(
    command, start, image_folder, tiny_model, result_of
) -> None:
    command("gstds-embed", f"imagefolder:{image_folder}", "--model", tiny_model, "--cache", "s")
    command(
        "gstds-select", "s", "--batch-size", "16", "--knn", "4", "--epochs", "2", "--rule", "random", "--out", "s.arrow"
    )
    words = ["gstds-train", f"imagefolder:{image_folder}", "--selection", "s.arrow", "--arch", "conv3", "--json"]
    named = [Path(result_of(command(*words, *more))["run_dir"]).name for more in ([], ["--lr", "0.03"])]
    assert named[1] == f"{named[0]}-lr0.03"
    again = result_of(command(*words, "--lr", "0.03", "--resume"))
    assert Path(again["run_dir"]).name == named[1]
    both = [start(*words, "--out", "one") for _ in range(2)]
    ended = [(process.communicate(200), process.wait()) for process in both]
    codes = sorted(code for _, code in ended)
    assert codes[0] == 0
    assert codes[1] in {2, 4}  # 2 where one came when the other had ended
    assert any("is being written by another process" in err or "holds a run" in err for (_, err), _ in ended)
    assert len((image_folder.parent / "one" / "metrics.jsonl").read_text().splitlines()) == 3


def test_threads_follow_from_the_work_of_a_step_and_from_nothing_else() -> None:
    small, large = (flops_per_sample("conv3", classes=10, side=side) for side in (8, 64))
    assert small is not None
    assert large is not None
    assert step_threads(small, 32.0) == 1  # the demo's
    assert step_threads(large, 512.0) == 0
    assert step_threads(None, 1.0) == 0
    assert [step_threads(SMALL_STEP, samples) for samples in (0.99, 1.0)] == [1, 0]
    assert flops_per_sample("alexnet", classes=10, side=16) is None  # training says what is wrong
