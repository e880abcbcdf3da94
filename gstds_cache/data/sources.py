"""Data sets by name, or as an object that a Python program has."""

from __future__ import annotations

import re
from collections.abc import Callable

from gstds_cache.data.hash_cache import HashCache
from gstds_cache.data.source import KINDS, ImageSource
from gstds_cache.errors import UsageError, unknown_name
from gstds_cache.files.location import expanded
from gstds_cache.uris import split_query

__all__ = ["KINDS", "ImageSource", "open_source"]

_FACTORY = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


def open_source(
    dataset: object, *, hash_cache: HashCache | None = None, progress: Callable[[int, int], None] | None = None
) -> ImageSource:
    """Open a data set.

    Of names, ``digits`` and ``imagefolder:PATH`` take ``?split=train|test&holdout=0.2``; ``torchvision:CLASS`` passes
    its query to the class and ``module:factory`` to the factory. A path may hold ``:`` but not ``?``.

    Args:
        dataset: A name, one of ``KINDS``; or any object with ``__len__`` and ``__getitem__`` that gives (image, label)
            (:func:`gstds_cache.data.python_object.open_object`).
        hash_cache: Digests of files remembered from before, for ``split``, which needs the digest of every item. Give
            :func:`gstds_cache.data.manifest.build_manifest` the same one, and no file is read twice to be hashed.
        progress: Called with (items hashed, items in all) while a split is decided.

    Returns:
        The source, with its labels read and no image decoded unless the data set leaves no other way.

    Raises:
        UsageError: The name is of no known kind, or has a query parameter that its kind does not take.
        DatasetError: What is named does not exist, or is no data set.
    """
    if not isinstance(dataset, str):
        from gstds_cache.data.python_object import open_object

        return open_object(dataset)
    return _open_name(dataset, hash_cache, progress)


def _open_name(uri: str, hash_cache: HashCache | None, progress: Callable[[int, int], None] | None) -> ImageSource:
    """Open a data set by name.

    Raises:
        UsageError: The name is of no known kind.
    """  # noqa: DOC501
    # Adapters are imported where they are chosen: each brings a heavy library.
    base, params = split_query("data set", uri)
    kind, _, target = base.partition(":")
    if base == "digits":
        from gstds_cache.data.arrays import open_digits
        from gstds_cache.data.split import open_split

        return open_split(uri, params, open_digits, hash_cache=hash_cache, progress=progress)
    if kind == "imagefolder":
        from gstds_cache.data.folder import open_folder
        from gstds_cache.data.split import open_split

        return open_split(
            uri, params, lambda whole: open_folder(whole, target), hash_cache=hash_cache, progress=progress
        )
    if kind == "torchvision":
        from gstds_cache.data.vision import open_torchvision

        return open_torchvision(uri, target, params)
    if kind == "python":
        raise UsageError(
            f"data set {uri!r}: got the class of an object in a Python program, which has no name to open it by",
            hint="pass the object itself from Python, or a name: a function of yours that returns it is "
            "package.module:function",
        )
    factory = target if kind == "module" and ":" in target else base
    if _FACTORY.fullmatch(factory):
        from gstds_cache.data.factory import open_factory

        return open_factory(uri, factory, params)
    if base and expanded(base, "data set").is_dir():
        raise UsageError(
            f"unknown data set {base!r}: it is a folder, and a folder of images is named imagefolder:PATH",
            hint=f"did you mean 'imagefolder:{base}'?",
        )
    raise unknown_name("data set", base, KINDS)
