"""Decoding: exact pixels for every mode, and one kind of error for everything that is not an image."""

from __future__ import annotations

import io
import pickle
import struct
import warnings

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from image_bytes import NOISE, encode, oriented, png, png_header, stored_as, with_right_checksums
from PIL import Image, ImageOps, TiffImagePlugin

from gstds_cache.config import EmbedConfig
from gstds_cache.data.decode import Decoding, UndecodableError, decode_image, decoding_as, header_size, to_rgb
from gstds_cache.errors import DatasetError


def pixels(image: Image.Image) -> np.ndarray:
    assert image.mode == "RGB"
    return np.asarray(image)


def on_white(value: int, alpha: int) -> int:
    """The definition, in exact arithmetic."""
    return round((value * alpha + 255 * (255 - alpha)) / 255)


VALID = {
    "png": encode(Image.fromarray(NOISE)),
    "jpeg": encode(Image.fromarray(NOISE), "JPEG"),
    "gif": encode(
        Image.fromarray(NOISE).convert("P"), "GIF", save_all=True, append_images=[Image.new("P", (13, 9), 3)]
    ),
}


@pytest.mark.parametrize("fmt", ["PNG", "BMP", "PPM", "TIFF"])
def test_rgb_is_returned_as_it_is(fmt: str) -> None:
    assert np.array_equal(pixels(decode_image(encode(Image.fromarray(NOISE), fmt))), NOISE)


def test_lossless_webp() -> None:
    assert np.array_equal(pixels(decode_image(encode(Image.fromarray(NOISE), "WEBP", lossless=True))), NOISE)


@pytest.mark.parametrize("alpha", [0, 1, 64, 128, 200, 254, 255])
def test_rgba_is_laid_on_white(alpha: int) -> None:
    got = decode_image(encode(Image.new("RGBA", (2, 2), (10, 100, 250, alpha))))
    assert got.getpixel((1, 1)) == (on_white(10, alpha), on_white(100, alpha), on_white(250, alpha))


@pytest.mark.parametrize("alpha", [0, 77, 255])
def test_grey_with_alpha_is_laid_on_white(alpha: int) -> None:
    got = decode_image(encode(Image.new("LA", (2, 2), (40, alpha))))
    assert got.getpixel((0, 0)) == (on_white(40, alpha),) * 3


@pytest.mark.parametrize("mode", ["RGBa", "La", "PA"])
def test_rarer_alpha_modes_are_laid_on_white(mode: str) -> None:
    clear = Image.new(mode, (2, 2), (0,) * len(Image.new(mode, (1, 1)).getbands()))
    assert to_rgb(clear).getpixel((0, 0)) == (255, 255, 255)
    opaque = Image.new("LA", (2, 2), (60, 255)) if mode != "RGBa" else Image.new("RGBA", (2, 2), (60, 60, 60, 255))
    assert to_rgb(opaque.convert(mode)).getpixel((0, 0)) == (60, 60, 60)


def test_palette_with_a_transparent_entry() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([200, 10, 20, 30, 40, 50])
    image.putpixel((1, 0), 1)
    got = decode_image(encode(image, transparency=0))
    assert [got.getpixel((x, 0)) for x in range(2)] == [(255, 255, 255), (30, 40, 50)]


def test_palette_with_an_alpha_per_entry() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([200, 10, 20, 30, 40, 50])
    image.putpixel((1, 0), 1)
    got = decode_image(encode(image, transparency=bytes([128, 255])))
    assert [got.getpixel((x, 0)) for x in range(2)] == [tuple(on_white(v, 128) for v in (200, 10, 20)), (30, 40, 50)]


def test_palette_without_transparency() -> None:
    image = Image.new("P", (1, 1))
    image.putpalette([200, 10, 20])
    assert decode_image(encode(image)).getpixel((0, 0)) == (200, 10, 20)


@pytest.mark.parametrize(
    ("mode", "clear", "solid", "seen"),
    [("L", 100, 99, (99, 99, 99)), ("RGB", (1, 2, 3), (1, 2, 4), (1, 2, 4)), ("I;16", 1000, 1001, (3, 3, 3))],
)
def test_png_with_one_transparent_colour(mode: str, clear: object, solid: object, seen: object) -> None:
    image = Image.new(mode, (2, 1), clear)
    image.putpixel((1, 0), solid)
    got = decode_image(encode(image, transparency=clear))
    assert [got.getpixel((x, 0)) for x in range(2)] == [(255, 255, 255), seen]


@pytest.mark.parametrize("fmt", ["PNG", "TIFF", "PPM"])
def test_sixteen_bit_grey_keeps_its_upper_byte(fmt: str) -> None:
    values = np.array([[0, 255, 256, 32768, 65279, 65535]], np.uint16)
    got = pixels(decode_image(encode(Image.fromarray(values), fmt)))
    assert got[0, :, 0].tolist() == [0, 0, 1, 128, 254, 255]
    assert (got[..., 0] == got[..., 1]).all()
    assert (got[..., 0] == got[..., 2]).all()


@pytest.mark.parametrize("mode", ["I;16B", "I;16L", "I;16N"])
def test_sixteen_bit_grey_in_either_byte_order(mode: str) -> None:
    assert to_rgb(Image.new(mode, (1, 1), 0x1234)).getpixel((0, 0)) == (0x12,) * 3


def test_wide_integers_are_read_as_sixteen_bit() -> None:
    values = np.array([[-5, 0, 4096, 65535, 70000] + 300 * [30000]], np.int32)
    assert pixels(to_rgb(Image.fromarray(values)))[0, :5, 0].tolist() == [0, 0, 16, 255, 255]


def test_float_grey_in_either_convention() -> None:
    shard = np.array([[0.0, 0.5, 1.0, np.nan, -1.0, np.inf] + 200 * [0.5]], np.float32)
    byte = np.array([[0.0, 127.6, 255.0, 300.0, np.inf] + 200 * [127.6]], np.float32)
    assert pixels(decode_image(encode(Image.fromarray(shard), "TIFF")))[0, :6, 0].tolist() == [0, 128, 255, 0, 0, 255]
    assert pixels(to_rgb(Image.fromarray(byte)))[0, :5, 0].tolist() == [0, 128, 255, 255, 255]


RAMP = np.linspace(0, 255, 48)[None].repeat(32, 0)


@pytest.mark.parametrize(
    ("values", "distinct"),
    [
        (RAMP.astype(np.int32), 48),
        ((RAMP * 257).astype(np.int32), 48),
        (RAMP.astype(np.float32), 48),
        ((RAMP / 255).astype(np.float32), 48),
        ((RAMP / 255 * 1.04 - 0.02).astype(np.float32), 47),  # overshoots as a resized image does
        ((RAMP * 257).astype(np.uint16), 48),
        (np.zeros((4, 4), np.int32), 1),  # black is a picture too
        (np.zeros((4, 4), np.uint16), 1),
        (np.zeros((4, 4), np.float32), 1),
        (np.full((4, 4), 9, np.uint16), 1),
        (np.full((4, 4), 65535, np.int32), 1),
        ((RAMP * 16 + 30000).astype(np.uint16), 16),  # fog in true 16 bits is no mistake
    ],
)
def test_grey_whose_values_follow_a_convention_keeps_them(values: np.ndarray, distinct: int) -> None:
    got = pixels(decode_image(encode(Image.fromarray(values), "TIFF")))
    assert abs(len(np.unique(got)) - distinct) <= 2
    assert (np.diff(got[0, :, 0].astype(int)) >= 0).all()


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ((RAMP / 127.5 - 1).astype(np.float32), "no known range: -1 to 1, expected 0 to 1 or 0 to 255"),
        ((RAMP * 257).astype(np.float32), "no known range: 0 to 65535, expected 0 to 1 or 0 to 255"),
        ((RAMP * 4000).astype(np.int32), r"no known range: 0 to 1.02e\+06, expected 0 to 255 or 0 to 65535"),
        ((RAMP.astype(np.int32) - 200), "no known range: -200 to 55"),
        ((RAMP * 16).astype(np.uint16), "all but black: grey values from 0 to 4080 of 0 to 65535, 16 of 48"),
        ((RAMP * 16).astype(np.int32), "all but black: grey values from 0 to 4080"),
        (np.arange(21, dtype=np.uint16)[None], "all but black: grey values from 0 to 20 .* 1 of 21"),  # class indices
        ((RAMP / 50).astype(np.float32), "all but black: grey values from 0 to 5.1 of 0 to 255"),
        (np.full((4, 4), np.nan, np.float32), "all are NaN"),
    ],
)
def test_grey_that_would_be_all_but_black_or_white_is_refused(values: np.ndarray, reason: str) -> None:
    data = encode(Image.fromarray(values), "TIFF")
    with pytest.raises(UndecodableError, match=reason) as caught:
        decode_image(data)
    with pytest.raises(UndecodableError) as again:
        decode_image(data)
    assert caught.value.reason == again.value.reason
    assert "\n" not in caught.value.reason


@pytest.mark.parametrize(
    ("values", "tags"),
    [
        ((RAMP * 4095 / 255).astype(np.uint16), {341: 4095}),
        ((RAMP * 4095 / 255).astype(np.uint16), {281: 4095}),
        ((RAMP / 127.5 - 1).astype(np.float32), {340: -1.0, 341: 1.0}),
        ((RAMP * 257).astype(np.float32), {341: 65535.0}),
        ((RAMP * 4000).astype(np.int32), {341: 1020000}),
    ],
)
def test_a_declared_range_is_the_way_out(values: np.ndarray, tags: dict[int, float]) -> None:
    info = TiffImagePlugin.ImageFileDirectory_v2()
    for tag, value in tags.items():
        info.tagtype[tag] = 4 if isinstance(value, int) else 12
        info[tag] = value
    got = pixels(decode_image(encode(Image.fromarray(values), "TIFF", tiffinfo=info)))
    assert np.abs(got[0, :, 0] - RAMP[0]).max() <= 1


def test_a_dark_pgm_is_not_brightened_and_a_full_scale_of_its_own_is_kept() -> None:
    dark = b"P5 4 1 65535\n" + struct.pack(">4H", 0, 100, 255, 300)
    assert pixels(decode_image(dark))[0, :, 0].tolist() == [0, 0, 0, 1]
    twelve = b"P5 3 1 4095\n" + struct.pack(">3H", 0, 2048, 4095)
    assert pixels(decode_image(twelve))[0, :, 0].tolist() == [0, 128, 255]


def test_colour_of_12_bits_in_16_is_refused_and_of_16_bits_is_kept() -> None:
    colour = np.repeat((RAMP * 257).astype(np.uint16)[..., None], 3, 2)
    assert len(np.unique(pixels(decode_image(png(colour))))) == 48
    with pytest.raises(UndecodableError, match="all but black: 16-bit colour with nothing above 4095 of 65535"):
        decode_image(png(colour >> 4))
    assert not pixels(decode_image(png(colour * 0))).any()


def test_cmyk() -> None:
    got = decode_image(encode(Image.new("CMYK", (2, 2), (255, 0, 0, 0)), "TIFF"))
    assert got.getpixel((0, 0)) == (0, 255, 255)


def test_cmyk_jpeg() -> None:
    got = decode_image(encode(Image.new("CMYK", (16, 16), (0, 0, 0, 255)), "JPEG", quality=100))
    assert max(got.getpixel((8, 8))) <= 3


@pytest.mark.parametrize(
    ("mode", "value", "seen"),
    [
        ("1", 1, (255, 255, 255)),
        ("1", 0, (0, 0, 0)),
        ("L", 7, (7, 7, 7)),
        ("HSV", (0, 255, 255), (255, 0, 0)),
        ("YCbCr", (128, 128, 128), (128, 128, 128)),
        ("LAB", (255, 128, 128), (255, 255, 255)),
        ("RGBX", (1, 2, 3, 0), (1, 2, 3)),
    ],
)
def test_other_modes(mode: str, value: object, seen: tuple[int, int, int]) -> None:
    got = to_rgb(Image.new(mode, (1, 1), value)).getpixel((0, 0))
    assert np.abs(np.subtract(got, seen)).max() <= (6 if mode == "LAB" else 0)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int) -> None:
    data = encode(Image.fromarray(stored_as(orientation, NOISE)), exif=oriented(orientation))
    assert np.array_equal(pixels(decode_image(data)), NOISE)


@pytest.mark.parametrize("exif", [b"Exif\x00\x00garbage", b"Exif\x00\x00II*\x00\xff\xff\xff\xff", b"Exif\x00\x00"])
def test_damaged_exif_is_ignored_without_a_warning(exif: bytes) -> None:
    data = encode(Image.fromarray(NOISE), "JPEG", exif=exif)
    assert np.array_equal(pixels(decode_image(data)), pixels(decode_image(VALID["jpeg"])))


def test_exif_that_cannot_be_parsed_leaves_the_image_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_image: Image.Image) -> None:
        raise struct.error("unpack requires a buffer of 2 bytes")

    monkeypatch.setattr(ImageOps, "exif_transpose", fail)
    assert np.array_equal(pixels(decode_image(VALID["png"])), NOISE)


@pytest.mark.parametrize("fmt", ["GIF", "PNG", "WEBP", "TIFF"])
def test_first_frame_of_an_animation(fmt: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255))]
    options = {"lossless": True} if fmt == "WEBP" else {}
    data = encode(frames[0], fmt, save_all=True, append_images=frames[1:], **options)
    assert Image.open(io.BytesIO(data)).n_frames == 3
    assert decode_image(data).getpixel((4, 4)) == (255, 0, 0)


def test_first_picture_of_a_multi_picture_jpeg() -> None:
    data = encode(Image.new("RGB", (16, 16), "red"), "MPO", save_all=True, append_images=[Image.new("RGB", (16, 16))])
    assert decode_image(data).getpixel((8, 8))[0] > 250


def test_transparent_gif_is_laid_on_white() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([200, 10, 20, 30, 40, 50])
    image.putpixel((1, 0), 1)
    got = decode_image(encode(image, "GIF", transparency=0))
    assert [got.getpixel((x, 0)) for x in range(2)] == [(255, 255, 255), (30, 40, 50)]


@pytest.mark.parametrize("size", [(8001, 8000), (9000, 9999), (20000, 20000), (2**31 - 1, 2**31 - 1)])
def test_bomb_is_refused_by_its_header(size: tuple[int, int]) -> None:
    # There are no pixels in this file at all, so the size can only have come from the header.
    with pytest.raises(UndecodableError, match="too many pixels") as caught:
        decode_image(png_header(*size))
    assert "64000000" in caught.value.reason or "decompression bomb" in caught.value.reason


def test_largest_size_is_accepted() -> None:
    data = encode(Image.new("1", (100, 100)))
    assert decode_image(data, Decoding(max_pixels=10_000)).size == (100, 100)
    with pytest.raises(UndecodableError, match="too many pixels: 100 x 100, at most 9999 are decoded"):
        decode_image(data, Decoding(max_pixels=9_999))
    assert EmbedConfig.max_pixels == Decoding().max_pixels == 64_000_000


def test_a_cap_above_pillows_own_limit_is_the_cap() -> None:
    limit = Image.MAX_IMAGE_PIXELS
    with pytest.raises(UndecodableError, match="decompression bomb"):
        decode_image(png_header(10_000, 10_000))
    with pytest.raises(UndecodableError, match="truncated"):  # not too large any more: there are no pixels in it
        decode_image(png_header(20_000, 20_000), Decoding(max_pixels=400_000_000))
    with pytest.raises(UndecodableError, match="too many pixels"):
        decode_image(png_header(20_000, 20_001), Decoding(max_pixels=400_000_000))
    assert limit == Image.MAX_IMAGE_PIXELS == 89478485


@pytest.mark.parametrize("kind", sorted(VALID))
@pytest.mark.parametrize("keep", [0.3, 0.6, 0.9])
def test_truncated(kind: str, keep: float) -> None:
    data = VALID[kind]
    with pytest.raises(UndecodableError):
        # The GIF has a second frame, which nobody needs: cut inside the first.
        decode_image(data[: int(len(data) * keep * (0.8 if kind == "gif" else 1))])


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", r"empty file \(0 bytes\)"),
        (b"hello, I am a text file named image.png\n", "not an image in a known format"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image in a known format"),
        (b"\x89PNG\r\n\x1a\n", "."),
    ],
)
def test_not_an_image(data: bytes, reason: str) -> None:
    with pytest.raises(UndecodableError, match=reason) as caught:
        decode_image(data)
    with pytest.raises(UndecodableError) as again:
        decode_image(data)
    assert caught.value.reason == again.value.reason
    assert "0x" not in caught.value.reason
    assert "\n" not in caught.value.reason


def test_reason_names_no_memory_address(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(file: io.BytesIO, **_options: object) -> None:
        raise OSError(f"cannot make sense of {file!r}\n at all")

    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(UndecodableError) as caught:
        decode_image(b"x")
    assert caught.value.reason == "OSError: cannot make sense of <_io.BytesIO object> at all"


def test_error_survives_pickling() -> None:
    error = pickle.loads(pickle.dumps(UndecodableError("why")))
    assert isinstance(error, UndecodableError)
    assert error.reason == "why"


def test_warning_filters_are_left_as_they_were() -> None:
    before = list(warnings.filters)
    decode_image(VALID["png"])
    with pytest.raises(UndecodableError):
        decode_image(b"x")
    assert warnings.filters == before


def decodes_or_says_why(data: bytes) -> None:
    def outcome() -> tuple[str, bytes]:
        try:
            image = decode_image(data, Decoding(max_pixels=100_000))
        except UndecodableError as error:
            return error.reason, b""
        return image.mode, image.tobytes()

    first = outcome()
    assert first[0]
    assert outcome() == first


@given(st.binary(max_size=200), st.sampled_from([b"", *(data[:12] for data in VALID.values()), b"II*\x00", b"P6\n"]))
@settings(max_examples=300, deadline=None)
def test_any_bytes_decode_or_say_why(data: bytes, magic: bytes) -> None:
    decodes_or_says_why(magic + data)


@given(st.sampled_from(sorted(VALID)), st.data())
@settings(max_examples=500, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_damaged_images_decode_or_say_why(kind: str, data: st.DataObject) -> None:
    image = bytearray(VALID[kind])
    edits = st.lists(st.tuples(st.integers(0, len(image) - 1), st.integers(0, 255)), min_size=1, max_size=6)
    for position, value in data.draw(edits):
        image[position] = value
    if kind == "png" and data.draw(st.booleans()):
        image = bytearray(with_right_checksums(bytes(image)))  # Gets past the first hurdle.
    decodes_or_says_why(
        bytes(image[: data.draw(st.integers(0, len(image)))]) if data.draw(st.booleans()) else bytes(image)
    )


# --- formats that came later


def test_avif_is_decoded() -> None:
    pixels_of = np.asarray(decode_image(encode(Image.fromarray(NOISE), "AVIF", quality=100, subsampling="4:4:4")), int)
    assert pixels_of.shape == NOISE.shape
    assert np.abs(pixels_of - NOISE).mean() < 8  # it is lossy
    clear = encode(Image.new("RGBA", (16, 16), (10, 100, 250, 0)), "AVIF", quality=100)
    assert decode_image(clear).getpixel((8, 8)) == (255, 255, 255)
    with pytest.raises(UndecodableError):
        decode_image(encode(Image.fromarray(NOISE), "AVIF")[:200])


def heic(image: Image.Image, **options: object) -> bytes:
    heif = pytest.importorskip("pillow_heif", reason="needs pillow-heif, the extra heic")
    heif.register_heif_opener()
    return encode(image, "HEIF", **options)


def test_heic_is_decoded_upright() -> None:
    image = Image.new("RGB", (64, 32), (0, 0, 255))
    image.paste((255, 0, 0), (0, 0, 32, 32))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: the right side is the bottom
    got = decode_image(heic(image, quality=90, exif=exif.tobytes()))
    assert got.size == (32, 64)
    assert got.getpixel((16, 8))[0] > 200 > got.getpixel((16, 56))[0]
    assert header_size(heic(image))[2] == "HEIF"
    with pytest.raises(UndecodableError):
        decode_image(heic(image)[:300])


def test_heic_without_its_decoder_is_nobodys_broken_image(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gstds_cache.data.decode.HAS_HEIC", False)
    header = b"\x00\x00\x00\x18ftypheic" + bytes(40)
    with pytest.raises(DatasetError, match=r"the extra heic: pip install 'gstds-cache\[heic\]'"):
        decode_image(header)


# --- scaled


SMOOTH = Image.fromarray(NOISE).resize((400, 304), Image.Resampling.BICUBIC)


@pytest.mark.parametrize(
    ("side", "size"), [(0, (400, 304)), (153, (400, 304)), (152, (200, 152)), (39, (100, 76)), (38, (50, 38))]
)
def test_a_jpeg_is_decoded_smaller_as_long_as_both_sides_stay_as_long_as_asked(
    side: int, size: tuple[int, int]
) -> None:
    data = encode(SMOOTH, "JPEG", quality=95)
    got = decode_image(data, Decoding(side=side))
    assert got.size == size
    with decoding_as(Decoding(side=side)):
        assert np.array_equal(pixels(decode_image(data)), pixels(got))
    assert decode_image(data).size == (400, 304)
    reduced = np.asarray(SMOOTH.resize(size, Image.Resampling.BOX), int)
    assert np.abs(pixels(got) - reduced).mean() < 4  # what the image looks like at that size


def test_what_is_no_jpeg_is_never_scaled() -> None:
    assert decode_image(encode(SMOOTH, "PNG"), Decoding(side=10)).size == (400, 304)
    assert decode_image(encode(SMOOTH, "WEBP"), Decoding(side=10)).size == (400, 304)


def test_a_scaled_jpeg_is_upright_and_a_cut_one_refused() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decode_image(encode(SMOOTH, "JPEG", exif=exif), Decoding(side=75)).size == (76, 100)
    for progressive in (False, True):
        data = encode(SMOOTH, "JPEG", progressive=progressive)
        for share in (0.3, 0.9):
            with pytest.raises(UndecodableError):
                decode_image(data[: int(len(data) * share)], Decoding(side=37))
    cmyk = encode(SMOOTH.convert("CMYK"), "JPEG", quality=95)
    assert np.abs(pixels(decode_image(cmyk, Decoding(side=75))).mean() - pixels(decode_image(cmyk)).mean()) < 2


def test_the_cap_counts_the_pixels_of_the_file_and_not_those_that_are_decoded() -> None:
    with pytest.raises(UndecodableError, match="too many pixels: 400 x 304"):
        decode_image(encode(SMOOTH, "JPEG"), Decoding(side=37, max_pixels=100_000))


def test_the_size_is_read_from_a_header_alone() -> None:
    data = encode(SMOOTH, "JPEG")
    assert header_size(data[:1000]) == (400, 304, "JPEG")
    assert header_size(png_header(20_000, 20_000)[:60]) == (20_000, 20_000, "PNG")
    with pytest.raises(UndecodableError):
        header_size(b"hello")


def test_a_jpeg_with_another_behind_it_as_phones_write_them_is_scaled_too() -> None:
    data = encode(SMOOTH, "MPO", save_all=True, append_images=[SMOOTH.rotate(180)], quality=95)
    assert header_size(data)[2] == "MPO"
    got = decode_image(data, Decoding(side=76))
    assert got.size == (100, 76)
    assert np.abs(pixels(got) - np.asarray(SMOOTH.resize(got.size, Image.Resampling.BOX), int)).mean() < 4
