"""The call, the command and the page, on real images: what is written, and what bad input gets."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from gstds_cache.cli.cache_command import main
from PIL import Image
from real_store import MODEL
from vector_store import clustered, vector_store

import gstds_cache
from gstds_cache.api.audit import AuditReport, audit
from gstds_cache.auditing.tables import Items
from gstds_cache.errors import FingerprintMismatchError, UsageError
from gstds_cache.report.page import write_page

EVIL = "<script>alert(1)<!-- & $x_$ \"'"
CLASSES = ("plain", EVIL, "日本")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
QUICK = {"device": "cpu", "threads": 1, "progress": False}


def make_images(folder: Path, *, seed: int, items: int) -> None:
    """Coloured noise, a class a colour; the last image of each class does not decode."""
    for label, word in enumerate(CLASSES):
        (folder / word).mkdir(parents=True)
        for number in range(items):
            pixels = np.random.default_rng([seed, label, number]).integers(0, 150, (12, 12, 3))
            pixels[..., label] += 100
            Image.fromarray(pixels.astype(np.uint8)).save(folder / word / f"{number:02d}.png")
        (folder / word / f"{items:02d}.png").write_bytes(b"no image")


def embed(folder: Path, name: str) -> gstds_cache.EmbeddingStore:
    return gstds_cache.embed(
        f"imagefolder:{folder / name}", cache=folder / f"{name}.store", model=MODEL, batch_size=8, shard_rows=16,
        workers=0, device="cpu", progress=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> tuple[Path, AuditReport]:
    folder = tmp_path_factory.mktemp("audit")
    make_images(folder / "train", seed=0, items=14)
    make_images(folder / "test", seed=1, items=4)
    shutil.copy(folder / "train" / "plain" / "03.png", folder / "train" / EVIL / "13.png")  # the same bytes, twice
    train, test = embed(folder, "train"), embed(folder, "test")
    done = audit(train, against=test, out=folder / "out", threshold=0.999, shown=6, folds=2, **QUICK)
    return folder, done


def test_what_is_written(work) -> None:
    folder, done = work
    assert [file.name for file in done.files] == [
        "duplicates.parquet", "outliers.parquet", "labels.parquet", "joint.parquet", "leaks.parquet", "audit.html",
    ]  # fmt: skip
    assert (done.rows, done.exact, done.no_doubts, done.missing) == (42, True, "", ())
    assert done.labelled == 42
    assert done.flip_test is not None
    assert done.flip_test.flipped == 4
    table = pq.read_table(folder / "out" / "duplicates.parquet")
    twins = {row["id"]: row for row in table.to_pylist() if row["same_bytes"]}
    assert set(twins) == {"plain/03.png", f"{EVIL}/13.png"}
    assert len({row["group"] for row in twins.values()}) == 1
    assert sorted(row["class"] for row in twins.values()) == sorted(["plain", EVIL])
    assert table.schema.metadata[b"gstds.fingerprint"]
    assert (done.groups, done.grouped) == (len(set(table["group"].to_pylist())), len(table))
    labels = pq.read_table(folder / "out" / "labels.parquet")
    assert labels["score"].to_pylist() == sorted(labels["score"].to_pylist())
    assert labels["doubted"].to_pylist().count(True) == done.doubted
    assert f"{EVIL}/13.png" in labels["id"].to_pylist()[:3]  # it is an image of another class
    joint = pq.read_table(folder / "out" / "joint.parquet").to_pylist()
    assert sum(row["rows"] for row in joint if row["label"] != row["counted_for"]) == done.doubted
    outliers = pq.read_table(folder / "out" / "outliers.parquet")
    assert outliers["mean_cosine"].to_pylist() == sorted(outliers["mean_cosine"].to_pylist())
    assert len(outliers) == 42
    assert json.loads(json.dumps(done.to_dict()))["flip_test"]["recall"] == done.flip_test.recall


def test_nothing_is_loaded_and_no_name_becomes_markup(work) -> None:
    html = (work[0] / "out" / "audit.html").read_text()
    assert "<script" not in html.lower()
    assert "&lt;script&gt;alert(1)&lt;!-- &amp; $x_$" in html
    assert not re.findall(r"""(?:src|href|action)\s*=\s*["'](?!data:|#)""", html)
    for title in ("Near-duplicates", "The threshold", "Leaks", "Labels in doubt", "Outliers"):
        assert f">{title}</h2>" in html
    assert "Under each of the most doubtful images" in html
    assert ("6 groups of these are shown" in html) == (work[1].groups > 6)
    ids = re.findall(r'\bid="([^"]+)"', html)
    assert len(ids) == len(set(ids))


@pytest.mark.browser
@pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="no Chromium and chromedriver: the page was not opened")
def test_the_page_at_a_desk_and_on_a_phone(work, tmp_path) -> None:
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for word in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
                 f"--user-data-dir={tmp_path / 'profile'}"):  # fmt: skip
        options.add_argument(word)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options=options, service=Service(DRIVER))
    try:
        for width in (1200, 390):
            metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
            browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
            browser.get((work[0] / "out" / "audit.html").as_uri())
            assert browser.execute_script("return document.documentElement.scrollWidth") <= width
            assert browser.execute_script(
                "return [...document.querySelectorAll('.tile img')].every(i => i.complete && i.naturalWidth == 96)"
            )
            assert browser.execute_script("return document.querySelectorAll('.tile img').length") > 20
            assert browser.execute_script("return document.querySelectorAll('figure svg').length") == 2
        assert browser.get_log("browser") == []
    finally:
        browser.quit()


def test_a_store_without_labels_or_images_has_everything_else(tmp_path) -> None:
    rows, _ = clustered(40)
    vector_store(tmp_path / "s", rows, bad=(3,))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "leaks.parquet").write_bytes(b"of an audit before")
    with pytest.raises(UsageError, match=r"holds leaks\.parquet already"):
        audit(tmp_path / "s", out=tmp_path / "out", **QUICK)
    done = audit(tmp_path / "s", out=tmp_path / "out", replace=True, **QUICK)
    assert [file.name for file in done.files] == ["duplicates.parquet", "outliers.parquet", "audit.html"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(file.name for file in done.files)
    assert (done.rows, done.labelled, done.no_doubts) == (39, 0, "the store has no labels")
    assert any("pass `dataset=DATASET`" in line for line in done.missing)
    assert any("the store has no labels" in line for line in done.missing)
    assert done.leaks is None


def test_what_cannot_be_meant(tmp_path) -> None:
    rows, labels = clustered(40)
    store, other = vector_store(tmp_path / "s", rows, labels), vector_store(tmp_path / "o", rows, labels, model="b")
    with pytest.raises(FingerprintMismatchError, match="different models"):
        audit(store, against=other, out=tmp_path / "out", **QUICK)
    assert not (tmp_path / "out").exists()
    with pytest.raises(UsageError, match="it needs `against`"):
        audit(store, against_dataset="digits", out=tmp_path / "out", **QUICK)
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="a file is in the way"):
        audit(store, out=tmp_path / "file", **QUICK)
    with pytest.raises(TypeError, match="did you mean 'threshold'"):
        audit(store, treshold=0.9, **QUICK)
    with pytest.raises(UsageError, match="`threshold`: got 1.5, expected a cosine"):
        audit(store, threshold=1.5, **QUICK)


def test_the_command(tmp_path) -> None:
    rows, labels = clustered(60)
    vector_store(tmp_path / "s", rows, labels)
    vector_store(tmp_path / "o", rows, labels, model="b")

    def run(*words: str):
        return CliRunner().invoke(main, ["audit", str(tmp_path / "s"), "--threads", "1", "--out",
                                         str(tmp_path / "out"), *words])  # fmt: skip

    done = run("--no-page", "--json", "--flipped", "0", "--folds", "2")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout.splitlines()[-1])
    assert (found["labelled"], found["flip_test"]) == (60, None)
    assert not (tmp_path / "out" / "audit.html").exists()
    assert run("--no-page").exit_code == 2
    assert "--force" in run("--no-page").output
    refused = run("--against", str(tmp_path / "o"), "--force")
    assert refused.exit_code == 3
    assert "encoder.model" in refused.output
    assert run("--threshold", "2", "--force").exit_code == 2


def test_an_interrupt_leaves_no_file(tmp_path) -> None:
    rows, labels = clustered(200)
    store = vector_store(tmp_path / "s", rows, labels)

    def stop(phase: str, *_) -> None:
        if phase == "probe":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        audit(store, out=tmp_path / "out", device="cpu", threads=2, progress=stop)
    assert not (tmp_path / "out").exists()


def test_names_that_are_no_utf8_are_written_as_escapes(tmp_path) -> None:
    rows, labels = clustered(30)
    store = vector_store(tmp_path / "s", rows, labels)
    store.classes = ("a\udcff", "b", "c")
    names = Items(store).names(np.array([0, -1, 2]))
    assert names.to_pylist() == ["a\\udcff", None, "c"]
    size = write_page(tmp_path / "page.html", "<p>a\udcff</p>")
    assert (tmp_path / "page.html").read_bytes() == b"<p>a\\udcff</p>"
    assert size == 14
