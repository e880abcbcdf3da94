"""The wheel, in an environment with what it declares as required and nothing else: its commands run.

Downloading torch once more would take minutes. The environment's packages are links to the files of the ones installed
here, of exactly those distributions that the wheel requires without extras, and what these require in turn.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from importlib.metadata import Distribution, PathDistribution, distribution
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def requirements(wheel: Distribution) -> dict[str, Distribution]:
    """The distributions that are installed with ``wheel``, by name, where no extra is asked for."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    found: dict[str, Distribution] = {}
    waiting = [(wheel, frozenset({""}))]
    while waiting:
        of, extras = waiting.pop()
        for text in of.requires or ():
            requirement = Requirement(text)
            marker, name = requirement.marker, canonicalize_name(requirement.name)
            if marker is not None and not any(marker.evaluate({"extra": extra}) for extra in extras):
                continue
            if name not in found or requirement.extras:
                found.setdefault(name, distribution(name))
                waiting.append((found[name], frozenset({"", *requirement.extras})))
    return found


def link(package: Distribution, site: Path) -> None:
    folders = set()
    for file in package.files or ():
        target = site / file
        if ".." in file.parts:  # scripts in bin/
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.exists():
            target.symlink_to(Path(str(package.locate_file(file))).resolve())
        folders.add(file.parent)
    for folder in folders:  # what Python has compiled of these files already
        there, compiled = Path(str(package.locate_file(folder))) / "__pycache__", site / folder / "__pycache__"
        if folder.name and there.is_dir() and not compiled.exists():
            compiled.symlink_to(there.resolve())


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The ``bin`` of an environment with the wheel and its requirements."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    names = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, check=True, capture_output=True, text=True
    )
    for name in names.stdout.splitlines():
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", folder, source], check=True)
    (wheel,) = folder.glob("*.whl")
    venv.create(folder / "venv", symlinks=True)
    site = Path(sysconfig.get_path("purelib", vars={"base": str(folder / "venv"), "platbase": str(folder / "venv")}))
    python = folder / "venv" / "bin" / "python"
    subprocess.run([*pip, "--python", python, "install", "--no-deps", "--no-index", wheel], check=True)
    (info,) = site.glob("gstds_cache-*.dist-info")
    for package in requirements(PathDistribution(info)).values():
        link(package, site)
    return python.parent


def run(environment: Path, words: str, cwd: Path, code: int = 0) -> str:
    command, *rest = words.split()
    variables = {name: value for name, value in os.environ.items() if name not in {"PYTHONPATH", "VIRTUAL_ENV"}}
    variables |= {"GSTDS_CACHE": str(cwd / "stores"), "OMP_NUM_THREADS": "1"}
    words_of = [environment / command, *rest]
    done = subprocess.run(words_of, cwd=cwd, env=variables, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == code, f"{words}\n{done.stdout}\n{done.stderr}"
    assert "Exception ignored" not in done.stderr  # while the interpreter ends
    return done.stdout + done.stderr


def test_the_licence_is_in_it_and_no_test_or_benchmark(environment) -> None:
    (wheel,) = environment.parents[1].glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert any(name.endswith("/licenses/LICENSE") for name in names)
    assert {name.split("/")[0].split("-")[0] for name in names} == {"gstds_cache"}
    assert "gstds_cache/py.typed" in names
    assert "gstds_cache/cli/embed_command.py" in names


def test_its_commands_run_with_what_it_requires(environment, image_folder) -> None:
    work = image_folder.parent
    model = "--model timm:tf_efficientnet_lite0?size=32"
    assert "60 in = 58 ok" in run(environment, f"gstds-embed imagefolder:photos {model} --cache s", work)
    run(environment, "gstds-select s --rule random --batch-size 20 --epochs 1 --out s.arrow", work)
    train = "gstds-train imagefolder:photos --selection s.arrow --arch conv3 --image-size 16 --out run"
    assert "ledger" in run(environment, train, work)
    assert '"items": 60' in run(environment, "gstds-cache info s --json", work)


@pytest.mark.parametrize(
    ("words", "extra"),
    [("gstds-cache report s.arrow --out page.html", "report"), ("gstds-cache info s3://bucket/store", "s3")],
)
def test_what_needs_an_extra_says_which_to_install(environment, tmp_path, words, extra) -> None:
    (tmp_path / "s.arrow").touch()
    assert f"pip install 'gstds-cache[{extra}]'" in run(environment, words, tmp_path, code=2)


@pytest.mark.parametrize("command", ["gstds-embed", "gstds-select", "gstds-train", "gstds-cache"])
def test_help_loads_no_heavy_library(environment, tmp_path, command) -> None:
    module = {"gstds-cache": "cache"}.get(command, command.removeprefix("gstds-"))
    program = (
        f"import sys; from gstds_cache.cli.{module}_command import main; main(['--help'], standalone_mode=False); "
        "sys.exit(str({'torch', 'faiss', 'zarr', 'numba', 'timm', 'sklearn', 'pyarrow'} & set(sys.modules) or 0))"
    )
    done = subprocess.run(
        [environment / "python", "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.stderr == "0\n", done.stderr
