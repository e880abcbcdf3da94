"""A data set object of a Python program: a list, a torch or torchvision data set, or one of a class of its own."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import Any

from gstds_cache.data.hugging_face import is_dataset, open_dataset_object
from gstds_cache.data.mapstyle import MapStyleSource, mirror_safe
from gstds_cache.data.repeatable import require_repeatable
from gstds_cache.data.source import ImageSource
from gstds_cache.errors import DatasetError

EXPECTED = "expected the name of a data set, or an object with __len__ and __getitem__ that gives (image, label)"


def open_object(dataset: Any) -> ImageSource:
    """Take a data set object with the guarantees of ``module:factory``.

    Items and labels are hashed and compared each time they are read, items that are drawn at random are refused, and
    each process that decodes has a copy of its own; where the object does not pickle, this process decodes. Row i is
    ``dataset[i]``. The object is not changed, and must not change while it is in use.

    Args:
        dataset: An object with ``__len__`` and ``__getitem__`` that gives (image, label), as
            :func:`gstds_cache.data.factory.open_factory` describes; a ``datasets.Dataset``, whose rows are dicts
            (:func:`gstds_cache.data.hugging_face.open_dataset_object`); or an ``ImageSource``, which is returned as it
            is.

    Returns:
        The source. Its kind and uri are ``python:`` and the object's class: provenance that no command can open, e.g.
        ``python:torchvision.datasets.CIFAR10``.

    Raises:
        DatasetError: The object is no such data set, or its items are not the same each time.
    """
    if isinstance(dataset, ImageSource):
        return dataset
    _require_indexed(dataset)
    name = f"python:{_public_name(type(dataset))}"
    if is_dataset(dataset):
        return open_dataset_object(dataset, name)
    source = MapStyleSource(dataset, uri=name, kind=name, mirror_safe=mirror_safe(dataset, name))
    require_repeatable(source)
    return source


def _require_indexed(dataset: Any) -> None:
    """Refuse what people pass by mistake, each with its remedy.

    Raises:
        DatasetError: It is no map-style data set.
    """
    kind = type(dataset).__name__
    got, hint = f"a {kind}", "wrap it in a torch.utils.data.Dataset, or make a list of (image, label)"
    if isinstance(dataset, os.PathLike):
        got, hint = f"the path {os.fspath(dataset)!r}", f"did you mean 'imagefolder:{os.fspath(dataset)}'?"
    elif isinstance(dataset, type):
        got, hint = f"the class {dataset.__name__}", f"pass an object of it: {dataset.__name__}(...)"
    elif isinstance(dataset, Mapping):
        hint = "pass one of its values, e.g. data['train']: rows are numbered from 0"
    elif type(dataset).__module__.startswith("datasets.") and not hasattr(dataset, "__len__"):
        hint = "load it without streaming=True: rows are read by their number"
    elif hasattr(dataset, "batch_sampler") and hasattr(dataset, "dataset"):
        hint = "pass the data set that it loads: loader.dataset"
    elif hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__"):
        return
    raise DatasetError(f"data set: got {got}, {EXPECTED}", hint=hint)


def _public_name(kind: type) -> str:
    """A class's name with the shortest module that has it: torchvision.datasets.CIFAR10, without ``cifar``."""
    parts = kind.__module__.split(".")
    for count in range(1, len(parts)):
        module = sys.modules.get(".".join(parts[:count]))
        if module is not None and vars(module).get(kind.__qualname__) is kind:
            parts = parts[:count]
            break
    return ".".join([*parts, kind.__qualname__]).removeprefix("builtins.")
