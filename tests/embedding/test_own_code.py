"""The code of a model of a user's own is part of a store's identity; stores from before that are taken with a note."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import gstds_cache
from gstds_cache.config import EmbedConfig
from gstds_cache.data.sources import open_source
from gstds_cache.embedding.elsewhere import open_same_encoder
from gstds_cache.embedding.run import embed_dataset
from gstds_cache.encoders.encoder import EncoderSpec
from gstds_cache.encoders.factory import open_encoder
from gstds_cache.errors import EncoderError, FingerprintMismatchError
from gstds_cache.files.digest import sha256_file
from gstds_cache.store.reader import EmbeddingStore

CODE = """
from torch import nn
from gstds_cache.encoders.preprocessing import Preprocessing

class Grid(nn.Module):
    preprocessing = Preprocessing(resize=16, crop=(16, 16))

    def forward(self, x):
        return nn.functional.adaptive_{kind}_pool2d(x, 4).flatten(1)

def build():
    return Grid()
"""
Edit = Callable[[str], str]


@pytest.fixture
def edit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Edit:
    """Writes the module of a model, by what it pools; gives the model's name."""
    name = f"own_code_{abs(hash(tmp_path)) % 10**9}"
    monkeypatch.syspath_prepend(tmp_path)

    def write(kind: str) -> str:
        (tmp_path / f"{name}.py").write_text(CODE.format(kind=kind))
        sys.modules.pop(name, None)
        importlib.invalidate_caches()
        for cached in (tmp_path / "__pycache__").glob("*.pyc"):
            cached.unlink()
        return f"{name}:build"

    return write


def embed(folder: Path, store: Path, model: str, **changes: Any) -> EmbeddingStore:
    config = EmbedConfig(model=model, batch_size=4, shard_rows=8, workers=0, device="cpu")
    return embed_dataset(open_source(f"imagefolder:{folder}"), config, where=store, **changes)


@contextmanager
def unrecorded() -> Iterator[None]:
    """Stores are made as by earlier versions, which did not record the code."""
    to_dict = EncoderSpec.to_dict
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EncoderSpec, "to_dict", lambda spec: to_dict(replace(spec, source="")))
        yield


def test_models_of_libraries_have_the_identity_they_had() -> None:
    spec = open_encoder("timm:tf_efficientnet_lite0").spec
    assert spec.source == ""
    assert "source" not in spec.to_dict()


def test_changed_code_is_no_hit_and_is_neither_repaired_nor_appended_with(image_folder, edit, tmp_path) -> None:
    store, folder = tmp_path / "store", f"imagefolder:{image_folder}"
    fingerprint = embed(image_folder, store, edit("avg")).fingerprint
    assert embed(image_folder, store, edit("avg")).report.cache_hit
    model = edit("max")
    with pytest.raises(FingerprintMismatchError, match=r"encoder\.source") as caught:
        embed(image_folder, store, model)
    assert "the file of" in caught.value.hint
    with pytest.raises(FingerprintMismatchError, match=r"encoder\.source"):
        gstds_cache.repair_store(store, shards=[1], dataset=folder, model=model, device="cpu", workers=0)
    with pytest.raises(FingerprintMismatchError, match=r"encoder\.source"):
        gstds_cache.verify_store(store, level="sample", dataset=folder, model=model, device="cpu")
    (image_folder / "dogs" / "99.png").write_bytes((image_folder / "cats" / "01.png").read_bytes()[:-1])
    with pytest.raises(FingerprintMismatchError, match=r"encoder\.source") as caught:
        gstds_cache.append_to_store(store, folder, model=model, device="cpu", workers=0, progress=False)
    assert "the file of" in caught.value.hint
    assert EmbeddingStore(store).fingerprint == fingerprint


def test_a_store_from_before_is_taken_with_a_note(image_folder, edit, tmp_path, caplog) -> None:
    store, folder, told = tmp_path / "store", f"imagefolder:{image_folder}", list[str]()
    with unrecorded():
        before = embed(image_folder, store, edit("avg")).fingerprint
    again = embed(image_folder, store, edit("avg"), notify=told.append)
    assert (again.report.cache_hit, again.fingerprint) == (True, before)
    assert [line for line in told if "was recorded" in line]
    rows = again.gather(np.arange(7))
    gstds_cache.repair_store(store, shards=[1], dataset=folder, model=edit("avg"), device="cpu", workers=0)
    assert "was recorded" in caplog.text
    repaired = EmbeddingStore(store)
    assert repaired.fingerprint == before
    np.testing.assert_array_equal(repaired.gather(np.arange(7)), rows)
    report = gstds_cache.verify_store(store, level="sample", dataset=folder, model=edit("avg"), device="cpu")
    assert report.problems == ()


def test_a_new_store_records_the_code_and_takes_no_rows_of_unknown_code(image_folder, edit, tmp_path) -> None:
    told: list[str] = []
    with unrecorded():
        before = embed(image_folder, tmp_path / "old", edit("avg"))
    new = embed(image_folder, tmp_path / "new", edit("avg"), reuse=[tmp_path / "old"], notify=told.append)
    assert (new.report.reused, new.report.ok) == (0, 58)
    assert len([line for line in told if line.startswith("note: `reuse`")]) == 1
    assert [line for line in told if "none is taken over" in line]
    assert new.spec.encoder == before.spec.encoder | {"source": new.spec.encoder["source"]}
    assert len(new.spec.encoder["source"]) == 64
    told.clear()
    other = embed(image_folder, tmp_path / "other", edit("avg"), reuse=[tmp_path / "new"], notify=told.append)
    assert (other.report.reused, told) == (58, [])
    with pytest.raises(FingerprintMismatchError, match="source"):
        embed(image_folder, tmp_path / "third", edit("max"), reuse=[tmp_path / "new"])


def test_what_is_recorded_is_the_code_that_runs_not_the_file_of_today(edit, tmp_path) -> None:
    model = edit("avg")
    before, name = open_encoder(model).spec.source, model.partition(":")[0]
    (tmp_path / f"{name}.py").write_text(CODE.format(kind="max") + "# edited")
    assert open_encoder(model).spec.source == before
    importlib.reload(sys.modules[name])
    assert open_encoder(model).spec.source == sha256_file(tmp_path / f"{name}.py") != before


def test_another_file_on_another_machine_is_told_as_such(image_folder, edit, tmp_path) -> None:
    spec = embed(image_folder, tmp_path / "store", edit("avg")).spec
    with pytest.raises(EncoderError, match="another model than the store") as caught:
        open_same_encoder(edit("max"), False, "pillow", spec, torch.device("cpu"), "there")
    assert "the file of own_code_" in caught.value.hint
