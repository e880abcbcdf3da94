"""One item of a data set of a user's own, and what becomes of it when their code raises."""

from __future__ import annotations

import errno
import re
import struct
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from gstds_cache.data.decode import UndecodableError, to_rgb
from gstds_cache.errors import DatasetError, GstdsError, IncompleteError, in_words
from gstds_cache.plugins import where_in
from gstds_cache.runtime.resources import about_us, out_of_memory

CODE_FAULTS = (NameError, TypeError, AttributeError, ImportError, NotImplementedError, RecursionError, SystemExit)
"""What is raised by code that is wrong, not by data that are damaged. Files, archives and decoders raise all others:
OSError, KeyError of an archive's missing member, ValueError and RuntimeError of a decoder, errors of their own."""

NOT_IMAGE = (
    "expected a PIL image, a uint8 array [H, W] or [H, W, C], or a uint8 tensor [C, H, W], C = 1, 3 or 4",
    "take ToTensor, Normalize and augmentation out of the dataset: they come after the cache",
)
NOT_PAIR = (
    "expected a pair (image, label)",
    "wrap it in a dataset of such pairs, and name that as package.module:factory",
)

# Reading any other item would fail as well: a device that is gone, a disk that is full.
_MACHINE = frozenset({errno.ENODEV, errno.ENOSPC, errno.ENOTCONN})
# Errors whose text is left out of the reason, as it always was: commit records written before stay as they are.
_BY_NAME = (OSError, EOFError, SyntaxError, struct.error, zlib.error, Image.DecompressionBombError)
# Addresses and absolute paths would make the reason another in every run; a file's own name stays.
_VARIES = re.compile(r" at 0x[0-9a-fA-F]+|(?<![\w./])/(?:[^\s/'\":]+/)+")


class ItemError(UndecodableError):
    """An item of a user's data set that gives no image.

    Attributes:
        kind: What failed: equal for items that fail in the same way.
        hint: What to do where every item fails so.
    """

    def __init__(self, reason: str, *, kind: str, hint: str) -> None:
        super().__init__(reason)
        self.kind, self.hint = kind, hint


@contextmanager
def users_code(where: Callable[[], str]) -> Iterator[None]:
    """Sort out what a user's code raises while it reads an item.

    Args:
        where: Names data set and item, for errors.

    Yields:
        Once.

    Raises:
        ItemError: The item cannot be read or decoded.
        DatasetError: The code is wrong; names the item and the line.
        IncompleteError: Memory, or files that may be open, ran out: no fault of the item.
    """  # noqa: DOC501
    try:
        yield
    except (GstdsError, UndecodableError):
        raise
    except (KeyboardInterrupt, GeneratorExit):
        raise
    except BaseException as error:  # also what is no Exception: SystemExit, panics of libraries written in Rust
        if _out_of_resources(error):
            raise IncompleteError(
                f"{where()} could not be read: {in_words(error)}",
                hint="nothing committed is lost: end what else uses memory or open files (ulimit -n), or close files "
                "in the data set, then run the same command again",
            ) from error
        if isinstance(error, CODE_FAULTS) or (isinstance(error, SyntaxError) and error.filename):
            raise code_fault(where(), error) from error
        raise ItemError(
            f"unreadable: {_reason(error)}",
            kind=f"unreadable: {type(error).__name__}",
            hint="look for a wrong path or a file that is missing, where it was raised:"
            f"{where_in(error) or ' in a library'}",
        ) from error


def code_fault(what: str, error: BaseException) -> DatasetError:
    """The error of a user's code that failed: what it was about, what was raised, and in which line."""
    return DatasetError(
        f"{what}: {in_words(error)}{where_in(error)}",
        hint="the code of the data set failed there: mend it, or its arguments, then run the same command again",
    )


def pair_of(item: Any) -> tuple[Any, Any]:
    """Image and label of an item.

    Raises:
        ItemError: It is no pair.
    """
    if isinstance(item, (tuple, list)) and len(item) == 2:
        return item[0], item[1]
    got = f"{len(item)} values" if isinstance(item, (tuple, list)) else type(item).__name__
    expected, hint = NOT_PAIR
    if isinstance(item, dict):
        got, hint = f"a dict of {', '.join(map(str, item))}"[:200], f"{hint}; a datasets.Dataset is taken as it is"
    raise ItemError(f"not a pair: got {got}, {expected}", kind="not a pair", hint=hint)


def image_of(value: Any) -> Image.Image:
    """An item's image in RGB.

    Raises:
        ItemError: It is no image, or one without pixels.
    """  # noqa: DOC501
    image = value if isinstance(value, Image.Image) else Image.fromarray(_pixels(value))
    if not image.width * image.height:
        raise _not_image(f"an image of {image.width}x{image.height} pixels")
    rgb = to_rgb(image)
    rgb.load()  # or an image in RGB that was only opened would decode, and fail, somewhere else
    return rgb


def _pixels(value: Any) -> UInt8[np.ndarray, "H W *C"]:
    is_tensor = hasattr(value, "detach")  # Told by its method, so that torch is not imported for arrays.
    array = value.detach().cpu().numpy() if is_tensor else value
    if isinstance(array, np.ndarray) and array.dtype == np.uint8 and array.ndim in {2, 3}:
        if is_tensor and array.ndim == 3:
            array = array.transpose(1, 2, 0)
        channels = 1 if array.ndim == 2 else array.shape[2]
        if channels in {1, 3, 4} and array.size:
            return np.ascontiguousarray(array[..., 0] if array.ndim == 3 and channels == 1 else array)
    got = f"{array.dtype} {'x'.join(map(str, array.shape))}" if isinstance(array, np.ndarray) else type(array).__name__
    raise _not_image(f"an image that is a {'tensor' if is_tensor else 'value'} of {got}")


def _not_image(got: str) -> ItemError:
    expected, hint = NOT_IMAGE
    return ItemError(f"not an image: got {got}, {expected}", kind="not an image", hint=hint)


def _reason(error: BaseException) -> str:
    """Why an item cannot be read, in one line that is the same in every run."""
    if isinstance(error, _BY_NAME):
        return getattr(error, "strerror", None) or type(error).__name__
    # A message may hold a file name in another encoding, which no commit record can.
    return _VARIES.sub("", in_words(error)).encode(errors="backslashreplace").decode()


def _out_of_resources(error: BaseException) -> bool:
    return about_us(error) or out_of_memory(error) or (isinstance(error, OSError) and error.errno in _MACHINE)
