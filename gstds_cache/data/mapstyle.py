"""Any map-style dataset of (image, label) pairs, taken as it is."""

from __future__ import annotations

import hashlib
import pickle
import re
import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import google_crc32c
import numpy as np
from jaxtyping import Int64
from PIL import Image

from gstds_cache.data.copies import Copies
from gstds_cache.data.decode import UndecodableError
from gstds_cache.data.files import Files, printable
from gstds_cache.data.items import ItemError, code_fault, image_of, pair_of, users_code
from gstds_cache.data.labels import NO_LABEL, LabelColumn, first_and_last, may_be_labels, parse_label
from gstds_cache.data.names import Names, duplicate
from gstds_cache.errors import DatasetError, in_words
from gstds_cache.files import mapped
from gstds_cache.plugins import importable

LABEL_ATTRIBUTES = ("targets", "labels", "_labels")

MIRROR_UNSAFE = frozenset(
    (
        *("EMNIST", "GTSRB", "KMNIST", "MNIST", "MovingMNIST", "Omniglot"),
        *("QMNIST", "RenderedSST2", "SEMEION", "SVHN", "USPS"),
    )
)
"""torchvision's data sets of characters and signs: mirrored, they are others or none."""
COMPARED = 16
"""Items whose labels are compared with those of an attribute before it is taken for all."""
TRIED = 8
"""Items, spread over the data set, that have to fail in the same way for it to be refused."""

_UNREADABLE = -1
_SUMMED_BYTES = 1 << 16


class MapStyleSource:
    """A dataset object with ``__len__`` and ``__getitem__``. An item's payload is its pixels in RGB.

    An item that cannot be read, or gives no image, is undecodable, whatever the reason: like a broken image file it
    has a row. Where every item that is tried fails in the same way, it is the data set that is wrong, and is refused.

    Items are read one at a time, since such objects often share a file handle. A process that decodes has a dataset of
    its own (:meth:`for_workers`). In any other process the dataset is unpickled, with ``folder`` importable, as it was
    when the dataset was made.
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
        again: Callable[[], Any] | None = None,
    ) -> None:
        """Take a dataset.

        Args:
            dataset: The object.
            uri: The data set as the user named it.
            kind: What sort of data set this is.
            folder: What is to be importable where the dataset is unpickled or made again.
            mirror_safe: Whether an image keeps its label when it is mirrored left to right.
            notes: What the user should be told.
            again: Makes the same dataset once more, for another process.
        """
        self.uri = uri
        self.kind = kind
        self.mirror_safe = mirror_safe
        self._dataset = dataset
        self._folder = folder
        self._again = again
        self._lock = threading.Lock()
        rows = _length(dataset, uri)
        self._sums = mapped.zeros((rows,), np.int64)  # Of each item when it was hashed; 0 until then.
        self.ids = _ids(dataset, uri, rows)
        self._require_an_image(rows)
        # torchvision names those classes alone that a split has.
        may_exceed = kind.startswith(("torchvision:", "python:torchvision."))
        column = LabelColumn(rows, uri, self.name_of, class_names(dataset, uri), may_exceed=may_exceed)
        self.labels = self._read_labels(rows, column)
        self.classes = column.classes
        self._indices = {name: index for index, name in enumerate(self.classes)}
        self.notes = (*notes, *column.notes)

    @property
    def files(self) -> Files | None:
        """None: what the dataset reads is its own affair."""
        return None

    def __repr__(self) -> str:
        return f"MapStyleSource({self.uri!r}, {len(self)} items)"

    def __len__(self) -> int:
        return len(self.ids)

    def name_of(self, row: int) -> str:
        """How errors name an item: by its id and its row."""
        return f"item {self.ids[row]!r} (row {row})"

    def payload(self, row: int) -> bytes:
        """``RGB|WxH|`` and the pixels of item ``row``, row by row.

        Raises:
            OSError: The dataset cannot read the item.
        """
        try:
            value, label = self._item(row)
            image = self._rgb(row, value)
        except UndecodableError as error:
            self._sums[row] = _UNREADABLE
            raise OSError(f"{self.name_of(row)}: {error.reason}") from error
        self._require_same_label(row, label)
        self._sums[row] = _sum(image)
        return _payload(image)

    def image(self, row: int) -> Image.Image:
        """Item ``row`` in RGB; if it was hashed, the image that was hashed, in whichever process.

        Raises:
            UndecodableError: The dataset cannot read the item.
            DatasetError: It could when the item was hashed, or the item was another image then; or the dataset's code
                is wrong.
        """
        hashed = int(self._sums[row])
        try:
            image = self._read(row)
        except UndecodableError as error:
            if hashed > 0:
                raise self._another(row, f"could be read when it was hashed, and cannot now: {error.reason}") from error
            raise
        if hashed and _sum(image) != hashed:
            raise self._another(row, "is another image now than when it was hashed")
        return image

    def image_size(self, row: int) -> tuple[int, int, str]:
        """Width and height of item ``row`` in pixels, without decoding an image that was only opened; no format."""
        value, _ = self._item(row)
        return (*(value if isinstance(value, Image.Image) else self._rgb(row, value)).size, "")

    def reading(self, row: int) -> tuple[bytes, int | str] | None:
        """The SHA-256 of what item ``row`` gives when it is read now, and its label; None if it cannot be read.

        Raises:
            DatasetError: The label is none.
        """
        try:
            value, label = self._item(row)
            digest = hashlib.sha256(_payload(self._rgb(row, value))).digest()
        except UndecodableError:
            return None
        return digest, LabelColumn(len(self), self.uri, self.name_of).parse(row, label)

    def _another(self, row: int, what: str) -> DatasetError:
        return DatasetError(
            f"data set {self.uri!r}: row {row} ({self.ids[row]}) {what}; expected the same each time, in every process",
            hint="take random transforms out of the dataset: augmentation comes after the cache. Where nothing is "
            "random, its items may depend on the process that reads them (a connection or random state that processes "
            "share): pass `workers=0`",
        )

    def for_workers(self) -> Callable[[], MapStyleSource]:
        """Called in a process that is forked from this one, what this returns gives a source with a dataset of its own.

        Raises:
            NotCopiedError: The dataset does not pickle, and nobody knows how it was made.
        """
        return partial(self._with_own, Copies(self._dataset, self._again))

    def _with_own(self, copies: Copies) -> MapStyleSource:
        with importable(self._folder):
            dataset = copies.make(self._like_the_original)
        if len(dataset) != len(self):
            raise DatasetError(
                f"data set {self.uri!r}: made again in another process it has {len(dataset)} items, here {len(self)}",
                hint="let it hold the same items each time it is made",
            )
        own = object.__new__(type(self))
        own.__dict__.update(self.__dict__, _dataset=dataset, _lock=threading.Lock())
        return own

    def _like_the_original(self, copy: Any) -> None:
        """Try a copy out: one that was pickled without its open file may not be able to read.

        Raises:
            Exception: Whatever its code raises where the original's does not.
        """
        len(copy)
        if int(self._sums[0]) > 0:  # It could be read when it was hashed.
            copy[0]

    def _read(self, row: int) -> Image.Image:
        value, _ = self._item(row)
        return self._rgb(row, value)

    def _item(self, row: int) -> tuple[Any, Any]:
        with self._lock, users_code(lambda: f"data set {self.uri!r}, {self.name_of(row)}"):
            item = self._dataset[row]
        return pair_of(item)

    def _rgb(self, row: int, value: Any) -> Image.Image:
        with users_code(lambda: f"data set {self.uri!r}, {self.name_of(row)}"):  # An opened image decodes only here.
            return image_of(value)

    def _require_an_image(self, rows: int) -> None:
        """Refuse a data set of which no item gives an image, all for the same reason.

        Raises:
            DatasetError: So it is; or the data set has fewer items than it says.
        """
        failures: list[UndecodableError] = []
        for row in spread(rows, TRIED):
            try:
                self.image(row)
            except UndecodableError as error:
                failures.append(error)
            else:
                return
        first = failures[0]
        # Reasons may hold each item's own numbers.
        kinds = {
            error.kind if isinstance(error, ItemError) else re.sub(r"\d+", "0", error.reason) for error in failures
        }
        if len(kinds) == 1:
            others = f"; so it is with all {len(failures)} items that were tried" if len(failures) > 1 else ""
            raise DatasetError(
                f"data set {self.uri!r}, {self.name_of(0)}: {first.reason}{others}",
                hint=first.hint if isinstance(first, ItemError) else "",
            )

    def _read_labels(self, rows: int, column: LabelColumn) -> Int64[np.ndarray, " N"]:
        """Read all labels from an attribute if it agrees with the first and last item, else item by item.

        Raises:
            DatasetError: There are fewer items than the data set says, or a label is none.
        """
        ends = {row: self._label(row) for row in (0, rows - 1)}
        last = ends[rows - 1]
        if isinstance(last, UndecodableError) and isinstance(last.__cause__, IndexError):
            raise DatasetError(
                f"data set {self.uri!r}, {self.name_of(rows - 1)}: its __len__ gives {rows}, and the last item is not "
                f"there: {in_words(last.__cause__)}",
                hint="return from __len__ how many items __getitem__ has",
            )
        parsed = [
            None if isinstance(label, UndecodableError) else column.parse(row, label) for row, label in ends.items()
        ]
        for name in LABEL_ATTRIBUTES:
            values = attribute(self._dataset, name, self.uri)
            if may_be_labels(values, rows) and _agree(values, parsed[0], parsed[-1]) and self._agrees(values, column):
                return column.read(values)
        labels = map(self._label, range(rows))
        return column.read(None if isinstance(label, UndecodableError) else label for label in labels)

    def _agrees(self, values: Any, column: LabelColumn) -> bool:
        """Whether an attribute's values are the labels of some items between the first and the last, too."""
        if not hasattr(values, "__getitem__"):
            return True  # Every item's own label is compared when it is hashed.
        for row in spread(len(self.ids), COMPARED):
            label = self._label(row)
            try:
                parsed = NO_LABEL if isinstance(label, UndecodableError) else column.parse(row, label)
                if parsed != NO_LABEL and parsed != parse_label(values[row]):  # an item may leave it to the attribute
                    return False
            except Exception:  # it is indexed in another way, or its own code fails
                return False
        return True

    def _require_same_label(self, row: int, label: Any) -> None:
        """Compare the label that an item gives with the one that was read before.

        Raises:
            DatasetError: It is another.
        """
        now = LabelColumn(len(self), self.uri, self.name_of).parse(row, label)
        index = self._indices.get(now, NO_LABEL) if isinstance(now, str) else now
        if index not in {NO_LABEL, int(self.labels[row])}:
            raise DatasetError(
                f"data set {self.uri!r}, {self.name_of(row)}: gives the label {now!r}, and the data set had "
                f"{int(self.labels[row])} for it before",
                hint="let an attribute 'targets' or 'labels' hold what the items give, or take it away; a label must "
                "be the same each time it is read",
            )

    def _label(self, row: int) -> Any:
        """The label of one item as the dataset gives it; the error, if the item cannot be read."""
        try:
            return self._item(row)[1]
        except UndecodableError as error:
            return error

    def __getstate__(self) -> dict[str, Any]:
        state = {name: value for name, value in self.__dict__.items() if name not in {"_lock", "_dataset", "_again"}}
        try:
            state["pickled"] = pickle.dumps(self._dataset)
        except (pickle.PicklingError, TypeError, AttributeError) as error:
            raise DatasetError(
                f"data set {self.uri!r}: cannot be sent to worker processes: {error}, expected an object that pickles",
                hint="decode in this process: pass `workers=0`",
            ) from error
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        with importable(state["_folder"]):
            self._dataset = pickle.loads(state.pop("pickled"))
        self._lock, self._again = threading.Lock(), None
        self.__dict__.update(state)


def spread(rows: int, count: int) -> list[int]:
    """Up to ``count`` rows of ``rows``, evenly spread from the first to the last."""
    count = min(rows, count)
    return [place * (rows - 1) // max(count - 1, 1) for place in range(count)]


def attribute(dataset: Any, name: str, uri: str) -> Any:
    """An attribute of a dataset, None if it has none.

    Raises:
        DatasetError: It is a property, and fails.
    """  # noqa: DOC501
    try:
        return getattr(dataset, name, None)
    except Exception as error:
        raise code_fault(f"data set {uri!r}, its attribute {name!r}", error) from error


def mirror_safe(dataset: Any, uri: str) -> bool:
    """Whether an image keeps its label when it is mirrored, as the dataset's attribute says; else by its class.

    Raises:
        DatasetError: The attribute is a property, and fails.
    """
    given = attribute(dataset, "mirror_safe", uri)
    while type(dataset).__name__ == "Subset" and hasattr(dataset, "dataset"):
        dataset = dataset.dataset
    known = type(dataset).__module__.startswith("torchvision.") and type(dataset).__name__ in MIRROR_UNSAFE
    return not known if given is None else bool(given)


def class_names(dataset: Any, uri: str) -> tuple[str, ...]:
    """The dataset's class names, if it has a list of them.

    Raises:
        DatasetError: One is no text that UTF-8 can express.
    """
    names = attribute(dataset, "classes", uri)
    names = names.tolist() if isinstance(names, np.ndarray) else names
    if isinstance(names, (list, tuple)):
        for name in names:
            if isinstance(name, str) and printable(name) != name:
                raise DatasetError(
                    f"data set {uri!r}: got the class name {printable(name)!r}, expected text that UTF-8 can express",
                    hint="spell it in another way, e.g. with os.fsencode(name).decode('utf-8', 'backslashreplace')",
                )
    return tuple(map(str, names)) if isinstance(names, (list, tuple)) and all(isinstance(n, str) for n in names) else ()


def _payload(image: Image.Image) -> bytes:
    return f"RGB|{image.width}x{image.height}|".encode() + image.tobytes()


def _agree(values: Any, *ends: int | str | None) -> bool:
    """Whether an attribute's first and last value are the labels of the first and last item, where these are known."""
    try:
        parsed = [parse_label(value) for value in first_and_last(values)]
    except Exception:  # no labels, none that can be gone through (sparse tensors), or the attribute's own code
        return False
    return all(label in {None, other} for label, other in zip(ends, parsed, strict=True))


def _length(dataset: Any, uri: str) -> int:
    if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        raise DatasetError(
            f"data set {uri!r}: got a {type(dataset).__name__}, expected an object with __len__ and __getitem__",
            hint="return a map-style dataset, e.g. a torch.utils.data.Dataset, or a list of (image, label)",
        )
    try:
        rows = len(dataset)
    except Exception as error:
        raise code_fault(f"data set {uri!r}, its __len__", error) from error
    if rows < 1:
        raise DatasetError(f"data set {uri!r}: got 0 items, expected at least 1")
    return rows


def _sum(image: Image.Image) -> int:
    """A number that tells an image from another; of a large one, lines that lie evenly are enough."""
    lines = max(1, _SUMMED_BYTES // (3 * image.width))
    size = f"{image.width}x{image.height}|".encode()
    if lines < image.height:
        image = image.resize((image.width, lines), Image.Resampling.NEAREST)
    return int(google_crc32c.extend(google_crc32c.value(size), image.tobytes())) + 1


def _ids(dataset: Any, uri: str, rows: int) -> Sequence[str]:
    given = attribute(dataset, "ids", uri)
    if given is None:
        return Names.numbered(rows)
    if not hasattr(given, "__len__") or isinstance(given, (str, bytes, set, frozenset)):
        raise DatasetError(
            f"data set {uri!r}: got an attribute 'ids' that is a {type(given).__name__}, expected a list of {rows} "
            "names",
            hint="give the dataset a list with one id per item, in their order, or no attribute 'ids'",
        )
    try:
        ids = Names.of((_id(uri, row, name) for row, name in enumerate(given)), "strict")
    except UnicodeEncodeError as error:
        raise DatasetError(
            f"data set {uri!r}: got the id {error.object!r}, expected text that UTF-8 can express",
            hint="spell it in another way, e.g. with ascii()",
        ) from error
    except TypeError as error:  # It has a length, and cannot be gone through.
        raise code_fault(f"data set {uri!r}, its attribute 'ids'", error) from error
    if len(ids) != rows or duplicate(ids) is not None:
        raise DatasetError(
            f"data set {uri!r}: got {len(ids)} ids, {len(set(ids))} of them different, expected {rows} different ones",
            hint="give the dataset one id per item, or no attribute 'ids'",
        )
    return ids


def _id(uri: str, row: int, name: Any) -> str:
    # An object that does not say what it is called has its address in its text: another one in every run.
    if name is None or repr(name) == str(name) == object.__repr__(name):
        raise DatasetError(
            f"data set {uri!r}: got the id {name!r} for row {row}, expected text or a number",
            hint="give the dataset one id per item, or no attribute 'ids'",
        )
    return str(name)
