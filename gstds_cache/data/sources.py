"""Data sets by name, or as an object that a Python program has."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from gstds_cache.data.hash_cache import HashCache
from gstds_cache.data.source import KINDS, ImageSource
from gstds_cache.errors import UsageError, unknown_name
from gstds_cache.files.location import expanded
from gstds_cache.runtime.progress import Counted
from gstds_cache.uris import split_query

__all__ = ["KINDS", "ImageSource", "open_source", "open_sources"]

_FACTORY = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


def open_source(
    dataset: object,
    *,
    hash_cache: HashCache | None = None,
    progress: Counted | None = None,
    read: bool = True,
) -> ImageSource:
    """Open a data set.

    Of names, ``digits`` and ``imagefolder:PATH`` take ``?split=train|test&holdout=0.2``; ``torchvision:CLASS`` passes
    its query to the class and ``module:factory`` to the factory. A path may hold ``:`` but not ``?``.

    Args:
        dataset: A name, one of ``KINDS``; or any object with ``__len__`` and ``__getitem__`` that gives (image, label)
            (:func:`gstds_cache.data.python_object.open_object`).
        hash_cache: Digests of files kept from before, for ``split``, which needs the digest of every item. Give
            :func:`gstds_cache.data.manifest.build_manifest` the same one, and no file is looked at twice.
        progress: Called with (items hashed, items in all) while a split is decided.
        read: Whether files are read for a split; if not, it is an estimate where ``hash_cache`` does not know them
            (:func:`gstds_cache.data.split.split_by_content`).

    Returns:
        The source, with its labels read and no image decoded unless the data set leaves no other way.

    Raises:
        UsageError: The name is of no known kind, or has a query parameter that its kind does not take.
        DatasetError: What is named does not exist, or is no data set.
    """
    return open_sources((dataset,), hash_cache=hash_cache, progress=progress, read=read)[0]


def open_sources(
    datasets: Iterable[object],
    *,
    hash_cache: HashCache | None = None,
    progress: Counted | None = None,
    read: bool = True,
) -> tuple[ImageSource, ...]:
    """Open several data sets. Parts of one folder share its listing and the digests of its files.

    Args:
        datasets: Each as for :func:`open_source`.
        hash_cache: As for :func:`open_source`.
        progress: As for :func:`open_source`.
        read: As for :func:`open_source`.

    Returns:
        The sources, in order.

    Raises:
        UsageError: A name is of no known kind, or has a query parameter that its kind does not take.
        DatasetError: What is named does not exist, or is no data set.
    """
    opener = _Opener(hash_cache or HashCache(), progress, read)
    return tuple(map(opener.open, datasets))


@dataclass(frozen=True)
class _Opener:
    """Opens data sets, each whole once."""

    hash_cache: HashCache
    progress: Counted | None
    read: bool
    wholes: dict[str, ImageSource] = field(default_factory=dict)

    def open(self, dataset: object) -> ImageSource:
        """Open one data set.

        Raises:
            UsageError: The name is of no known kind.
        """  # noqa: DOC501
        # Adapters are imported where they are chosen: each brings a heavy library.
        if not isinstance(dataset, str):
            from gstds_cache.data.python_object import open_object

            return open_object(dataset)
        base, params = split_query("data set", dataset)
        kind, _, target = base.partition(":")
        if base == "digits" or kind == "imagefolder":
            return self._part(dataset, base, params)
        if kind == "torchvision":
            from gstds_cache.data.vision import open_torchvision

            return open_torchvision(dataset, target, params)
        if kind == "python":
            raise UsageError(
                f"data set {dataset!r}: got an object in a Python program, which cannot be opened by name",
                hint="pass the object itself from Python, or a name: a function of yours that returns it is "
                "package.module:function",
            )
        factory = target if kind == "module" and ":" in target else base
        if _FACTORY.fullmatch(factory):
            from gstds_cache.data.factory import open_factory

            return open_factory(dataset, factory, params)
        if base and expanded(base, "data set").is_dir():
            raise UsageError(
                f"unknown data set {base!r}: it is a folder, and a folder of images is named imagefolder:PATH",
                hint=f"did you mean 'imagefolder:{base}'?",
            )
        raise unknown_name("data set", base, KINDS)

    def _part(self, uri: str, base: str, params: dict[str, str]) -> ImageSource:
        """The whole named ``base``, or the part of it that ``params`` ask for."""
        from gstds_cache.data.split import split_by_content, split_parameters

        asked = split_parameters(uri, params)
        if base not in self.wholes:
            self.wholes[base] = _open_whole(base)
        whole = self.wholes[base]
        if asked is None:
            return whole
        split, holdout = asked
        return split_by_content(
            whole, split, holdout, uri=uri, hash_cache=self.hash_cache, progress=self.progress, read=self.read
        )


def _open_whole(base: str) -> ImageSource:
    kind, _, path = base.partition(":")
    if kind == "digits":
        from gstds_cache.data.arrays import open_digits

        return open_digits(base)
    from gstds_cache.data.folder import open_folder

    return open_folder(base, path)
