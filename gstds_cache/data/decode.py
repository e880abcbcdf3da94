"""Bytes to one RGB image, or a reason why not: the same pixels for the same bytes, whatever the mode or container."""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

from gstds_cache.config import EmbedConfig
from gstds_cache.data.grey import GreyScale, UndecodableError, eight_bits
from gstds_cache.errors import DatasetError
from gstds_cache.runtime.resources import about_us

__all__ = [
    "EXACT",
    "TOO_MANY",
    "Decoding",
    "UndecodableError",
    "current_decoding",
    "decode_image",
    "decoding_as",
    "to_rgb",
]

# Named rather than left open, so that what decodes does not depend on the plugins another import registered, and so
# that a file cannot choose a decoder that runs a program (EPS runs Ghostscript).
FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP", "GIF", *(("AVIF",) if find_spec("PIL._avif") else ()))
# Without those that came later: reasons stand in commit records, which a repair makes again to the last byte.
_UNKNOWN = f"not an image in a known format ({', '.join(FORMATS[:7])})"
HAS_HEIC = find_spec("pillow_heif") is not None
HEIC_EXTRA = "the extra heic: pip install 'gstds-cache[heic]'"
_HEIC_BRANDS = (b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"hevm", b"hevs", b"mif1", b"msf1")

TOO_MANY = "too many pixels"
"""How the reason begins for an image above the cap."""

_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")
_SIXTEEN_BIT = ("I", "I;16", "I;16B", "I;16L", "I;16N")
_BITS, _MAXIMUM, _SMALLEST, _LARGEST = 258, 281, 340, 341  # TIFF: Bits-, Max-, SMin-, SMax-
_FULL_SCALES = {2**bits - 1 for bits in range(9, 16)}
_ALPHA = ("LA", "PA", "La", "RGBA", "RGBa")


@dataclass(frozen=True)
class Decoding:
    """How image files are decoded; part of what makes an embedding what it is.

    Attributes:
        side: A JPEG is decoded at 1/2, 1/4 or 1/8 of its size, by leaving out high frequencies (DCT), where each side
            of it stays at least so long, in pixels; 0 decodes it at its full size.
        max_pixels: Largest width x height that is decoded, read from the header before any pixel is.
    """

    side: int = 0
    max_pixels: int = EmbedConfig.max_pixels


EXACT = Decoding()

# Of this thread's block, and no argument of `ImageSource.image`: items that are no files have nothing to scale, and
# each kind of data set whose items are would only hand it on.
_DECODING: ContextVar[Decoding] = ContextVar("decoding", default=EXACT)


@contextmanager
def decoding_as(how: Decoding) -> Iterator[None]:
    """Have :func:`decode_image` decode in another way in this block.

    Args:
        how: The way.

    Yields:
        Nothing.
    """
    token = _DECODING.set(how)
    try:
        yield
    finally:
        _DECODING.reset(token)


def current_decoding() -> Decoding:
    """The way of the :func:`decoding_as` around this, for what decodes in another thread or process."""
    return _DECODING.get()


def decode_image(data: bytes, how: Decoding | None = None) -> Image.Image:
    """Decode the first frame of an image file to upright RGB.

    Transparency is laid on white, 16-bit grey keeps its upper byte, and the EXIF orientation is applied. Pillow's
    warnings are silenced: what is wrong with a file either stops it from decoding or does not matter here. (Warning
    filters belong to the process, so decode in several processes rather than in several threads.)

    Args:
        data: The bytes of a file in one of ``FORMATS``.
        how: The way; by default that of the :func:`decoding_as` around it, else at full size.

    Returns:
        An image of mode RGB.

    Raises:
        UndecodableError: There is no image in ``data``, only a part of one, or one of more than ``max_pixels``.
        DatasetError: It is HEIC, and what decodes that is not installed: no fault of the image, which has another
            embedding once it is.
        MemoryError: There is not enough memory for it.
    """
    if not data:
        raise UndecodableError("empty file (0 bytes)")
    how = how or _DECODING.get()
    with _our_own_limit(how.max_pixels):
        try:
            with Image.open(io.BytesIO(data), formats=_formats_of(data)) as image:
                _check_size(image.size, how.max_pixels)
                if how.side and image.format in {"JPEG", "MPO"}:  # MPO: a JPEG with another behind it, as phones write
                    image.draft(None, (how.side, how.side))
                deep = image.mode in {"RGB", "RGBA", "LA"} and _is_deep(image)
                image.load()
                if deep:
                    _require_colours(image)
                return to_rgb(_upright(image), _scale_of(image))
        except (UndecodableError, DatasetError):
            raise
        except UnidentifiedImageError:
            raise UndecodableError(_UNKNOWN) from None
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise UndecodableError(f"{TOO_MANY}: {error}") from None
        except Exception as error:  # Bytes from anywhere can raise anything in a decoder: OSError, SyntaxError, ...
            if about_us(error):
                raise
            text = _ADDRESS.sub("", " ".join(str(error).split()))
            raise UndecodableError(f"{type(error).__name__}: {text}" if text else type(error).__name__) from None


def header_size(data: bytes) -> tuple[int, int, str]:
    """Width and height in pixels as stored, and the format, from the header of an image file; no pixel is decoded.

    Args:
        data: The bytes of a file, or as many of the first as hold its header.

    Raises:
        UndecodableError: There is no image in ``data``.
    """
    with _our_own_limit(1 << 62):
        try:
            with Image.open(io.BytesIO(data), formats=_formats_of(data)) as image:
                return *image.size, image.format or ""
        except Exception as error:  # Anything, as above.
            if about_us(error):
                raise
            raise UndecodableError(_UNKNOWN) from None


@contextmanager
def _our_own_limit(max_pixels: int) -> Iterator[None]:
    """Silence Pillow's warnings, and raise its own limit of pixels to ours.

    Yields:
        Nothing.
    """
    before = Image.MAX_IMAGE_PIXELS
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        if before is not None and max_pixels > before:
            Image.MAX_IMAGE_PIXELS = max_pixels
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = before


def _formats_of(data: bytes) -> tuple[str, ...]:
    """What Pillow may take a file for: HEIC's decoder is loaded for the first file that needs it.

    Raises:
        DatasetError: It is HEIC, and nothing here decodes that.
    """
    if data[4:8] != b"ftyp" or data[8:12] not in _HEIC_BRANDS:
        return FORMATS
    if not HAS_HEIC:
        raise DatasetError(
            f"got a HEIC image, which needs {HEIC_EXTRA}",
            hint="install it, or convert the images; nothing committed is lost: the same command goes on",
        )
    import pillow_heif

    pillow_heif.register_heif_opener()
    return ("HEIF", *FORMATS)


def to_rgb(image: Image.Image, scale: GreyScale | None = None) -> Image.Image:
    """Convert an image of any Pillow mode to RGB.

    Differs from ``image.convert("RGB")`` in this: transparency shows white instead of whatever colour lies under
    it; 16-bit grey is scaled to 8 bits instead of clipped at 255; wider grey is scaled by the convention that its
    values follow (``data/grey.py``), and refused where they follow none, instead of all but black or white.

    Args:
        image: Any mode Pillow can hold.
        scale: What is known of grey values of more than 8 bits; None asks the image.

    Returns:
        An image of mode RGB; ``image`` itself if it is one already.

    Raises:
        UndecodableError: Grey values of more than 8 bits follow no convention.
    """
    mode = image.mode
    if mode in _SIXTEEN_BIT or mode == "F":
        return _grey_to_rgb(image, scale or _scale_of(image))
    if mode in _ALPHA or image.has_transparency_data:
        if mode == "La":  # Pillow converts premultiplied grey to nothing but LA.
            image = image.convert("LA")
        rgba = image.convert("RGBA")
        white = Image.new("RGB", image.size, (255, 255, 255))
        white.paste(rgba.convert("RGB"), mask=rgba.getchannel("A"))
        return white
    return image if mode == "RGB" else image.convert("RGB")


def _grey_to_rgb(image: Image.Image, scale: GreyScale) -> Image.Image:
    values = np.asarray(image)
    grey = eight_bits(values, scale)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):  # PNG's tRNS: the one value that is not there.
        grey = np.where(values == transparent, np.uint8(255), grey)
    return Image.fromarray(grey).convert("RGB")


def _scale_of(image: Image.Image) -> GreyScale:
    """What the file says of its grey values; before it is turned, which drops that."""
    # Mode I is 32 bits wide, but what PGM and older readers of PNG put in it is 16-bit.
    sixteen = image.mode != "I" or image.format in {"PPM", "PNG"}
    tags = getattr(image, "tag_v2", None) or {}
    bits, low, high = (_number(tags.get(tag)) for tag in (_BITS, _SMALLEST, _LARGEST))
    if image.mode != "F":
        if bits is not None and 8 < bits < 16:
            return GreyScale((0.0, 2.0**bits - 1), sixteen=sixteen)
        if high is None:
            # By the standard a statistic of the image; but writers of 10 to 14 bits in 16 put the full scale there.
            high = _number(tags.get(_MAXIMUM))
            high = high if high in _FULL_SCALES else None
    ends = (low or 0.0, high) if high is not None and (low or 0.0) < high else None
    return GreyScale(ends, sixteen=sixteen)


def _number(tag: Any) -> float | None:
    try:
        number = float(tag[0] if isinstance(tag, tuple) else tag)
    except (TypeError, ValueError, IndexError, OverflowError, ZeroDivisionError):
        return None
    return number if math.isfinite(number) else None


def _is_deep(image: ImageFile.ImageFile) -> bool:
    """Whether a file that was opened holds 16 bits of which Pillow keeps 8."""
    if image.format == "PPM":  # the largest value is the last of the decoder's arguments
        largest = [tile[3][-1] for tile in image.tile if isinstance(tile[3], tuple) and tile[3]]
        return any(isinstance(value, int) and value > 255 for value in largest)
    return any(";16" in str(tile) for tile in image.tile)


def _require_colours(image: Image.Image) -> None:
    """Refuse colour of 16 bits of which Pillow kept the upper byte, where next to nothing was in that.

    Raises:
        UndecodableError: All values are in the lowest sixteenth, and so many of those that remain are there that it is
            no black picture.
    """
    pixels = np.asarray(image)
    pixels = pixels if image.mode == "RGB" else pixels[..., :-1]  # without alpha
    if pixels.size and int(pixels.max()) <= 16 and len(np.unique(pixels)) > 8:
        raise UndecodableError(
            f"all but black: 16-bit colour with nothing above {int(pixels.max()) * 256 + 255} of 65535; scale it to "
            "the full range"
        )


def _check_size(size: tuple[int, int], max_pixels: int) -> None:
    width, height = size
    if width * height > max_pixels:
        raise UndecodableError(f"{TOO_MANY}: {width} x {height}, at most {max_pixels} are decoded")


def _upright(image: Image.Image) -> Image.Image:
    """Apply the EXIF orientation; an EXIF block that cannot be read leaves the image as it is.

    Raises:
        MemoryError: There is not enough memory for another copy.
    """
    try:
        return ImageOps.exif_transpose(image)
    except MemoryError:
        raise
    except Exception:  # The pixels are loaded already, so only metadata can be at fault, in as many ways as above.
        return image
