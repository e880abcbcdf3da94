"""The page of an audit."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from gstds_cache.auditing import view
from gstds_cache.auditing.run import Findings
from gstds_cache.auditing.search import NOTHING
from gstds_cache.auditing.view import Part, Pictures
from gstds_cache.config import AuditConfig
from gstds_cache.report.page import fill_template, write_page

PAGE = "audit.html"


def make_page(
    findings: Findings, config: AuditConfig, pictures: Pictures, others: Pictures | None, file: Path
) -> tuple[int, list[str]]:
    """Draw and write the page.

    Args:
        findings: What was found.
        config: What was looked for.
        pictures: Images of the store.
        others: Images of the other store, where there is one.
        file: The page.

    Returns:
        Bytes of the page, and what it had to leave out.
    """
    store = findings.rows.store
    parts = list(_parts(findings, config, pictures, others))
    facts = [
        ("store", str(store.location)),
        ("data set", store.dataset_uri or store.kind),
        ("rows looked at", f"{len(findings.rows):,} of {len(store):,}"),
        ("without embedding", f"{len(store.without_embedding):,}"),
        *([("hidden", f"{len(store.hidden):,}")] if len(store.hidden) else []),
        ("model", str(store.spec.encoder.get("model", "unknown"))),
        ("compared", "every row with every other" if findings.found.exact else "rows of the nearest cells"),
        ("threshold", f"{config.threshold:g}"),
        ("fingerprint", store.fingerprint[:16]),
    ]
    html = fill_template(
        "page.html", "gstds_cache.auditing", title=f"Audit of {store.location.name}", facts=facts, parts=parts
    )
    missing = sorted({part.missing for part in parts if part.missing})
    return write_page(file, html), missing


def _parts(findings: Findings, config: AuditConfig, pictures: Pictures, others: Pictures | None) -> list[Part]:
    found, rows, shown = findings.found, findings.rows, config.shown
    assert findings.examples is not None
    nearest = np.asarray(found.similarity[:, 0])
    parts = [
        view.view_groups(findings.groups, pictures, config.threshold, found.exact, shown),
        view.view_threshold("near", "The threshold", nearest[nearest > NOTHING], config.threshold, *findings.examples,
                            pictures, pictures),
    ]  # fmt: skip
    if findings.leaks is not None and findings.leak_examples is not None and others is not None:
        parts.append(view.view_leaks(findings.leaks, findings.leak_examples, others, pictures, config.threshold, shown))
    if findings.doubts is None:
        parts.append(Part("Labels in doubt", missing=f"No label can be judged: {findings.no_doubts}."))
    else:
        parts.append(view.view_labels(findings.doubts, findings.test, findings.no_test, pictures, config.rank, shown))
    every = rows.rows.all()
    parts.append(view.view_outliers("far", findings.mean, findings.outliers, every, found.k, pictures, shown))
    return parts
