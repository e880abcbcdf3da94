"""Vectors that another tool made: an array or tensor, or a file that is mapped and never held whole.

- ``.npy``: one array, as of ``np.save``.
- ``.safetensors``: one tensor of the file.
- ``.parquet``, ``.arrow``: a column of lists; columns ``id`` and ``label`` are taken with it. Tables are read once,
  into a temporary file that is mapped: their columns cannot be read by row.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet
from jaxtyping import Float, Int64

from gstds_cache.data.names import AT_ONCE
from gstds_cache.errors import UsageError, nearest_first, unknown_name
from gstds_cache.files import mapped
from gstds_cache.files.given import reading, require_file
from gstds_cache.files.location import local_file

ENDINGS = (".npy", ".parquet", ".arrow", ".safetensors")
DTYPES = ("float16", "bfloat16", "float32", "float64")
StoredAs = Literal["float16", "float32"]
EXPECTED = "an array or tensor of shape [N, D], or a file: " + ", ".join(ENDINGS)
_SAFETENSORS = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}
_TABLE_ROWS = 4096


@dataclass(frozen=True, eq=False)
class Vectors:
    """[N, D] numbers, of which some rows at a time are read.

    Attributes:
        name: What errors call them: the file, or ``vectors``.
        values: [N, D]; bfloat16 as the uint16 of its bits.
        dtype: One of :data:`DTYPES`.
        path: The file; None for an array.
        without: Rows that the file has no vector for (null in a table), ascending.
        columns: Which of the columns ``id`` and ``label`` a table has beside them (:meth:`column`).
    """

    name: str
    values: np.ndarray
    dtype: str
    path: Path | None = None
    without: Int64[np.ndarray, " A"] = field(default_factory=lambda: np.zeros(0, np.int64))
    columns: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.values)

    @property
    def dim(self) -> int:
        """Length of a vector (D)."""
        return int(self.values.shape[1])

    @property
    def stored_as(self) -> StoredAs:
        """What they are stored as: float16 and float32 as they are, the others as float32."""
        return "float16" if self.dtype == "float16" else "float32"

    def read(self, rows: range | Int64[np.ndarray, " R"]) -> Float[np.ndarray, "R D"]:
        """Rows in their own dtype (bfloat16 as float32); a view, not to be changed, where that is possible."""
        part = self.values[rows.start : rows.stop] if isinstance(rows, range) else self.values[rows]
        if self.dtype == "bfloat16":
            return (part.astype(np.uint32) << 16).view(np.float32)
        usable = part.dtype.isnative and part.flags.c_contiguous and part.flags.writeable  # torch warns of others
        return np.asarray(part) if usable else np.array(part, part.dtype.newbyteorder("="), order="C")

    def column(self, name: str) -> Iterator[Any]:
        """The values of another column of the table, in order.

        Yields:
            One for each row.
        """
        assert self.path is not None
        for array in column_parts(self.path, name):
            yield from array.to_pylist()

    def release(self) -> None:
        """Take mapped pages out of the process."""
        mapped.release(self.values)


def open_vectors(vectors: Any, key: str | None = None) -> Vectors:
    """Open what a user gave as vectors.

    Args:
        vectors: A NumPy array or a torch tensor, [N, D]; or the path of a file with one of :data:`ENDINGS`.
        key: Which tensor, or column of a table; needed where there are several.

    Returns:
        The vectors, whose shape and dtype can be used.

    Raises:
        UsageError: They are no such thing, have another shape or dtype, or the file does not read.
    """
    if hasattr(vectors, "shape") and hasattr(vectors, "dtype"):
        if key is not None:
            raise UsageError(f"`key`: got {key!r}, but `vectors` is an array, which has no names in it")
        return _checked("`vectors`", _as_array(vectors), _dtype_of(vectors))
    if not isinstance(vectors, (str, Path)):
        raise UsageError(f"`vectors`: got {type(vectors).__name__}, expected {EXPECTED}")
    path = local_file(vectors, "`vectors`")
    if path.suffix not in ENDINGS:
        raise UsageError(
            f"`vectors`: got {str(path)!r}, expected a file that ends in {', '.join(ENDINGS)}",
            hint="save the array with np.save('vectors.npy', array)",
        )
    require_file(path, "`vectors`")
    if path.suffix == ".npy":
        if key is not None:
            raise UsageError(f"`key`: got {key!r}, but {path} holds one array, which has no name")
        with reading(path, "one array of numbers (.npy), as of np.save"):
            array: np.ndarray = np.load(path, mmap_mode="c", allow_pickle=False)
        return _checked(str(path), array, str(array.dtype.newbyteorder("=")), path)
    return (_open_safetensors if path.suffix == ".safetensors" else _open_table)(path, key)


def _dtype_of(vectors: Any) -> str:
    kind = vectors.dtype
    return str(kind).removeprefix("torch.") if not isinstance(kind, np.dtype) else str(kind.newbyteorder("="))


def _as_array(vectors: Any) -> np.ndarray:
    if not hasattr(vectors, "detach"):
        return np.asarray(vectors)
    tensor = vectors.detach().cpu()
    if str(tensor.dtype) == "torch.bfloat16":
        import torch

        return np.asarray(tensor.contiguous().view(torch.int16).numpy().view(np.uint16))
    return np.asarray(tensor.numpy())


def _checked(name: str, values: np.ndarray, dtype: str, path: Path | None = None, **found: Any) -> Vectors:
    """Vectors whose shape and dtype can be used."""
    _require_usable(name, list(values.shape), dtype)
    return Vectors(name, values, dtype, path, **found)


def _require_usable(name: str, shape: list[int], dtype: str) -> None:
    """Refuse what are no vectors, one a row.

    Raises:
        UsageError: They are not.
    """
    if dtype not in DTYPES:
        raise UsageError(
            f"{name}: got {dtype:.80} {shape}, expected {', '.join(DTYPES)} of shape [N, D]",
            hint="whole numbers are no embeddings: convert quantised ones with the scale that they were made with",
        )
    if len(shape) != 2 or 0 in shape:
        instead = f"take one vector a row: array.reshape({shape[0]}, -1)" if len(shape) > 2 and 0 not in shape else ""
        raise UsageError(f"{name}: got shape {shape}, expected [N, D], a vector a row, both at least 1", hint=instead)


def _open_safetensors(path: Path, key: str | None) -> Vectors:
    """Map one tensor of a file: eight bytes that say how long the header is, the header (JSON), and the numbers.

    Raises:
        UsageError: The file is damaged, or has several tensors and none was named.
    """  # noqa: DOC501
    with reading(path, "a safetensors file"):
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= path.stat().st_size - 8:
                raise ValueError(f"its header says it is {length:,} bytes long")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        tensors = {name: (part["dtype"], list(part["shape"]), part["data_offsets"]) for name, part in header.items()}
    kind, shape, (start, stop) = tensors[_named(path, "tensor", key, {n: t[1] for n, t in tensors.items()})]
    dtype = _SAFETENSORS.get(kind, kind.lower())
    _require_usable(str(path), shape, dtype)
    stored = np.dtype({"bfloat16": "<u2", "float16": "<f2", "float32": "<f4", "float64": "<f8"}[dtype])
    with reading(path, "a safetensors file"):
        if stop - start != stored.itemsize * shape[0] * shape[1] or 8 + length + stop > path.stat().st_size:
            raise ValueError("it is shorter than its header says")
        values = np.memmap(path, stored, "c", 8 + length + start, (shape[0], shape[1]))
    return _checked(str(path), values, dtype, path)


def _named(path: Path, what: str, key: str | None, found: dict[str, Any]) -> str:
    """The one thing of a file that is meant.

    Raises:
        UsageError: There are several, or none of that name.
    """  # noqa: DOC501
    if key is not None:
        if key not in found:
            raise unknown_name(f"{what} of {path}", key, found)
        return key
    if len(found) != 1:
        names = ", ".join(f"{name} {shape}" for name, shape in sorted(found.items())[:12])
        raise UsageError(
            f"{path} has {len(found)} {what}s: {names}" if found else f"{path} has no {what} of vectors",
            hint=f"say which: `key={nearest_first('embeddings', found)[0]!r}`" if found else "",
        )
    return next(iter(found))


def _open_table(path: Path, key: str | None) -> Vectors:
    """Read the column of vectors into a mapped array, and the columns ``id`` and ``label`` beside it.

    Raises:
        UsageError: The file does not read, has several columns of vectors, or one of lists of different lengths.
    """
    with reading(path, "a Parquet file" if path.suffix == ".parquet" else "an Arrow IPC file"):
        schema, count = schema_of(path)
    lists = {f.name: str(f.type) for f in schema if _is_vectors(f.type)}
    if key is not None and key not in lists and key in schema.names:
        raise UsageError(f"`key`: got {key!r}, of type {schema.field(key).type}, expected a column of lists of numbers")
    name = _named(path, "column", key, lists)
    if not count:
        raise UsageError(f"{path}: got no rows, expected at least one")
    values: np.ndarray | None = None
    done, without = 0, [np.zeros(0, np.int64)]
    dtype = str(np.dtype(schema.field(name).type.value_type.to_pandas_dtype()))
    with reading(path, "a table of vectors"):
        for array in column_parts(path, name):
            part, nulls = _rows_of(array, path, done, None if values is None else values.shape[1])
            if values is None and len(part):
                values = mapped.zeros((count, part.shape[1]), part.dtype)
            without.append(nulls + done)
            if values is not None:
                values[np.delete(np.arange(done, done + len(array)), nulls)] = part
                mapped.release(values)
            done += len(array)
    if values is None:
        raise UsageError(f"{path}: column {name} is null in every row")
    columns = tuple(column for column in ("id", "label") if column in schema.names)
    return _checked(str(path), values, dtype, path, without=np.concatenate(without), columns=columns)


def _is_vectors(kind: pa.DataType) -> bool:
    lists = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    return bool(lists and pa.types.is_floating(kind.value_type))


def schema_of(path: Path) -> tuple[pa.Schema, int]:
    """Columns and number of rows of a Parquet or Arrow file."""
    if path.suffix == ".parquet":
        file = pa.parquet.ParquetFile(path)
        return file.schema_arrow, file.metadata.num_rows
    with pa.OSFile(str(path)) as source:
        table = pa.ipc.open_file(source)
        return table.schema, sum(table.get_batch(i).num_rows for i in range(table.num_record_batches))


def column_parts(path: Path, column: str) -> Iterator[pa.Array]:
    """One column of a Parquet or Arrow file.

    Args:
        path: The file.
        column: The column.

    Yields:
        Its values, some thousand rows at a time.
    """
    if path.suffix == ".parquet":
        for batch in pa.parquet.ParquetFile(path).iter_batches(_TABLE_ROWS, columns=[column]):
            yield batch.column(0)
        return
    with pa.OSFile(str(path)) as source:
        table = pa.ipc.open_file(source)
        for number in range(table.num_record_batches):
            array = table.get_batch(number)[column]
            for start in range(0, len(array), AT_ONCE):
                yield array.slice(start, AT_ONCE)


def _rows_of(
    array: pa.Array, path: Path, first: int, dim: int | None
) -> tuple[Float[np.ndarray, "R D"], Int64[np.ndarray, " A"]]:
    """The vectors of a column's rows that have one, and which have none.

    Raises:
        UsageError: One has another length than those before, or a number that is null.
    """
    nulls = np.flatnonzero(array.is_null().to_numpy(zero_copy_only=False))
    there = array.drop_null()
    lengths = there.value_lengths().to_numpy(zero_copy_only=False) if len(there) else np.zeros(0, np.int64)
    if pa.types.is_fixed_size_list(array.type):
        lengths = np.full(len(there), array.type.list_size)
    expected = int(lengths[0]) if dim is None and len(lengths) else dim
    odd = np.flatnonzero(lengths != expected) if expected is not None else np.zeros(0, np.int64)
    rows = np.delete(np.arange(first, first + len(array)), nulls)
    if odd.size:
        raise UsageError(
            f"{path}: row {rows[odd[0]]} has {lengths[odd[0]]} numbers, expected {expected}, as those before it have",
            hint="vectors of one model have one length: leave out the others, or write null for rows that have none",
        )
    numbers = there.flatten()
    if numbers.null_count:
        place = int(np.flatnonzero(numbers.is_null().to_numpy(zero_copy_only=False))[0]) // max(expected or 1, 1)
        raise UsageError(f"{path}: row {rows[place]}: a number of its vector is null", hint="write null for the vector")
    return numbers.to_numpy(zero_copy_only=False).reshape(len(there), expected or 0), nulls
