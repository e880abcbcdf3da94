"""The size a model looks at, and how JPEGs are decoded, where that is left to the images or to a store."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gstds_cache.api.repair import repair_store
from gstds_cache.config import EmbedConfig
from gstds_cache.data.sizes import SAMPLE, sample_sizes
from gstds_cache.data.sources import open_source
from gstds_cache.embedding import run
from gstds_cache.embedding.run import embed_dataset, estimate_dataset
from gstds_cache.embedding.settle import SIZE_BY, side_for
from gstds_cache.encoders.factory import open_encoder, with_size
from gstds_cache.errors import EncoderError, FingerprintMismatchError
from gstds_cache.store.reader import EmbeddingStore

MODEL = "timm:test_resnet"  # of 160 pixels
CONFIG = EmbedConfig(model=MODEL, allow_untrained=True, device="cpu", workers=0, batch_size=4)


def photos(root: Path, side: int, count: int = 6, kind: str = "jpg") -> str:
    for number in range(count):
        folder = root / "ab"[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        rng = np.random.default_rng([number, side])
        small = rng.integers(0, 256, (7, 9, 3), dtype=np.uint8)
        Image.fromarray(small).resize((side + number % 3, side), Image.Resampling.BICUBIC).save(
            folder / f"{number}.{kind}"
        )
    return f"imagefolder:{root}"


def crop_of(store: EmbeddingStore) -> list[int]:
    return store.spec.encoder["preprocessing"]["crop"]


@pytest.mark.parametrize(
    ("shorter", "side"),
    [(0, 224), (8, 96), (24, 96), (28, 128), (32, 128), (33, 160), (48, 192), (49, 224), (500, 224)],
)
def test_the_side_is_four_times_the_images_or_the_models_own(shorter: int, side: int) -> None:
    assert side_for(shorter, 224) == side
    assert side_for(shorter, 64) == 64


def test_only_models_that_take_any_size_leave_it_open() -> None:
    assert open_encoder(MODEL, allow_untrained=True).sizes is not None
    assert open_encoder(f"{MODEL}?size=auto", allow_untrained=True).sizes is not None
    assert open_encoder(f"{MODEL}?size=96", allow_untrained=True).sizes is None
    fixed = open_encoder("timm:test_vit?size=auto", allow_untrained=True)
    assert fixed.sizes is None
    assert "timm:test_vit looks at its own, 160 x 160 pixels" in fixed.notes[-1]
    assert open_encoder("torchvision:mobilenet_v3_small", allow_untrained=True).sizes is not None
    # What is settled to a size is what that size is called by name.
    named = open_encoder(f"{MODEL}?size=96", allow_untrained=True).spec.preprocessing
    assert open_encoder(MODEL, allow_untrained=True).looking_at(96) == named


def test_a_name_gets_another_size() -> None:
    assert with_size("timm:a?size=auto&weights=b", 64) == "timm:a?weights=b&size=64"
    assert with_size("timm:a", 64) == "timm:a?size=64"
    assert with_size("timm:a?size=64", None) == "timm:a"


def test_small_images_are_looked_at_in_fewer_pixels_and_a_store_tells_which(tmp_path: Path) -> None:
    source = open_source(photos(tmp_path / "small", 20))
    store = embed_dataset(source, CONFIG, where=tmp_path / "s")
    assert crop_of(store) == [96, 96]
    assert store.report.looks_at == "96 x 96 pixels: the shorter side of 6 sampled images is 20 in the median"
    # The identity is the size that was used, whoever settled it.
    named = embed_dataset(source, replace(CONFIG, model=f"{MODEL}?size=96"), where=tmp_path / "n")
    assert named.fingerprint == store.fingerprint
    assert not named.report.cache_hit
    assert named.report.looks_at == "96 x 96 pixels"
    again = embed_dataset(source, replace(CONFIG, model=f"{MODEL}?size=auto"), where=tmp_path / "s")
    assert again.report.cache_hit
    assert again.report.looks_at == "96 x 96 pixels: as the store does"
    estimate = estimate_dataset(source, CONFIG, where=tmp_path / "other")
    assert estimate.lines()[-1].startswith("looks at: 96 x 96 pixels: the shorter side of 6")
    large = embed_dataset(open_source(photos(tmp_path / "large", 200)), CONFIG, where=tmp_path / "l")
    assert crop_of(large) == [160, 160]
    # What a repair or a command of somebody else opens is the size, not the question.
    assert store._metadata.model_uri == f"{MODEL}?size=96"
    assert store._metadata.provenance[SIZE_BY] == "images"
    assert large._metadata.model_uri == MODEL


def test_a_store_of_the_models_own_size_is_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source(photos(tmp_path / "small", 20))
    own = replace(CONFIG, model=f"{MODEL}?size=160")  # as every store was before the size was left open
    before = {place: embed_dataset(source, own, **place_of(place, tmp_path)) for place in ("where", "root")}

    def none_opened(*_: object) -> None:
        raise AssertionError("an image was opened")

    monkeypatch.setattr("gstds_cache.embedding.settle.sample_sizes", none_opened)
    for place, store in before.items():
        again = embed_dataset(source, CONFIG, **place_of(place, tmp_path))
        assert again.report.cache_hit
        assert (again.fingerprint, again.location) == (store.fingerprint, store.location)
        assert again.report.looks_at == "160 x 160 pixels: as the store does"


def place_of(place: str, folder: Path) -> dict[str, Path]:
    return {place: folder / place}


def test_stores_are_found_by_name_whatever_was_settled_and_no_image_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, root = open_source(photos(tmp_path / "small", 20)), tmp_path / "stores"
    # One that somebody named another size for is not what the same command makes without one.
    named = embed_dataset(source, replace(CONFIG, model=f"{MODEL}?size=128"), root=root)
    first = embed_dataset(source, CONFIG, root=root)
    assert (crop_of(named), crop_of(first)) == ([128, 128], [96, 96])
    monkeypatch.setattr("gstds_cache.embedding.settle.sample_sizes", None)
    again = embed_dataset(source, CONFIG, root=root)
    assert again.report.cache_hit
    assert again.location == first.location


def test_a_run_that_was_stopped_goes_on_in_its_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source(photos(tmp_path / "small", 20, count=16))
    config = replace(CONFIG, shard_rows=4)
    whole = embed_dataset(source, config, where=tmp_path / "whole")
    commit = run.StoreWriter.commit

    def stop(writer: run.StoreWriter, shard: int, *more: object) -> object:
        if shard == 2:
            raise KeyboardInterrupt
        return commit(writer, shard, *more)

    monkeypatch.setattr(run.StoreWriter, "commit", stop)
    with pytest.raises(KeyboardInterrupt):
        embed_dataset(source, config, where=tmp_path / "cut")
    monkeypatch.undo()
    ended = embed_dataset(source, CONFIG, where=tmp_path / "cut")
    assert (ended.report.committed_before, ended.fingerprint) == (8, whole.fingerprint)
    rows = [
        np.stack([store.gather(np.arange(16), np.empty((16, store.spec.dim), np.float16))]) for store in (ended, whole)
    ]
    assert np.array_equal(*rows)


def test_rows_of_a_store_of_the_models_own_size_are_taken_over_by_a_grown_data_set(tmp_path: Path) -> None:
    photos(tmp_path / "small", 20)
    uri = f"imagefolder:{tmp_path / 'small'}"
    embed_dataset(open_source(uri), replace(CONFIG, model=f"{MODEL}?size=160"), where=tmp_path / "old")
    photos(tmp_path / "small", 21, count=8)  # six are other images now, and two are new
    grown = embed_dataset(open_source(uri), CONFIG, where=tmp_path / "new", reuse=[tmp_path / "old"])
    assert crop_of(grown) == [160, 160]
    assert grown.report.looks_at == "160 x 160 pixels: as the store does"


def test_another_models_store_is_a_mismatch_still(tmp_path: Path) -> None:
    source = open_source(photos(tmp_path / "small", 20))
    embed_dataset(source, CONFIG, where=tmp_path / "s")
    with pytest.raises(FingerprintMismatchError, match="model: the store has 'timm:test_resnet'"):
        embed_dataset(source, replace(CONFIG, model="timm:test_efficientnet"), where=tmp_path / "s")
    with pytest.raises(FingerprintMismatchError, match="crop"):
        embed_dataset(source, replace(CONFIG, model=f"{MODEL}?size=128"), where=tmp_path / "s")


def test_a_model_that_refuses_the_smaller_size_looks_at_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_model: object, _name: str, pixels: object) -> None:
        raise EncoderError("no")

    monkeypatch.setattr("gstds_cache.encoders.encoder.run", refuse)
    assert not open_encoder(MODEL, allow_untrained=True).takes(96)
    monkeypatch.undo()
    assert open_encoder(MODEL, allow_untrained=True).takes(96)


def test_sizes_are_those_of_a_fixed_sample_and_no_pixel_is_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_source(photos(tmp_path / "many", 16, count=SAMPLE + 20))
    (tmp_path / "many/a/0.jpg").write_bytes(b"no image")

    def load(*_: object) -> None:
        raise AssertionError("pixels were decoded")

    monkeypatch.setattr(type(source), "image", load)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", load)
    found = sample_sizes(source)
    assert found == sample_sizes(source)
    assert len(found.shorter) in {SAMPLE, SAMPLE - 1}
    assert set(found.shorter) == {16}
    assert found.jpeg == found.shorter


class Pairs:
    """A data set of a program's own, with images that were opened and not decoded, and arrays."""

    def __init__(self, path: Path) -> None:
        self.data = path.read_bytes()

    def __len__(self) -> int:
        return 4

    def __getitem__(self, row: int) -> tuple[object, int]:
        if row > 3:
            raise IndexError
        return (Image.open(io.BytesIO(self.data)), 0) if row % 2 else (np.full((30, 40, 3), 9 * row, np.uint8), 1)


def test_a_data_set_of_ones_own_tells_the_size_of_its_items(tmp_path: Path) -> None:
    photos(tmp_path / "one", 20, count=1)
    found = sample_sizes(open_source(Pairs(tmp_path / "one/a/0.jpg")))
    assert sorted(found.shorter) == [20, 20, 30, 30]
    assert found.jpeg == ()  # whatever decodes them is not ours to scale
    assert sample_sizes(open_source("digits")).median == 8


# --- decoding


def test_large_jpegs_are_decoded_scaled_down_and_small_ones_are_not(tmp_path: Path) -> None:
    model = f"{MODEL}?size=32"
    config = replace(CONFIG, model=model)
    side = 2 * open_encoder(model, allow_untrained=True).spec.preprocessing.resize
    stores = {}
    for name, length, kind in (("large", 2 * side, "jpg"), ("small", 2 * side - 1, "jpg"), ("png", 2 * side, "png")):
        source = open_source(photos(tmp_path / name, length, kind=kind))
        store = embed_dataset(source, config, where=tmp_path / f"{name}.store")
        exact = embed_dataset(source, replace(config, decode="exact"), where=tmp_path / f"{name}.exact")
        asked = embed_dataset(source, replace(config, decode="scaled"), where=tmp_path / f"{name}.scaled")
        # It is part of the identity where it changes pixels, and nowhere else.
        assert (store.fingerprint == exact.fingerprint) == (name != "large")
        assert asked.fingerprint == store.fingerprint
        stores[name] = store, exact
    store, exact = stores["large"]
    assert store.spec.encoder["preprocessing"]["decode"] == "scaled"
    assert "decode" not in exact.spec.encoder["preprocessing"]
    assert "large JPEGs are decoded at 1/2" in store.report.looks_at
    rows = [s.gather(np.arange(6), np.empty((6, s.spec.dim), np.float32)) for s in (store, exact)]
    cosines = (rows[0] * rows[1]).sum(axis=1)
    assert 0.99 < cosines.min() < 1


def test_a_store_of_exact_decoding_is_found_again(tmp_path: Path) -> None:
    source = open_source(photos(tmp_path / "large", 200))
    config = replace(CONFIG, model=f"{MODEL}?size=32")
    before = embed_dataset(source, replace(config, decode="exact"), where=tmp_path / "s")
    again = embed_dataset(source, config, where=tmp_path / "s")
    assert (again.report.cache_hit, again.fingerprint) == (True, before.fingerprint)
    with pytest.raises(FingerprintMismatchError, match="decode: the store has None, this run has 'scaled'"):
        embed_dataset(source, replace(config, decode="scaled"), where=tmp_path / "s")
    scaled = embed_dataset(source, config, where=tmp_path / "t")
    with pytest.raises(FingerprintMismatchError, match="decode: the store has 'scaled', this run has None"):
        embed_dataset(source, replace(config, decode="exact"), where=tmp_path / "t")
    assert embed_dataset(source, replace(config, decode="scaled"), where=tmp_path / "t").report.cache_hit
    assert scaled.fingerprint != before.fingerprint


def test_the_cap_is_an_option_and_identity_where_it_is_not_the_default(tmp_path: Path) -> None:
    source = open_source(photos(tmp_path / "large", 200))
    store = embed_dataset(source, CONFIG, where=tmp_path / "s")
    small = embed_dataset(source, replace(CONFIG, max_pixels=200 * 200), where=tmp_path / "t")
    assert "max_pixels" not in store.spec.encoder["preprocessing"]
    assert small.spec.encoder["preprocessing"]["max_pixels"] == 40_000
    assert {item.reason for item in small.quarantined} == {
        "too many pixels: 201 x 200, at most 40000 are decoded",
        "too many pixels: 202 x 200, at most 40000 are decoded",
    }
    again = embed_dataset(source, replace(CONFIG, max_pixels=200 * 200), where=tmp_path / "t")
    assert again.report.cache_hit


def test_a_store_is_made_again_in_the_way_that_was_settled(tmp_path: Path) -> None:
    small, large = photos(tmp_path / "small", 20), photos(tmp_path / "large", 200)
    for name, uri, config in (
        ("size", small, CONFIG),
        ("decode", large, replace(CONFIG, model=f"{MODEL}?size=32", max_pixels=201 * 200)),
    ):
        store = embed_dataset(open_source(uri), config, where=tmp_path / name)
        assert name == "size" or store.spec.encoder["preprocessing"]["decode"] == "scaled"
        for model in (None, config.model):  # where it was, and named as the user did
            report = repair_store(tmp_path / name, shards=[0], model=model, device="cpu", workers=0, progress=False)
            assert (report.shards, report.changed, report.after.problems) == ((0,), (), ())


def test_items_of_formats_that_came_later_are_told_of_where_a_store_has_none(tmp_path: Path) -> None:
    uri = photos(tmp_path / "photos", 20)
    embed_dataset(open_source(uri), CONFIG, where=tmp_path / "s")
    Image.new("RGB", (20, 20)).save(tmp_path / "photos/a/z.avif")
    with pytest.raises(FingerprintMismatchError, match="1 of the items are AVIF or HEIC files"):
        embed_dataset(open_source(uri), CONFIG, where=tmp_path / "s")
