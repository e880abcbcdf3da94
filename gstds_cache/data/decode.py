"""Bytes to one RGB image, or a reason why not: the same pixels for the same bytes, whatever the mode or container."""

from __future__ import annotations

import io
import re
import warnings

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from gstds_cache.resources import about_us

MAX_PIXELS = 64_000_000

# Named rather than left open, so that what decodes does not depend on the plugins another import registered, and so
# that a file cannot choose a decoder that runs a program (EPS runs Ghostscript).
FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP", "GIF")

_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")
_SIXTEEN_BIT = ("I", "I;16", "I;16B", "I;16L", "I;16N")
_ALPHA = ("LA", "PA", "La", "RGBA", "RGBa")


class UndecodableError(Exception):
    """An item that gives no image.

    Attributes:
        reason: Why, in one line that is the same in every run: no memory addresses, no absolute paths.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def decode_image(data: bytes, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode the first frame of an image file to upright RGB.

    Transparency is laid on white, 16-bit grey keeps its upper byte, and the EXIF orientation is applied. Pillow's
    warnings are silenced: what is wrong with a file either stops it from decoding or does not matter here. (Warning
    filters belong to the process, so decode in several processes rather than in several threads.)

    Args:
        data: The bytes of a file in one of ``FORMATS``.
        max_pixels: Largest width x height accepted, read from the header before any pixel is decoded.

    Returns:
        An image of mode RGB.

    Raises:
        UndecodableError: There is no image in ``data``, only a part of one, or one of more than ``max_pixels``.
        MemoryError: There is not enough memory for it.
    """
    if not data:
        raise UndecodableError("empty file (0 bytes)")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                _check_size(image.size, max_pixels)
                image.load()
                return to_rgb(_upright(image))
        except UndecodableError:
            raise
        except UnidentifiedImageError:
            raise UndecodableError(f"not an image in a known format ({', '.join(FORMATS)})") from None
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise UndecodableError(f"too many pixels: {error}") from None
        except Exception as error:  # Bytes from anywhere can raise anything in a decoder: OSError, SyntaxError, ...
            if about_us(error):
                raise
            text = _ADDRESS.sub("", " ".join(str(error).split()))
            raise UndecodableError(f"{type(error).__name__}: {text}" if text else type(error).__name__) from None


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image of any Pillow mode to RGB.

    Differs from ``image.convert("RGB")`` in three ways: transparency shows white instead of whatever colour lies under
    it; 16-bit grey is scaled to 8 bits instead of clipped at 255; float grey in [0, 1] is scaled instead of all but
    black.

    Args:
        image: Any mode Pillow can hold.

    Returns:
        An image of mode RGB; ``image`` itself if it is one already.
    """
    mode = image.mode
    if mode in _SIXTEEN_BIT or mode == "F":
        return _grey_to_rgb(image)
    if mode in _ALPHA or image.has_transparency_data:
        if mode == "La":  # Pillow converts premultiplied grey to nothing but LA.
            image = image.convert("LA")
        rgba = image.convert("RGBA")
        white = Image.new("RGB", image.size, (255, 255, 255))
        white.paste(rgba.convert("RGB"), mask=rgba.getchannel("A"))
        return white
    return image if mode == "RGB" else image.convert("RGB")


def _grey_to_rgb(image: Image.Image) -> Image.Image:
    values = np.asarray(image)
    if image.mode == "F":
        # Two conventions are in use, 0..1 and 0..255; the values say which. NaN becomes black.
        values = np.nan_to_num(values.astype(np.float64), nan=0.0, posinf=255.0, neginf=0.0)
        scale = 255.0 if values.max(initial=0.0) <= 1.0 else 1.0
        grey = np.rint(np.clip(values * scale, 0.0, 255.0)).astype(np.uint8)
    else:
        # Mode I is 32 bits wide, but what files put in it (PGM, older PNG readers) is 16-bit.
        grey = (np.clip(values.astype(np.int64), 0, 65535) >> 8).astype(np.uint8)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):  # PNG's tRNS: the one value that is not there.
        grey = np.where(values == transparent, np.uint8(255), grey)
    return Image.fromarray(grey).convert("RGB")


def _check_size(size: tuple[int, int], max_pixels: int) -> None:
    width, height = size
    if width * height > max_pixels:
        raise UndecodableError(f"too many pixels: {width} x {height}, at most {max_pixels} are decoded")


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
