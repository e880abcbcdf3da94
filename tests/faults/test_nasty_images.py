"""Images as they come: a folder of files that are not what their name says, between good ones, embedded for real.

Every file has its verdict written beside it: the pixels it shows, or why it shows none. A good file's embedding is
compared with that of a plain PNG of the same pixels, in a folder where there is nothing else.
"""

from __future__ import annotations

import io
import os
import re
import socket
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import zarr
from image_bytes import NOISE, encode, oriented, png, png_header, segments, stored_as, text_bomb
from PIL import Image

from gstds_cache.config import EmbedConfig
from gstds_cache.data import files as files_module
from gstds_cache.data.decode import UndecodableError
from gstds_cache.data.files import printable
from gstds_cache.data.hashing import UNREADABLE
from gstds_cache.data.manifest import build_manifest
from gstds_cache.data.sources import open_source
from gstds_cache.embedding.run import embed_dataset
from gstds_cache.store.reader import EmbeddingStore

PICTURE = np.kron(NOISE, np.ones((8, 8, 1), np.uint8))  # [72, 104, 3], large enough to survive JPEG
PLAIN = Image.fromarray(PICTURE)
GREY = PLAIN.convert("L")
PNG, JPEG, GIF = encode(PLAIN), encode(PLAIN, "JPEG", quality=95), encode(PLAIN.quantize(64), "GIF")
PROGRESSIVE = encode(PLAIN, "JPEG", quality=95, progressive=True)
LOSSY = 0.02
UNKNOWN = r"not an image in a known format \(JPEG, .*\)"
TRUNCATED = "OSError: .*([Tt]runcated|decoder).*"


@dataclass(frozen=True)
class Case:
    """A file, and what it shows: ``shows``, with embeddings that differ by at most ``within``; or else ``reason``."""

    name: str | bytes
    made: bytes | Callable[[Path], object]
    shows: np.ndarray | Image.Image | None = None
    reason: str = ""
    within: float = 0.0


def shown(
    name: str | bytes, made: bytes | Callable[[Path], object], shows: object = PICTURE, within: float = 0
) -> Case:
    return Case(name, made, shows=shows, within=within)


def refused(name: str | bytes, made: bytes | Callable[[Path], object], reason: str) -> Case:
    return Case(name, made, reason=reason)


def patched(data: bytes, at: int, value: bytes) -> bytes:
    return data[:at] + value + data[at + len(value) :]


def on_white(alpha: int) -> Image.Image:
    clear = PLAIN.copy()
    clear.putalpha(alpha)
    white = Image.new("RGBA", clear.size, "white")
    return Image.alpha_composite(white, clear).convert("RGB")


def zipped(data: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a.png", data)
    return buffer.getvalue()


def link_to(target: str) -> Callable[[Path], object]:
    return lambda path: path.symlink_to(target)


def several(image: Image.Image, fmt: str, **options: object) -> bytes:
    return encode(image, fmt, save_all=True, append_images=[Image.new("RGB", image.size)] * 2, **options)


def cases() -> Iterator[Case]:
    # Cut short, or never images.
    yield refused("0-bytes.png", b"", r"empty file \(0 bytes\)")
    yield refused("1-byte.jpg", b"\xff", UNKNOWN)
    yield refused("1-byte-more.jpg", b"\xff\xd8", ".+")
    for keep in (20, 33, 50, len(PNG) // 2, len(PNG) * 9 // 10):
        yield refused(f"cut-at-{keep}.png", PNG[:keep], f"{UNKNOWN}|{TRUNCATED}")
    yield refused("cut.jpg", JPEG[: len(JPEG) // 2], TRUNCATED)
    yield refused("cut-before-the-end-mark.jpg", JPEG[:-2], TRUNCATED)
    yield refused("cut.gif", GIF[: len(GIF) // 2], TRUNCATED)
    yield refused("cut.tiff", encode(PLAIN, "TIFF")[:-99], f"{UNKNOWN}|{TRUNCATED}")
    yield refused("cut.webp", encode(PLAIN, "WEBP", lossless=True)[:-99], TRUNCATED)
    yield refused("cut.bmp", encode(PLAIN, "BMP")[:-99], TRUNCATED)
    yield refused("cut.ppm", encode(PLAIN, "PPM")[:-99], TRUNCATED)
    yield refused("text.png", b"this is not an image\n" * 99, UNKNOWN)
    yield refused("zeros.jpg", bytes(5000), UNKNOWN)
    yield refused("404.jpg", b"<!DOCTYPE html><html><body>404 Not Found</body></html>", UNKNOWN)
    yield refused("drawing.png", b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>", UNKNOWN)
    yield refused("archive.png", zipped(PNG), UNKNOWN)
    yield refused("postscript.png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", UNKNOWN)
    yield refused("lfs.png", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", UNKNOWN)
    yield refused("fork.png", b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X        " + bytes(40), UNKNOWN)
    # Progressive JPEG: without its last scans and end mark, and with a mark set after the third scan.
    cut = segments(PROGRESSIVE, 0xDA)[-1]
    yield refused("cut-at-a-scan.jpg", PROGRESSIVE[:cut], TRUNCATED)
    yield shown("fewer-scans.jpg", PROGRESSIVE[:cut] + b"\xff\xd9", within=0.1)
    yield shown("progressive.jpg", PROGRESSIVE, within=LOSSY)
    # Bombs.
    yield refused("bomb-by-header.png", png_header(60_000, 60_000), "too many pixels: .*")
    yield refused("bomb.png", encode(Image.new("1", (20_000, 20_000))), "too many pixels: .*")
    at = segments(JPEG, 0xC0)[0] + 5
    yield refused("bomb.jpg", patched(JPEG, at, b"\xff\xdc\xff\xdc"), "too many pixels: .*")
    yield refused("bomb.gif", patched(GIF, 6, b"\xff\xff\xff\xff"), f"too many pixels: .*|{TRUNCATED}")
    yield refused("bomb.bmp", patched(encode(PLAIN, "BMP"), 18, b"\xff\xff\x00\x00" * 2), "too many pixels: .*")
    yield refused("text-bomb.png", png(PICTURE, before_data=text_bomb(50 << 20)), "ValueError: Decompressed data too.*")
    yield shown("long-text.png", png(PICTURE, before_data=text_bomb(100_000)))
    # Every mode.
    inverted = Image.fromarray(255 - PICTURE)
    cmyk = Image.merge("CMYK", (*inverted.split(), Image.new("L", PLAIN.size)))
    yield shown("cmyk.tiff", encode(cmyk, "TIFF"))
    yield shown("cmyk.jpg", encode(cmyk, "JPEG", quality=95), within=LOSSY)
    yield shown("grey.jpg", encode(GREY, "JPEG", quality=95), GREY, LOSSY)
    sixteen = (np.asarray(GREY).astype(np.uint16) << 8) | 77
    yield shown("grey-16-bit.png", encode(Image.fromarray(sixteen)), GREY)
    yield shown("grey-16-bit.tiff", encode(Image.fromarray(sixteen), "TIFF"), GREY)
    yield shown("rgb-16-bit.png", png((PICTURE.astype(np.uint16) << 8) | 77))
    yield shown("float.tiff", encode(Image.fromarray(np.asarray(GREY).astype(np.float32) / 255), "TIFF"), GREY)
    palette = PLAIN.quantize(64)
    yield shown("palette.png", encode(palette), palette)
    clear = palette.convert("RGBA")
    clear.putalpha(Image.fromarray(np.where(np.asarray(palette) == 3, 0, 255).astype(np.uint8)))
    flat = Image.alpha_composite(Image.new("RGBA", clear.size, "white"), clear)
    yield shown("palette-with-transparency.png", encode(palette, transparency=3), flat)
    yield shown("palette-with-transparency.gif", encode(palette, "GIF", transparency=3), flat)
    for alpha in (0, 100, 255):
        rgba, grey_alpha = PLAIN.copy(), GREY.copy()
        rgba.putalpha(alpha)
        grey_alpha.putalpha(alpha)
        yield shown(f"alpha-{alpha}.png", encode(rgba), on_white(alpha), 0.01)
        yield shown(f"grey-alpha-{alpha}.png", encode(grey_alpha), on_white(alpha).convert("L"), 0.01)
    yield shown("alpha.webp", encode(PLAIN.convert("RGBA"), "WEBP", lossless=True))
    bilevel = GREY.convert("1")
    yield shown("1-bit.png", encode(bilevel), bilevel)
    yield shown("1-bit.tiff", encode(bilevel, "TIFF", compression="group4"), bilevel)
    # Every container.
    for orientation in range(1, 9):
        turned = Image.fromarray(stored_as(orientation, PICTURE))
        data = encode(turned, "JPEG", quality=95, exif=oriented(orientation))
        yield shown(f"orientation-{orientation}.jpg", data, within=LOSSY)
    for n, exif in enumerate(
        (b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff")
    ):
        yield shown(f"damaged-exif-{n}.jpg", encode(PLAIN, "JPEG", quality=95, exif=exif), within=LOSSY)
    yield shown("damaged-profile.png", encode(PLAIN, icc_profile=b"garbage" * 9))
    yield shown("damaged-profile.jpg", encode(PLAIN, "JPEG", quality=95, icc_profile=b"garbage"), within=LOSSY)
    yield shown("animated.gif", several(palette, "GIF"), palette)
    yield shown("animated.png", several(PLAIN, "PNG"))
    yield shown("animated.webp", several(PLAIN, "WEBP", lossless=True))
    yield shown("pages.tiff", several(PLAIN, "TIFF"))
    yield shown("pictures.jpg", several(PLAIN, "MPO", quality=95), within=LOSSY)
    yield shown("lossless.webp", encode(PLAIN, "WEBP", lossless=True))
    yield shown("interlaced.png", png(PICTURE, interlaced=True))
    yield shown("png-inside.jpg", PNG)
    yield shown("jpeg-inside.PNG", JPEG, within=LOSSY)
    yield shown("gif-inside.tif", GIF, palette)
    bmp = encode(PLAIN, "BMP")
    yield shown("top-down.bmp", patched(bmp, 22, (-72).to_bytes(4, "little", signed=True)), PICTURE[::-1])
    yield shown("garbage-behind.png", PNG + b"garbage" * 99)
    yield shown("garbage-behind.jpg", JPEG + b"garbage" * 99, within=LOSSY)
    yield refused("garbage-before.jpg", b"garbage" + JPEG, UNKNOWN)
    # As with every reader that uses Pillow, the checksum of the pixels is passed over, and their stream counts.
    yield shown("wrong-checksum.png", patched(PNG, len(PNG) - 16, b"\0\0\0\0"))
    yield refused("wrong-checksum-of-the-header.png", patched(PNG, 29, b"\0\0\0\0"), ".+")
    yield refused("damaged-stream.png", patched(PNG, PNG.index(b"IDAT") + 6, b"\xff" * 40), ".+")
    yield refused("no-pixels.png", PNG[:33] + PNG[-12:], "OSError: .+")
    yield refused("0-wide.png", patched(PNG, 16, bytes(4)), ".+")
    # Every size.
    yield shown("1x1.png", encode(Image.new("RGB", (1, 1), (9, 200, 90))), Image.new("RGB", (1, 1), (9, 200, 90)))
    tall = Image.fromarray(np.kron(PICTURE[:1, ::8], np.ones((20_000, 1, 1), np.uint8))[:, :1])
    yield shown("1x20000.png", encode(tall), tall)
    yield shown(
        "20000x1.png", encode(tall.transpose(Image.Transpose.ROTATE_90)), tall.transpose(Image.Transpose.ROTATE_90)
    )
    # Every name.
    for name in (
        b"caf\xe9.png",
        "caf\u00e9.png".encode(),
        b"a\nb\tc.png",
        b"'quoted\" \\.png",
        b"$(reboot);*?.png",
        "\U0001f98a\u202egnp.png".encode(),
        b" .png",
        b"--help.png",
        b"a.png.PnG",
        b"long" + b"x" * 243 + b".png",
    ):
        yield shown(name, PNG)
    # Not quite files.
    yield refused("dangling-link.png", link_to("nowhere.png"), "unreadable: No such file or directory")
    yield shown("link-out.png", link_to("../../outside/picture.png"))
    yield refused("link-into-itself.png", lambda path: path.symlink_to(path.name), "unreadable: Too many levels.*")
    if Path("/proc/self/mem").exists():  # Root may read whatever permissions say; this no one may read.
        yield refused("no-right-to-read.png", link_to("/proc/self/mem"), "unreadable: Input/output error")
    if os.geteuid():
        yield refused(
            "locked.png", lambda path: (path.write_bytes(PNG), path.chmod(0)), "unreadable: Permission denied"
        )


CASES = tuple(cases())
NEIGHBOURS = [Image.fromarray(np.roll(PICTURE, shift * 8, axis=(0, 1))) for shift in range(1, 8)]


def file_name(number: int, name: str | bytes) -> str:
    return os.fsdecode(b"%03d " % number + os.fsencode(name))


def neighbour_name(number: int) -> str:
    return f"{number:03d}~.png"


@dataclass(frozen=True)
class Folders:
    """``nasty`` holds all cases, each followed by a good neighbour; ``plain`` what of it can be seen, as plain PNG."""

    nasty: Path
    plain: Path


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    base = tmp_path_factory.mktemp("nasty")
    nasty, plain = base / "nasty" / "a", base / "plain" / "a"
    for folder in (nasty, plain, base / "outside"):
        folder.mkdir(parents=True)
    (base / "outside" / "picture.png").write_bytes(PNG)
    for number, case in enumerate(CASES):
        path = nasty / file_name(number, case.name)
        if isinstance(case.made, bytes):
            path.write_bytes(case.made)
        else:
            case.made(path)
        if case.shows is not None:
            image = case.shows if isinstance(case.shows, Image.Image) else Image.fromarray(case.shows)
            image.convert("RGB").save(plain / f"{number:03d}.png")
        for folder in (nasty, plain):
            NEIGHBOURS[number % 7].save(folder / neighbour_name(number))
    # What is no item at all; a folder is looked into, whatever its name is.
    os.mkfifo(nasty / "050 pipe.png")
    with socket.socket(socket.AF_UNIX) as unix:
        folder = os.open(nasty, os.O_RDONLY)
        try:
            unix.bind(f"/proc/self/fd/{folder}/051 socket.png")  # A socket's path may not be long.
        finally:
            os.close(folder)
    (nasty / "052 device.png").symlink_to("/dev/zero")
    (nasty / "053 thumbs.db").write_bytes(b"?")
    (nasty / "054 up").symlink_to("..")
    for folder in (nasty / "055 photo.png", plain / "055 photo.png"):
        folder.mkdir()
        NEIGHBOURS[0].save(folder / "inside.png")
    (nasty / "056 empty.png").mkdir()
    return Folders(nasty.parent, plain.parent)


def embedded(folder: Path, model: str, store: Path, workers: int):
    config = EmbedConfig(model=model, batch_size=7, shard_rows=14, workers=workers, device="cpu", dtype="float32")
    source = open_source(f"imagefolder:{folder}")
    return source, embed_dataset(source, config, where=store).report


@pytest.mark.parametrize("workers", [0, 1])
def test_every_row_has_its_verdict_and_none_shifts(
    folders: Folders, tiny_model: str, tmp_path: Path, workers: int
) -> None:
    assert len(CASES) > 100
    source, report = embedded(folders.nasty, tiny_model, tmp_path / "nasty", workers)
    clean, _ = embedded(folders.plain, tiny_model, tmp_path / "plain", 0)
    names = [file_name(number, case.name) for number, case in enumerate(CASES)]
    names += [neighbour_name(number) for number in range(len(CASES))]
    names += ["055 photo.png/inside.png"]
    assert list(source.ids) == [printable(f"a/{name}") for name in sorted(names, key=os.fsencode)]
    assert source.notes == (
        "ignored 1 file without an image extension (.db)",
        "ignored 3 entries that no image can be in: pipes, sockets, devices",
        "ignored 1 symbolic link back to a folder above",
    )

    store = EmbeddingStore(tmp_path / "nasty")
    rows = {name: row for row, name in enumerate(source.ids)}
    got, plain = (zarr.open_group(tmp_path / name, mode="r")["embeddings"][:] for name in ("nasty", "plain"))
    expected = dict(zip(clean.ids, plain, strict=True))
    reasons = {item.row: item.reason for item in report.quarantined}
    assert all(item.id == source.ids[item.row] for item in report.quarantined)
    bad = {rows[printable(f"a/{file_name(n, case.name)}")]: case for n, case in enumerate(CASES) if case.shows is None}
    assert sorted(reasons) == sorted(bad)
    assert (report.items, report.ok, report.embedded) == (len(rows), len(rows) - len(bad), len(rows))
    assert store.valid.tolist() == [2 if row in bad else 1 for row in range(len(rows))]

    for row, case in bad.items():
        assert re.fullmatch(case.reason, reasons[row]), (case.name, reasons[row])
        assert str(folders.nasty.parent) not in reasons[row]
        assert not got[row].any()
    for number, case in enumerate(CASES):
        row = rows[f"a/{neighbour_name(number)}"]
        np.testing.assert_array_equal(got[row], expected[f"a/{neighbour_name(number)}"])
        if case.shows is not None:
            row = rows[printable(f"a/{file_name(number, case.name)}")]
            np.testing.assert_allclose(
                got[row], expected[f"a/{number:03d}.png"], rtol=0, atol=case.within, err_msg=str(case.name)
            )
    np.testing.assert_array_equal(got[rows["a/055 photo.png/inside.png"]], expected["a/055 photo.png/inside.png"])


def test_reasons_are_the_same_in_every_run(folders: Folders) -> None:
    def reasons() -> dict[str, str]:
        found = {}
        source = open_source(f"imagefolder:{folders.nasty}")
        for row, name in enumerate(source.ids):
            try:
                source.image(row)
            except UndecodableError as error:
                found[name] = error.reason
        return found

    first = reasons()
    assert reasons() == first
    assert all("\n" not in reason and "0x" not in reason for reason in first.values())


def test_only_what_cannot_be_read_has_no_digest(folders: Folders) -> None:
    manifest = build_manifest(open_source(f"imagefolder:{folders.nasty}"))
    unreadable = [
        name for name, digest in zip(manifest.ids, manifest.sha256, strict=True) if bytes(digest) == UNREADABLE
    ]
    expected = [
        f"a/{file_name(number, case.name)}" for number, case in enumerate(CASES) if case.reason.startswith("unreadable")
    ]
    assert sorted(unreadable) == sorted(expected)


def test_a_huge_file_is_not_read_to_be_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").mkdir()
    with (tmp_path / "a" / "huge.png").open("wb") as file:
        file.truncate(1 << 40)  # Takes no room on the disk, and no machine could hold it.
    with pytest.raises(UndecodableError, match=f"too large a file: {1 << 40} bytes, at most {1 << 30} are decoded"):
        open_source(f"imagefolder:{tmp_path}").image(0)
    monkeypatch.setattr(files_module, "MAX_BYTES", len(PNG) - 1)
    (tmp_path / "a" / "huge.png").write_bytes(PNG)
    with pytest.raises(UndecodableError, match="too large a file"):
        open_source(f"imagefolder:{tmp_path}").image(0)
    monkeypatch.setattr(files_module, "MAX_BYTES", len(PNG))
    assert open_source(f"imagefolder:{tmp_path}").image(0).size == (104, 72)
