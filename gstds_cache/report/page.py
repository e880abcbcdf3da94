"""The page: one HTML file with everything in it, nothing to load, and no script."""

from __future__ import annotations

import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from gstds_cache.files.atomic import atomic_write
from gstds_cache.report.charts import DROPPED, KEPT
from gstds_cache.report.run_view import RunView, panels_of
from gstds_cache.report.selection_view import SelectionView


def render(selections: list[SelectionView], runs: list[RunView]) -> str:
    """The page as HTML.

    Args:
        selections: Selections to show.
        runs: Runs to show side by side.

    Returns:
        HTML. Names of files, items and classes are escaped; charts alone are taken as markup.
    """
    return fill_template(
        "page.html",
        title="gstds-cache report",
        selections=selections,
        runs=runs,
        run_panels=panels_of(runs) if runs else [],
    )


def fill_template(name: str, package: str = "gstds_cache.report", **values: Any) -> str:
    """A page by its template, which has the frame and colours of ``base.html``.

    Args:
        name: The template.
        package: Where it is.
        values: What it shows; all of it is escaped but for charts, which go through the filter ``svg``.

    Returns:
        HTML.
    """
    environment = Environment(
        loader=ChoiceLoader([PackageLoader(package, "."), PackageLoader("gstds_cache.report", ".")]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["svg"] = Markup
    return environment.get_template(name).render(
        **values,
        kept=KEPT,
        dropped=DROPPED,
        version=version("gstds-cache"),
        made=time.strftime("%Y-%m-%d %H:%M"),
    )


def write_page(file: Path, html: str) -> int:
    """Write the page; a killed write leaves what was there. Of names that are no UTF-8 it has the escapes.

    Returns:
        Bytes of the file.
    """
    with atomic_write(file, durable=False) as out:
        out.write(html.encode("utf-8", "backslashreplace"))
    return file.stat().st_size
