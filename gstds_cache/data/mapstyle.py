"""Any map-style dataset of (image, label) pairs, taken as it is."""

from __future__ import annotations

import contextlib
import operator
import pickle
import struct
import sys
import threading
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int64, UInt8
from PIL import Image

from gstds_cache import scratch
from gstds_cache.data.decode import UndecodableError, to_rgb
from gstds_cache.data.files import Files
from gstds_cache.data.names import AT_ONCE, Names, Numbers, duplicate
from gstds_cache.errors import DatasetError
from gstds_cache.resources import about_us

LABEL_ATTRIBUTES = ("targets", "labels", "_labels")

# What reading a damaged image raises from inside a dataset; anything else is a fault of its code, and keeps its trace.
_READ_ERRORS = (OSError, SyntaxError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)


class MapStyleSource:
    """A dataset object with ``__len__`` and ``__getitem__``. An item's payload is its pixels in RGB.

    Items are read one at a time, since such objects often share a file handle. In another process the dataset is
    unpickled, with ``folder`` importable, as it was when the dataset was made.
    """

    def __init__(
        self,
        dataset: Any,
        *,
        uri: str,
        kind: str,
        folder: str = "",
        mirror_safe: bool = True,
        notes: Sequence[str] = (),
    ) -> None:
        self.uri = uri
        self.kind = kind
        self.mirror_safe = mirror_safe
        self.notes = tuple(notes)
        self._dataset = dataset
        self._folder = folder
        self._lock = threading.Lock()
        rows = _length(dataset, uri)
        self.ids = _ids(dataset, uri, rows)
        self.classes = class_names(dataset)
        with contextlib.suppress(*_READ_ERRORS):  # A damaged first item is one bad item; a wrong type is all of them.
            self._rgb(self._item(0)[0])
        self.labels = self._read_labels(rows)

    @property
    def files(self) -> Files | None:
        """None: what the dataset reads is its own affair."""
        return None

    def __len__(self) -> int:
        return len(self.ids)

    def payload(self, row: int) -> bytes:
        """``RGB|WxH|`` and the pixels of item ``row``, row by row.

        Raises:
            OSError: The dataset cannot read the item.
        """
        try:
            image = self._rgb(self._item(row)[0])
        except _READ_ERRORS as error:
            raise OSError(f"item {row}: {error}") from error
        return f"RGB|{image.width}x{image.height}|".encode() + image.tobytes()

    def image(self, row: int) -> Image.Image:
        """Item ``row`` in RGB.

        Raises:
            UndecodableError: The dataset cannot read the item.
        """
        try:
            return self._rgb(self._item(row)[0])
        except _READ_ERRORS as error:
            if about_us(error):
                raise
            reason = getattr(error, "strerror", None) or type(error).__name__
            raise UndecodableError(f"unreadable: {reason}") from None

    def _item(self, row: int) -> tuple[Any, Any]:
        with self._lock:
            item = self._dataset[row]
        if not isinstance(item, (tuple, list)) or len(item) != 2:
            got = f"{len(item)} values" if isinstance(item, (tuple, list)) else type(item).__name__
            raise DatasetError(
                f"data set {self.uri!r}, item {row}: got {got}, expected a pair (image, label)",
                hint="wrap it in a dataset of such pairs, and name that as package.module:factory",
            )
        return item[0], item[1]

    def _rgb(self, value: Any) -> Image.Image:
        return to_rgb(value if isinstance(value, Image.Image) else Image.fromarray(self._pixels(value)))

    def _pixels(self, value: Any) -> UInt8[np.ndarray, "H W *C"]:
        is_tensor = hasattr(value, "detach")  # Told by its method, so that torch is not imported for arrays.
        array = value.detach().cpu().numpy() if is_tensor else value
        if isinstance(array, np.ndarray) and array.dtype == np.uint8 and array.ndim in {2, 3}:
            if is_tensor and array.ndim == 3:
                array = array.transpose(1, 2, 0)
            channels = 1 if array.ndim == 2 else array.shape[2]
            if channels in {1, 3, 4} and array.size:
                return np.ascontiguousarray(array[..., 0] if array.ndim == 3 and channels == 1 else array)
        got = (
            f"{array.dtype} {'x'.join(map(str, array.shape))}"
            if isinstance(array, np.ndarray)
            else type(array).__name__
        )
        raise DatasetError(
            f"data set {self.uri!r}: got an image that is a {'tensor' if is_tensor else 'value'} of {got}, "
            "expected a PIL image, a uint8 array [H, W] or [H, W, C], or a uint8 tensor [C, H, W], C = 1, 3 or 4",
            hint="take ToTensor, Normalize and augmentation out of the dataset: they come after the cache",
        )

    def _read_labels(self, rows: int) -> Int64[np.ndarray, " N"]:
        """Read all labels from an attribute if it agrees with the first and last item, else item by item."""
        ends = {row: self._label(row) for row in (0, rows - 1)}
        for name in LABEL_ATTRIBUTES:
            labels = label_array(getattr(self._dataset, name, None), rows)
            if labels is not None and all(label in {None, labels[row]} for row, label in ends.items()):
                return labels
        found = map(self._label, range(rows))
        return _numbers((-1 if label is None else label for label in found), rows)

    def _label(self, row: int) -> int | None:
        """The label of one item, None if it cannot be read."""
        try:
            return label_of(self._item(row)[1])
        except _READ_ERRORS:
            return None

    def __getstate__(self) -> dict[str, Any]:
        state = {name: value for name, value in self.__dict__.items() if name not in {"_lock", "_dataset"}}
        try:
            state["pickled"] = pickle.dumps(self._dataset)
        except (pickle.PicklingError, TypeError, AttributeError) as error:
            raise DatasetError(
                f"data set {self.uri!r}: cannot be sent to worker processes: {error}, expected an object that pickles",
                hint="decode in this process: --workers 0",
            ) from error
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        with importable(state["_folder"]):
            self._dataset = pickle.loads(state.pop("pickled"))
        self._lock = threading.Lock()
        self.__dict__.update(state)


@contextlib.contextmanager
def importable(folder: str) -> Iterator[None]:
    """Make modules in ``folder`` importable for the length of a ``with`` block; '' changes nothing."""
    if not folder:
        yield
        return
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)


def label_of(value: Any) -> int:
    """A label as a class index: -1 for what is not an integer, and for negative ones, which data sets use as "none"."""
    try:
        return max(-1, operator.index(value))
    except TypeError:
        return -1


def label_array(values: Any, rows: int) -> Int64[np.ndarray, " N"] | None:
    """Labels from an attribute of a dataset, or None if it is not one label for each of ``rows`` items."""
    if values is None or not hasattr(values, "__len__") or isinstance(values, (str, dict)) or len(values) != rows:
        return None
    return _numbers(map(label_of, values), rows)


def class_names(dataset: Any) -> tuple[str, ...]:
    """The dataset's class names, if it has a list of them."""
    names = getattr(dataset, "classes", None)
    return tuple(names) if isinstance(names, (list, tuple)) and all(isinstance(n, str) for n in names) else ()


def _length(dataset: Any, uri: str) -> int:
    if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        raise DatasetError(
            f"data set {uri!r}: got a {type(dataset).__name__}, expected an object with __len__ and __getitem__",
            hint="return a map-style dataset, e.g. a torch.utils.data.Dataset, or a list of (image, label)",
        )
    rows = len(dataset)
    if rows < 1:
        raise DatasetError(f"data set {uri!r}: got 0 items, expected at least 1")
    return rows


def _numbers(values: Iterable[int], rows: int) -> Int64[np.ndarray, " N"]:
    made, left = scratch.zeros((rows,), np.int64), iter(values)
    for start in range(0, rows, AT_ONCE):
        part = made[start : start + AT_ONCE]
        part[:] = np.fromiter(left, np.int64, len(part))
    return made


def _ids(dataset: Any, uri: str, rows: int) -> Sequence[str]:
    given = getattr(dataset, "ids", None)
    if given is None:
        return Numbers(rows)
    try:
        ids = Names.of(map(str, given), "strict")
    except UnicodeEncodeError as error:
        raise DatasetError(
            f"data set {uri!r}: got the id {error.object!r}, expected text that UTF-8 can express",
            hint="spell it in another way, e.g. with ascii()",
        ) from error
    if len(ids) != rows or duplicate(ids) is not None:
        raise DatasetError(
            f"data set {uri!r}: got {len(ids)} ids, {len(set(ids))} of them different, expected {rows} different ones",
            hint="give the dataset one id per item, or no attribute 'ids'",
        )
    return ids
