"""``package.module:factory``: the user's own data set."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from gstds_cache.data.items import code_fault
from gstds_cache.data.mapstyle import MapStyleSource, attribute, importable
from gstds_cache.data.repeatable import require_repeatable
from gstds_cache.data.sources import KINDS
from gstds_cache.errors import DatasetError, GstdsError
from gstds_cache.plugins import load_factory


def open_factory(uri: str, name: str, params: Mapping[str, str]) -> MapStyleSource:
    """Call the user's factory and adapt what it returns.

    The dataset must have ``__len__`` and ``__getitem__`` that gives (image, label): a PIL image, a uint8 array
    [H, W] or [H, W, C] or a uint8 tensor [C, H, W], and a label (:func:`gstds_cache.data.labels.parse_label`).
    Attributes ``ids``, ``classes``,
    ``targets``/``labels`` and ``mirror_safe`` are used where it has them. The current directory is importable while
    the factory runs.

    Args:
        uri: The data set as the user named it.
        name: ``package.module:factory``.
        params: Keyword arguments for the factory, all strings.

    Returns:
        The source.

    Raises:
        DatasetError: There is no such factory, it cannot be called with ``params``, or what it returns is not a
            data set whose items are the same each time.
    """
    folder = str(Path.cwd())
    try:
        factory = load_factory(name, "data set", KINDS)
    except (GstdsError, ImportError) as error:
        message = error.message if isinstance(error, GstdsError) else f"it imports what is not installed: {error}"
        hint = (
            error.hint
            if isinstance(error, GstdsError)
            else f"look at the whole trace: python -c 'import {name.partition(':')[0]}'"
        )
        raise DatasetError(f"data set {uri!r}: {message}", hint=hint) from error
    with importable(folder):
        dataset = _called(uri, name, factory, params)
        source = MapStyleSource(
            dataset,
            uri=uri,
            kind=f"module:{name}",
            folder=folder,
            mirror_safe=_mirror_safe(dataset, uri),
        )
        require_repeatable(source)
    return source


def _called(uri: str, name: str, factory: Callable[..., Any], params: Mapping[str, str]) -> Any:
    """What the factory returns.

    Raises:
        DatasetError: It does not take ``params``, or it fails.
    """  # noqa: DOC501
    call = f"{name}({', '.join(f'{key}={value!r}' for key, value in params.items())})"
    try:
        return factory(**params)
    except (GstdsError, MemoryError):
        raise
    except Exception as error:
        if isinstance(error, TypeError) and not _takes(factory, params):
            raise DatasetError(
                f"data set {uri!r}: the call {call} failed: {error}",
                hint="query parameters are passed to the factory by name, as strings",
            ) from error
        raise code_fault(f"data set {uri!r}: the call {call} failed", error) from error


def _takes(factory: Callable[..., Any], params: Mapping[str, str]) -> bool:
    try:
        inspect.signature(factory).bind(**params)
    except (TypeError, ValueError):  # ValueError: it has no signature, as some of C have
        return False
    return True


def _mirror_safe(dataset: Any, uri: str) -> bool:
    given = attribute(dataset, "mirror_safe", uri)
    return True if given is None else bool(given)
