"""Labels in whatever wrapping a data set gives them: class indices, text that names classes, or none."""

from __future__ import annotations

import math
import operator
import reprlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from decimal import Decimal
from itertools import islice
from numbers import Number, Real
from typing import Any

import numpy as np
from jaxtyping import Int64

from gstds_cache.data.names import AT_ONCE
from gstds_cache.errors import DatasetError
from gstds_cache.files import mapped

NO_LABEL = -1
WITHOUT = "or None for an item without a label"
_NUMBER = f"give the class index, a whole number, {WITHOUT}"
_LARGEST = int(np.iinfo(np.int64).max)
_WRAPPINGS = 8
"""Arrays in lists in tuples that are taken off; more is no label, but a list that holds itself."""


class LabelError(ValueError):
    """A value that is no label.

    Attributes:
        got: The value, in a few words.
        hint: What to give instead.
    """

    def __init__(self, got: str, hint: str) -> None:
        super().__init__(got)
        self.got, self.hint = got, hint


def parse_label(value: Any) -> int | str:
    """A label as a class index, or as the text that names its class.

    Whole numbers are class indices in any type (``3.0``, ``np.float32(3)``, ``True``) and in any wrapping of one
    element (arrays, tensors, lists, tuples). None, NaN and pandas' NA are no label, and so are negative numbers, which
    data sets use as "none". Bytes are UTF-8 text.

    Args:
        value: What a data set gives as the label of one item.

    Returns:
        The index, ``NO_LABEL`` for none, or the text.

    Raises:
        LabelError: It is neither: a fraction, an infinite or complex number, one-hot or scores, a dict, an object.
    """
    try:
        bare = _unwrapped(value)
    except Exception:  # the value's own code; tensors without values
        raise LabelError(described(value), _NUMBER) from None
    if bare is None or type(bare).__name__ == "NAType":
        return NO_LABEL
    if isinstance(bare, (str, bytes, bytearray)):
        return _text(value, bare)
    try:
        if isinstance(bare, (Real, Decimal)) and not hasattr(bare, "__index__"):
            if math.isnan(bare):
                return NO_LABEL
            number = int(bare)  # type: ignore[arg-type] # OverflowError: it is infinite
            whole = number == bare
        else:
            number, whole = operator.index(bare), True
    except Exception:  # TypeError, ArithmeticError, and whatever its own __index__ raises
        raise LabelError(described(value), _NUMBER if isinstance(bare, Number) else _instead(value)) from None
    if not whole:
        raise LabelError(described(value), _NUMBER)
    if number > _LARGEST:
        raise LabelError(described(value), "number the classes from 0, e.g. by np.unique(labels, return_inverse=True)")
    return max(NO_LABEL, number)


def described(value: Any) -> str:
    """A value of any type in a few words, on one line."""
    try:
        return _described(value)
    except Exception:  # its own code
        return f"a {type(value).__name__}"


def _described(value: Any) -> str:
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        what = "tensor" if hasattr(value, "detach") else "array"
        first = (value.detach().cpu().numpy() if what == "tensor" else np.asarray(value)).reshape(-1)[:8].tolist()
        shape = "x".join(map(str, value.shape)) or "no dimensions"
        dots = ", ..." if np.prod(value.shape) > 8 else ""
        text = f"a {str(value.dtype).removeprefix('torch.')} {what} of {shape}: {str(first)[:-1]}{dots}]"
    else:
        text = f"{reprlib.repr(value)} ({type(value).__name__})"
    return " ".join(text.split())[:200]


def _unwrapped(value: Any) -> Any:
    for _ in range(_WRAPPINGS):
        if type(value) in {int, str, float} or value is None:
            return value
        if isinstance(value, np.ma.MaskedArray) and value.size == 1 and bool(np.ma.getmaskarray(value).all()):
            return None
        if isinstance(value, (list, tuple)):
            inner = value[0] if len(value) == 1 else value
        elif hasattr(value, "detach"):  # a tensor, told by its method, so that torch is not imported for arrays
            inner = value.detach().cpu().item() if value.numel() == 1 else value
        elif hasattr(value, "__array__") and not isinstance(value, (str, bytes)):
            array = np.asarray(value)
            # A time in nanoseconds would give a plain number.
            inner = array.item() if array.size == 1 and array.dtype.kind not in "mM" else value
        else:
            return value
        if inner is value:
            return value
        value = inner
    return value


def _text(value: Any, bare: str | bytes | bytearray) -> str:
    try:
        text = bare if isinstance(bare, str) else bare.decode()
        text.encode()
    except UnicodeError:
        raise LabelError(described(value), "spell it in UTF-8, e.g. with ascii()") from None
    return str(text)


def _instead(value: Any) -> str:
    shape = getattr(value, "shape", None)
    if shape is None and isinstance(value, (list, tuple)):
        plain = len(value) > 1 and all(isinstance(part, (int, float)) for part in value)
        shape = (len(value),) if plain else None
    if shape is not None and len(shape) == 1 and shape[0] > 1:
        return f"one-hot, or a score for each class: give the index, e.g. int(np.argmax(label)), {WITHOUT}"
    return f"targets of detection, segmentation or several kinds are no class: give one index or name, {WITHOUT}"


class LabelColumn:
    """The labels of a data set's items, taken in in order: all of them numbers, or all of them text.

    Text makes classes: the different texts, sorted, unless the data set has class names, of which each text must then
    be one. A number must be below the number of class names, where there are any, unless it may exceed them.

    Attributes:
        classes: Class names by label.
        notes: What the user should be told.
    """

    def __init__(
        self, rows: int, uri: str, name: Callable[[int], str], classes: Sequence[str] = (), *, may_exceed: bool = False
    ) -> None:
        """Begin with no label.

        Args:
            rows: How many items there are.
            uri: The data set, for errors.
            name: How errors name the item of a row.
            classes: The data set's own class names; empty if it has none.
            may_exceed: Whether there may be labels beyond the class names.
        """
        self.classes: tuple[str, ...] = tuple(classes)
        self.notes: tuple[str, ...] = ()
        self._rows, self._uri, self._name, self._may_exceed = rows, uri, name, may_exceed
        self._codes: dict[str, int] = {}  # of each text: its class, or how many others were met before it
        for code, text in enumerate(self.classes):
            self._codes.setdefault(text, code)
        self._text: tuple[int, str] | None = None  # the first row of either kind, and its label
        self._number: tuple[int, int] | None = None

    def parse(self, row: int, value: Any) -> int | str:
        """The label of one item (:func:`parse_label`).

        Raises:
            DatasetError: It is no label; names the item and the value.
        """
        try:
            return parse_label(value)
        except LabelError as error:
            raise DatasetError(
                f"data set {self._uri!r}, {self._name(row)}: got the label {error.got}, expected a whole number "
                "below 2^63, text or None",
                hint=error.hint,
            ) from None

    def read(self, values: Iterable[Any]) -> Int64[np.ndarray, " N"]:
        """Take in the label of every item.

        Args:
            values: A value for each item, in order.

        Returns:
            [N] class indices, ``NO_LABEL`` where there is none.

        Raises:
            DatasetError: One is no label, is not among the class names, or is text beside numbers.
        """
        labels, left = mapped.zeros((self._rows,), np.int64), _plain(values)
        for start in range(0, self._rows, AT_ONCE):
            some = list(islice(left, min(AT_ONCE, self._rows - start)))
            labels[start : start + len(some)] = self._coded(start, some)
            if len(some) < min(AT_ONCE, self._rows - start):
                raise DatasetError(
                    f"data set {self._uri!r}: got {start + len(some)} labels, expected one for each of {self._rows} "
                    "items"
                )
        if self._text is not None:
            self._name_classes(labels)
        mapped.release(labels)
        return labels

    def _coded(self, start: int, values: list[Any]) -> Int64[np.ndarray, " n"]:
        kinds = set(map(type, values))
        if kinds in ({int}, {float}):  # most data sets; 20 times as fast as one by one
            numbers = np.array(values)
            if kinds == {float} and (np.abs(numbers) < _LARGEST).all() and (numbers == np.rint(numbers)).all():
                numbers = numbers.astype(np.int64)
            if numbers.dtype == np.int64:
                self._check_numbers(start, numbers)
                numbers[numbers < 0] = NO_LABEL
                return numbers
        parsed = [self.parse(row, value) for row, value in enumerate(values, start)]
        if not any(isinstance(label, str) for label in parsed):
            numbers = np.array(parsed, np.int64)
            self._check_numbers(start, numbers)
            return numbers
        codes = np.empty(len(parsed), np.int64)
        for place, label in enumerate(parsed):
            if isinstance(label, str):
                codes[place] = self._code_of(start + place, label)
            else:
                codes[place] = label
                self._check_numbers(start + place, codes[place : place + 1])
        return codes

    def _code_of(self, row: int, text: str) -> int:
        if self._text is None:
            self._text = (row, text)
            self._refuse_mixed()
        code = self._codes.get(text)
        if code is None:
            if self.classes:
                raise DatasetError(
                    f"data set {self._uri!r}, {self._name(row)}: got the label {text!r}, expected one of the data "
                    f"set's {len(self.classes)} classes: {reprlib.repr(list(self.classes))}",
                    hint="add it to the attribute 'classes', or leave the attribute out: the labels then make classes",
                )
            code = self._codes[text] = len(self._codes)
        return code

    def _check_numbers(self, start: int, numbers: Int64[np.ndarray, " n"]) -> None:
        if self._number is None and (numbers >= 0).any():
            place = int(np.flatnonzero(numbers >= 0)[0])
            self._number = (start + place, int(numbers[place]))
            self._refuse_mixed()
        if self.classes and not self._may_exceed and int(numbers.max(initial=-1)) >= len(self.classes):
            place = int(np.flatnonzero(numbers >= len(self.classes))[0])
            raise DatasetError(
                f"data set {self._uri!r}, {self._name(start + place)}: got the label {int(numbers[place])}, expected "
                f"one below {len(self.classes)}, as the data set names {len(self.classes)} classes",
                hint="name every class in the attribute 'classes', or number the labels from 0",
            )

    def _refuse_mixed(self) -> None:
        if self._text is not None and self._number is not None:
            raise DatasetError(
                f"data set {self._uri!r}: got the label {self._text[1]!r} for {self._name(self._text[0])} and "
                f"{self._number[1]} for {self._name(self._number[0])}, expected all labels to be text, or all numbers",
                hint="use str(label) for all of them, or number the classes from 0",
            )

    def _name_classes(self, labels: Int64[np.ndarray, " N"]) -> None:
        if self.classes:
            self.notes = (f"labels are text: each is one of the data set's {len(self.classes):,} classes",)
            return
        self.classes = tuple(sorted(self._codes))
        names = [text if len(text) <= 20 else f"{text[:18]} ..." for text in self.classes[:5]]
        shown = ", ".join([*names, "..."] if len(self.classes) > 5 else names)
        self.notes = (f"labels are text: {len(self.classes):,} classes, sorted: {shown}",)
        code_of = {text: code for code, text in enumerate(self.classes)}
        codes = np.array([*(code_of[text] for text in self._codes), NO_LABEL])  # code -1 takes the last
        for start in range(0, len(labels), AT_ONCE):
            labels[start : start + AT_ONCE] = codes[labels[start : start + AT_ONCE]]


def may_be_labels(values: Any, rows: int) -> bool:
    """Whether an attribute of a data set has a value for each of ``rows`` items."""
    if str(getattr(values, "layout", "torch.strided")) != "torch.strided":  # sparse tensors cannot be gone through
        return False
    try:
        return hasattr(values, "__len__") and not isinstance(values, (str, bytes, dict, set)) and len(values) == rows
    except Exception:  # arrays without dimensions, and whatever else has no length after all
        return False


def first_and_last(values: Any) -> tuple[Any, Any]:
    """The first and last of some values, one at least; of any type that can be gone through."""
    if isinstance(values, (list, tuple, np.ndarray)) or hasattr(values, "detach"):
        return values[0], values[-1]
    return next(iter(values)), deque(values, 1)[0]


def _plain(values: Iterable[Any]) -> Iterator[Any]:
    """One value after the other; of arrays and tensors of numbers and text, Python's own, which come faster.

    Yields:
        A value for each item.
    """
    flat = getattr(values, "ndim", 0) == 1 and (hasattr(values, "detach") or isinstance(values, np.ndarray))
    if not flat or getattr(getattr(values, "dtype", None), "kind", "i") not in "biufSU":
        yield from values
        return
    array: Any = values.detach().cpu() if hasattr(values, "detach") else values
    for start in range(0, len(array), AT_ONCE):
        yield from array[start : start + AT_ONCE].tolist()
