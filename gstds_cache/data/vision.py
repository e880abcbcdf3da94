"""``torchvision:CLASS?root=PATH``: the data sets torchvision knows, from files that are already there."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from gstds_cache.data.arrays import ArraySource
from gstds_cache.data.files import Files, FileSource, has_image_extension, printable
from gstds_cache.data.labels import LabelColumn, may_be_labels
from gstds_cache.data.mapstyle import MIRROR_UNSAFE, MapStyleSource, class_names
from gstds_cache.data.names import Names, duplicate
from gstds_cache.data.repeatable import require_repeatable
from gstds_cache.data.source import ImageSource
from gstds_cache.errors import DatasetError, UsageError, unknown_name
from gstds_cache.files.location import expanded
from gstds_cache.plugins import own_code
from gstds_cache.runtime.resources import out_of_memory

# Code that would run inside the cache, and the network.
_NOT_PARAMETERS = frozenset(
    ("self", "transform", "target_transform", "transforms", "loader", "is_valid_file", "download")
)


def open_torchvision(uri: str, name: str, params: Mapping[str, str]) -> ImageSource:
    """Open a data set class of torchvision.

    Row i is item i of the class, so that kept indices fit the dataset object in any other program. Where the object
    knows its image files, an item's payload is the file's bytes; for CIFAR it is the pixels as stored; else the pixels
    the object gives. Nothing is ever downloaded.

    Args:
        uri: The data set as the user named it.
        name: The class, e.g. ``CIFAR10``.
        params: Its constructor's arguments as strings, converted by the types the constructor declares.
            ``split=train|test`` also works for classes that have ``train=true|false``.

    Returns:
        The source.

    Raises:
        UsageError: The class or a parameter is unknown, or ``root`` is missing.
        DatasetError: The data are not at ``root``, or items are not (image, label) pairs.
    """  # noqa: DOC501
    from torchvision import datasets

    known = {
        key: value
        for key, value in vars(datasets).items()
        if inspect.isclass(value) and issubclass(value, datasets.VisionDataset) and value is not datasets.VisionDataset
    }
    if name not in known:
        raise unknown_name("torchvision data set", name, known)
    arguments = _arguments(uri, known[name], params)
    given = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
    with own_code(
        f"data set {uri!r}: {name}({given})", DatasetError, f"see torchvision.datasets.{name} for its arguments"
    ):
        dataset = _construct(uri, known[name], arguments)
        again = partial(_construct, uri, known[name], arguments)
        return _adapt(uri, name, dataset, str(arguments.get("root", "")), again)


def _arguments(uri: str, cls: type, params: Mapping[str, str]) -> dict[str, Any]:
    """Check the query against the constructor's signature and convert its values.

    Raises:
        UsageError: A parameter is unknown, missing, or not for the command line to set.
    """  # noqa: DOC501
    accepted = inspect.signature(cls.__init__).parameters  # type: ignore[misc]
    named = {key: value for key, value in accepted.items() if value.kind is not inspect.Parameter.VAR_KEYWORD}
    takes_any = len(named) != len(accepted)
    given = dict(params)
    if "download" in given:
        raise UsageError(
            f"data set {uri!r}: got download={given['download']}, but nothing is downloaded here",
            hint=f"download it first: {_download_command(cls, given.get('root', 'PATH'))}",
        )
    if "split" in given and "split" not in named and "train" in named:
        split = given.pop("split")
        if split not in {"train", "test"} or "train" in given:
            raise UsageError(
                f"data set {uri!r}: got split={split}, expected either split=train or split=test, or train="
            )
        given["train"] = "true" if split == "train" else "false"
    allowed = [key for key in named if key not in _NOT_PARAMETERS]
    for key in given:
        if key in _NOT_PARAMETERS or (key not in named and not takes_any):
            raise unknown_name(f"query parameter of data set {uri!r}:", key, allowed)
    required = [key for key in allowed if key == "root" or named[key].default is inspect.Parameter.empty]
    missing = [
        key for key in required if not given.get(key) and named[key].kind is not inspect.Parameter.VAR_POSITIONAL
    ]
    if missing:
        raise UsageError(
            f"data set {uri!r}: got no {' and no '.join(missing)}, expected {'&'.join(f'{k}=...' for k in missing)}",
            hint=f"say where the data are: torchvision:{cls.__name__}?root=PATH",
        )
    arguments = {key: _convert(uri, key, value, named.get(key)) for key, value in given.items()}
    if "download" in named:
        arguments["download"] = False  # Some classes download unless told not to.
    if "root" in arguments:
        arguments["root"] = str(expanded(str(arguments["root"]), "root"))
    return arguments


def _convert(uri: str, key: str, value: str, parameter: inspect.Parameter | None) -> str | int | bool:
    default = parameter.default if parameter is not None else None
    if key == "root" or isinstance(default, str) or (parameter is not None and parameter.annotation in {str, "str"}):
        return value
    if value.lower() in {"true", "false"} and (default is None or isinstance(default, (bool, type))):
        return value.lower() == "true"
    is_int = value.removeprefix("-").isdecimal()
    if isinstance(default, bool) or (isinstance(default, int) and not is_int):
        expected = "true or false" if isinstance(default, bool) else "a whole number"
        raise UsageError(f"data set {uri!r}: got {key}={value}, expected {expected}")
    return int(value) if is_int else value


def _construct(uri: str, cls: type, arguments: Mapping[str, Any]) -> Any:
    root = str(arguments.get("root", ""))
    if "root" in arguments and not Path(root).is_dir():
        raise DatasetError(
            f"data set {uri!r}: got root={root}, expected a folder that exists",
            hint=f"download it first: {_download_command(cls, root)}",
        )
    try:
        return cls(**arguments)
    except (RuntimeError, FileNotFoundError, NotADirectoryError) as error:
        if out_of_memory(error):
            raise
        raise DatasetError(
            f"data set {uri!r}: {cls.__name__} found no data under {root or 'its root'}, or damaged data: {error}",
            hint=f"download it first: {_download_command(cls, root)}",
        ) from error
    except ValueError as error:  # How torchvision refuses an argument.
        raise UsageError(f"data set {uri!r}: {error}") from error


def _download_command(cls: type, root: str) -> str:
    if "download" not in inspect.signature(cls.__init__).parameters:  # type: ignore[misc]
        return f"see {cls.__module__.rpartition('.')[0]}.{cls.__name__}'s documentation"
    return f"""python -c "from torchvision.datasets import {cls.__name__}; {cls.__name__}('{root}', download=True)\""""


def _adapt(uri: str, name: str, dataset: Any, root: str, again: Callable[[], Any]) -> ImageSource:
    kind, mirror_safe = f"torchvision:{name}", name not in MIRROR_UNSAFE
    if name in {"CIFAR10", "CIFAR100"}:
        return ArraySource(
            uri=uri,
            kind=kind,
            ids=Names.numbered(len(dataset)),
            labels=np.array(dataset.targets, np.int64),
            pixels=dataset.data,
            classes=class_names(dataset, uri),
        )
    files = _files_and_targets(dataset)
    if files is None:
        source = MapStyleSource(dataset, uri=uri, kind=kind, mirror_safe=mirror_safe, again=again)
        require_repeatable(source)
        return source
    paths, targets = files
    column = LabelColumn(
        len(paths),
        uri,
        lambda row: f"item {str(paths[row])!r} (row {row})",
        _file_classes(dataset, uri),
        may_exceed=True,
    )
    labels = column.read([None] * len(paths) if targets is None else targets)
    none = () if targets is not None else ("labels: none, since this class's targets of that kind are no classes",)
    return FileSource(
        uri=uri,
        kind=kind,
        ids=_ids(paths, root),
        labels=labels,
        files=Files.at(paths),
        classes=column.classes,
        mirror_safe=mirror_safe,
        notes=(*column.notes, *none),
    )


def _files_and_targets(dataset: Any) -> tuple[Sequence[str | Path], Any] | None:
    """The image files a dataset object lists, and their labels: None where the targets asked for are no classes.

    Returns:
        Both; None if it lists no files, or no label for each.
    """
    rows = len(dataset)
    paths: Any
    for name in ("_image_files", "_images"):
        paths = getattr(dataset, name, None)
        kept = _label_attribute(dataset)
        targets = getattr(dataset, kept, None) if kept else None
        if _are_images(paths, rows) and (not kept or may_be_labels(targets, rows)):
            return paths, targets
    for name in ("samples", "imgs", "_samples"):
        pairs = getattr(dataset, name, None)
        if isinstance(pairs, (list, tuple)) and pairs and all(isinstance(p, tuple) and len(p) == 2 for p in pairs):
            paths, targets = zip(*pairs, strict=True)
            if _are_images(paths, rows):
                return paths, targets
    return None


def _file_classes(dataset: Any, uri: str) -> tuple[str, ...]:
    kept = _label_attribute(dataset)
    if kept == "_bin_labels":
        return tuple(dataset.bin_classes)
    return class_names(dataset, uri) if kept else ()


def _label_attribute(dataset: Any) -> str:
    """Where file data sets keep labels; OxfordIIITPet has several kinds, of which '' is none that is a class."""
    target_types = tuple(getattr(dataset, "_target_types", ("category",)))
    return {("category",): "_labels", ("binary-category",): "_bin_labels"}.get(target_types, "")


def _are_images(paths: Any, rows: int) -> bool:
    return (
        isinstance(paths, (list, tuple))
        and len(paths) == rows > 0
        and all(isinstance(path, (str, Path)) and has_image_extension(str(path)) for path in paths)
    )


def _ids(paths: Sequence[str | Path], root: str) -> Sequence[str]:
    """Paths relative to the root; row numbers where those are not unique or lead outside."""
    if all(Path(path).is_relative_to(root) for path in paths):
        ids = Names.of(printable(Path(path).relative_to(root).as_posix()) for path in paths)
        if duplicate(ids) is None:
            return ids
    return Names.numbered(len(paths))
