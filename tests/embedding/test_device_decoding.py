"""JPEGs decoded by the device: the same code on a CPU, where torchvision's own decoder stands for the GPU's."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from multiprocessing import Pipe
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as tvf

from gstds_cache.api import append
from gstds_cache.api import repair as repair_api
from gstds_cache.config import EmbedConfig
from gstds_cache.data.sources import open_source
from gstds_cache.embedding import decoding, device_decoding, elsewhere, jpeg_reader, several
from gstds_cache.embedding.check import check_sample
from gstds_cache.embedding.device_decoding import decode_jpegs
from gstds_cache.embedding.jpeg import Jpeg, device_jpeg
from gstds_cache.embedding.repair import repair
from gstds_cache.embedding.run import embed_dataset, estimate_dataset
from gstds_cache.encoders.factory import open_encoder
from gstds_cache.encoders.preprocessing import Preprocessing
from gstds_cache.errors import EncoderError, FingerprintMismatchError, UsageError
from gstds_cache.files.location import Location
from gstds_cache.store import layout
from gstds_cache.store.reader import EmbeddingStore

CPU = torch.device("cpu")


def photograph(width: int, height: int, seed: int = 0) -> Image.Image:
    """Smooth colours with some noise, which a JPEG keeps."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    pixels = np.asarray(small.resize((width, height), Image.Resampling.BICUBIC), np.int16)
    return Image.fromarray(np.clip(pixels + rng.integers(-6, 7, pixels.shape), 0, 255).astype(np.uint8))


def jpeg(image: Image.Image, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", **({"quality": 92} | options))
    return file.getvalue()


def turned(image: Image.Image, orientation: object) -> bytes:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return jpeg(image, exif=exif)


def changed(data: bytes, marker: int, change: Callable[[bytes], bytes]) -> bytes:
    """A JPEG whose segments of one kind, from marker to end, went through ``change``."""
    at, kept = 2, data[:2]
    while True:
        stop = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        kept += change(data[at:stop]) if data[at + 1] == marker else data[at:stop]
        if data[at + 1] == 0xDA:
            return kept + data[stop:]
        at = stop


def without_tables(data: bytes) -> bytes:
    """A JPEG that Pillow refuses and nvJPEG does not: it has no quantization tables."""
    return changed(data, 0xDB, lambda _: b"")


WIDE, TALL = photograph(90, 60), photograph(48, 70, 1)
FILES: dict[str, bytes] = {
    "00_wide.jpg": jpeg(WIDE),
    "01_tall.jpg": jpeg(TALL, subsampling=0),
    "02_422.jpg": jpeg(photograph(64, 64, 2), subsampling=1),
    "03_turned.jpg": turned(photograph(80, 40, 3), 6),
    "04_mirrored.jpg": turned(photograph(80, 40, 4), 5),
    "05_grey.jpg": jpeg(photograph(50, 50, 5).convert("L")),
    "06_cmyk.jpg": jpeg(photograph(50, 40, 6).convert("CMYK")),
    "07_progressive.jpg": jpeg(photograph(60, 50, 7), progressive=True),
    "08_cut.jpg": jpeg(photograph(200, 150, 8))[:-900],
    "09_no_tables.jpg": without_tables(jpeg(photograph(40, 40, 9))),
    "10_empty.jpg": b"",
    "11_long.jpg": jpeg(photograph(400, 12, 10)),
    "12_small.jpg": jpeg(photograph(9, 11, 11)),
}
BY_DEVICE = {
    "00_wide.jpg",
    "01_tall.jpg",
    "02_422.jpg",
    "03_turned.jpg",
    "04_mirrored.jpg",
    "11_long.jpg",
    "12_small.jpg",
}
BROKEN = {"08_cut.jpg", "09_no_tables.jpg", "10_empty.jpg"}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A data set of all those files, PNGs among them, more than one batch of them."""
    folder = tmp_path_factory.mktemp("photos")
    for number in range(3):
        (folder / f"class{number}").mkdir()
        for name, data in FILES.items():
            (folder / f"class{number}" / name).write_bytes(data)
        photograph(30, 30, 20 + number).save(folder / f"class{number}" / "13_other.png")
    return f"imagefolder:{folder}"


@pytest.fixture
def device_decodes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a CPU pass for a device that decodes: all that is asked of it is its version."""
    monkeypatch.setattr(decoding, "device_decoder_version", lambda _device: "13.0")


@pytest.fixture
def config(tiny_model: str) -> EmbedConfig:
    return EmbedConfig(
        model=tiny_model, batch_size=8, shard_rows=16, workers=0, device="cpu", decoder="nvjpeg", dtype="float32"
    )


def rows_of(where: Path) -> np.ndarray:
    store = EmbeddingStore(where)
    fine = np.flatnonzero(store.valid == layout.OK)
    rows = np.zeros((len(store), store.spec.dim), np.float32)
    rows[fine] = store.gather(fine)
    return rows


@pytest.mark.parametrize("name", FILES)
def test_the_header_tells_who_decodes_a_file(name: str) -> None:
    told = device_jpeg(FILES[name])
    assert (told is not None) == (name in BY_DEVICE)
    if told is not None:
        with Image.open(io.BytesIO(FILES[name])) as image:
            orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
            assert told == Jpeg(image.width, image.height, orientation)


@pytest.mark.parametrize(
    ("what", "data"),
    [
        ("nothing", b""),
        ("two bytes", b"\xff\xd8"),
        ("no frame", b"\xff\xd8\xff\xd9"),
        ("only a length", b"\xff\xd8\xff\xe0\x00\x10\xff\xd9"),
        ("12 bits", jpeg(WIDE).replace(b"\xff\xc0\x00\x11\x08", b"\xff\xc0\x00\x11\x0c")),
        ("lossless", jpeg(WIDE).replace(b"\xff\xc0\x00\x11\x08", b"\xff\xc3\x00\x11\x08")),
        ("RGB by its Adobe segment", jpeg(WIDE, keep_rgb=True)),
        ("too many pixels", jpeg(WIDE).replace(b"\x08\x00\x3c\x00\x5a\x03", b"\x08\x7f\xff\x7f\xff\x03")),
        ("an odd orientation", turned(WIDE, 9)),
        ("much behind its end", jpeg(WIDE) + bytes(5000)),
        ("no quantization tables", without_tables(jpeg(WIDE))),
        ("a quantization table that is cut", changed(jpeg(WIDE), 0xDB, lambda part: part[:2] + b"\0\x33" + part[4:53])),
        ("no Huffman tables", changed(jpeg(WIDE), 0xC4, lambda _: b"")),
        ("three codes of one bit", changed(jpeg(WIDE), 0xC4, lambda part: part[:5] + b"\3" + part[6:])),
        ("a table that the scan has not", changed(jpeg(WIDE), 0xDA, lambda part: part[:6] + b"\x22" + part[7:])),
        (
            "a scan of one component",
            changed(jpeg(WIDE), 0xDA, lambda part: b"\xff\xda\0\x08\1" + part[5:7] + part[11:]),
        ),
    ],
)
def test_what_is_odd_is_left_to_pillow(what: str, data: bytes) -> None:
    assert device_jpeg(data) is None, what


def test_a_little_behind_the_end_and_filling_before_a_marker_are_fine() -> None:
    data = jpeg(WIDE)
    assert device_jpeg(data + bytes(100)) == Jpeg(90, 60, 1)
    assert device_jpeg(data[:2] + b"\xff\xff" + data[2:]) == Jpeg(90, 60, 1)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("resize", [32, (40, 36)])
@pytest.mark.parametrize("size", [(90, 60), (60, 90), (32, 32), (1000, 20), (20, 1000), (9, 11), (32, 40)])
def test_resized_pixels_are_torchvisions_and_almost_pillows(size, resize, interpolation: str) -> None:
    ours = Preprocessing(resize=resize, crop=(28, 28), interpolation=interpolation)
    image = photograph(*size)
    pixels = torch.from_numpy(np.asarray(image).transpose(2, 0, 1).copy())
    (got,) = ours.resized(pixels[None])
    assert (got.shape, got.dtype) == ((3, 28, 28), torch.float32)
    if max(size) <= 16 * min(size):
        filter_ = InterpolationMode(interpolation)
        theirs = tvf.resize(pixels.float(), [resize] if isinstance(resize, int) else list(resize), filter_)
        torch.testing.assert_close(got, tvf.center_crop(theirs, [28, 28]), atol=1e-4, rtol=0)
    difference = (got.round().clamp(0, 255) - ours.pixels(image).float()).abs()
    assert float(difference.mean()) < 0.6
    assert float(difference.max()) <= 3


def test_a_crop_larger_than_the_image_is_filled_up_with_black() -> None:
    ours = Preprocessing(resize=20, crop=(32, 32))
    image = photograph(40, 20)
    pixels = torch.from_numpy(np.asarray(image).transpose(2, 0, 1).copy())
    (got,) = ours.resized(pixels[None])
    assert bool((got[:, :6] == 0).all())
    assert float((got.round() - ours.pixels(image).float()).abs().max()) <= 3


def test_one_broken_file_does_not_take_the_others_of_its_call_with_it() -> None:
    files = [
        torch.frombuffer(bytearray(FILES[name]), dtype=torch.uint8) for name in ("00_wide.jpg", "09_no_tables.jpg")
    ]
    good, broken = decode_jpegs(files, CPU)
    assert broken is None
    assert good is not None
    assert np.abs(good.numpy().astype(int) - np.asarray(WIDE).transpose(2, 0, 1)).mean() < 8


@pytest.mark.parametrize("workers", [1, 3])
def test_a_store_of_all_sorts_of_files(photos, config, device_decodes, tmp_path, workers: int) -> None:
    told: list[str] = []
    source = open_source(photos)
    alone = embed_dataset(source, config, where=tmp_path / "alone", notify=told.append).report
    spread = embed_dataset(source, replace(config, workers=workers), where=tmp_path / "spread").report
    pillow = embed_dataset(source, replace(config, decoder="pillow"), where=tmp_path / "pillow").report
    assert [(item.row, item.reason) for item in alone.quarantined] == [
        (item.row, item.reason) for item in pillow.quarantined
    ]
    assert {Path(source.ids[item.row]).name for item in alone.quarantined} == BROKEN
    assert spread.quarantined == alone.quarantined
    ours, theirs = rows_of(tmp_path / "alone"), rows_of(tmp_path / "pillow")
    assert ours.tobytes() == rows_of(tmp_path / "spread").tobytes()
    same = np.array([(a == b).all() for a, b in zip(ours, theirs, strict=True)])
    others = [row for row, name in enumerate(source.ids) if Path(name).name not in BY_DEVICE]
    assert same[others].all()
    assert not same.all()
    fine = np.flatnonzero((theirs != 0).any(axis=1))
    assert float((ours[fine] * theirs[fine]).sum(axis=1).min()) > 0.999
    (note,) = [line for line in told if line.startswith("note: `decoder=nvjpeg`")]
    assert f"decoded {3 * len(BY_DEVICE)} of {len(source)} images" in note


def test_what_the_device_cannot_decode_after_all_is_pillows(
    photos, config, device_decodes, tmp_path, monkeypatch
) -> None:
    decode = device_decoding._operator

    def operator(device: torch.device) -> Callable[[list[torch.Tensor]], list[torch.Tensor | None]]:
        def refusing(files: list[torch.Tensor]) -> list[torch.Tensor | None]:
            if any(bytes(file.numpy()) == FILES["01_tall.jpg"] for file in files):
                raise RuntimeError("the device's decoder failed")
            return decode(device)(files)

        return refusing

    monkeypatch.setattr(device_decoding, "_operator", operator)
    source = open_source(photos)
    embed_dataset(source, config, where=tmp_path / "device")
    embed_dataset(source, replace(config, decoder="pillow"), where=tmp_path / "pillow")
    ours, theirs = rows_of(tmp_path / "device"), rows_of(tmp_path / "pillow")
    names = [Path(name).name for name in source.ids]
    tall, wide = (np.array([name == which for name in names]) for which in ("01_tall.jpg", "00_wide.jpg"))
    assert ours[tall].tobytes() == theirs[tall].tobytes()
    assert not (ours[wide] == theirs[wide]).all(axis=1).any()


@pytest.mark.parametrize("workers", [0, 2])
def test_parts_that_are_full_go_on_in_the_next(
    photos, config, device_decodes, tmp_path, monkeypatch, workers: int
) -> None:
    source = open_source(photos)
    embed_dataset(source, config, where=tmp_path / "whole")
    monkeypatch.setattr(jpeg_reader, "PART_BYTES", 3000)
    monkeypatch.setattr(jpeg_reader, "PART_DECODED_BYTES", 20_000)
    counted: list[int] = []
    decode = device_decoding.decode_jpegs
    monkeypatch.setattr(
        device_decoding, "decode_jpegs", lambda files, device: counted.append(len(files)) or decode(files, device)
    )
    embed_dataset(source, replace(config, workers=workers), where=tmp_path / "parts")
    assert rows_of(tmp_path / "parts").tobytes() == rows_of(tmp_path / "whole").tobytes()
    assert len(counted) > len(source) / 4
    assert max(counted) <= 4


def test_the_decoder_is_part_of_the_fingerprint_and_pillow_is_not(photos, config, device_decodes, tmp_path) -> None:
    source, pillow = open_source(photos), replace(config, decoder="pillow")
    embed_dataset(source, pillow, where=tmp_path / "s")
    preprocessing = EmbeddingStore(tmp_path / "s").spec.encoder["preprocessing"]
    assert not {"decoder", "decoder_version", "resized_by"} & preprocessing.keys()
    with pytest.raises(FingerprintMismatchError, match=r"decoder: the store has None, this run has 'nvjpeg'") as caught:
        embed_dataset(source, config, where=tmp_path / "s")
    assert "preprocessing.decoder_version: the store has None, this run has '13.0'" in caught.value.message
    with pytest.raises(FingerprintMismatchError, match="preprocessing"):
        embed_dataset(source, config, where=tmp_path / "t", reuse=[tmp_path / "s"])
    found = [embed_dataset(source, one, root=tmp_path / "root").location for one in (pillow, config)]
    assert found[0] != found[1]


def test_a_store_is_compared_and_mended_with_its_own_decoder(photos, config, device_decodes, tmp_path) -> None:
    source = open_source(photos)
    embed_dataset(source, config, where=tmp_path / "s")
    before = rows_of(tmp_path / "s").tobytes()
    encoder = open_encoder(config.model).decoded_by("nvjpeg", "13.0")
    report = check_sample(EmbeddingStore(tmp_path / "s"), source, encoder, rows=len(source), device="cpu")
    assert report.problems == ()
    assert report.cosine_min > 1 - 1e-6
    mended = repair(tmp_path / "s", source, encoder, shards=[1], device="cpu", workers=0)
    assert (mended.shards, mended.changed) == ((1,), ())
    assert rows_of(tmp_path / "s").tobytes() == before
    with pytest.raises(FingerprintMismatchError, match=r"decoder_version: the store has '13.0', this run has '13.1'"):
        repair(
            tmp_path / "s",
            source,
            open_encoder(config.model).decoded_by("nvjpeg", "13.1"),
            shards=[1],
            device="cpu",
            workers=0,
        )


def test_an_estimate_is_of_the_decoder_that_will_decode(photos, config, device_decodes) -> None:
    told = estimate_dataset(open_source(photos), config)
    assert told.decoder == "nvjpeg"
    assert "/s with nvjpeg, the model" in told.lines()[0]
    assert told.images_per_second <= told.decode_per_second


def test_a_cpu_is_no_device_that_decodes(photos, config) -> None:
    for call in (embed_dataset, estimate_dataset):
        with pytest.raises(UsageError, match="`decoder`: got 'nvjpeg' with device cpu, expected a CUDA") as caught:
            call(open_source(photos), config, where="nowhere")
        assert "use `decoder='pillow'`" in caught.value.hint
    assert not Path("nowhere").exists()


def test_a_torchvision_that_cannot_decode_is_told(photos, config, device_decodes, monkeypatch, tmp_path) -> None:
    def none(_device: torch.device) -> Callable[[list[torch.Tensor]], list[torch.Tensor | None]]:
        raise AttributeError("'_OpNamespace' 'image' object has no attribute 'decode_jpegs_cuda'")

    monkeypatch.setattr(device_decoding, "_operator", none)
    with pytest.raises(UsageError, match=r"torchvision \S+ cannot decode a test image on cpu: .*decode_jpegs_cuda"):
        embed_dataset(open_source(photos), config, where=tmp_path / "s")
    assert not (tmp_path / "s").exists()


def test_whoever_embeds_with_a_decoder_of_the_gpu_keeps_its_streams_apart(
    photos, config, device_decodes, tmp_path, monkeypatch
) -> None:
    """Before anything asks for a device, which would begin CUDA."""
    asked: list[str] = []
    store = tmp_path / "s"
    embed_dataset(open_source(photos), config, where=store)
    for module in (append, repair_api, elsewhere, several):
        resolve = getattr(module, "resolve_devices", None) or getattr(module, "resolve_device", None)
        monkeypatch.setattr(module, "keep_streams_apart", asked.append)
        if resolve is not None:
            monkeypatch.setattr(module, resolve.__name__, lambda name, of=resolve: asked.append("device") or of(name))
    append.append_to_store(store, photos, model=config.model, device="cpu", workers=0, progress=False)
    assert asked[:2] == ["nvjpeg", "device"]
    asked.clear()
    repair_api.repair_store(store, shards=[0], dataset=photos, model=config.model, device="cpu", progress=False)
    assert asked[:2] == ["nvjpeg", "device"]
    asked.clear()
    recipe = elsewhere.EmbedRecipe(
        source=open_source(photos), model=config.model, allow_untrained=False, decoder="nvjpeg", cuda_graphs=True,
        location=Location.parse(store), spec=EmbeddingStore(store).spec, gpu=False, workers=0, reuse=(), samples={},
    )  # fmt: skip
    recipe.open()
    assert asked == ["nvjpeg"]
    asked.clear()
    setup = several.DeviceSetup(
        source=open_source(photos), model=config.model, allow_untrained=False, decoder="nvjpeg", cuda_graphs=True,
        spec=EmbeddingStore(store).spec, workers=0, knows=False,
    )  # fmt: skip
    (asking, answers), (committing, _) = Pipe(), Pipe()
    answers.send(None)  # there are no shards
    several._embed_shards(setup, "cpu", asking, committing)
    assert asked == ["nvjpeg"]


def test_a_filter_that_a_device_has_not_is_told() -> None:
    encoder = open_encoder("timm:test_resnet", allow_untrained=True)
    encoder.spec = replace(encoder.spec, preprocessing=replace(encoder.spec.preprocessing, interpolation="lanczos"))
    with pytest.raises(EncoderError, match="got 'lanczos' as filter of its resize.*expected one of bilinear, bicubic"):
        encoder.decoded_by("nvjpeg", "13.0")


def test_an_error_in_the_decoding_thread_ends_the_run(photos, config, device_decodes, monkeypatch, tmp_path) -> None:
    def broken(_files: object, _device: object) -> list[torch.Tensor | None]:
        raise torch.OutOfMemoryError("CUDA out of memory")

    embed = replace(config, workers=2)
    source = open_source(photos)
    monkeypatch.setattr(decoding, "pixels_of", lambda *_: torch.zeros((3, 16, 16), dtype=torch.uint8))
    monkeypatch.setattr("gstds_cache.embedding.determinism.pixels_of", lambda *_: torch.ones(3, 16, 16).byte())
    monkeypatch.setattr(device_decoding, "decode_jpegs", broken)
    with pytest.raises(Exception, match="out of memory"):
        embed_dataset(source, embed, where=tmp_path / "s")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("workers", [0, 3])
def test_a_gpu_decodes_almost_what_pillow_does(photos, config, tmp_path, workers: int) -> None:
    source, on_gpu = open_source(photos), replace(config, device="cuda", workers=workers)
    ours = embed_dataset(source, on_gpu, where=tmp_path / "gpu").report
    theirs = embed_dataset(source, replace(on_gpu, decoder="pillow"), where=tmp_path / "pillow").report
    assert [item.row for item in ours.quarantined] == [item.row for item in theirs.quarantined]
    mine, pillows = rows_of(tmp_path / "gpu"), rows_of(tmp_path / "pillow")
    fine = np.flatnonzero((pillows != 0).any(axis=1))
    cosines = dict(zip(fine.tolist(), (mine[fine] * pillows[fine]).sum(axis=1).tolist(), strict=True))
    small = [row for row in cosines if source.ids[row].endswith("12_small.jpg")]  # of 9 x 11: colours of 5 x 6
    assert len(small) == 3
    assert min(cosines[row] for row in small) > 0.98  # 0.987 on an H200
    assert min(cosine for row, cosine in cosines.items() if row not in small) > 0.995
    again = embed_dataset(source, on_gpu, where=tmp_path / "again").report
    assert again.embedded == len(source)
    assert rows_of(tmp_path / "again").tobytes() == mine.tobytes()
