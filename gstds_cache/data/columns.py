"""Which columns of a table hold images, labels and ids, by their names and Arrow types."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from gstds_cache.errors import DatasetError, unknown_name

IMAGE_NAMES = ("image", "img", "picture", "photo", "jpg", "jpeg", "png", "webp", "image_bytes", "bytes", "content")
PATH_NAMES = ("path", "image_path", "file_path", "filepath", "file_name", "filename", "file")
LABEL_NAMES = ("label", "labels", "class", "class_name", "category", "target", "cls", "fine_label")

_EXPECTED = "bytes of image files, the struct {bytes, path} of Hugging Face, or paths"


@dataclass(frozen=True)
class Columns:
    """The columns of a table that make a data set.

    Attributes:
        image: The column of images.
        form: How it holds them: ``bytes`` of files, a ``struct`` {bytes, path}, or a ``path``.
        label: The column of labels, if there is one.
        id: The column of ids, if one was named.
        classes: Class names by label, as the table's Hugging Face features have them.
        notes: What the user should be told.
    """

    image: str
    form: str
    label: str | None = None
    id: str | None = None
    classes: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def read(self) -> list[str]:
        """The Parquet columns that an image takes."""
        return [f"{self.image}.bytes", f"{self.image}.path"] if self.form == "struct" else [self.image]


def find_columns(uri: str, schema: pa.Schema, params: Mapping[str, str]) -> Columns:
    """Find the columns of a table.

    Args:
        uri: The data set as the user named it.
        schema: The table's schema; its ``huggingface`` metadata are read where there are any.
        params: ``image``, ``label`` and ``id``: names of columns; an empty label is none.

    Returns:
        The columns.

    Raises:
        UsageError: A column that was named is not there.
        DatasetError: None was named and none can be told, or what was named holds no images.
    """  # noqa: DOC501
    for what in ("image", "label", "id"):
        name = params.get(what)
        if name and name not in schema.names:
            raise unknown_name(f"column of data set {uri!r}:", name, schema.names)
    image = params.get("image") or _image_column(uri, schema)
    form = _form(schema.field(image).type)
    if form is None:
        raise DatasetError(
            f"data set {uri!r}: got the column {image!r} of {_short(schema.field(image).type)}, expected {_EXPECTED}",
            hint=_hint(schema, image),
        )
    label = params.get("label")
    if label is None:
        label = next((name for name in LABEL_NAMES if name in schema.names and name != image), None)
    taken = {image, label, params.get("id")}
    others = [name for name in schema.names if name not in taken]
    notes = (
        ()
        if label or params.get("label") == ""
        else (
            f"labels: no column is named {', '.join(LABEL_NAMES[:3])} or alike; name one by "
            f"label=COLUMN, of: {', '.join(others) or 'none'}",
        )
    )
    return Columns(image, form, label or None, params.get("id") or None, _class_names(schema, label), notes)


def _image_column(uri: str, schema: pa.Schema) -> str:
    forms = {name: _form(schema.field(name).type) for name in schema.names}
    images = [name for name, form in forms.items() if form in {"bytes", "struct"}]
    named = [name for name in IMAGE_NAMES if name in images]
    if len(images) == 1 or named:
        return named[0] if named else images[0]
    paths = [name for name in (*IMAGE_NAMES, *PATH_NAMES) if forms.get(name) == "path"]
    if not images and paths:
        return paths[0]
    raise DatasetError(
        f"data set {uri!r}: got {f'{len(images)} columns' if images else 'no column'} that may hold images, of "
        f"{_listed(schema)}; expected one of {_EXPECTED}",
        hint="say which it is: image=COLUMN",
    )


def _form(kind: pa.DataType) -> str | None:
    """How a column of this type holds images, or None."""
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or str(kind) == "binary_view":
        return "bytes"
    if pa.types.is_struct(kind) and {"bytes", "path"} <= {kind.field(place).name for place in range(kind.num_fields)}:
        return "struct"
    return "path" if pa.types.is_string(kind) or pa.types.is_large_string(kind) or str(kind) == "string_view" else None


def _class_names(schema: pa.Schema, label: str | None) -> tuple[str, ...]:
    """The names of a ClassLabel, which ``datasets`` writes beside the schema."""
    try:
        features: Any = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        names = features[label]["names"] if features[label]["_type"] == "ClassLabel" else ()
        return tuple(names) if all(isinstance(name, str) for name in names) else ()
    except (KeyError, TypeError, ValueError):
        return ()


def _hint(schema: pa.Schema, image: str) -> str:
    may = [name for name in schema.names if name != image and _form(schema.field(name).type) in {"bytes", "struct"}]
    return f"did you mean image={may[0]}?" if may else f"the columns are {_listed(schema)}"


def _listed(schema: pa.Schema) -> str:
    names: Sequence[str] = [f"{name} ({_short(schema.field(name).type)})" for name in schema.names]
    return ", ".join(names[:12]) + (" ..." if len(names) > 12 else "")


def _short(kind: pa.DataType) -> str:
    text = str(kind)
    return text if len(text) <= 40 else f"{text[:36]} ..."
