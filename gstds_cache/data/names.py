"""Names of items: a million of them take no memory, since they lie in one mapped text, or are made when asked for."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice, pairwise
from typing import IO, Any, overload

import numpy as np
from jaxtyping import Int64, UInt64

from gstds_cache.files import mapped

AT_ONCE = 1 << 14
"""Names that are in memory at a time."""


class _Lazy(Sequence[str]):
    """A sequence of strings that equals every sequence of the same strings."""

    @overload
    def __getitem__(self, row: int) -> str: ...
    @overload
    def __getitem__(self, row: slice) -> tuple[str, ...]: ...
    def __getitem__(self, row: int | slice) -> str | tuple[str, ...]:
        if isinstance(row, slice):
            start, stop, step = row.indices(len(self))
            return (
                self._some(start, stop)
                if step == 1 and start < stop
                else tuple(map(self._name, range(start, stop, step)))
            )
        rows = len(self)
        if not -rows <= row < rows:
            raise IndexError(f"name {row} of {rows}")
        return self._name(row % rows)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or isinstance(other, str):
            return NotImplemented
        return len(self) == len(other) and all(ours == theirs for ours, theirs in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"<{len(self)} names>"

    @abstractmethod
    def _name(self, row: int) -> str: ...

    def _some(self, start: int, stop: int) -> tuple[str, ...]:
        return tuple(map(self._name, range(start, stop)))


class Numbers(_Lazy):
    """Row numbers of seven digits and more, as names."""

    def __init__(self, rows: int) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return self._rows

    def _name(self, row: int) -> str:
        return f"{row:07d}"


class Names(_Lazy):
    """Strings one behind the other in one text (UTF-8, bytes of file names that are not escaped as Python does)."""

    def __init__(self, text: bytes | memoryview, ends: Int64[np.ndarray, " N1"]) -> None:
        """Take text and the places where each name ends; the first of them is 0."""
        self.text, self.ends = memoryview(text), ends
        self._at = ends.data  # Its numbers are Python's own, and come three times as fast.

    @classmethod
    def of(cls, names: Iterable[str], errors: str = "surrogateescape") -> Names:
        """Copy ``names``, a few at a time.

        Args:
            names: The names.
            errors: What to do with what UTF-8 does not have; ``strict`` refuses it.

        Raises:
            UnicodeEncodeError: A name is no text, and ``errors`` is ``strict``.
        """
        text, left, end = memoryview(b""), iter(names), 0

        def write_ends(ends: IO[bytes]) -> None:
            def write_text(file: IO[bytes]) -> None:
                nonlocal end
                while some := [name.encode("utf-8", errors) for name in islice(left, AT_ONCE)]:
                    file.write(b"".join(some))
                    ends.write((end + np.cumsum(np.fromiter(map(len, some), np.int64, len(some)))).tobytes())
                    end += sum(map(len, some))

            nonlocal text
            ends.write(bytes(8))
            text = mapped.written(write_text)

        ends = mapped.written(write_ends)
        return cls(text, np.frombuffer(ends, np.int64))

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __iter__(self) -> Iterator[str]:
        for start in range(0, len(self), AT_ONCE):
            yield from self[start : start + AT_ONCE]
            self.release()

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Names):
            same = len(self) == len(other) and len(self.text) == len(other.text)
            return same and all(map(_equal, _pieces(self), _pieces(other)))
        return super().__eq__(other)

    __hash__ = None

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpickled, (bytes(self.text), self.ends.tobytes())

    def _name(self, row: int) -> str:
        return bytes(self.text[self._at[row] : self._at[row + 1]]).decode("utf-8", "surrogateescape")

    def _some(self, start: int, stop: int) -> tuple[str, ...]:
        data, ends = self.cut(start, stop)
        text = data.decode("utf-8", "surrogateescape")
        if len(text) < len(data):  # Not a character for every byte.
            return tuple(name.decode("utf-8", "surrogateescape") for name in self.encoded(start, stop))
        return tuple(text[one:other] for one, other in pairwise(ends.tolist()))

    def cut(self, start: int, stop: int) -> tuple[bytes, Int64[np.ndarray, " n1"]]:
        """The text of the names ``start`` to ``stop``, or to the last, and where in it each ends; first of all 0."""
        ends = self.ends[min(start, len(self)) : min(stop, len(self)) + 1]
        return bytes(self.text[ends[0] : ends[-1]]), ends - ends[0]

    def encoded(self, start: int, stop: int) -> list[bytes]:
        """The UTF-8 bytes of the names ``start`` to ``stop``, or to the last."""
        text, ends = self.cut(start, stop)
        return [text[one:other] for one, other in pairwise(ends.tolist())]

    def parts(self) -> tuple[np.ndarray, np.ndarray]:
        """The ends, and the text as bytes."""
        return self.ends, np.frombuffer(self.text, np.uint8)

    def release(self) -> None:
        """Take the mapped pages out of this process (:func:`gstds_cache.files.map_object.release`)."""
        mapped.release(*self.parts())


def cut(names: Sequence[str], start: int, stop: int) -> tuple[bytes, Int64[np.ndarray, " n1"]]:
    """:meth:`Names.cut` of any sequence of names.

    Raises:
        UnicodeEncodeError: A name is no text.
    """
    if isinstance(names, Names):
        found = names.cut(start, stop)
        names.release()
        return found
    some = [name.encode() for name in names[start:stop]]
    return b"".join(some), np.cumsum([0, *map(len, some)], dtype=np.int64)


def held(names: Sequence[str]) -> Sequence[str]:
    """The same names, in a sequence that stays as it is and takes no memory of its own."""
    return names if isinstance(names, tuple | Names | Numbers) else Names.of(names, "strict")


def numbers_of(names: Names, start: int, stop: int) -> UInt64[np.ndarray, " n"]:
    """A number of 64 bits for each name from ``start`` to ``stop``; the same names have the same, in this process."""
    numbers = np.fromiter(map(hash, names.encoded(start, stop)), np.int64).view(np.uint64)
    names.release()
    return numbers


def find(names: Names, wanted: Names) -> Int64[np.ndarray, " M"]:
    """Where each of the names ``wanted`` is among ``names``.

    Looked up by a hash of at least 32 bits: once in a while a name that is not there seems to be, or one is taken for
    another.

    Args:
        names: Different names.
        wanted: Names.

    Returns:
        [M] rows of ``names``, -1 for what is not there.
    """
    rows = mapped.zeros((len(wanted),), np.int64)
    rows[:] = -1
    if not len(names):
        return rows
    # One number holds hash and row, so that sorting in place is all, and takes no memory.
    low = np.uint64((1 << max(1, (len(names) - 1).bit_length())) - 1)
    table = mapped.zeros((len(names),), np.uint64)
    for start in range(0, len(names), AT_ONCE):
        hashes = numbers_of(names, start, start + AT_ONCE)
        table[start : start + AT_ONCE] = (hashes & ~low) | np.arange(start, start + len(hashes), dtype=np.uint64)
    table.sort()
    for start in range(0, len(wanted), AT_ONCE):
        hashes = numbers_of(wanted, start, start + AT_ONCE) & ~low
        there = table[np.minimum(np.searchsorted(table, hashes), len(table) - 1)]
        rows[start : start + AT_ONCE] = np.where(there & ~low == hashes, (there & low).astype(np.int64), -1)
    return rows


def duplicate(names: Names) -> str | None:
    """A name that is there more than once, or None."""
    table = mapped.zeros((len(names),), np.uint64)
    for start in range(0, len(names), AT_ONCE):
        table[start : start + AT_ONCE] = numbers_of(names, start, start + AT_ONCE)
    table.sort()
    suspects: set[int] = set()
    for start in range(0, len(names), AT_ONCE):
        part = table[start : start + AT_ONCE + 1]
        suspects.update(part[1:][part[1:] == part[:-1]].tolist())
    seen: set[str] = set()
    for start in range(0, len(names) if suspects else 0, AT_ONCE):
        for row, number in enumerate(numbers_of(names, start, start + AT_ONCE).tolist(), start):
            if number in suspects:
                if (name := names[row]) in seen:
                    return name
                seen.add(name)
    return None


def _pieces(names: Names) -> Iterator[np.ndarray]:
    for whole in names.parts():
        for start in range(0, len(whole), 1 << 20):
            yield whole[start : start + (1 << 20)]
        mapped.release(whole)


def _equal(one: np.ndarray, other: np.ndarray) -> bool:
    return bool(np.array_equal(one, other))


def _unpickled(text: bytes, ends: bytes) -> Names:
    return Names(text, np.frombuffer(ends, np.int64))
