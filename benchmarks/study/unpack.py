"""Unpack the study's photographs into the folder that its settings read.

    python -m benchmarks.study.unpack FOLDER --to .data && export DATA=$PWD/.data

FOLDER holds ``cifar10.tar.gz``, ``flowers89.tar``, ``clothing14.tar`` and ``clothing14_corrected.csv``. Each archive
becomes a folder ``DATA/NAME/SPLIT/CLASS/FILE.jpg``, whole or not at all: its images are counted before it gets its
name. What is there already is counted and left as it is.
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import sys
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gstds_cache.errors import DatasetError, GstdsError

CORRECTED = "corrected.csv"


@dataclass(frozen=True)
class Archive:
    """An archive and what has to be in it.

    Attributes:
        name: The data set's folder.
        file: The archive's file name.
        classes: Classes of each split.
        images: Images of each split.
        beside: A file beside the archive that goes into the folder as ``corrected.csv``; none if empty.
        lines: Lines of that file, its header not counted.
    """

    name: str
    file: str
    classes: int
    images: Mapping[str, int]
    beside: str = ""
    lines: int = 0


ARCHIVES = (
    Archive("cifar10", "cifar10.tar.gz", 10, {"train": 50_000, "test": 10_000}),
    Archive("flowers89", "flowers89.tar", 89, {"train": 728, "val": 706, "test": 4_109}),
    Archive(
        *("clothing14", "clothing14.tar", 14, {"train": 3_925, "val": 455, "test": 581}),
        beside="clothing14_corrected.csv",
        lines=26,
    ),
)


def unpack(archive: Archive, source: Path, to: Path) -> bool:
    """Unpack one archive.

    Args:
        archive: Which.
        source: The folder it lies in.
        to: The data folder; the images come into its folder ``archive.name``.

    Returns:
        Whether it was unpacked now; False where it was there.

    Raises:
        DatasetError: The archive is not there, is damaged, or holds other counts than it should, or what is there does.
    """
    target = to / archive.name
    if target.exists():
        fault = fault_of(archive, target)
        if fault:
            raise DatasetError(
                f"{target}: {fault}", hint=f"delete it and unpack again: rm -r {shlex.quote(str(target))}"
            )
        return False
    needed = [source / archive.file, *([source / archive.beside] if archive.beside else [])]
    missing = [path for path in needed if not path.is_file()]
    if missing:
        raise DatasetError(
            f"{missing[0]}: no such file, expected {', '.join(path.name for path in needed)} in {source}"
        )
    partial = to / f".{archive.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
    partial.mkdir(parents=True)
    try:
        with tarfile.open(needed[0], "r:*") as tar:
            tar.extractall(partial, filter="data")  # refuses names that lead out of the folder
    except (tarfile.TarError, EOFError, OSError) as error:
        raise DatasetError(f"{needed[0]}: cannot be unpacked: {error}") from error
    if archive.beside:
        shutil.copyfile(needed[1], partial / CORRECTED)
    fault = fault_of(archive, partial)
    if fault:
        raise DatasetError(f"{needed[0]}: {fault}", hint="get the archive again")
    partial.replace(target)
    return True


def fault_of(archive: Archive, folder: Path) -> str:
    """What of a folder's counts is not as it should be; empty where all are."""
    for split, wanted in archive.images.items():
        classes = [path for path in (folder / split).glob("*") if path.is_dir()]
        images = sum(1 for path in (folder / split).glob("*/*.jpg"))
        if (len(classes), images) != (archive.classes, wanted):
            return f"{split}: got {images:,} images of {len(classes)} classes, expected {wanted:,} of {archive.classes}"
    if archive.beside:
        path = folder / CORRECTED
        lines = len(path.read_text().splitlines()) - 1 if path.exists() else 0
        if lines != archive.lines:
            return f"{CORRECTED}: got {lines} lines, expected {archive.lines}"
    return ""


def main(argv: list[str] | None = None, archives: Sequence[Archive] = ARCHIVES) -> int:
    """Unpack what is there; the others' faults are printed at the end."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.study.unpack",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="where the archives are")
    parser.add_argument("--to", type=Path, default=Path(".data"), metavar="DATA", help="data folder (default: .data)")
    arguments = parser.parse_args(argv)
    code = 0
    for archive in archives:
        try:
            now = unpack(archive, arguments.folder, arguments.to)
        except GstdsError as error:
            print(f"error: {error.message}" + (f"\nhint: {error.hint}" if error.hint else ""), file=sys.stderr)
            code = error.exit_code
            continue
        counts = ", ".join(f"{split} {images:,}" for split, images in archive.images.items())
        print(
            f"{archive.name}: {'unpacked' if now else 'there already'}: {counts}; {archive.classes} classes", flush=True
        )
    print(f"export DATA={arguments.to.resolve()}")
    return code


if __name__ == "__main__":
    sys.exit(main())
