"""Which member of a sample is its image, and which its label."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int64

from gstds_cache.data.files import IMAGE_EXTENSIONS
from gstds_cache.data.tar_index import TarIndex
from gstds_cache.errors import DatasetError, UsageError, unknown_name

_IMAGES = frozenset(extension[1:] for extension in IMAGE_EXTENSIONS)
_NUMBER = re.compile(rb"\s*-?\d+\s*")
_AUTO_FIELD = "label"


def is_image(extension: str) -> bool:
    """Whether a member with this extension may be an image: ``jpg``, or ``seg.png``."""
    return extension.rpartition(".")[2] in _IMAGES


def image_members(index: TarIndex, preferred: Sequence[str], where: str) -> Int64[np.ndarray, " S"]:
    """The member that is each sample's image.

    Args:
        index: The shard's members.
        preferred: Extensions, the first one that a sample has is its image; empty: the one that is an image's, where
            those with a dot in them count only for samples that have no other.
        where: The shard, for errors.

    Returns:
        [S] a member of each sample, -1 where it has no image.

    Raises:
        DatasetError: A sample has several images, and none is preferred.
    """  # noqa: DOC501
    chosen = np.full(len(index), -1, np.int64)
    codes = {extension: code for code, extension in enumerate(index.extensions)}
    if preferred:
        for extension in reversed(preferred):
            members = np.flatnonzero(index.extension == codes.get(extension, -1))
            chosen[index.sample[members]] = members
        return chosen
    for extensions in ([name for name in codes if name in _IMAGES], [name for name in codes if "." in name]):
        allowed = [codes[name] for name in extensions if is_image(name)]
        members = np.flatnonzero(np.isin(index.extension, allowed))
        members = members[chosen[index.sample[members]] < 0]
        several = np.flatnonzero(np.bincount(index.sample[members], minlength=len(index)) > 1)
        if several.size:
            raise _several(index, int(several[0]), members, where)
        chosen[index.sample[members]] = members
    return chosen


def _several(index: TarIndex, sample: int, members: np.ndarray, where: str) -> DatasetError:
    found = [index.extensions[int(index.extension[member])] for member in members if index.sample[member] == sample]
    key = index.key(sample).decode("utf-8", "backslashreplace")
    return DatasetError(
        f"{where}: got {len(found)} images in the sample {key!r}: {', '.join(found)}; expected one",
        hint=f"say which is the image: ?image={found[0]}; where not all samples have it: ?image={found[0]};{found[1]}, "
        "the first that a sample has",
    )


@dataclass(frozen=True)
class LabelMember:
    """Where the labels of samples are.

    Given nothing: the member ``cls``, else the field ``label`` of the member ``json``. ``cls`` and ``txt`` are those
    members, a whole number or the name of a class; ``.EXTENSION`` is any other; everything else is a field of ``json``,
    with dots for fields of fields. Empty: no labels.

    Attributes:
        asked: As the user gave it; None for nothing.
        extensions: The members that are read, in the order of preference.
        path: The field of ``json``.
    """

    asked: str | None
    extensions: tuple[str, ...]
    path: tuple[str, ...] = ()

    @classmethod
    def parse(cls, uri: str, asked: str | None) -> LabelMember:
        """Parse ``label=`` of a data set's query.

        Args:
            uri: The data set, for errors.
            asked: What stands there; None if nothing does.

        Returns:
            Where the labels are.

        Raises:
            UsageError: It names an image.
        """
        if asked is None:
            return cls(None, ("cls", "json"), (_AUTO_FIELD,))
        if not asked:
            return cls("", ())
        if asked in {"cls", "txt"} or asked.startswith("."):
            extension = asked.lstrip(".").lower()
            if is_image(extension):
                raise UsageError(
                    f"data set {uri!r}: got label={asked}, which is an image, expected cls, txt or a field of json"
                )
            return cls(asked, (extension,))
        return cls(asked, ("json",), tuple(asked.removeprefix("json.").split(".")))

    @property
    def what(self) -> str:
        """What of a shard these labels are, for a cache."""
        return f"labels {self.extensions} {self.path}"

    def reads(self, extension: str) -> bool:
        """Whether members with this extension are read."""
        return extension in self.extensions

    def members(self, index: TarIndex) -> Int64[np.ndarray, " S"]:
        """[S] the member of each sample that has its label, the first choice where there are several; -1 for none."""
        chosen = np.full(len(index), -1, np.int64)
        for extension in reversed(self.extensions):
            if extension in index.extensions:
                members = np.flatnonzero(index.extension == index.extensions.index(extension))
                chosen[index.sample[members]] = members
        return chosen

    def values(self, index: TarIndex, contents: Iterable[tuple[int, int, bytes]], where: str) -> list[Any]:
        """The labels of a shard's samples.

        Args:
            index: Its members.
            contents: Sample, member and content of those that :meth:`members` names.
            where: The shard, for errors.

        Returns:
            [S] whole numbers, text, what else a field holds, or None.

        Raises:
            DatasetError: A json member is none, or no sample has the field that was asked for.
        """  # noqa: DOC501
        labels: list[Any] = [None] * len(index)
        fields: set[str] = set()
        found = False
        for sample, member, content in contents:
            extension = index.extensions[int(index.extension[member])]
            if extension != "json" or not self.path:
                labels[sample] = _text(content)
                continue
            name = f"{where}, sample {index.key(sample).decode('utf-8', 'backslashreplace')!r}"
            try:
                value = json.loads(content)
            except ValueError as error:
                raise DatasetError(
                    f"{name}: its json member is none: {error}", hint="write it again; or read no labels: ?label="
                ) from None
            there, labels[sample] = _field(value, self.path)
            found = found or there
            if not there and isinstance(value, dict) and len(fields) < 100:
                fields.update(value)
        if self.asked is not None and fields and not found:
            raise unknown_name(f"field of json in {where}:", self.path[0], sorted(fields))
        return labels

    def notes(self, extensions: set[str], *, labelled: bool) -> Iterator[str]:
        """What the user should be told of where labels come from, or could.

        Args:
            extensions: All that occur.
            labelled: Whether any sample has a label.

        Yields:
            A note at most.
        """
        if labelled or self.asked == "":
            return
        others = [name for name in ("json", "txt") if name in extensions]
        if self.asked is None:
            ways = {"json": "a field of json by label=FIELD", "txt": "txt by label=txt"}
            yield "labels: the samples have no member cls" + (
                f"; take {' or '.join(ways[name] for name in others)}" if others else ""
            )
        elif not set(self.extensions) & extensions:
            yield f"labels: no sample has a member {self.extensions[0]}, which label={self.asked} names"


def _text(content: bytes) -> int | str | None:
    """A whole number, or the text of a member; None where it is empty."""
    if _NUMBER.fullmatch(content):
        return int(content)
    return content.decode("utf-8", "surrogateescape").strip() or None


def _field(value: Any, path: tuple[str, ...]) -> tuple[bool, Any]:
    """Whether there is such a field, and what it holds."""
    whole = ".".join(path)
    if isinstance(value, dict) and whole in value:
        return True, value[whole]
    for name in path:
        if not isinstance(value, dict) or name not in value:
            return False, None
        value = value[name]
    return True, value
