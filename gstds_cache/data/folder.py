"""``imagefolder:PATH``: one folder per class, images anywhere below it; ``folder:PATH``: images without classes."""

from __future__ import annotations

import heapq
import os
import shlex
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np
from jaxtyping import Int64

from gstds_cache.data.decode import HEIC_EXTRA
from gstds_cache.data.files import (
    HEIC_EXTENSIONS,
    IMAGE_EXTENSIONS,
    Files,
    FileSource,
    has_image_extension,
    printable,
)
from gstds_cache.data.labels import NO_LABEL
from gstds_cache.data.levels import level_notes
from gstds_cache.data.names import Names, duplicate
from gstds_cache.data.outputs import Listing, holds_outputs
from gstds_cache.errors import DatasetError, UsageError
from gstds_cache.files import mapped
from gstds_cache.files.location import local_file

_AT_ONCE = 1 << 16
_LAYOUT = "expected a folder with one folder per class, PATH/CLASS/IMAGE"


@dataclass
class _Scan:
    """What was found: images by class index, whether any is not spelled as its file, and counts of what was ignored.

    Of each class, ``outputs`` has what this package wrote into it, and ``direct`` whether an image lies right in it.
    """

    images: Counter[int] = field(default_factory=Counter)
    escaped: bool = False
    ignored: Counter[str] = field(default_factory=Counter)
    loops: int = 0
    special: int = 0
    outputs: dict[str, str] = field(default_factory=dict)
    direct: set[str] = field(default_factory=set)


def open_folder(uri: str, path: str, _params: Mapping[str, str] | None = None) -> FileSource:
    """Open a folder of class folders.

    Class names are the first-level folders, sorted; items are sorted by their path relative to ``path``. Symbolic
    links are followed, except where one leads back to a folder it lies in. A broken link with an image's name is an
    item (it will be reported as unreadable), so that losing a file does not shift the rows behind it. Names that begin
    with a dot are passed over. Differs from torchvision's ImageFolder in that loops end, what is ignored is reported,
    a class folder without an image is a note and not an error, and what this package wrote (stores, runs, selections)
    is neither a class nor looked into.

    Args:
        uri: The data set as the user named it.
        path: The folder: a path, which may begin with ``~``, or ``file:///path``.

    Returns:
        The source.

    Raises:
        UsageError: ``path`` is empty.
        DatasetError: There is no such folder, or it holds no class folders or no images.
    """
    root = _root(uri, path, _LAYOUT)
    top = sorted(_list(str(root)), key=lambda entry: os.fsencode(entry.name))
    classes = [entry.name for entry in top if _is_folder(entry)]
    stray = [entry.name for entry in top if has_image_extension(entry.name) and not _is_folder(entry)]
    _check_top(path, root, classes, stray)
    scan = _Scan()
    names = Names.of(_images(os.path.join(root, ""), classes, scan))  # noqa: PTH118 - Path drops the slash
    classes = _without_outputs(root, classes, scan)
    if not names:
        raise DatasetError(
            f"image folder {path!r}: got {_count(len(classes), 'class folder')} without an image, "
            f"expected files that end in {' '.join(IMAGE_EXTENSIONS)}",
            hint=f"HEIC images need {HEIC_EXTRA}"
            if any(scan.ignored[suffix] for suffix in HEIC_EXTENSIONS)
            else f"look at what is there: find {_quoted(root)} -type f | head",
        )
    ids = names
    if scan.escaped:
        ids = Names.of(map(printable, names))
        _check_unique(path, ids)
    return FileSource(
        uri=uri,
        kind="imagefolder",
        ids=ids,
        labels=_labels(classes, scan),
        files=Files(os.path.join(root, ""), names),  # noqa: PTH118
        classes=tuple(printable(name) for name in classes),
        notes=(
            *_notes(scan, classes, stray),
            *level_notes(root, path, [name for label, name in enumerate(classes) if scan.images[label]], scan.direct),
        ),
    )


def open_plain_folder(uri: str, path: str, _params: Mapping[str, str] | None = None) -> FileSource:
    """Open a folder of images without labels, at any depth; else as :func:`open_folder`.

    Args:
        uri: The data set as the user named it.
        path: The folder: a path, which may begin with ``~``, or ``file:///path``.

    Returns:
        The source; every label is -1.

    Raises:
        DatasetError: There is no such folder, or no image in it.
    """
    root = _root(uri, path, "expected a folder of images")
    scan = _Scan()
    names = Names.of(_walk(os.path.join(root, ""), "", scan))  # noqa: PTH118 - Path drops the slash
    if not names:
        raise DatasetError(
            f"image folder {path!r}: got no image in it, expected files that end in {' '.join(IMAGE_EXTENSIONS)}",
            hint=f"look at what is there: find {_quoted(root)} -type f | head",
        )
    ids = Names.of(map(printable, names))
    _check_unique(path, ids)
    labels = mapped.zeros((len(names),), np.int64)
    labels[:] = NO_LABEL
    return FileSource(
        uri=uri,
        kind="folder",
        ids=ids,
        labels=labels,
        files=Files(os.path.join(root, ""), names),  # noqa: PTH118
        notes=tuple(_notes(scan, [], [])),
    )


def _root(uri: str, path: str, expected: str) -> Path:
    """The folder at ``path``.

    Raises:
        UsageError: ``path`` is empty.
        DatasetError: There is no folder.
    """
    if not path:
        raise UsageError(f"data set {uri!r}: no path given", hint=f"name the folder: {uri.partition(':')[0]}:PATH")
    root = local_file(path, "image folder")
    if not root.is_dir():
        got = "a file" if root.exists() else "nothing there"
        raise DatasetError(
            f"image folder {path!r}: got {got}, {expected}",
            hint="unpack the archive and name the folder"
            if root.exists()
            else f"look for it: ls {_quoted(root.parent)}",
        )
    return root


def _list(folder: str, listing: Listing | None = None) -> Iterator[os.DirEntry[str]]:
    """The visible entries of a folder, in no order; ``listing`` is told all names but images'.

    Yields:
        Each of them.

    Raises:
        DatasetError: The folder cannot be listed.
    """
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if listing is not None and not has_image_extension(entry.name):
                    listing.add(entry.name)
                if not entry.name.startswith("."):
                    yield entry
    except OSError as error:
        # Passing over a folder would silently make another data set.
        raise DatasetError(
            f"image folder: cannot list {printable(folder)!r}: {error.strerror}, expected a readable folder",
            hint=f"look at its permissions: ls -ld {_quoted(Path(folder))}",
        ) from error


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # A link to itself.
        return False


def _is_item(entry: os.DirEntry[str]) -> bool:
    """Whether this, which is no folder, is a file or a broken link; reading anything else may never end."""
    try:
        return entry.is_file() or (entry.is_symlink() and not Path(entry.path).exists())
    except OSError:
        return True


def _in_order(classes: list[str]) -> list[int]:
    """Class indices in the order of paths: a name's next character is compared with the slash behind another."""
    return sorted(range(len(classes)), key=lambda label: os.fsencode(f"{classes[label]}/"))


def _labels(classes: list[str], scan: _Scan) -> Int64[np.ndarray, " N"]:
    labels, done = mapped.zeros((scan.images.total(),), np.int64), 0
    for label in _in_order(classes):
        labels[done : done + scan.images[label]] = label
        done += scan.images[label]
    return labels


def _images(root: str, classes: list[str], scan: _Scan) -> Iterator[str]:
    """Walk through all classes.

    Yields:
        The path of every image relative to the root, sorted by bytes.
    """
    for label in _in_order(classes):
        for name in _walk(root, f"{classes[label]}/", scan):
            scan.images[label] += 1
            scan.escaped = scan.escaped or printable(name) != name
            yield name


def _walk(root: str, first: str, scan: _Scan) -> Iterator[str]:
    """Walk through the folder ``first``, which ends with a slash, or through the root, which is ''.

    Yields:
        The path of every image relative to the root, sorted by bytes.
    """
    # Each folder carries the identities of the folders it lies in: a link to one of those would never end, while the
    # same folder reached twice by different ways is only two sets of items.
    stack: list[tuple[Iterator[str], frozenset[tuple[int, int]]]] = [
        (iter([first]), frozenset({_identity(root)} if first else ()))
    ]
    while stack:
        entries, above = stack[-1]
        relative = next(entries, None)
        if relative is None:
            stack.pop()
        elif relative and not relative.endswith("/"):
            yield relative
        elif (identity := _identity(root + relative)) in above:
            scan.loops += 1
        else:
            found, listing = _Scan(), Listing()
            entries = _sorted(_entries(root, relative, found, listing))
            kind = listing.kind(root + relative)
            if kind is not None:
                scan.outputs[relative] = kind
                continue
            scan.ignored, scan.special = scan.ignored + found.ignored, scan.special + found.special
            scan.direct |= found.direct if len(stack) == 1 else set()
            stack.append((entries, above | {identity}))


def _entries(root: str, folder: str, scan: _Scan, listing: Listing) -> Iterator[str]:
    """Read a folder.

    Yields:
        The images and folders in it, relative to the root; folders end with a slash.
    """
    for entry in _list(root + folder, listing):
        if _is_folder(entry):
            yield f"{folder}{entry.name}/"
        elif not _is_item(entry):
            scan.special += 1
        elif has_image_extension(entry.name):
            scan.direct.add(folder)
            listing.strange = True
            yield folder + entry.name
        else:
            scan.ignored[Path(entry.name).suffix.lower()] += 1


def _without_outputs(root: Path, classes: list[str], scan: _Scan) -> list[str]:
    """The classes that are some: not what this package wrote, nor a folder of that without an image.

    Labels are given here, once every folder has been read, so that the classes behind such a folder keep theirs.
    """
    within = {folder.partition("/")[0] for folder in scan.outputs}
    images, kept = Counter[int](), list[str]()
    for label, name in enumerate(classes):
        derived = name.rpartition(".")[0] in within and not any(_list(str(root / name)))
        if not scan.images[label] and (name in within or derived or holds_outputs(str(root / name))):
            if name not in within:
                scan.outputs[f"{name}/"] = "outputs"
            continue
        images[len(kept)] = scan.images[label]
        kept.append(name)
    scan.images = images
    return kept


def _sorted(names: Iterator[str]) -> Iterator[str]:
    """``names`` by their bytes; sorted in parts and merged, so that a folder of a million files takes no memory."""
    parts: list[Iterable[str]] = []
    while part := list(islice(names, _AT_ONCE)):
        part.sort(key=None if all(map(str.isascii, part)) else os.fsencode)  # without a key in a fifth of the time
        parts.append(part if len(part) < _AT_ONCE else Names.of(part))
    return heapq.merge(*parts, key=os.fsencode) if len(parts) > 1 else iter(*parts) if parts else iter(())


def _identity(folder: str) -> tuple[int, int]:
    stat = os.stat(folder)  # noqa: PTH116
    return stat.st_dev, stat.st_ino


def _check_top(path: str, root: Path, classes: list[str], stray: list[str]) -> None:
    if classes:
        return
    if stray:
        raise DatasetError(
            f"image folder {path!r}: got {_count(len(stray), 'image')} directly inside and no class folder, {_LAYOUT}",
            hint=f"without classes it is 'folder:{path}'; else move each into the folder of its class, "
            f"e.g.: cd {_quoted(root)} && mkdir all && mv *.* all/",
        )
    raise DatasetError(
        f"image folder {path!r}: got a folder without class folders, {_LAYOUT}",
        hint=f"look at what is there: ls -A {_quoted(root)}",
    )


def _check_unique(path: str, ids: Names) -> None:
    twice = duplicate(ids)
    if twice is not None:
        raise DatasetError(
            f"image folder {path!r}: got two files that are both spelled {twice!r} once bytes that are not UTF-8 are "
            "escaped, expected a name of its own for every file",
            hint="rename one of them",
        )


def _notes(scan: _Scan, classes: list[str], stray: list[str]) -> Iterator[str]:
    if stray:
        yield f"ignored {_count(len(stray), 'image')} outside any class folder"
    if scan.ignored:
        most = sorted(scan.ignored, key=lambda suffix: (-scan.ignored[suffix], suffix))[:5]
        kinds = ", ".join(suffix or "no extension" for suffix in most)
        yield f"ignored {_count(scan.ignored.total(), 'file')} without an image extension ({printable(kinds)})"
        heic = sum(scan.ignored[suffix] for suffix in HEIC_EXTENSIONS)
        if heic:
            yield f"{_count(heic, 'file is', 'files are')} HEIC; to have them as images install {HEIC_EXTRA}"
    if scan.special:
        yield f"ignored {_count(scan.special, 'entry', 'entries')} that no image can be in: pipes, sockets, devices"
    if scan.outputs:
        few = [f"{printable(folder.rstrip('/'))} ({kind})" for folder, kind in sorted(scan.outputs.items())[:5]]
        more = " ..." if len(scan.outputs) > 5 else ""
        yield f"passed over, as gstds-cache wrote it and it is no class: {', '.join(few)}{more}"
    if scan.loops:
        yield f"ignored {_count(scan.loops, 'symbolic link')} back to a folder above"
    empty = [printable(name) for label, name in enumerate(classes) if not scan.images[label]]
    if empty:
        more = " ..." if len(empty) > 5 else ""
        yield f"{_count(len(empty), 'class', 'classes')} without an image: {', '.join(empty[:5])}{more}"


def _quoted(path: Path) -> str:
    return shlex.quote(printable(str(path)))


def _count(number: int, one: str, many: str = "") -> str:
    return f"{number} {one}" if number == 1 else f"{number} {many or one + 's'}"
