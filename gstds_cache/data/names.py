"""Names of items in Arrow arrays that are mapped from a file, so that a million of them take no memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import IO, Any, overload

import numpy as np
import pyarrow as pa
from jaxtyping import UInt64

from gstds_cache.files import mapped

AT_ONCE = 1 << 14
"""Names that are in memory at a time, and the length of an Arrow array."""

# Bytes and no text: a file's name need not be UTF-8.
POOL = pa.system_memory_pool()  # Arrow's own allocator keeps some 10 MB for itself
_SCHEMA = pa.schema([pa.field("name", pa.binary(), nullable=False)])


class Names(Sequence[str]):
    """Strings in Arrow arrays of ``AT_ONCE`` each. Equals every sequence of the same strings.

    Bytes that are not UTF-8 are surrogate escapes in the strings, as in Python's own file names.

    Attributes:
        file: The Arrow IPC file that the arrays lie in, mapped where it is large.
    """

    def __init__(self, file: bytes | memoryview) -> None:
        """Read the arrays of an Arrow IPC file that :meth:`of` wrote; nothing is copied."""
        self.file = memoryview(file)
        reader = pa.ipc.open_file(pa.py_buffer(self.file))
        self._arrays = [reader.get_batch(number).column(0) for number in range(reader.num_record_batches)]
        self._length = sum(map(len, self._arrays))
        self._at_once = len(self._arrays[0]) if self._arrays else 1

    @classmethod
    def of(cls, names: Iterable[str], errors: str = "surrogateescape") -> Names:
        """Write ``names`` to a mapped file, a few at a time; ``Names`` are returned as they are.

        Args:
            names: The names.
            errors: What to do with what UTF-8 does not have; ``strict`` refuses it.

        Returns:
            The names.

        Raises:
            UnicodeEncodeError: A name is no text, and ``errors`` is ``strict``.
        """
        if isinstance(names, Names):
            return names
        left = iter(names)

        def write(file: IO[bytes]) -> None:
            with pa.ipc.new_file(file, _SCHEMA) as writer:
                while some := [name.encode("utf-8", errors) for name in islice(left, AT_ONCE)]:
                    array = pa.array(some, pa.binary(), memory_pool=POOL)
                    writer.write_batch(pa.record_batch([array], schema=_SCHEMA))

        return cls(mapped.written(write))

    @classmethod
    def of_arrays(cls, arrays: Iterable[pa.BinaryArray]) -> Names:
        """Write the names of Arrow arrays to a mapped file, without a Python object for each name.

        Args:
            arrays: The names, as bytes; of any lengths.

        Returns:
            The names.
        """

        def write(file: IO[bytes]) -> None:
            with pa.ipc.new_file(file, _SCHEMA) as writer:
                held: list[pa.BinaryArray] = []
                for array in arrays:
                    held.append(array)
                    while (count := sum(map(len, held))) >= AT_ONCE:
                        joined = pa.concat_arrays(held, memory_pool=POOL)
                        writer.write_batch(pa.record_batch([joined.slice(0, AT_ONCE)], schema=_SCHEMA))
                        held = [joined.slice(AT_ONCE)] if count > AT_ONCE else []
                if any(map(len, held)):
                    writer.write_batch(pa.record_batch([pa.concat_arrays(held)], schema=_SCHEMA))

        return cls(mapped.written(write))

    @classmethod
    def numbered(cls, count: int) -> Names:
        """Row numbers of seven digits and more."""
        return cls.of(f"{row:07d}" for row in range(count))

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, row: int) -> str: ...
    @overload
    def __getitem__(self, row: slice) -> tuple[str, ...]: ...
    def __getitem__(self, row: int | slice) -> str | tuple[str, ...]:
        if isinstance(row, slice):
            start, stop, step = row.indices(len(self))
            if step != 1:
                return tuple(self[place] for place in range(start, stop, step))
            return tuple(name for array in self.arrays(start, stop) for name in _strings(array))
        if not -len(self) <= row < len(self):
            raise IndexError(f"name {row} of {len(self)}")
        number, place = divmod(row % len(self), self._at_once)
        return _string(self._arrays[number][place].as_py())

    def __iter__(self) -> Iterator[str]:
        for array in self._arrays:
            yield from _strings(array)
            mapped.release(self.file)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or isinstance(other, str):
            return NotImplemented
        if len(self) != len(other):
            return False
        if isinstance(other, Names) and self._at_once == other._at_once:
            return all(map(_equal, self._released(), other._released()))
        return all(ours == theirs for ours, theirs in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"<{len(self)} names>"

    def __reduce__(self) -> tuple[Any, ...]:
        return Names, (bytes(self.file),)

    def arrays(self, start: int, stop: int) -> Iterator[pa.BinaryArray]:
        """The names ``start`` to ``stop``, or to the last, as bytes: Arrow arrays that are views of the file.

        Yields:
            One array after the other, none of them empty.
        """
        stop = min(stop, len(self))
        while start < stop:
            number, place = divmod(start, self._at_once)
            array = self._arrays[number].slice(place, stop - start)
            yield array
            start += len(array)

    def encoded(self, start: int, stop: int) -> list[bytes]:
        """The bytes of the names ``start`` to ``stop``, or to the last."""
        return [name for array in self.arrays(start, stop) for name in array.to_pylist()]

    def _released(self) -> Iterator[pa.BinaryArray]:
        for array in self._arrays:
            yield array
            mapped.release(self.file)


def duplicate(names: Names) -> str | None:
    """A name that occurs more than once, or None.

    Arrow's ``value_counts`` would hold every name in a hash table: 60 MB a million. Here 64-bit hashes are sorted in a
    mapped array, and names are compared where two hashes are equal.
    """
    table = mapped.zeros((len(names),), np.uint64)
    for start in range(0, len(names), AT_ONCE):
        table[start : start + AT_ONCE] = _hashes(names, start)
    table.sort()
    suspects: set[int] = set()
    for start in range(0, len(names), AT_ONCE):
        part = table[start : start + AT_ONCE + 1]
        suspects.update(part[1:][part[1:] == part[:-1]].tolist())
    seen: set[str] = set()
    for start in range(0, len(names) if suspects else 0, AT_ONCE):
        for row, number in enumerate(_hashes(names, start).tolist(), start):
            if number in suspects:
                if (name := names[row]) in seen:
                    return name
                seen.add(name)
    return None


def _hashes(names: Names, start: int) -> UInt64[np.ndarray, " n"]:
    """64-bit hashes of ``AT_ONCE`` names from ``start``; equal names have equal ones in this process."""
    hashes = np.fromiter(map(hash, names.encoded(start, start + AT_ONCE)), np.int64).view(np.uint64)
    mapped.release(names.file)
    return hashes


def _strings(array: pa.BinaryArray) -> list[str]:
    try:
        strings: list[str] = array.cast(pa.utf8(), memory_pool=POOL).to_pylist()
    except pa.ArrowInvalid:  # Not UTF-8.
        return list(map(_string, array.to_pylist()))
    return strings


def _string(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")


def _equal(one: pa.BinaryArray, other: pa.BinaryArray) -> bool:
    return bool(one.equals(other))
