"""``package.module:factory``: the user's own data set."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

from gstds_cache.data.mapstyle import MapStyleSource, mirror_safe
from gstds_cache.data.repeatable import require_repeatable
from gstds_cache.data.source import KINDS
from gstds_cache.errors import DatasetError, GstdsError
from gstds_cache.plugins import call_factory, importable, load_factory


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
    except GstdsError as error:
        raise DatasetError(f"data set {uri!r}: {error.message}", hint=error.hint) from error
    with importable(folder):
        dataset = call_factory(factory, name, params, what=f"data set {uri!r}", kind=DatasetError)
        source = MapStyleSource(
            dataset,
            uri=uri,
            kind=f"module:{name}",
            folder=folder,
            mirror_safe=mirror_safe(dataset, uri),
            again=partial(factory, **params),
        )
        require_repeatable(source)
    return source
