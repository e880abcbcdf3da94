"""Runs and their trackers: each library's own files are read back, by its own reader where it has one."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from contextlib import nullcontext
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

import pytest

from gstds_cache.config import TrainConfig
from gstds_cache.errors import UsageError
from gstds_cache.stream.reader import open_selection
from gstds_cache.trackers import names
from gstds_cache.trackers.credentials import without_credentials
from gstds_cache.trackers.feed import Feed
from gstds_cache.trackers.names import tracker_names
from gstds_cache.trackers.points_file import PointsFile
from gstds_cache.trackers.tracker import Point, TrackedRun
from gstds_cache.training import tracking as tracking_module
from gstds_cache.training.identity import run_config
from gstds_cache.training.loop import train
from gstds_cache.training.run_dir import RunDir
from gstds_cache.training.tracking import Tracking, flat

CONFIG = TrainConfig(arch="timm:test_resnet", image_size=16, lr=0.02, device="cpu", workers=0, norm_samples=0)
STEPS = [4, 8, 10, 12]  # of twelve in three epochs: each epoch's last, and the tenth
SECRET = "a-secret-of-40-characters-0123456789abcd"


@pytest.fixture(autouse=True)
def offline(tmp_path, monkeypatch) -> None:
    """No tracker reaches for a network, secrets of all kinds are around, and there is time to load libraries."""
    monkeypatch.setattr(tracking_module, "PATIENCE", 300.0)
    monkeypatch.setattr(tracking_module, "IMPATIENCE", 300.0)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file://{tmp_path}/mlruns")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    for name in ("WANDB_API_KEY", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, SECRET)


@pytest.fixture
def source(array_source):
    return array_source(72)


def run(source, selection: Path, out: Path, log: tuple[str, ...], notes: list[str] | None = None, **options: Any):
    with open_selection(selection) as stream:
        identity = run_config(CONFIG, stream.header, None)
        run_dir = RunDir(out, identity, provenance={}, resume=True)
        about = identity | {"dataset": "s3://me:hunter2@bucket/photos?token=abcdef"}
        tell = (lambda _line: None) if notes is None else notes.append
        with Tracking(log, run_dir=out, config=about, identity=identity, notify=tell) as tracking:
            return train(source, stream, CONFIG, run_dir, evaluation=source, tracking=tracking, **options)


def stopped_after(steps: int):
    """What ``interruptible`` is, for a run that stops after so many steps."""
    taken = iter(range(1, 1000))
    return lambda: nullcontext(lambda: next(taken) >= steps)


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "trackers" / "points.jsonl").read_text().splitlines()]


def expected(out: Path, name: str) -> list[tuple[int, float]]:
    return [(line["step"], line["values"][name]) for line in lines(out) if name in line["values"]]


def scalars(out: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard's own reader finds."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(out / "trackers" / "tensorboard"))
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def offline_records(folder: Path) -> list[Any]:
    """The records of W&B's offline files, oldest first: a LevelDB log of protocol buffers behind 7 bytes of header."""
    from wandb.proto import wandb_internal_pb2

    records = []
    for path in sorted(folder.rglob("run-*.wandb")):
        data, at, whole = path.read_bytes(), 7, b""
        while at + 7 <= len(data):
            if 32768 - at % 32768 < 7:  # a block's rest that is too short for a header
                at += 32768 - at % 32768
                continue
            _, size, kind = struct.unpack_from("<IHB", data, at)
            whole += data[at + 7 : at + 7 + size]
            at += 7 + size
            if kind in (1, 4):  # whole, or the last part of one
                record = wandb_internal_pb2.Record()
                record.ParseFromString(whole)
                records.append(record)
                whole = b""
    return records


def history(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Values by name, from the records of :func:`offline_records`."""
    found: dict[str, list[tuple[int, float]]] = {}
    for record in offline_records(folder):
        if record.WhichOneof("record_type") == "history":
            row = {(item.key or item.nested_key[0]): json.loads(item.value_json) for item in record.history.item}
            for name, value in row.items():
                if name not in {"step"} and not name.startswith("_"):
                    found.setdefault(name, []).append((row["step"], value))
    return found


def metrics(wanted: list[str]) -> tuple[dict[str, list[tuple[int, float]]], Any]:
    """What MLflow's own client finds of the one run there is, and the run."""
    from mlflow import MlflowClient

    client = MlflowClient()
    (one,) = client.search_runs([client.get_experiment_by_name("gstds-cache").experiment_id])
    return {name: [(m.step, m.value) for m in client.get_metric_history(one.info.run_id, name)] for name in wanted}, one


def test_all_three_hold_each_point_once_after_an_interrupt_and_a_kill(source, uneven, tmp_path) -> None:
    selection, out = uneven[0], tmp_path / "run"
    notes: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        run(source, selection, out, names.NAMES, notes, interruptible=stopped_after(9))
    # As after a kill between an epoch's end and the next checkpoint: trackers are ahead of it.
    with (out / "trackers" / "points.jsonl").open("a") as file:
        file.write('{"step": 10, "values": {"lo')
    run(source, selection, out, names.NAMES, notes)

    assert not [note for note in notes if note.startswith("note")], notes
    assert [line["step"] for line in lines(out)] == [*STEPS, 12]
    tensorboard, wandb = scalars(out), history(out)
    every = sorted({name for line in lines(out) for name in line["values"]})
    mlflow, stored = metrics(every)
    assert every == ["core_seconds", "epoch", "epoch_loss", "gradient_samples", "loss", "lr", "test_accuracy"]
    for name in every:
        points = expected(out, name)
        assert wandb[name] == mlflow[name] == points
        assert tensorboard[name] == [(step, pytest.approx(value, rel=1e-6)) for step, value in points]
    epochs = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [value for _, value in mlflow["epoch_loss"]] == [line["loss"] for line in epochs[:-1]]
    assert mlflow["gradient_samples"][-1] == (12, epochs[-1]["gradient_samples"])
    assert mlflow["test_accuracy"] == [(12, epochs[-1]["test_accuracy"])]
    spent = [value for _, value in mlflow["core_seconds"]]
    assert spent == sorted(spent)
    assert spent[0] > 0
    # What the run is, and nothing secret.
    config = json.loads((out / "config.json").read_text())["config"]
    assert stored.data.params["selection_digest"] == config["selection_digest"]
    assert stored.data.params["cache_fingerprint"] == config["cache_fingerprint"]
    assert stored.data.params["dataset"] == "s3://***@bucket/photos?token=***"
    assert stored.info.status == "FINISHED"
    (text,) = {len(r.run.config.update) for r in offline_records(out) if r.WhichOneof("record_type") == "run"}
    assert text >= len(config)
    for file in [*out.rglob("*"), *(tmp_path / "mlruns").rglob("*")]:
        if file.is_file():
            assert SECRET.encode() not in file.read_bytes(), file
            assert b"hunter2" not in file.read_bytes(), file


class Recording:
    """A tracker that remembers, and fails or is killed when told to."""

    def __init__(self, told: list[tuple[int, Point]], run: TrackedRun, *, fail_at: int = 1000) -> None:
        self.run_id, self.where, self._told, self._fail_at = run.run_id or "one", "nowhere", told, fail_at

    def send(self, first: int, points: list[Point]) -> None:
        for place, point in enumerate(points, first):
            if place >= self._fail_at:
                raise OSError(28, f"no space left, and the key is {SECRET}")
            self._told.append((place, point))

    def close(self, outcome: str) -> None:
        self._told.append((-1, Point(0, {outcome: 0})))


def test_one_that_fails_loses_no_step_and_gets_the_rest_at_the_next_session(
    source, uneven, tmp_path, monkeypatch
) -> None:
    told: list[tuple[int, Point]] = []
    notes: list[str] = []
    monkeypatch.setattr(tracking_module, "open_tracker", lambda _: lambda run: Recording(told, run, fail_at=0))
    report = run(source, uneven[0], tmp_path / "run", ("wandb",), notes)
    assert report.steps == 12
    (note,) = [note for note in notes if note.startswith("note")]
    assert note.startswith("note: `log`: wandb failed (OSError:")
    assert note.endswith("`resume=True` sends them")
    assert SECRET not in note
    monkeypatch.setattr(tracking_module, "open_tracker", lambda _: lambda run: Recording(told, run))
    run(source, uneven[0], tmp_path / "run", ("wandb",), notes)
    assert [(place, point.step) for place, point in told] == [(0, 4), (1, 8), (2, 10), (3, 12), (4, 12), (-1, 0)]


def test_points_of_a_session_without_trackers_are_sent_by_the_next_one(source, uneven, tmp_path, monkeypatch) -> None:
    told: list[tuple[int, Point]] = []
    monkeypatch.setattr(tracking_module, "open_tracker", lambda _: lambda run: Recording(told, run))
    out = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        run(source, uneven[0], out, ("wandb",), interruptible=stopped_after(5))
    told.clear()
    with pytest.raises(KeyboardInterrupt):
        run(source, uneven[0], out, (), interruptible=stopped_after(4))  # to step 9
    assert (told, [line["step"] for line in lines(out)]) == ([], [4, 8])
    run(source, uneven[0], out, ("wandb",))
    assert [(place, point.step) for place, point in told] == [(1, 8), (2, 10), (3, 12), (4, 12), (-1, 0)]
    # A run that never had a tracker has nothing written down.
    run(source, uneven[0], tmp_path / "plain", ())
    assert not (tmp_path / "plain" / "trackers").exists()


def test_a_tracker_that_hangs_keeps_no_run(source, uneven, tmp_path, monkeypatch) -> None:
    import threading

    hangs = threading.Event()
    monkeypatch.setattr(tracking_module, "open_tracker", lambda _: lambda _run: hangs.wait())
    monkeypatch.setattr(tracking_module, "PATIENCE", 0.2)
    notes: list[str] = []
    run(source, uneven[0], tmp_path / "run", ("mlflow",), notes)
    assert ["mlflow has not taken the last 5 points" in note for note in notes] == [True]


def test_a_folder_that_cannot_be_written_is_a_note(source, uneven, tmp_path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "trackers").write_text("in the way")
    notes: list[str] = []
    assert run(source, uneven[0], tmp_path / "run", ("tensorboard",), notes).steps == 12
    assert ["cannot be written" in note for note in notes] == [True]


def test_tracked_runs_are_those_that_are_not_to_the_bit(source, uneven, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(tracking_module, "open_tracker", lambda _: lambda run: Recording([], run))
    run(source, uneven[0], tmp_path / "a", ())
    run(source, uneven[0], tmp_path / "b", ("wandb",))
    a, b = ((tmp_path / name / "checkpoint.pt") for name in "ab")
    import torch

    weights = [torch.load(path, weights_only=True)["network"] for path in (a, b)]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    assert not (tmp_path / "a" / "trackers").exists()


@pytest.mark.parametrize("step", [0, 3, 4, 11, 12])
def test_points_after_a_checkpoint_are_dropped_and_read_again(tmp_path, step) -> None:
    points = [Point(s, {"core_seconds": float(s)}) for s in STEPS] + [Point(12, {"test_accuracy": 1.0}, final=True)]
    file = PointsFile(tmp_path / "points.jsonl")
    file.append(points)
    count, last = file.keep(step)
    assert count == sum(s <= step for s in STEPS)
    assert last == (points[count - 1] if count else None)
    reader = file.reader(1)  # of which the first may still have to come
    file.append(points[count:])
    assert reader.take(2) == points[1:3]
    assert reader.take(100) == points[3:]


@pytest.mark.parametrize("killed_at", range(6))
def test_a_feed_goes_on_where_it_was(tmp_path, killed_at) -> None:
    points = [Point(s, {"x": float(s)}) for s in range(1, 6)]
    file, told = PointsFile(tmp_path / "points.jsonl"), []
    run = TrackedRun("run", tmp_path / "wandb", {}, "identity")
    for first, upto in ((0, killed_at), (killed_at, 5)):
        file.append(points[first:upto])
        feed = Feed("wandb", lambda run: Recording(told, run), run, file, tmp_path / "wandb.json")
        feed.tell(upto)
        feed.close("finished", 30.0)
        assert not [note for note in feed.notes() if note.startswith("note")]
    assert [place for place, _ in told if place >= 0] == list(range(5))
    other = Feed("wandb", lambda run: Recording(told, run), TrackedRun("r", tmp_path, {}, "other"), file,
                 tmp_path / "wandb.json")  # fmt: skip
    other.tell(5)
    other.close("finished", 30.0)
    assert [place for place, _ in told if place >= 0] == [*range(5), *range(5)]


@pytest.mark.parametrize(
    "line", ["{\n", "[]\n", "{}\n", '{"step": null, "values": {}}\n', '{"step": 3, "values": 1}\n']
)
def test_a_damaged_line_ends_the_points_and_no_run(tmp_path, line) -> None:
    file = PointsFile(tmp_path / "points.jsonl")
    file.append([Point(1, {"x": 1.0}), Point(2, {"x": 2.0})])
    whole = (tmp_path / "points.jsonl").read_text()
    (tmp_path / "points.jsonl").write_text(whole + line)
    assert file.keep(12) == (2, Point(2, {"x": 2.0}))
    assert (tmp_path / "points.jsonl").read_text() == whole


def notes_of(feed: Feed) -> str:
    feed.tell(3)
    feed.close("finished", 30.0)
    return " ".join(feed.notes())


def test_a_feed_without_the_points_or_whose_library_exits_ends_with_a_note(tmp_path) -> None:
    file = PointsFile(tmp_path / "points.jsonl")
    file.append([Point(1, {"x": 1.0})])
    run = TrackedRun("run", tmp_path, {}, "identity")
    short = Feed("wandb", lambda run: Recording([], run), run, file, tmp_path / "wandb.json")
    assert "points.jsonl has fewer points than were written" in notes_of(short)

    def leave(run: TrackedRun) -> Recording:
        raise SystemExit(1)

    assert "failed (SystemExit" in notes_of(Feed("wandb", leave, run, file, tmp_path / "other.json"))


def test_names() -> None:
    assert tracker_names("tensorboard, mlflow,tensorboard,") == ("tensorboard", "mlflow")
    assert tracker_names(["wandb"]) == ("wandb",)
    assert tracker_names("") == ()
    with pytest.raises(UsageError, match="`log`: got 3, expected names"):
        tracker_names(3)
    with pytest.raises(UsageError, match="unknown tracker 'wandbb'.*\n.*'wandb'"):
        tracker_names("wandbb")


def test_a_folder_of_the_librarys_name_is_not_the_library(tmp_path, monkeypatch) -> None:
    # wandb leaves such a folder where it is run.
    (tmp_path / "wandb").mkdir()
    monkeypatch.setattr(names, "find_spec", lambda name: PathFinder.find_spec(name, [str(tmp_path)]))
    assert names.find_spec("wandb") is not None
    for name in names.NAMES:
        with pytest.raises(UsageError, match=f"`log`: {name} is not installed\n.*gstds-cache.{name}."):
            tracker_names(name)


def test_nothing_of_a_tracker_is_loaded_without_one(tmp_path) -> None:
    code = (
        "import sys, gstds_cache.api.train, gstds_cache.training.tracking as t\n"
        "with t.Tracking() as tracking: tracking.begin(0)\n"
        "print(sorted({'wandb', 'mlflow', 'tensorboard'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert done.stdout == "[]\n"


def test_credentials() -> None:
    text = f"https://user:pass@host/x?api_key=1234567&a=b&X-Amz-Signature=ff {SECRET}"
    assert without_credentials(text) == "https://***@host/x?api_key=***&a=b&X-Amz-Signature=*** ***"
    assert without_credentials("see s3://me:p@ss/w@host/x?sig=ff&author=me&auth=12, a@b") == (
        "see s3://***@host/x?sig=***&author=me&auth=*** a@b"
    )
    assert flat({"a": {"b": 1, "c": {"d": None}}, "e": True}) == {"a.b": 1, "a.c.d": None, "e": True}
