"""Data sets of ``datasets``, written by the library itself: splits, columns, objects, and a hub out of reach."""

from __future__ import annotations

import hashlib
import time
from pathlib import Path

import numpy as np
import pytest
from source_kinds import CLASSES, class_folders, hugging_face_object, items

from gstds_cache.data import hash_cache as hash_cache_module
from gstds_cache.data.files import FileSource
from gstds_cache.data.hash_cache import HashCache
from gstds_cache.data.manifest import build_manifest
from gstds_cache.data.mapstyle import MapStyleSource
from gstds_cache.data.source import ImageSource
from gstds_cache.data.sources import open_source
from gstds_cache.data.table import TableSource
from gstds_cache.errors import DatasetError, UsageError

datasets = pytest.importorskip("datasets", reason="the extra hf is not installed")
COUNT = 12


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hf"))
    datasets.disable_progress_bars()


@pytest.fixture(scope="session")
def made():
    return items(COUNT)


@pytest.fixture
def dataset(made):
    return hugging_face_object(made)


def data_of(source: ImageSource) -> list[bytes]:
    return [source.payload(row) for row in range(len(source))]


def test_splits(dataset, made, tmp_path) -> None:
    datasets.DatasetDict({"train": dataset, "test": dataset.select([4, 1])}).save_to_disk(str(tmp_path / "d"))
    source = open_source(f"hf:{tmp_path / 'd'}")
    assert source.notes == ("split train; there are also test: name one by split=",)
    test = open_source(f"hf:{tmp_path / 'd'}?split=test")
    assert data_of(test) == [made[4].data, made[1].data]
    assert (test.classes, test.notes) == (CLASSES, ())
    with pytest.raises(UsageError) as caught:
        open_source(f"hf:{tmp_path / 'd'}?split=tset")
    assert caught.value.hint == "did you mean 'test'?"
    datasets.DatasetDict({"a": dataset, "b": dataset}).save_to_disk(str(tmp_path / "e"))
    with pytest.raises(DatasetError, match="got no split of a, b, expected one"):
        open_source(f"hf:{tmp_path / 'e'}")


def test_files_that_are_replaced_after_they_were_mapped_vouch_for_nothing(dataset, made, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(hash_cache_module, "RACY_NS", 0)
    cache, saved = tmp_path / "hashes", tmp_path / "saved"
    dataset.save_to_disk(str(saved))
    assert open_source(datasets.load_from_disk(str(saved))).containers == ()  # nobody knows when it was mapped
    source = open_source(f"hf:{saved}")
    dataset.select(range(COUNT)[::-1]).save_to_disk(str(tmp_path / "new"))
    for path in (tmp_path / "new").iterdir():
        path.replace(saved / path.name)
    build_manifest(source, hash_cache=HashCache(cache))
    digests = build_manifest(open_source(f"hf:{saved}"), hash_cache=HashCache(cache)).sha256
    assert [row.tobytes() for row in digests] == [hashlib.sha256(item.data).digest() for item in made[::-1]]


def test_a_folder_of_parquet_files_and_one_file(dataset, made, tmp_path) -> None:
    (tmp_path / "p").mkdir()
    for number in range(2):
        part = dataset.select(range(6 * number, 6 * number + 6))
        part.to_parquet(str(tmp_path / "p" / f"train-0000{number}-of-00002.parquet"))
    source = open_source(f"hf:{tmp_path / 'p'}?split=train&image=image&label=label")
    assert data_of(source) == [item.data for item in made]
    assert source.classes == CLASSES
    one = open_source(f"hf:{tmp_path / 'p' / 'train-00001-of-00002.parquet'}")
    assert data_of(one) == [item.data for item in made[6:]]


def test_a_folder_of_images_that_datasets_loads(made, tmp_path) -> None:
    assert class_folders(tmp_path / "i", made).endswith("/i")
    source = open_source(f"hf:{tmp_path / 'i'}")
    assert isinstance(source, FileSource)  # so that their hashes are kept, one a file
    assert data_of(source) == [item.data for item in made]
    assert (source.classes, source.labels.tolist()) == (CLASSES, [item.label for item in made])


def test_objects_that_were_selected_shuffled_or_have_a_transform(dataset, made) -> None:
    order = np.random.default_rng(0).permutation(COUNT).tolist()
    shuffled = dataset.select(order)
    source = open_source(shuffled)
    assert isinstance(source, TableSource)
    assert data_of(source) == [made[row].data for row in order]
    assert source.labels.tolist() == [made[row].label for row in order]
    assert source.uri == "python:datasets.Dataset"
    flipped = dataset.with_transform(lambda rows: rows)
    assert open_source(flipped).notes == ("its transform is not applied: images are embedded as they are stored",)


def test_columns_of_an_object(dataset) -> None:
    renamed = dataset.rename_columns({"image": "picture", "label": "breed"})
    source = open_source(renamed)
    assert (source.classes, source.labels.tolist()) == (CLASSES, dataset["label"][:])
    two = dataset.add_column("other", dataset["label"][:]).rename_column("image", "left")
    two = two.add_column("right", [{"bytes": b"", "path": None}] * COUNT).cast_column("right", datasets.Image())
    with pytest.raises(DatasetError, match="got 2 columns of images, left, right, expected one") as caught:
        open_source(two)
    assert "dataset.select_columns(['left', ...])" in caught.value.hint
    with pytest.raises(DatasetError, match="got no column that may hold images, of label"):
        open_source(dataset.select_columns(["label"]))
    with pytest.raises(DatasetError, match="got a DatasetDict") as caught:
        open_source(datasets.DatasetDict({"train": dataset}))
    assert "data['train']" in caught.value.hint
    with pytest.raises(DatasetError, match="got a IterableDataset") as caught:
        open_source(dataset.to_iterable_dataset())
    assert "streaming=True" in caught.value.hint


def test_rows_that_are_dicts_of_another_class_say_what_is_expected(dataset) -> None:
    with pytest.raises(DatasetError, match="not a pair: got a dict of image, label") as caught:
        open_source([dataset[0], dataset[1]])
    assert "a datasets.Dataset is taken as it is" in caught.value.hint
    assert isinstance(open_source([(row["image"], row["label"]) for row in dataset]), MapStyleSource)


@pytest.mark.parametrize("offline", [True, False])
def test_a_name_on_the_hub_without_a_network(offline: bool, monkeypatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", offline)
    if not offline:  # no one listens there
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
        monkeypatch.setattr("huggingface_hub.hf_api.constants.ENDPOINT", "http://127.0.0.1:9")
    begun = time.monotonic()
    with pytest.raises(DatasetError, match="nothing of it was loaded on this machine before") as caught:
        open_source("hf:someone/flowers")
    assert time.monotonic() - begun < 60
    assert ("HF_HUB_OFFLINE" in caught.value.message) == offline
    assert "save it with save_to_disk" in caught.value.hint
    assert datasets.config.HF_HUB_OFFLINE is offline


def test_what_is_no_name_and_no_data_set(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="is no name on the hub"):
        open_source(f"hf:{tmp_path}/none/at/all")
    with pytest.raises(UsageError, match="no name given"):
        open_source("hf:")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DatasetError, match="datasets cannot load it"):
        open_source(f"hf:{tmp_path / 'empty'}")
