"""A package that setup.cfg does not list would silently be missing from the wheel."""

from __future__ import annotations

import configparser
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_every_package_is_listed_and_every_module_belongs_to_one() -> None:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    listed = set(config["options"]["packages"].split())
    here = {".".join(p.parent.relative_to(ROOT).parts) for p in (ROOT / "gstds_cache").rglob("__init__.py")}
    assert listed == here | {"gstds_cache.cli"}
    folders = {p.parent for p in (ROOT / "gstds_cache").rglob("*.py")}
    assert all((folder / "__init__.py").exists() for folder in folders)


def test_no_module_takes_the_name_of_one_of_pythons_own() -> None:
    names = {p.stem for folder in ("gstds_cache", "cli") for p in (ROOT / folder).rglob("*.py")} - {"__init__"}
    assert not names & set(sys.stdlib_module_names)
