"""What this package wrote: never data. Known by what is in it, whatever its name is, and wherever it lies."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gstds_cache.data.source import ImageSource
from gstds_cache.files.location import Location, LocationLike

# Commit records are in `receipts` in format 1.
STORE = frozenset(
    {"zarr.json", "embeddings", "label", "valid", "items.arrow", "commits", "receipts", "COMPLETE.json", "repair.json"}
    | {"grown", "parts", "hidden"}
)
RUN = frozenset({"config.json", "metrics.jsonl", "checkpoint.pt", "ledger.json"})
MIRROR = frozenset({"embeddings.npy", "mirror.json"})
LOCK = ".lock"

# Folders in which each name is one of ours; hidden ones are locks, costs and what an interrupted run left.
DIGESTED = {
    "kept selections": re.compile(r"\.?[0-9a-f]{16}\.arrow(\..+)?"),
    "guidance": re.compile(r"\.?[0-9a-f]{16}\.(npy|json|trial\.json)(\..+)?"),
    "hashes of files": re.compile(r"hashes\.sqlite(-\w+)?|\.?[\w-]+-[0-9a-f]{16}\.hashes(\..+)?"),
}
_MARKS = {".arrow": b"gstds.", ".parquet": b"gstds.fingerprint", ".html": b"<title>gstds-cache report</title>"}
_END = 1 << 16


@dataclass
class Listing:
    """Names in a folder, as far as they tell whose it is.

    Attributes:
        own: Names that this package gives, hidden ones as well.
        strange: Whether there are visible ones that it does not give.
    """

    own: set[str] = field(default_factory=set)
    strange: bool = False

    def add(self, name: str) -> None:
        """Look at one name."""
        if name in STORE or name in RUN or name in MIRROR or name == LOCK or _digested(name):
            self.own.add(name)
        elif not name.startswith("."):
            self.strange = True

    def kind(self, folder: str) -> str | None:
        """What the folder is of ours, in words, or None.

        Args:
            folder: Its path. Files are read where names alone do not tell; whoever has a ``zarr.json`` or a
                ``config.json`` of their own has other things in it.
        """
        own = self.own
        if not own:
            return None
        if "zarr.json" in own and "gstds" in _fields(_read(folder, "zarr.json", "attributes")):
            return "a store"
        if "config.json" in own and "selection_digest" in _fields(_read(folder, "config.json", "config")):
            return "a run"
        if "mirror.json" in own and {"fingerprint", "signature"} <= _fields(_read(folder, "mirror.json")).keys():
            return "a mirror"
        return None if self.strange else self._unfinished()

    def _unfinished(self) -> str | None:
        """What it is where all names are ours: the file that would say so is written last, or was cut short."""
        visible = {name for name in self.own if not name.startswith(".")}
        locked = LOCK in self.own
        if visible <= STORE and ("items.arrow" in visible or (locked and not visible)):
            return "a store"
        if visible <= RUN and locked:
            return "a run"
        if visible <= MIRROR and locked:
            return "a mirror"
        return next((kind for kind, names in DIGESTED.items() if all(map(names.fullmatch, self.own))), None)


def holds_outputs(folder: str) -> bool:
    """Whether a folder without an image holds a file that this package wrote: a selection, an export, a page."""
    return any(_is_output(path) for path in _files(folder))


def inside_warning(source: ImageSource, path: LocationLike | None, *, what: str, argument: str) -> str:
    """A warning for the user where what is to be written would lie in the image folder that is read.

    Args:
        source: The data set.
        path: Where it is written; a bucket and None lie nowhere.
        what: What it is, in words.
        argument: The argument that names another place.

    Returns:
        The warning; empty where it lies elsewhere.
    """
    target = None if path is None else Location.parse(path).path
    if not source.kind.startswith(("imagefolder", "folder")) or source.files is None or target is None:
        return ""
    folder = Path(source.files.folder)
    # os.path, whose realpath ends where a link leads back to itself
    if Path(os.path.realpath(folder)) not in Path(os.path.realpath(target)).parents:
        return ""
    return (
        f"warning: {what} {path} lies inside the image folder {folder}; it is not taken for a class, but other "
        f"programs may do so: give a `{argument}` outside of it"
    )


def _files(folder: str) -> Iterator[str]:
    for place, _folders, names in os.walk(folder):
        yield from (os.path.join(place, name) for name in names)  # noqa: PTH118


def _is_output(path: str) -> bool:
    suffix = os.path.splitext(path)[1]  # noqa: PTH122
    with suppress(OSError):
        if path.endswith(".cost.json"):
            return "reused" in _fields(_read("", path))
        if suffix in _MARKS:
            with open(path, "rb") as file:  # noqa: PTH123
                head = file.read(_END)
                file.seek(max(0, os.fstat(file.fileno()).st_size - _END))
                return _MARKS[suffix] in head or _MARKS[suffix] in file.read()
    return False


def _fields(content: Any) -> dict[str, Any]:
    """The fields of a JSON file's object; none of any other content: files of that name may be anyone's."""
    return content if isinstance(content, dict) else {}


def _digested(name: str) -> bool:
    return any(names.fullmatch(name) for names in DIGESTED.values())


def _read(folder: str, name: str, key: str | None = None) -> Any:
    """The content of a JSON file, or what it has under ``key``; None where that cannot be read."""
    try:
        with open(os.path.join(folder, name), "rb") as file:  # noqa: PTH118, PTH123
            content = json.load(file)
        return content if key is None else content.get(key)
    except (OSError, ValueError, AttributeError, RecursionError):
        return None
