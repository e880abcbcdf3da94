from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch

from gstds_cache.config import EmbedConfig
from gstds_cache.data.sources import open_source
from gstds_cache.embedding.run import embed_dataset
from gstds_cache.encoders.factory import open_encoder
from gstds_cache.errors import FingerprintMismatchError
from gstds_cache.store.reader import EmbeddingStore


def config_of(model: str, **changes) -> EmbedConfig:
    return EmbedConfig(**({"model": model, "batch_size": 4, "shard_rows": 8, "workers": 0, "device": "cpu"} | changes))


def files_of(store: Path | str) -> dict[str, bytes]:
    return {str(p.relative_to(store)): p.read_bytes() for p in Path(store).rglob("*") if p.is_file()}


def test_every_row_is_the_models_own_forward_pass(array_source, tiny_model, tmp_path) -> None:
    source = array_source(50)
    report = embed_dataset(source, config_of(tiny_model, dtype="float32"), where=tmp_path / "s").report
    assert (report.items, report.ok, report.embedded, report.shards) == (50, 50, 50, 7)
    encoder = open_encoder(tiny_model)
    pixels = torch.stack([encoder.spec.preprocessing.pixels(source.image(row)) for row in range(50)])
    expected = encoder.embed(pixels).numpy()
    np.testing.assert_allclose(EmbeddingStore(tmp_path / "s").gather(np.arange(50)), expected, atol=1e-6)


def test_bad_images_never_shift_rows(array_source, tiny_model, tmp_path) -> None:
    whole = embed_dataset(array_source(30), config_of(tiny_model), where=tmp_path / "whole").report
    report = embed_dataset(
        array_source(30, bad=frozenset({0, 13, 29})), config_of(tiny_model), where=tmp_path / "s"
    ).report
    assert (report.items, report.ok, len(report.quarantined)) == (30, 27, 3)
    assert [(q.row, q.id, q.reason) for q in report.quarantined] == [
        (row, f"item/{row:04d}", "made to fail") for row in (0, 13, 29)
    ]
    store = EmbeddingStore(tmp_path / "s")
    fine = np.setdiff1d(np.arange(30), [0, 13, 29])
    np.testing.assert_array_equal(store.gather(fine), EmbeddingStore(whole.location).gather(fine))
    assert store.valid[[0, 13, 29]].tolist() == [2, 2, 2]


def test_the_same_again_is_a_cache_hit(array_source, tiny_model, tmp_path) -> None:
    first = embed_dataset(array_source(20), config_of(tiny_model), root=tmp_path).report
    before = files_of(first.location)
    times = {p: p.stat().st_mtime_ns for p in Path(first.location).rglob("*") if p.is_file() and p.name != ".lock"}
    again = embed_dataset(array_source(20), config_of(tiny_model), root=tmp_path).report
    assert again.cache_hit
    assert (again.location, again.embedded, again.committed_before) == (first.location, 0, 20)
    assert files_of(first.location) == before
    assert times == {p: p.stat().st_mtime_ns for p in times}


def test_sizes_that_are_not_given_are_the_stores_own(array_source, tiny_model, tmp_path) -> None:
    first = embed_dataset(array_source(20), config_of(tiny_model), root=tmp_path).report
    config = config_of(tiny_model, batch_size=None, shard_rows=None)
    again = embed_dataset(array_source(20), config, root=tmp_path).report
    assert again.cache_hit
    assert again.fingerprint == first.fingerprint


def test_an_interrupted_run_goes_on_and_ends_with_the_same_bytes(array_source, tiny_model, tmp_path) -> None:
    def stop_at(images: int):
        def progress(phase: str, done: int, _total: int, _shares: Mapping[str, float]) -> None:
            if phase == "embed" and done >= images:
                raise KeyboardInterrupt

        return progress

    embed_dataset(array_source(50), config_of(tiny_model), where=tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        embed_dataset(array_source(50), config_of(tiny_model), where=tmp_path / "s", progress=stop_at(20))
    report = embed_dataset(array_source(50), config_of(tiny_model), where=tmp_path / "s").report
    assert (report.committed_before, report.embedded) == (16, 34)  # two shards of eight were committed
    assert files_of(tmp_path / "s") == files_of(tmp_path / "whole")


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_change_nothing(image_folder, tiny_model, tmp_path, workers) -> None:
    report = embed_dataset(
        open_source(f"imagefolder:{image_folder}"), config_of(tiny_model, workers=workers), where=tmp_path / "s"
    ).report
    reference = embed_dataset(
        open_source(f"imagefolder:{image_folder}"), config_of(tiny_model), where=tmp_path / "t"
    ).report
    assert (report.items, report.ok) == (60, 58)
    assert files_of(tmp_path / "s") == files_of(tmp_path / "t")
    assert reference.quarantined == report.quarantined


def test_a_moved_folder_with_touched_times_is_a_hit_and_one_changed_image_is_not(
    image_folder, tiny_model, tmp_path
) -> None:
    first = embed_dataset(
        open_source(f"imagefolder:{image_folder}"), config_of(tiny_model), root=tmp_path / "stores"
    ).report
    moved = image_folder.rename(tmp_path / "elsewhere")
    for path in moved.rglob("*.png"):
        path.touch()
    assert embed_dataset(
        open_source(f"imagefolder:{moved}"), config_of(tiny_model), root=tmp_path / "stores"
    ).report.cache_hit
    (moved / "dogs" / "00.png").write_bytes((moved / "dogs" / "01.png").read_bytes())
    changed = embed_dataset(open_source(f"imagefolder:{moved}"), config_of(tiny_model), root=tmp_path / "stores").report
    assert (changed.cache_hit, changed.location == first.location) == (False, False)
    with pytest.raises(FingerprintMismatchError, match="items_root"):
        embed_dataset(open_source(f"imagefolder:{moved}"), config_of(tiny_model), where=first.location)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_gives_the_same_rows_within_tolerance(array_source, tmp_path) -> None:
    model = "timm:tf_efficientnet_lite0"
    embed_dataset(array_source(40), config_of(model, device="cuda", dtype="float32"), where=tmp_path / "gpu")
    embed_dataset(array_source(40), config_of(model, device="cpu", dtype="float32"), where=tmp_path / "cpu")
    rows = np.arange(40)
    cosine = (EmbeddingStore(tmp_path / "gpu").gather(rows) * EmbeddingStore(tmp_path / "cpu").gather(rows)).sum(1)
    assert cosine.min() > 0.999
