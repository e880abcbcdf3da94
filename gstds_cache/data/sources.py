"""Data sets by name, or as an object that a Python program has."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from urllib.parse import urlencode

from gstds_cache.data.hash_cache import HashCache
from gstds_cache.data.source import KINDS, ImageSource
from gstds_cache.errors import UsageError, unknown_name
from gstds_cache.files.location import expanded
from gstds_cache.runtime.executor import Executor
from gstds_cache.runtime.progress import Counted
from gstds_cache.uris import split_query

__all__ = ["KINDS", "ImageSource", "open_source", "open_sources"]

_FACTORY = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


@dataclass(frozen=True)
class _Scheme:
    """How the data sets of one scheme are opened.

    Attributes:
        module: The module in this package.
        function: Its function of the name without the query, what stands behind the scheme, and the query.
        parameters: What may stand in the query.
        parts: Whether ``split=train|test`` and ``holdout`` are ours: parts by content; else they are the scheme's own.
        keeps: Whether the function takes the hash cache, beside which it keeps something, and an executor as well.
    """

    module: str
    function: str
    parameters: tuple[str, ...] = ()
    parts: bool = True
    keeps: bool = False


# Each is imported where it is chosen: most bring a heavy library.
_SCHEMES: dict[str, _Scheme] = {
    "digits": _Scheme("arrays", "open_digits"),
    "imagefolder": _Scheme("folder", "open_folder"),
    "folder": _Scheme("folder", "open_plain_folder"),
    "list": _Scheme("file_list", "open_file_list", ("path", "label")),
    "parquet": _Scheme("parquet", "open_parquet", ("image", "label", "id")),
    "arrow": _Scheme("parquet", "open_parquet", ("image", "label", "id")),
    "webdataset": _Scheme("webdataset", "open_webdataset", ("image", "label"), keeps=True),
    "hf": _Scheme("hugging_face", "open_hugging_face", ("split", "image", "label", "id", "config"), parts=False),
}
_IN_BUCKETS = {"imagefolder": _Scheme("bucket_folder", "open_bucket_folder")}
"""What opens ``s3://`` where it is not what opens a path."""
_ENDINGS = {".tar": "webdataset", ".parquet": "parquet", ".arrow": "arrow", ".csv": "list", ".tsv": "list"}


def open_source(
    dataset: object,
    *,
    hash_cache: HashCache | None = None,
    progress: Counted | None = None,
    read: bool = True,
    executor: Executor | None = None,
) -> ImageSource:
    """Open a data set.

    All kinds of names but three take ``?split=train|test&holdout=0.2``: ``torchvision:CLASS`` passes its query to the
    class, ``module:factory`` to the factory, and of ``hf:`` ``split`` is one that the data set has. A path may hold
    ``:`` but not ``?``.

    Args:
        dataset: A name, one of ``KINDS``; or any object with ``__len__`` and ``__getitem__`` that gives (image, label)
            (:func:`gstds_cache.data.python_object.open_object`).
        hash_cache: Digests of files kept from before, for ``split``, which needs the digest of every item. Give
            :func:`gstds_cache.data.manifest.build_manifest` the same one, and no file is looked at twice.
        progress: Called with (items hashed, items in all) while a split is decided.
        read: Whether files are read for a split; if not, it is an estimate where ``hash_cache`` does not know them
            (:func:`gstds_cache.data.split.split_by_content`).
        executor: Where tar shards are indexed; None for this process.

    Returns:
        The source, with its labels read and no image decoded unless the data set leaves no other way.

    Raises:
        UsageError: The name is of no known kind, or has a query parameter that its kind does not take.
        DatasetError: What is named does not exist, or is no data set.
    """
    return open_sources((dataset,), hash_cache=hash_cache, progress=progress, read=read, executor=executor)[0]


def open_sources(
    datasets: Iterable[object],
    *,
    hash_cache: HashCache | None = None,
    progress: Counted | None = None,
    read: bool = True,
    executor: Executor | None = None,
) -> tuple[ImageSource, ...]:
    """Open several data sets. Parts of one folder share its listing and the digests of its files.

    Args:
        datasets: Each as for :func:`open_source`.
        hash_cache: As for :func:`open_source`.
        progress: As for :func:`open_source`.
        read: As for :func:`open_source`.
        executor: As for :func:`open_source`.

    Returns:
        The sources, in order.

    Raises:
        UsageError: A name is of no known kind, or has a query parameter that its kind does not take.
        DatasetError: What is named does not exist, or is no data set.
    """
    opener = _Opener(hash_cache or HashCache(), progress, read, executor)
    return tuple(map(opener.open, datasets))


@dataclass(frozen=True)
class _Opener:
    """Opens data sets, each whole once."""

    hash_cache: HashCache
    progress: Counted | None
    read: bool
    executor: Executor | None = None
    wholes: dict[str, ImageSource] = field(default_factory=dict)

    def open(self, dataset: object) -> ImageSource:
        """Open one data set.

        Raises:
            UsageError: The name is of no known kind.
        """  # noqa: DOC501
        if not isinstance(dataset, str):
            from gstds_cache.data.python_object import open_object

            return open_object(dataset)
        base, params = split_query("data set", dataset)
        kind, colon, target = base.partition(":")
        if kind in _SCHEMES and not (kind == "digits" and colon):
            return self._part(dataset, base, params)
        if kind == "torchvision":
            from gstds_cache.data.vision import open_torchvision

            return open_torchvision(dataset, target, params)
        if kind == "python":
            raise UsageError(
                f"data set {dataset!r}: got an object in a Python program, which cannot be opened by name",
                hint="pass the object itself from Python, where each command is a function that takes `dataset`; or a "
                "name: a function of yours that returns it is package.module:function",
            )
        factory = target if kind == "module" and ":" in target else base
        if _FACTORY.fullmatch(factory):
            from gstds_cache.data.factory import open_factory

            return open_factory(dataset, factory, params)
        raise _unknown(base)

    def _part(self, uri: str, base: str, params: dict[str, str]) -> ImageSource:
        """The whole named ``base``, or the part of it that ``params`` ask for."""
        from gstds_cache.data.split import split_by_content, split_parameters

        kind, _, target = base.partition(":")
        scheme = _SCHEMES[kind] if target[:5].lower() != "s3://" else _IN_BUCKETS.get(kind, _SCHEMES[kind])
        own = {key: value for key, value in params.items() if key in scheme.parameters}
        rest = {key: value for key, value in params.items() if key not in own}
        asked = split_parameters(uri, rest, scheme.parameters, parts=scheme.parts)
        name = f"{base}?{urlencode(own)}" if own else base
        if name not in self.wholes:
            self.wholes[name] = _open_whole(scheme, uri if asked is None else name, target, own, self)
        whole = self.wholes[name]
        if asked is None:
            return whole
        split, holdout = asked
        return split_by_content(
            whole, split, holdout, uri=uri, hash_cache=self.hash_cache, progress=self.progress, read=self.read
        )


def _open_whole(scheme: _Scheme, uri: str, target: str, params: Mapping[str, str], opener: _Opener) -> ImageSource:
    of_kind: Callable[..., ImageSource] = getattr(import_module(f"gstds_cache.data.{scheme.module}"), scheme.function)
    own = (opener.hash_cache, opener.executor) if scheme.keeps else ()
    return of_kind(uri, target, params, *own)


def _unknown(base: str) -> UsageError:
    """The error for a name of no known kind; a file or folder that is there gets the name that it would have."""
    path = Path(base) if not base else expanded(base, "data set")
    if base and path.is_dir():
        return UsageError(
            f"unknown data set {base!r}: it is a folder, and a folder of images is named imagefolder:PATH",
            hint=f"did you mean 'imagefolder:{base}'? Without class folders: 'folder:{base}'",
        )
    scheme = _ENDINGS.get(path.suffix.lower())
    if scheme is not None and path.is_file():
        return UsageError(
            f"unknown data set {base!r}: it is a file, and such a file is named {scheme}:FILE",
            hint=f"did you mean '{scheme}:{base}'?",
        )
    return unknown_name("data set", base, KINDS)
