"""``imagefolder:PATH``: one folder per class, images anywhere below it."""

from __future__ import annotations

import os
import shlex
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from gstds_cache.data.files import IMAGE_EXTENSIONS, Files, FileSource, has_image_extension, printable
from gstds_cache.errors import DatasetError, UsageError

_LAYOUT = "expected a folder with one folder per class, PATH/CLASS/IMAGE"


@dataclass
class _Scan:
    """What was found: path relative to the root and class index of each image, and counts of what was passed over."""

    images: list[tuple[str, int]] = field(default_factory=list)
    ignored: Counter[str] = field(default_factory=Counter)
    loops: int = 0
    special: int = 0


def open_folder(uri: str, path: str) -> FileSource:
    """Open a folder of class folders.

    Class names are the first-level folders, sorted; items are sorted by their path relative to ``path``. Symbolic
    links are followed, except where one leads back to a folder it lies in. A broken link with an image's name is an
    item (it will be reported as unreadable), so that losing a file does not shift the rows behind it. Names that begin
    with a dot are passed over. Differs from torchvision's ImageFolder in that loops end, what is ignored is reported,
    and a class folder without an image is a note and not an error.

    Args:
        uri: The data set as the user named it.
        path: The folder; ``~`` is expanded.

    Returns:
        The source.

    Raises:
        UsageError: ``path`` is empty.
        DatasetError: There is no such folder, or it holds no class folders or no images.
    """
    if not path:
        raise UsageError(f"data set {uri!r}: no path given", hint="name the folder: imagefolder:PATH")
    root = Path(path).expanduser()
    if not root.is_dir():
        got = "a file" if root.exists() else "nothing there"
        raise DatasetError(
            f"image folder {path!r}: got {got}, {_LAYOUT}",
            hint="unpack the archive and name the folder"
            if root.exists()
            else f"look for it: ls {_quoted(root.parent)}",
        )
    top = sorted(_list(str(root)), key=lambda entry: os.fsencode(entry.name))
    classes = [entry.name for entry in top if _is_folder(entry)]
    stray = [entry.name for entry in top if has_image_extension(entry.name) and not _is_folder(entry)]
    _check_top(path, root, classes, stray)
    scan = _Scan()
    for label, name in enumerate(classes):
        _scan_class(os.path.join(root, ""), name, label, scan)  # noqa: PTH118 - Path drops the slash
    if not scan.images:
        raise DatasetError(
            f"image folder {path!r}: got {_count(len(classes), 'class folder')} without an image, "
            f"expected files that end in {' '.join(IMAGE_EXTENSIONS)}",
            hint=f"look at what is there: find {_quoted(root)} -type f | head",
        )
    scan.images.sort(key=lambda image: os.fsencode(image[0]))
    names = tuple(name for name, _ in scan.images)
    ids = tuple(map(printable, names))
    _check_unique(path, ids)
    return FileSource(
        uri=uri,
        kind="imagefolder",
        ids=ids,
        labels=np.array([label for _, label in scan.images], np.int64),
        files=Files(os.path.join(root, ""), names),  # noqa: PTH118
        classes=tuple(printable(name) for name in classes),
        notes=tuple(_notes(scan, classes, stray)),
    )


def _list(folder: str) -> list[os.DirEntry[str]]:
    """The visible entries of a folder, in no order.

    Raises:
        DatasetError: The folder cannot be listed.
    """
    try:
        with os.scandir(folder) as entries:
            return [entry for entry in entries if not entry.name.startswith(".")]
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


def _scan_class(root: str, name: str, label: int, scan: _Scan) -> None:
    # Each folder carries the identities of the folders it lies in: a link to one of those would never end, while the
    # same folder reached twice by different ways is only two sets of items.
    stack = [(name, frozenset({_identity(root)}))]
    while stack:
        relative, above = stack.pop()
        identity = _identity(root + relative)
        if identity in above:
            scan.loops += 1
            continue
        for entry in _list(root + relative):
            inner = f"{relative}/{entry.name}"
            if _is_folder(entry):
                stack.append((inner, above | {identity}))
            elif not _is_item(entry):
                scan.special += 1
            elif has_image_extension(entry.name):
                scan.images.append((inner, label))
            else:
                scan.ignored[Path(entry.name).suffix.lower()] += 1


def _identity(folder: str) -> tuple[int, int]:
    stat = os.stat(folder)  # noqa: PTH116
    return stat.st_dev, stat.st_ino


def _check_top(path: str, root: Path, classes: list[str], stray: list[str]) -> None:
    if classes:
        return
    if stray:
        raise DatasetError(
            f"image folder {path!r}: got {_count(len(stray), 'image')} directly inside and no class folder, {_LAYOUT}",
            hint=f"move each into the folder of its class, e.g.: cd {_quoted(root)} && mkdir all && mv *.* all/",
        )
    raise DatasetError(
        f"image folder {path!r}: got a folder without class folders, {_LAYOUT}",
        hint=f"look at what is there: ls -A {_quoted(root)}",
    )


def _check_unique(path: str, ids: tuple[str, ...]) -> None:
    if len(set(ids)) != len(ids):
        twice = next(name for name, count in Counter(ids).items() if count > 1)
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
    if scan.special:
        yield f"ignored {_count(scan.special, 'entry', 'entries')} that no image can be in: pipes, sockets, devices"
    if scan.loops:
        yield f"ignored {_count(scan.loops, 'symbolic link')} back to a folder above"
    filled = {label for _, label in scan.images}
    empty = [printable(name) for label, name in enumerate(classes) if label not in filled]
    if empty:
        more = " ..." if len(empty) > 5 else ""
        yield f"{_count(len(empty), 'class', 'classes')} without an image: {', '.join(empty[:5])}{more}"


def _quoted(path: Path) -> str:
    return shlex.quote(printable(str(path)))


def _count(number: int, one: str, many: str = "") -> str:
    return f"{number} {one}" if number == 1 else f"{number} {many or one + 's'}"
