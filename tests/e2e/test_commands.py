"""The commands as a user runs them: processes of their own, on real image files."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from click.testing import CliRunner
from images import TINY_ENCODER, make_images

from gstds_cache.store.reader import EmbeddingStore


@pytest.fixture
def embed_words(image_folder: Path, tiny_model: str) -> list[str]:
    # photos/ lies in the folder the commands run in
    return ["gstds-embed", "imagefolder:photos", "--model", tiny_model, "--cache", "photos.store", "--batch-size", "4",
            "--shard-rows", "8", "--json"]  # fmt: skip


SELECT = ["gstds-select", "photos.store", "--batch-size", "20", "--epochs", "3", "--knn", "5", "--json"]
QUICK = [*SELECT, "--guidance", "none"]  # where the rows that are kept do not matter: no probe is trained
TRAIN = ["gstds-train", "imagefolder:photos", "--arch", "timm:test_resnet", "--image-size", "16", "--lr", "0.02",
         "--json"]  # fmt: skip


@pytest.fixture(scope="module")
def embedded(forks, tmp_path_factory) -> Path:
    """A folder with the images, their store, and a selection. Not to be changed."""
    folder = tmp_path_factory.mktemp("embedded")
    make_images(folder / "photos")
    (folder / "tiny.py").write_text(TINY_ENCODER)
    for words in (
        ["gstds-embed", "imagefolder:photos", "--model", "tiny:build", "--cache", "photos.store", "--batch-size", "4",
         "--shard-rows", "8"],
        [*QUICK, "--out", "good.arrow"],
    ):  # fmt: skip
        process = forks.start(words, cwd=folder)
        assert process.wait(120) == 0, process.communicate()
        process.communicate()
    return folder


@pytest.fixture
def copied(embedded: Path, tmp_path: Path) -> Path:
    """A copy of it, which is the folder that commands run in."""
    shutil.copytree(embedded, tmp_path, dirs_exist_ok=True)
    return tmp_path


def test_entry_points_load() -> None:
    ours = {
        point.name: point.load() for point in entry_points(group="console_scripts") if point.name.startswith("gstds")
    }
    assert sorted(ours) == ["gstds-cache", "gstds-embed", "gstds-select", "gstds-train"]
    assert all(callable(command) for command in ours.values())


@pytest.mark.parametrize(
    "words", [["gstds-embed"], ["gstds-select"], ["gstds-train"], ["gstds-cache"], ["gstds-cache", "ls"],
              ["gstds-cache", "info"], ["gstds-cache", "verify"]], ids=" ".join,
)  # fmt: skip
def test_help_has_an_example(command, words) -> None:
    text = command(*words, "--help").stdout
    assert "Example" in text
    assert f"\n  {words[0]} " in text or f"\n    {words[0]} " in text


def test_the_main_job(command, result_of, embed_words, tmp_path) -> None:
    first = command(*embed_words)
    embedded = result_of(first)
    assert (embedded["items"], embedded["ok"], embedded["embedded"]) == (60, 58, 60)
    assert [item["id"] for item in embedded["quarantined"]] == ["cats/07.png", "owls/03.png"]
    assert "60 in = 58 ok + 2 quarantined" in first.stdout
    assert "next: gstds-select photos.store --draw auto\n" in first.stdout

    again = command(*embed_words)
    assert "cache hit" in again.stdout
    assert result_of(again)["embedded"] == 0

    chosen = command(*SELECT)
    selected = result_of(chosen)
    assert "keeps 45 of 174 samples" in chosen.stderr
    assert (selected["total_batches"], selected["kept"], selected["rows"]) == (9, 45, 174)
    repeated = command(*SELECT)
    assert result_of(repeated)["cache_hit"]
    assert "cache hit" in repeated.stderr
    assert "nothing was computed" in repeated.stdout
    assert " 0 of 0" not in repeated.stdout

    out = ["--selection", selected["out"], "--eval", "imagefolder:photos", "--out", "run"]
    before = sorted(tmp_path.rglob("*"))
    planned = command(*TRAIN, *out, "--plan")
    assert sorted(tmp_path.rglob("*")) == before
    assert "45 samples to spend, 135 of 180 saved" in planned.stdout
    plan = result_of(planned)["ledger"]
    assert (plan["planned"], plan["embed"]["samples"], plan["select"]["samples"]) == (True, 60, 174)
    assert all(plan["seconds"][phase] > 0 for phase in ("load", "step", "eval"))
    done = command(*TRAIN, *out)
    trained = result_of(done)
    assert "45 samples spent, 129 of 174 saved (74.1%)" in done.stdout
    ledger = json.loads((tmp_path / "run" / "ledger.json").read_text())
    assert ledger == trained["ledger"]
    assert (ledger["embed"]["samples"], ledger["embed"]["reused"], ledger["saved_samples"]) == (60, 0, 129)
    assert ledger["select_seconds"] > 0
    # The plan does not know yet which images cannot be decoded, of those that batch normalisation looks at again.
    assert ledger["training_flops"] == pytest.approx(plan["training_flops"], rel=0.02)
    assert plan["training_flops"] > 0
    # An experiment this small cannot pay for its selection, and both say so.
    assert (plan["pays"], ledger["pays"]) == (False, False)
    assert "warning: selection takes" in planned.stderr
    assert trained["gradient_samples"] == 45
    assert trained["test_items"] == 58
    assert 0 <= trained["test_accuracy"] <= 1
    assert set(trained["seconds"]) >= {"load", "indices", "images", "step", "eval", "total"}
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["config"]["cache_fingerprint"] == embedded["fingerprint"]
    assert config["config"]["selection_digest"] == selected["selection_digest"]

    scores = command("gstds-cache", "export", "photos.store", "scores.parquet", "--scores", selected["out"], "--json")
    assert result_of(scores)["rows"] == 60
    assert "never in a batch, as they have no embedding or are hidden: 2" in scores.stdout
    page = result_of(command("gstds-cache", "report", "run", selected["out"], "--json"))
    assert (page["runs"], page["selections"], page["missing"]) == (1, 1, [])
    assert "cats (19)" in (tmp_path / "report.html").read_text()

    listed = result_of(command("gstds-cache", "ls", ".", "--json"))
    assert [store["items"] for store in listed["stores"]] == [60]
    assert "quarantined row 7: cats/07.png" in command("gstds-cache", "info", "photos.store").stdout
    assert "no problem found" in command("gstds-cache", "verify", "photos.store", "--level", "full").stdout


def test_a_pipe_trains_the_same_network_as_a_file(command, copied) -> None:
    command(*TRAIN, "--selection", "good.arrow", "--out", "from-file")
    bin_folder = Path(sys.executable).parent
    words = " ".join([*QUICK, "--out", "-"])
    train = " ".join([*TRAIN, "--selection", "-", "--out", "from-pipe"])
    piped = subprocess.run(
        ["bash", "-o", "pipefail", "-c", f"{bin_folder}/{words} | {bin_folder}/{train}"],
        cwd=copied,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert piped.returncode == 0, piped.stderr
    assert "Exception ignored" not in piped.stderr  # while the interpreter ends, which a forked command's does not
    assert json.loads(piped.stdout.splitlines()[-1])["gradient_samples"] == 45

    def losses(name):
        lines = (copied / name / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line).get("loss") for line in lines]

    assert losses("from-pipe") == losses("from-file")


def test_a_reader_that_goes_away_ends_the_producer(start, copied) -> None:
    readable, writable = os.pipe()
    producer = start(*QUICK, "--epochs", "2000", "--out", "-", stdout=writable)
    os.close(writable)
    with open(readable, "rb") as reader:  # noqa: PTH123 - a descriptor is no path
        taken = reader.read(3000)
    _, errors = producer.communicate(120)
    assert len(taken) == 3000, errors
    assert producer.returncode == 4
    assert "went away" in errors
    assert "Traceback" not in errors


def test_a_killed_producer_is_never_taken_for_a_whole_selection(command, copied) -> None:
    whole = (copied / "good.arrow").read_bytes()
    (copied / "half").write_bytes(whole[: len(whole) // 2])
    with (copied / "half").open("rb") as half:
        failed = command(*TRAIN, "--selection", "-", "--out", "run", code=3, stdin=half)
    assert "truncated" in failed.stderr
    assert "test accuracy" not in failed.stdout


def _files(store: Path) -> dict[str, bytes]:
    return {str(p.relative_to(store)): p.read_bytes() for p in sorted(store.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT], ids=["SIGKILL", "SIGINT"])
def test_a_stopped_embedding_is_finished_by_the_same_command(
    command, start, result_of, embed_words, tmp_path, how
) -> None:
    slow = [word.replace(":build", ":build_slow") for word in embed_words[:-1]]
    command(*slow, "--cache", "slow.store")
    (tmp_path / "hold").touch()
    process = start(*slow)
    commits = tmp_path / "photos.store" / "commits"
    deadline = time.monotonic() + 120
    while not (commits.is_dir() and len(list(commits.glob("*.json"))) >= 3):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(how)
    _, errors = process.communicate(timeout=60)
    if how == signal.SIGINT:
        assert process.returncode == 130
        assert "run the same command again" in errors
        assert "Traceback" not in errors
    else:
        assert process.returncode == -signal.SIGKILL
    before = {p.name: p.stat().st_mtime_ns for p in commits.glob("*.json")}
    assert 3 <= len(before) < 8
    assert "shards are committed" in command("gstds-select", "photos.store", code=4).stderr
    assert "not complete" in command("gstds-cache", "verify", "photos.store", code=4).stderr
    (tmp_path / "hold").unlink()
    rest = result_of(command(*slow, "--json"))
    assert rest["committed_before"] == 8 * len(before)
    assert rest["embedded"] == 60 - 8 * len(before)
    assert {name: (commits / name).stat().st_mtime_ns for name in before} == before
    assert _files(tmp_path / "photos.store") == _files(tmp_path / "slow.store")
    assert len(EmbeddingStore(tmp_path / "photos.store")) == 60


def test_a_stopped_training_resumes(command, start, result_of, copied) -> None:
    command(*QUICK, "--epochs", "60", "--out", "long.arrow")
    words = [*TRAIN, "--selection", "long.arrow", "--out", "run"]
    process = start(*words)
    deadline = time.monotonic() + 120
    while not (copied / "run" / "metrics.jsonl").exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "with --resume --out run" in errors
    assert "--resume" in command(*words, code=2).stderr
    assert result_of(command(*words, "--resume"))["gradient_samples"] == 60 * 15


BAD = [
    (["gstds-embed", "imagefoldr:photos"], 2, ["unknown kind of data set", "did you mean 'imagefolder:PATH'"]),
    (["gstds-embed", "imagefolder:nowhere"], 2, ["nowhere"]),
    (["gstds-embed", "imagefolder:empty"], 2, ["empty"]),
    (["gstds-embed", "imagefolder:photos/cats"], 2, ["class"]),
    (["gstds-embed", "digits", "--model", "timm:tf_efficientnet_lite"], 2, ["tf_efficientnet_lite0"]),
    (["gstds-embed", "digits", "--device", "tpu"], 2, ["tpu", "cuda"]),
    (["gstds-embed", "digits", "--batch-size", "0"], 2, ["--batch-size", "0"]),
    (["gstds-embed", "imagefolder:photos", "--cache", "photos"], 2, ["no store", "'cats'"]),
    (["gstds-select", "nowhere.store"], 2, ["no store at nowhere.store", "gstds-embed"]),
    (["gstds-select", "photos.store", "--rule", "converage"], 2, ["unknown rule", "there are: coverage"]),
    (["gstds-select", "photos.store", "--schedule", "constnt:0.5"], 2, ["unknown schedule", "constant"]),
    (["gstds-select", "photos.store", "--schedule", "constant:1"], 2, ["outside [0, 1)"]),
    (["gstds-select", "photos.store", "--batch-size", "59"], 2, ["only 58 rows"]),
    (["gstds-select", "photos.store", "--batch-size", "3"], 2, ["expected 4 to"]),
    (["gstds-select", "photos.store", "--batch-size", "20", "--knn", "20"], 2, ["--knn", "19"]),
    (["gstds-train", "imagefolder:photos", "--selection", "no.arrow"], 2, ["no selection at no.arrow"]),
    (["gstds-train", "imagefolder:photos", "--selection", "notes.txt"], 3, ["no selection"]),
    (["gstds-train", "digits", "--selection", "good.arrow"], 3, ["another data set", "gstds-embed"]),
    (["gstds-train", "imagefolder:photos", "--selection", "good.arrow", "--arch", "resnet19"], 2, ["resnet18"]),
    (["gstds-train", "imagefolder:photos", "--selection", "cut.arrow", "--image-size", "16", "--out", "cut.run"], 3,
     ["truncated"]),
    (["gstds-select", "photos.store", "--out", "notes.txt", "--batch-size", "20"], 2, ["notes.txt", "--force"]),
    (["gstds-cache", "verify", "nowhere"], 2, ["no store"]),
    (["gstds-cache", "ls", "nowhere"], 2, ["no folder at nowhere"]),
    (["gstds-embed", "digits", "--model", ":build"], 2, ["unknown model"]),
    (["gstds-embed", "digits", "--model", "timm:resnet18?weights"], 2, ["name=value"]),
    (["gstds-embed", "digits", "--model", "torchvision:alexnet"], 2, ["flattened"]),
    (["gstds-embed", "imagefolder:photos", "--cache", "notes.txt/x.store"], 2, ["notes.txt"]),
    (["gstds-select", "photos.store", "--out", "notes.txt/x", "--batch-size", "20"], 2, ["notes.txt"]),
    (["gstds-select", "photos.store", "--out", "-", "--force", "--batch-size", "20"], 2, ["--force"]),
    (["gstds-train", "imagefolder:photos", "--selection", "good.arrow", "--threads", "-1"], 2, ["--threads"]),
    (["gstds-train", "imagefolder:photos", "--selection", "good.arrow", "--cache", "other.store"], 3,
     ["made from cache", "gstds-select other.store"]),
]  # fmt: skip


def test_bad_input_gets_a_clear_message_and_changes_nothing(command, copied, tmp_path, monkeypatch) -> None:
    other = ["gstds-embed", "imagefolder:photos", "--model", "tiny:build", "--dtype", "float32"]
    command(*other, "--cache", "other.store")
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("my notes")
    (tmp_path / "cut.arrow").write_bytes((tmp_path / "good.arrow").read_bytes()[:-200])

    def snapshot():
        # What was trained before a selection broke off is kept, and said to be.
        skip = {".lock", "__pycache__", "cut.run"}
        return {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file() and not skip & set(p.parts)}

    # In this process: two dozen starts of Python would take minutes. The entry points are the installed ones.
    monkeypatch.chdir(tmp_path)
    points = entry_points(group="console_scripts")
    commands = {point.name: point.load() for point in points if point.name.startswith("gstds-")}
    before = snapshot()
    for words, code, expected in BAD:
        done = CliRunner().invoke(commands[words[0]], words[1:])
        assert done.exit_code == code, (words, done.output, done.exception)
        for word in expected:
            assert word in done.stderr, (words, word, done.stderr)
        assert snapshot() == before, words


def test_another_model_names_the_field_that_differs(command, embed_words, tiny_model) -> None:
    command(*embed_words)
    other = [word.replace(":build", ":build_slow") for word in embed_words]
    done = command(*other, code=3)
    assert f"encoder.model: the store has '{tiny_model}'" in done.stderr
    assert "nothing was changed" in done.stderr


def test_a_disk_that_takes_no_more_is_a_clean_error(command, embed_words, tmp_path) -> None:
    # A limit on the size of a file makes the write fail half way, as a full disk would.
    limit = (
        "import resource, sys; sys.dont_write_bytecode = True\n"  # which is not to meet the limit
        "resource.setrlimit(resource.RLIMIT_FSIZE, (8 << 10, 8 << 10))\n"
        "from gstds_cache.cli.embed_command import main; main()"
    )
    limited = command("-c", limit, *embed_words[1:-1], "--dtype", "float32", "--shard-rows", "60", code=4)
    assert "Traceback" not in limited.stderr
    command(*embed_words[:-1], "--dtype", "float32", "--shard-rows", "60")
    assert len(EmbeddingStore(tmp_path / "photos.store")) == 60
