"""The page in a real browser, at a desk's and at a phone's width; names that would be markup stay text."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from real_store import MODEL

from gstds_cache.api.export import export_scores
from gstds_cache.api.hide import hide_rows
from gstds_cache.api.report import write_report
from gstds_cache.config import EmbedConfig, SelectConfig, TrainConfig
from gstds_cache.costs.records import Cost, record, selection_costs
from gstds_cache.data.sources import open_source
from gstds_cache.embedding.run import embed_dataset
from gstds_cache.errors import FingerprintMismatchError, IntegrityError, UsageError
from gstds_cache.report.page import render, write_page
from gstds_cache.report.run_view import panels_of, read_run
from gstds_cache.report.selection_view import view_selection
from gstds_cache.report.thumbnails import SIDE, thumbnails
from gstds_cache.selection.run import BatchSelector
from gstds_cache.store.reader import EmbeddingStore
from gstds_cache.stream.reader import open_selection
from gstds_cache.stream.writer import write_file
from gstds_cache.training.identity import run_config
from gstds_cache.training.loop import train
from gstds_cache.training.run_dir import RunDir

EVIL = "<script>alert(1)<!-- & $x_$ \"'"
CLASSES = (EVIL, "plain", "日本 $")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
TITLES = ["Schedule and saving", "Spectral health", "Kept and dropped along the Fiedler coordinate", "Spectral map",
          "Keep rates by class"]  # fmt: skip


@dataclass(frozen=True)
class Work:
    """Real parts: images on disk, their store, a selection and two finished runs."""

    folder: Path
    uri: str
    store: EmbeddingStore
    selection: Path
    runs: list[Path]


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Work:
    folder = tmp_path_factory.mktemp("page")
    for label, name in enumerate(CLASSES):
        (folder / "images" / name).mkdir(parents=True)
        for number in range(14):
            pixels = np.random.default_rng([label, number]).integers(0, 90, (12, 12, 3)) + 80 * (np.arange(3) == label)
            Image.fromarray(pixels.astype(np.uint8)).save(folder / "images" / name / f"{number:02d}{EVIL}.png")
    uri = f"imagefolder:{folder / 'images'}"
    source = open_source(uri)
    embed = EmbedConfig(model=MODEL, batch_size=8, shard_rows=32, workers=0, device="cpu")
    store = EmbeddingStore(embed_dataset(source, embed, where=folder / "store").location)
    config = SelectConfig(batch_size=14, epochs=2, knn=3, schedule="linear:0.25:0.75", device="cpu")
    selector = BatchSelector(store, config)
    selection = folder / f"{EVIL}.arrow"
    list(write_file(selector, selection))
    record(selection_costs(selection), Cost(selector.digest, 84, 0, 0.5, None, "cpu", str(folder / "store")))
    runs = []
    for seed in (0, 1):
        how = TrainConfig(arch="timm:test_resnet", image_size=12, augment="none", seed=seed, device="cpu", workers=0)
        with open_selection(selection) as stream:
            provenance = {"selection": stream.header.settings}
            run_dir = RunDir(
                folder / f"run{seed}", run_config(how, stream.header, None), provenance=provenance, resume=False
            )
            train(source, stream, how, run_dir, evaluation=source)
        runs.append(run_dir.path)
    return Work(folder, uri, store, selection, runs)


def view(work: Work, file: Path | None = None, **options):
    return view_selection(file or work.selection, key="s0", dataset=open_source, **options)


@pytest.fixture(scope="module")
def page(work: Work) -> Path:
    file = work.folder / "report.html"
    write_page(file, render([view(work)], [read_run(path, n) for n, path in enumerate(work.runs, 1)]))
    return file


def test_nothing_is_loaded_and_no_name_becomes_markup(page) -> None:
    html = page.read_text()
    assert "<script" not in html.lower()
    assert not re.findall(r"""(?:src|href|action)\s*=\s*["'](?!data:|#)""", html)
    assert not re.findall(r"url\((?!#)", html)
    assert "&lt;script&gt;alert(1)&lt;!-- &amp; $x_$ &#34;&#39;.arrow" in html
    ids = re.findall(r'\bid="([^"]+)"', html)
    assert len(ids) == len(set(ids))


def test_without_store_or_images_the_page_says_what_is_missing(work, tmp_path) -> None:
    alone = tmp_path / "s.arrow"
    shutil.copy(work.selection, alone)
    bare = view(work, alone)
    assert [panel.title for panel in bare.panels if not panel.missing] == TITLES[:2]
    assert all("pass `cache=STORE`" in panel.missing for panel in bare.panels if panel.missing)
    assert "pass `cache=STORE`" in bare.sheets_missing
    assert "pass `cache=STORE`" in render([bare], [])

    images, gone, store = work.folder / "images", work.folder / "elsewhere", work.store.location
    images.rename(gone)
    try:
        moved = view(work, alone, cache=store)
        assert [panel.title for panel in moved.panels] == TITLES
        assert not any(panel.missing for panel in moved.panels)
        assert f"were at imagefolder:{images}" in moved.sheets_missing
        assert view(work, alone, cache=store, dataset_uri=f"imagefolder:{gone}").sheets_missing == ""
    finally:
        gone.rename(images)
    with pytest.raises(UsageError):
        view(work, alone, cache=str(tmp_path / "no-store"))


def test_sheets_hold_kept_and_dropped_images_in_fiedler_order(work) -> None:
    sheets = view(work, per_sheet=5).sheets
    assert len(sheets) == 3
    for sheet in sheets:
        for images in (sheet.kept, sheet.dropped):
            places = [float(image.title.rsplit(" ", 1)[1]) for image in images]
            assert places == sorted(places)
            assert 1 <= len(images) <= 5
            assert all(image.uri.startswith("data:image/jpeg;base64,") for image in images)
        assert not {image.title for image in sheet.kept} & {image.title for image in sheet.dropped}


def test_graphs_that_come_again_count_once(work, tmp_path) -> None:
    for ways, graphs in ((1, 3), (0, 6), (2, 6)):
        config = SelectConfig(batch_size=14, epochs=2, knn=3, batch_assignments=ways, device="cpu")
        list(write_file(BatchSelector(work.store, config), tmp_path / f"{ways}.arrow"))
        health = next(p for p in view(work, tmp_path / f"{ways}.arrow").panels if p.title == "Spectral health")
        assert health.text.startswith(f"{graphs} graphs, ")


def test_small_images_are_enlarged_and_keep_their_shape(work, tmp_path) -> None:
    for name, size in (("a", (12, 6)), ("b", (300, 100))):
        (tmp_path / name).mkdir()
        Image.new("RGB", size, "black").save(tmp_path / name / "one.png")
    made = thumbnails(open_source(f"imagefolder:{tmp_path}"), [0, 1], [0.0, 0.0])
    for image, height in zip(made, (28, 19), strict=True):
        pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(image.uri.partition(",")[2]))).convert("L"))
        assert pixels.shape == (SIDE, SIDE)
        assert int((pixels[:, SIDE // 2] < 128).sum()) == height
        assert (pixels[SIDE // 2] < 128).all()


def test_a_rule_without_a_graph_has_a_page_too(work, tmp_path) -> None:
    config = SelectConfig(batch_size=14, epochs=1, knn=3, rule="random", device="cpu")
    list(write_file(BatchSelector(work.store, config), tmp_path / "r.arrow"))
    shown = view(work, tmp_path / "r.arrow", cache=work.store.location)
    assert [panel.title for panel in shown.panels] == [TITLES[0], TITLES[2], TITLES[4]]
    assert "computes no graph" in shown.panels[1].missing
    assert len(shown.sheets) == 3
    render([shown], [])


def test_classes_that_come_by_turns_are_kept_as_often_as_they_are_seen(work, tmp_path, monkeypatch) -> None:
    shutil.copytree(work.folder / "store", tmp_path / "store")
    hide_rows(tmp_path / "store", rows=range(34, 42))  # six of the last class are left
    config = SelectConfig(batch_size=8, epochs=3, knn=3, schedule="constant:0", order="class-balanced", device="cpu")
    store, rates = EmbeddingStore(tmp_path / "store"), []
    list(write_file(BatchSelector(store, config), tmp_path / "s.arrow"))
    monkeypatch.setattr("gstds_cache.report.charts.class_rates", lambda *given: rates.append(given[2:]) or "<svg/>")
    view(work, tmp_path / "s.arrow", cache=store)
    of_classes, items, mean = rates[0]
    assert of_classes == pytest.approx([1, 1, 1], abs=0.1)
    assert (sorted(items), mean) == ([6, 14, 14], 1)


def test_another_store_is_refused(work, tmp_path) -> None:
    from real_store import embed

    with pytest.raises(FingerprintMismatchError, match="made from cache"):
        view(work, cache=embed(tmp_path / "other").location)


def test_a_run_that_is_none_or_not_finished_or_damaged(work, tmp_path) -> None:
    with pytest.raises(UsageError, match="no run of gstds-train"):
        read_run(tmp_path, 1)
    copy = tmp_path / "run"
    shutil.copytree(work.runs[0], copy)
    lines = (copy / "metrics.jsonl").read_text().splitlines(keepends=True)
    (copy / "metrics.jsonl").write_text("".join(lines[:-1]))
    with pytest.raises(UsageError, match="not finished"):
        read_run(copy, 1)
    (copy / "config.json").write_text("{}")
    (copy / "metrics.jsonl").write_text("".join(lines))
    with pytest.raises(IntegrityError, match="damaged"):
        read_run(copy, 1)


def test_runs_say_what_is_unknown(work) -> None:
    run = read_run(work.runs[0], 1)  # trained without the command, so without a ledger
    assert (run.select_seconds, run.saved, run.break_even) == (None, None, "unknown")
    html = render([], [run])
    assert html.count("<td>unknown</td>") == 4
    assert "No run has measured accuracy" in panels_of([replace(run, accuracy=None)])[0].missing


def test_a_page_and_the_scores_as_one_call_each(work, tmp_path) -> None:
    where = {"cache": work.store, "dataset": work.uri, "device": "cpu", "progress": False}
    page = write_report(work.selection, *work.runs, out=tmp_path / "r.html", **where)
    assert (page.selections, page.runs, page.missing) == (1, 2, ())
    assert page.bytes == (tmp_path / "r.html").stat().st_size
    with pytest.raises(UsageError, match="`out` .*exists"):
        write_report(work.selection, out=tmp_path / "r.html")
    scores = export_scores(work.store, work.selection, tmp_path / "s.parquet", device="cpu", progress=False)
    assert (scores.rows, scores.epochs, scores.unseen) == (42, 2, 0)
    assert 0 < scores.never_kept < 42


@pytest.mark.browser
@pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="no Chromium and chromedriver: the page was not opened")
def test_the_page_in_a_browser_at_a_desk_and_on_a_phone(page, tmp_path) -> None:
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service
    from selenium.webdriver.common.by import By

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for word in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
                 f"--user-data-dir={tmp_path / 'profile'}"):  # fmt: skip
        options.add_argument(word)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    browser = webdriver.Chrome(options=options, service=Service(DRIVER))
    try:
        for width, height in ((1200, 900), (390, 844)):
            metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
            browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
            browser.get(page.as_uri())
            assert browser.execute_script("return document.documentElement.scrollWidth") <= width
            assert [h.text for h in browser.find_elements(By.CSS_SELECTOR, ".panels h3")] == [
                "Accuracy against cost",
                *TITLES,
            ]
            charts = browser.find_elements(By.CSS_SELECTOR, "figure svg")
            assert len(charts) == 2 + 2 + 4 + 2 + 1 + 1
            assert all(chart.size["width"] > 250 and chart.size["height"] > 90 for chart in charts)
            texts = browser.execute_script(
                "return [...document.querySelectorAll('figure svg text')].map(t => "
                "parseFloat(getComputedStyle(t).fontSize) * Math.hypot(t.getCTM().a, t.getCTM().b))"
            )
            assert min(texts) > 7, "letters too small to read"
            shown = browser.execute_script(
                "return [...document.querySelectorAll('.strip img')].every(i => i.complete && i.naturalWidth == 56)"
            )
            assert shown
            heading = browser.find_element(By.CSS_SELECTOR, "h2.selection").text
            assert heading == f"Selection {EVIL}.arrow"
            assert any(
                "<script>alert(1)" in text.get_attribute("textContent")
                for text in browser.find_elements(By.CSS_SELECTOR, "figure svg text")
            )
        assert browser.get_log("browser") == []
        events = [json.loads(line["message"])["message"] for line in browser.get_log("performance")]
        asked = {
            event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"
        }
        asked = {
            url for url in asked if not url.startswith(("chrome:", "chrome-untrusted:"))
        }  # the empty page that a browser begins with
        assert {url.partition(":")[0] for url in asked} == {"file", "data"}
        assert [url for url in asked if url.startswith("file")] == [page.as_uri()]
    finally:
        browser.quit()
