"""Glyphs: the letters A to Z of some 1,500 real fonts, 28 x 28 pixels, both cases in one class.

The fonts are those of Debian's package ``texlive-fonts-extra``; ``GSTDS_FONTS`` names their folder where it is not
installed (``dpkg-deb -x texlive-fonts-extra_*.deb FOLDER`` is enough). They are split by *family*: no font of the test
set has a sibling of another weight or size in the training set.

    gstds-embed 'benchmarks.study.glyphs:train' --cache glyphs.store
    gstds-embed 'benchmarks.study.glyphs:train?noise=0.3' --cache noisy.store --reuse glyphs.store

``fonts=built-in`` needs no fonts at all: it distorts the one that comes with Pillow. For trying things out.
"""

from __future__ import annotations

import hashlib
import os
import string
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int64, UInt8
from PIL import Image, ImageDraw, ImageFont

from benchmarks.study.labels import imbalanced, noisy
from gstds_cache.errors import DatasetError
from gstds_cache.files.derived import cache_root
from gstds_cache.seeding import rng_for

SIDE, INNER = 28, 22  # pixels of an image, and of the square its letter is fitted into
LETTERS = string.ascii_uppercase + string.ascii_lowercase
FONTS = "/usr/share/texlive/texmf-dist/fonts"
DRAWN = 64  # font size at which a letter is drawn before it is fitted
TEST_FONTS = 425  # fonts of the test set, in whole families
LARGE_FAMILY = 64  # a family of more fonts always trains: it would be the test set all alone
MISSING = "\uffff"  # never a letter: what a font draws for letters it lacks
ImageStack = UInt8[np.ndarray, "N 28 28"]


@dataclass(frozen=True)
class Glyphs:
    """A map-style data set of (image, label), as ``module:factory`` expects it.

    Attributes:
        images: uint8 [N, 28, 28], white on black.
        targets: int64 [N], 0 for A to 25 for Z; in the noisy variant not always the letter shown.
        ids: Font and letter of each.
        classes: The letters.
        mirror_safe: False: a mirrored letter may be another one.
    """

    images: ImageStack
    targets: Int64[np.ndarray, " N"]
    ids: tuple[str, ...]
    classes: tuple[str, ...] = tuple(string.ascii_uppercase)
    mirror_safe: bool = False

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, row: int) -> tuple[UInt8[np.ndarray, "28 28"], int]:
        return self.images[row], int(self.targets[row])


def train(
    fonts: str = "",
    items: str = "0",
    noise: str = "0",
    imbalance: str = "1",
    doubled: str = "0",
    validation: str = "0",
) -> Glyphs:
    """The training set, or a variant of it. All arguments are strings, as a data set's query parameters are.

    Args:
        fonts: The fonts' folder, or ``built-in``.
        items: How many images, drawn once for all; 0 for all of them.
        noise: Share of the labels that are changed to another letter, drawn once for all.
        imbalance: How many times more frequent the most frequent class is than the rarest; those between fall evenly
            on a logarithmic scale (Cao et al. 2019, "Learning Imbalanced Datasets", section 4.1).
        doubled: Share of the images that are there twice.
        validation: 1 leaves out the fonts that ``unseen?validation=1`` holds, to choose settings by.

    Returns:
        The data set; the same arguments give the same one.
    """
    glyphs = _part(_all(fonts), test=False)
    if int(validation):
        glyphs = _part(glyphs, test=False)
    if int(items) and int(items) < len(glyphs):
        glyphs = _take(glyphs, np.sort(rng_for(0, "items").permutation(len(glyphs))[: int(items)]))
    if float(imbalance) > 1:
        glyphs = _take(glyphs, imbalanced(glyphs.targets, len(glyphs.classes), float(imbalance)))
    if float(doubled):
        again = np.sort(rng_for(0, "doubled").permutation(len(glyphs))[: round(float(doubled) * len(glyphs))])
        second = _take(glyphs, again)
        glyphs = Glyphs(
            np.concatenate([glyphs.images, second.images]),
            np.concatenate([glyphs.targets, second.targets]),
            glyphs.ids + tuple(f"{name}+" for name in second.ids),
        )
    if float(noise):
        glyphs = Glyphs(glyphs.images, noisy(glyphs.targets, len(glyphs.classes), float(noise)), glyphs.ids)
    return glyphs


def unseen(fonts: str = "", items: str = "0", validation: str = "0") -> Glyphs:
    """The test set: clean and balanced in every variant. ``items`` limits it as in :func:`train`.

    With ``validation`` 1 it is a third of the training fonts instead, parted by family in the same way.
    """
    glyphs = _part(_all(fonts), test=not int(validation))
    if int(validation):
        glyphs = _part(glyphs, test=True)
    if int(items) and int(items) < len(glyphs):
        return _take(glyphs, np.sort(rng_for(0, "items").permutation(len(glyphs))[: int(items)]))
    return glyphs


def _take(glyphs: Glyphs, rows: Int64[np.ndarray, " M"]) -> Glyphs:
    return Glyphs(glyphs.images[rows], glyphs.targets[rows], tuple(glyphs.ids[row] for row in rows))


def _part(glyphs: Glyphs, *, test: bool) -> Glyphs:
    """Whole families in an order drawn by their names' hash, until the test set has its fonts."""
    fonts_of: dict[str, set[str]] = {}
    for name in glyphs.ids:
        font = name.rpartition(":")[0]
        fonts_of.setdefault(font.rpartition("/")[0], set()).add(font)
    families = sorted(fonts_of, key=lambda family: hashlib.sha256(family.encode()).hexdigest())
    wanted = min(TEST_FONTS, sum(map(len, fonts_of.values())) // 3)
    tested: set[str] = set()
    for family in families:
        if wanted > 0 and len(fonts_of[family]) <= LARGE_FAMILY:
            tested.add(family)
            wanted -= len(fonts_of[family])
    rows = [row for row, name in enumerate(glyphs.ids) if (name.rpartition("/")[0] in tested) == test]
    return _take(glyphs, np.array(rows, np.int64))


def _all(fonts: str) -> Glyphs:
    """All glyphs; rendered once, then kept in the user's cache folder."""
    if fonts == "built-in":
        return _collect(_built_in())
    folder = Path(fonts or os.environ.get("GSTDS_FONTS", FONTS))
    files = sorted(path for path in folder.rglob("*") if path.suffix in {".otf", ".ttf"})
    if not files:
        raise DatasetError(
            f"glyphs: no .otf or .ttf fonts in {folder}, expected those of Debian's texlive-fonts-extra",
            hint="apt-get download texlive-fonts-extra; dpkg-deb -x texlive-fonts-extra_*.deb fonts; "
            "export GSTDS_FONTS=$PWD/fonts",
        )
    names = [str(path.relative_to(folder)) for path in files]
    digest = hashlib.sha256("\n".join(["glyphs 1", *names]).encode()).hexdigest()[:16]
    kept = cache_root() / "study" / f"glyphs-{digest}.npz"
    if not kept.exists():
        glyphs = _collect(_drawn(folder, names))
        kept.parent.mkdir(parents=True, exist_ok=True)
        partial = kept.with_suffix(f".{os.getpid()}.npz")
        np.savez(partial, images=glyphs.images, targets=glyphs.targets, ids=np.array(glyphs.ids))
        partial.replace(kept)
    with np.load(kept) as arrays:
        return Glyphs(arrays["images"], arrays["targets"], tuple(arrays["ids"].tolist()))


def _collect(fonts: Iterator[tuple[str, dict[str, UInt8[np.ndarray, "28 28"]]]]) -> Glyphs:
    images, targets, ids = [], [], []
    for name, letters in fonts:
        for letter, image in letters.items():
            images.append(image)
            targets.append(string.ascii_uppercase.index(letter.upper()))
            ids.append(f"{name}:{letter}")
    return Glyphs(np.stack(images), np.array(targets, np.int64), tuple(ids))


def _drawn(folder: Path, names: list[str]) -> Iterator[tuple[str, dict[str, UInt8[np.ndarray, "28 28"]]]]:
    """Letters of each font that has all of them, as the font's name and its images.

    A font counts as having a letter if it does not draw it as it draws a character that does not exist, and as a font
    of letters if at least 40 of the 52 are different pictures.

    Yields:
        The font's path in ``folder`` and an image for each letter.
    """
    for name in names:
        try:
            font = ImageFont.truetype(str(folder / name), DRAWN, layout_engine=ImageFont.Layout.BASIC)
            missing = _fitted(font, MISSING)
            letters = {letter: _fitted(font, letter) for letter in LETTERS}
        except (OSError, ValueError):  # FreeType cannot read it
            continue
        pictures = {image.tobytes() for image in letters.values() if image is not None}
        whole = {letter: image for letter, image in letters.items() if image is not None}
        lacks = missing is not None and missing.tobytes() in pictures
        if len(whole) == len(LETTERS) and len(pictures) >= 40 and not lacks:
            yield name, whole


def _fitted(font: ImageFont.FreeTypeFont, letter: str, slant: float = 0, stroke: int = 0) -> np.ndarray | None:
    """A letter fitted into the middle of a 28 x 28 image, its proportions kept; None where nothing is drawn."""
    canvas = Image.new("L", (4 * DRAWN, 3 * DRAWN))
    ImageDraw.Draw(canvas).text((DRAWN, DRAWN // 2), letter, fill=255, font=font, stroke_width=stroke)
    if slant:
        canvas = canvas.transform(canvas.size, Image.Transform.AFFINE, (1, slant, -slant * DRAWN, 0, 1, 0))
    box = canvas.getbbox()
    if box is None:
        return None
    cut = canvas.crop(box)
    scale = INNER / max(cut.size)
    size = (max(1, round(cut.width * scale)), max(1, round(cut.height * scale)))
    image = Image.new("L", (SIDE, SIDE))
    image.paste(cut.resize(size, Image.Resampling.BOX), ((SIDE - size[0]) // 2, (SIDE - size[1]) // 2))
    return np.asarray(image)


def _built_in() -> Iterator[tuple[str, dict[str, UInt8[np.ndarray, "28 28"]]]]:
    """Pillow's own font, slanted and thickened: 24 "fonts" in 6 families.

    Yields:
        A name and an image for each letter.
    """
    font = ImageFont.load_default(DRAWN)
    assert isinstance(font, ImageFont.FreeTypeFont)
    for family, slant in enumerate((-0.5, -0.3, -0.1, 0.1, 0.3, 0.5)):
        for stroke in (0, 2, 4, 6):
            letters = {letter: _fitted(font, letter, slant, stroke) for letter in LETTERS}
            yield (
                f"built-in/{family}/{stroke}",
                {letter: image for letter, image in letters.items() if image is not None},
            )
