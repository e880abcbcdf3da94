"""Image folders whose classes lie one level below the folder that was named: PATH/train/CLASS, PATH/photos/CLASS."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from gstds_cache.data.files import has_image_extension, printable

# What the parts of a data set are called, the one to train on first.
PARTS = (
    *("train", "training", "trn", "train_set", "trainset"),
    *("val", "valid", "validation", "val_set", "valset", "dev", "eval", "evaluation", "holdout"),
    *("test", "testing", "tst", "test_set", "testset"),
)
WRAPPERS = ("images", "image", "imgs", "img", "photos", "pictures", "data", "dataset", "jpg", "jpeg", "png")
_DEPTH = 5
_LAST_TO_TRAIN_ON = PARTS.index("trainset")


def level_notes(root: Path, path: str, classes: Sequence[str], direct: Collection[str]) -> Iterator[str]:
    """Say so where the classes are probably meant to lie lower.

    Folders within a class are no mistake in general; nor is a class called ``train``. What is told of is a data set
    whose classes have no image right in them, or are all called like parts of a data set.

    Args:
        root: The folder.
        path: The same as the user named it.
        classes: The folders in it that were taken for classes and hold images.
        direct: Those with an image right in them, each with a slash at the end.

    Yields:
        A note, or nothing.
    """
    parts = _parts(classes)
    if direct and (not parts or len(direct) == len(classes)):
        return
    meant = _meant(root, classes)
    if meant == root:
        return
    command = shlex.quote(f"imagefolder:{os.path.join(path, printable(str(meant.relative_to(root))))}")  # noqa: PTH118
    names = ", ".join(printable(name) for name in classes[:5]) + (" ..." if len(classes) > 5 else "")
    if direct:
        yield f"the classes are {names}, which sound like parts of a data set; did you mean {command}?"
    elif parts or len(classes) == 1:
        yield f"no image lies directly in a class folder, and the classes are {names}; did you mean {command}?"
    else:
        yield (
            f"no image lies directly in a class folder, and the classes are {names}; if they are meant to be one level "
            f"lower, name one folder, e.g. {command}"
        )


def _meant(root: Path, classes: Sequence[str]) -> Path:
    """The folder whose folders are probably the classes: down through parts of a data set and single folders."""
    folder, inner = root, list(classes)
    for _ in range(_DEPTH):
        named = [part for part in _parts(inner) if _folders(folder / part)]
        wrapping = len(inner) == 1 or all(name.lower() in WRAPPERS for name in inner)
        if not inner or not (named or wrapping or folder == root):
            break
        step = folder / (named or inner)[0]
        if not _folders(step):
            break
        folder, inner = step, _folders(step)
    return folder


def _parts(names: Sequence[str]) -> list[str]:
    """Those called like parts of a data set, the one to train on first; none where they may well be classes.

    Parts are all of the names, or several of them of which one is to train on.
    """
    known = sorted((place, name) for name in names if (place := _part(name)) is not None)
    trained = any(place <= _LAST_TO_TRAIN_ON for place, _ in known)
    return [name for _, name in known] if len(known) == len(names) or (len(known) > 1 and trained) else []


def _part(name: str) -> int | None:
    """The place in ``PARTS`` of a name, or of the first of its words that has one: of seg_train, that of train."""
    words = [name.lower(), *re.split(r"[\W_\d]+", name.lower())]
    return next((PARTS.index(word) for word in words if word in PARTS), None)


def _folders(folder: Path) -> list[str]:
    """The visible folders in a folder that has no image of its own."""
    try:
        with os.scandir(folder) as entries:
            visible = [entry for entry in entries if not entry.name.startswith(".")]
    except OSError:
        return []
    if any(has_image_extension(entry.name) and not entry.is_dir() for entry in visible):
        return []
    return sorted(entry.name for entry in visible if entry.is_dir())
