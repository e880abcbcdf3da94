"""The folder for FiftyOne: read as JSON here; by FiftyOne's own importer where FiftyOne is installed."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import offered
import pyarrow as pa
import pyarrow.parquet
import pytest
from PIL import Image
from real_store import BAD, ITEMS, Images, embed

from gstds_cache import export_fiftyone, export_scores
from gstds_cache.config import SelectConfig
from gstds_cache.errors import FingerprintMismatchError, UsageError
from gstds_cache.report.fiftyone import candidate_columns
from gstds_cache.selection.run import BatchSelector
from gstds_cache.store.reader import EmbeddingStore
from gstds_cache.stream.reader import open_selection
from gstds_cache.stream.writer import write_file

CONFIG = SelectConfig(batch_size=7, epochs=2, knn=3, schedule="constant:0.5", guidance="none", device="cpu")


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> EmbeddingStore:
    return EmbeddingStore(embed(tmp_path_factory.mktemp("fiftyone") / "store").location)


@pytest.fixture(scope="module")
def selection(store, tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("selection") / "s.arrow"
    list(write_file(BatchSelector(store, CONFIG), file))
    return file


@pytest.fixture
def table(tmp_path) -> Path:
    columns = {
        "id": [f"item/{row:04d}" for row in (5, 2)],
        "group": [7, 3],
        "doubt": [0.5, float("nan")],
        "v": [[1], []],
    }
    pa.parquet.write_table(pa.table(columns), tmp_path / "audit.parquet")
    return tmp_path / "audit.parquet"


def samples(folder: Path) -> list[dict]:
    return json.loads((folder / "samples.json").read_text())["samples"]


def test_samples_have_the_scores_the_labels_and_what_is_joined(store, selection, table, tmp_path) -> None:
    done = export_fiftyone(store, tmp_path / "out", selection=selection, join=[table], dataset=Images(), device="cpu")
    assert (done.samples, done.left_out) == (ITEMS - 1, 1)
    export_scores(store, selection, tmp_path / "scores.parquet", device="cpu")
    scores = pa.parquet.read_table(tmp_path / "scores.parquet").to_pylist()
    found = samples(tmp_path / "out")
    assert [s["row"] for s in found] == [row for row in range(ITEMS) if row != BAD]
    for sample in found:
        score = scores[sample["row"]]
        assert sample["item_id"] == score["id"]
        assert sample["ground_truth"]["label"] == "abc"[score["label"]]
        for name in ("seen", "kept", "percentile", "from_middle", "spacing", "difficulty"):
            assert sample[name] == score[name]
        assert (sample["group"], sample["doubt"]) == {5: (7, 0.5), 2: (3, None)}.get(sample["row"], (None, None))
        with Image.open(tmp_path / "out" / sample["filepath"]) as image:
            assert np.array_equal(np.asarray(image), np.asarray(Images().image(sample["row"])))
    metadata = json.loads((tmp_path / "out" / "metadata.json").read_text())
    assert "version" not in metadata
    assert set(metadata["sample_fields"]) == set(found[0]) - {"_media_type"}
    assert metadata["info"]["gstds.fingerprint"] == store.fingerprint


def test_files_stay_where_they_are_and_undecodable_ones_are_tagged(image_folder, tiny_model, tmp_path) -> None:
    import gstds_cache

    uri = f"imagefolder:{image_folder}"
    made = gstds_cache.embed(uri, cache=tmp_path / "s", model=tiny_model, workers=0, device="cpu", progress=False)
    done = export_fiftyone(made, tmp_path / "out")
    assert (done.samples, done.left_out, done.fields) == (len(made), 0, ())
    found = samples(tmp_path / "out")
    assert all(Path(s["filepath"]).is_file() and s["filepath"].endswith(s["item_id"]) for s in found)
    assert [s["row"] for s in found if s["tags"] == ["undecodable"]] == made.without_embedding.tolist()
    assert not (tmp_path / "out" / "data").exists()


def test_candidates_give_strata_and_reference_losses(tmp_path) -> None:
    offered.write(tmp_path / "c.arrow")
    with open_selection(tmp_path / "c.arrow") as stream:
        columns = candidate_columns(stream, offered.ITEMS)
    with open_selection(tmp_path / "c.arrow") as stream:
        batches = list(stream)
    for row in range(offered.ITEMS):
        seen = [(b.candidates, b.kept.tolist().index(row)) for b in batches if row in b.kept]
        assert columns["offered"][row].as_py() == len(seen) == offered.EPOCHS
        assert columns["stratum"][row].as_py() == seen[0][0].stratum[seen[0][1]]
        assert columns["reference_loss"][row].as_py() == pytest.approx(np.mean([c.reference[i] for c, i in seen]))
        assert columns["prior"][row].as_py() == pytest.approx(np.mean([c.prior[i] for c, i in seen]))


def test_what_is_refused(store, selection, table, tmp_path) -> None:
    def refused(match: str, kind: type[Exception] = UsageError, **options) -> None:
        with pytest.raises(kind, match=match):
            export_fiftyone(store, tmp_path / "out", **{"dataset": Images(), "device": "cpu"} | options)
        assert not (tmp_path / "out").exists() or not (tmp_path / "out" / "samples.json").exists()

    pa.parquet.write_table(pa.table({"name": ["a"]}), tmp_path / "no-id.parquet")
    refused("no column `id` .but name.", join=[tmp_path / "no-id.parquet"])
    pa.parquet.write_table(pa.table({"id": ["item/0001"] * 2}), tmp_path / "twice.parquet")
    refused("more than once", join=[tmp_path / "twice.parquet"])
    pa.parquet.write_table(pa.table({"id": ["item/0001", "x"]}), tmp_path / "strange.parquet")
    refused("id 'x', which the store does not have", join=[tmp_path / "strange.parquet"])
    (tmp_path / "text.parquet").write_text("text")
    refused("no table that can be read", join=[tmp_path / "text.parquet"])
    other = Images()
    other.ids = [*other.ids[:-1], "another"]
    refused("other items than the store", FingerprintMismatchError, dataset=other)
    offered.write(tmp_path / "c.arrow")
    refused("store", FingerprintMismatchError, selection=tmp_path / "c.arrow")
    (tmp_path / "out").mkdir(exist_ok=True)
    (tmp_path / "out" / "mine.txt").write_text("keep")
    refused("holds something else .'mine.txt'")
    (tmp_path / "out" / "mine.txt").unlink()
    export_fiftyone(store, tmp_path / "out", dataset=Images(), replace=True)
    with pytest.raises(UsageError, match="holds an export"):
        export_fiftyone(store, tmp_path / "out", dataset=Images())
    export_fiftyone(store, tmp_path / "out", dataset=Images(), replace=True)


READ = """
import json, sys
from fiftyone.utils.data.importers import FiftyOneDatasetImporter
importer = FiftyOneDatasetImporter(sys.argv[1])
assert importer._is_legacy_format_data()
importer = importer._to_legacy_importer()
importer.setup()
print(json.dumps([[s.filepath, s["item_id"], s["kept"], s["ground_truth"].label] for s in importer]))
"""


@pytest.mark.skipif(find_spec("fiftyone") is None, reason="FiftyOne is not installed (1 GB, and a MongoDB)")
def test_fiftyones_own_importer_reads_it(store, selection, tmp_path) -> None:
    export_fiftyone(store, tmp_path / "out", selection=selection, dataset=Images(), device="cpu")
    done = subprocess.run(
        [sys.executable, "-c", READ, tmp_path / "out"], capture_output=True, text=True, timeout=300, check=True
    )
    read = json.loads(done.stdout.splitlines()[-1])
    assert read == [
        [str(tmp_path / "out" / s["filepath"]), s["item_id"], s["kept"], s["ground_truth"]["label"]]
        for s in samples(tmp_path / "out")
    ]
