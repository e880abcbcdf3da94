"""What ``gstds-embed`` adds to the library: a dry run, shares of the time, words for flags."""

from __future__ import annotations

import shutil
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from gstds_cache.cli.cache_command import main as cache_main
from gstds_cache.cli.embed_command import main as embed_main

from gstds_cache.data.hash_cache import RACY_NS
from gstds_cache.runtime.progress import ProgressBar, shares_text

WORDS = ["imagefolder:photos", "--batch-size", "4", "--shard-rows", "8", "--device", "cpu"]


@pytest.fixture
def embed(image_folder: Path, tiny_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Runs ``gstds-embed`` on the image folder, in this process: loading torch again and again takes long."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GSTDS_CACHE", str(tmp_path / "stores"))

    def run(*more: str, code: int = 0) -> Result:
        done = CliRunner().invoke(embed_main, [*WORDS, "--model", tiny_model, *more])
        assert done.exit_code == code, done.output
        return done

    return run


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if "__pycache__" not in path.parts)


def test_a_dry_run_writes_nothing(embed, result_of, tmp_path) -> None:
    before = names(tmp_path)
    done = embed("--dry-run", "--json")
    result = result_of(done)
    assert (result["dry_run"], result["items"], result["images"], result["committed"]) == (True, 60, 60, 0)
    assert result["images_per_second"] > 0
    assert result["disk_bytes"] > 60 * 48 * 2
    assert "estimate: 60 images at about" in done.stdout
    assert "nothing was written" in done.stdout
    embed("--dry-run", "--cache", "photos.store")
    assert names(tmp_path) == before

    embed("--cache", "photos.store")
    after = names(tmp_path)
    again = embed("--dry-run", "--cache", "photos.store", "--json")
    assert "photos.store has 60 of 60 rows committed" in again.stdout
    assert (result_of(again)["images"], result_of(again)["committed"]) == (0, 60)
    assert names(tmp_path) == after


def test_the_result_tells_how_the_time_was_spent(embed, result_of, tmp_path) -> None:
    time.sleep(RACY_NS / 1e9 + 0.1)  # the digests of younger images are not kept
    done = embed("--cache", "photos.store", "--workers", "1", "--json")
    result = result_of(done)
    assert set(result["shares"]) == {"decode", "forward", "commit", "waiting"}
    assert result["seconds"]["decode"] > 0
    assert result["seconds"]["embed"] >= result["seconds"]["forward"] + result["seconds"]["waiting"] - 0.01
    assert (result["batch_size"], result["workers"], result["estimate"]) == (4, 1, None)
    assert result["store"] == "photos.store"
    assert "of embed" in done.stdout
    assert any((tmp_path / "stores" / "hashes").iterdir())
    again = embed("--cache", "photos.store", "--json")
    assert result_of(again)["cache_hit"]
    assert "of embed" not in again.stdout


def test_a_flag_under_its_old_name_works_and_says_so(embed, result_of, tmp_path) -> None:
    for words in (["--unit-rows", "12"], ["--unit-rows=12"]):
        done = embed("--cache", "photos.store", *words, "--json")  # the last of two counts
        assert "note: --unit-rows is now called --shard-rows" in done.stderr
        assert result_of(done)["shards"] == 5
    repaired = CliRunner().invoke(cache_main, ["repair", "photos.store", "--unit", "3", "--workers", "0"])
    assert repaired.exit_code == 0, repaired.output
    assert "note: --unit is now called --shard" in repaired.stderr
    assert "repaired  1 shards, 12 images embedded" in repaired.stdout


def test_workers_take_a_number_or_auto(embed) -> None:
    assert "got 'many', expected a number or auto" in embed("--workers", "many", code=2).stderr
    assert "--workers: got -1" in embed("--workers", "-1", code=2).stderr
    text = " ".join(embed("--help").stdout.split())
    assert "auto: one for every four cores" in text
    assert "--unit-rows" not in text


def test_progress_shows_rates_and_shares(monkeypatch, capsys) -> None:
    clock = iter(range(0, 1000, 100))
    monkeypatch.setattr("gstds_cache.runtime.progress.time.monotonic", lambda: next(clock))
    assert not sys.stderr.isatty()
    progress = ProgressBar("images", check="shards")
    for done, shares in ((0, {}), (100, {"decode": 0.5, "commit": 0.004}), (300, {})):
        progress("embed", done, 400, shares)
    for done in (0, 6):
        progress("check", done, 6, {})
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "embed: 100 of 400 images (25%), 1.0/s, ETA 5:00, decode 50%, commit 0.4%"
    assert lines[1].endswith("ETA 1:06")
    assert lines[2].startswith("check: 6 of 6 shards (100%)")
    assert shares_text({"forward": 0.914, "waiting": 0.0}) == "forward 91%, waiting 0%"


def test_rows_of_several_stores_are_taken_over_and_counted_and_all_stores_are_listed(
    image_folder: Path, tiny_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GSTDS_CACHE", str(tmp_path / "stores"))
    sizes = ["--model", tiny_model, "--batch-size", "4", "--shard-rows", "8", "--device", "cpu", "--workers", "0"]

    def embed(folder: str, store: str, *more: str) -> str:
        done = CliRunner().invoke(embed_main, [f"imagefolder:{folder}", "--cache", f"stores/{store}", *sizes, *more])
        assert done.exit_code == 0, done.output
        return done.stdout

    for name in ("cats", "dogs"):
        shutil.copytree(image_folder / name, tmp_path / "parts" / name / name)
        embed(f"parts/{name}", f"{name}.store")
    # 20 owls are new, and a cat that does not decode is tried again.
    said = embed("photos", "all.store", "--reuse", "stores/cats.store", "--reuse", "stores/dogs.store")
    assert "embedded 21 (" in said
    assert "took 39 over (--reuse)" in said
    listed = CliRunner().invoke(cache_main, ["ls"])
    assert listed.exit_code == 0, listed.output
    head, *lines = [line.split() for line in listed.stdout.splitlines()]
    assert " ".join(head) == "name rows MB state model data set last used"
    assert [(line[0], line[1], line[3], line[4]) for line in lines] == [
        ("all.store", "60", "complete", tiny_model),
        ("cats.store", "20", "complete", tiny_model),
        ("dogs.store", "20", "complete", tiny_model),
    ]
    assert [line[5] for line in lines] == ["imagefolder:photos", "imagefolder:parts/cats", "imagefolder:parts/dogs"]
    assert all(
        abs(time.mktime(time.strptime(" ".join(line[6:]), "%Y-%m-%d %H:%M")) - time.time()) < 600 for line in lines
    )
