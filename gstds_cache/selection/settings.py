"""A configuration parsed into what a run works with, once; and a selection's identity."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from gstds_cache.config import BY_CLASS, CLASSES, SelectConfig
from gstds_cache.selection.catalog import SPREAD
from gstds_cache.selection.draws import Draw, find_draw
from gstds_cache.selection.guidance_spec import GuidanceSpec, parse_guidance
from gstds_cache.selection.order import Order, parse_order
from gstds_cache.selection.rule import Rule, RuleBatch
from gstds_cache.selection.rules import find_rule
from gstds_cache.selection.schedule import Schedule, parse_schedule

ALGORITHM = 3  # raised by whoever changes what the same settings select, so that no stored selection is silently stale
NOT_IDENTITY = frozenset({"device", "knn_backend", "solver", "threads"})
RECORDED_AS = {"batch_assignments": "partitions"}
"""Fields that digests and headers name otherwise: they keep the name they had when the first selections were stored."""
BESIDE = {"draw_source", "hidden", "chance", "labels"}
"""What stands among a selection's settings and is none of :class:`SelectConfig`."""


@dataclass(frozen=True)
class ParsedSettings:
    """The settings of a configuration that are text, parsed.

    Attributes:
        rule: The rule; with ``draw`` one that says what strata and prior look at.
        draw: What rows of candidates are drawn in proportion to; None where rows are kept by the rule.
        schedule: Filter ratio over the run.
        order: Order of an epoch.
        guidance: What was asked for, which may be ``auto``.
        batch_assignments: Fixed assignments of rows to batches; a rule that makes no graph gains nothing from them.
    """

    rule: Rule
    draw: Draw | None
    schedule: Schedule
    order: Order
    guidance: GuidanceSpec
    batch_assignments: int

    @classmethod
    def parse(cls, config: SelectConfig) -> ParsedSettings:
        """Parse a configuration.

        Raises:
            UsageError: A rule, schedule, order or guidance is unknown, or a file that it names cannot be read.
        """
        draw, assignments = None if config.draw is None else find_draw(config.draw), config.batch_assignments
        order = parse_order(config.order)
        rule = (
            find_rule(config.rule)
            if draw is None
            else _offering(draw, draw.strata if config.strata is None else config.strata)
        )
        return cls(
            rule=rule,
            draw=draw,
            schedule=parse_schedule(config.schedule),
            order=order,
            guidance=parse_guidance(config.guidance),
            batch_assignments=int(rule.vectors > 0 and not order.balanced) if assignments is None else assignments,
        )


def with_strata(config: SelectConfig) -> SelectConfig:
    """``config`` with the strata that suit its draw, where none were asked for.

    Where classes come by turns it is the classes: rows of a rare one, which come again and again, soon have small
    losses, and drawn by losses alone would be rarer than the order makes them.

    Raises:
        UsageError: The draw is unknown.
    """
    if config.draw is None or config.strata is not None:
        return config
    draw = find_draw(config.draw)
    return replace(config, strata=CLASSES if parse_order(config.order).balanced else draw.strata)


def _offering(draw: Draw, strata: int) -> Rule:
    """What a draw wants to know of a batch, in a rule's terms: eigenvectors for its strata, guidance for its prior."""

    def all_rows(batch: RuleBatch) -> np.ndarray:
        return np.arange(len(batch))

    vectors = SPREAD if strata > 1 else 0
    return Rule(f"draw {draw.name}", draw.summary, all_rows, vectors, needs_guidance=draw.needs_prior)


def identity(
    fingerprint: str,
    config: SelectConfig,
    settings: ParsedSettings,
    guidance: str,
    reference: str = "",
    hidden: str = "",
    chance: float = 0.0,
    labels: str = "",
) -> dict[str, Any]:
    """Everything that decides a selection's outcome, as JSON-able values.

    Args:
        fingerprint: The store's.
        config: The configuration.
        settings: The same, parsed.
        guidance: Digest of the guidance.
        reference: Digest of the probe that reference losses are of; empty where there are none.
        hidden: Digest of the rows that are left out; empty where there are none.
        chance: Loss of a network that knows nothing: the logarithm of the number of classes; 0 where no draw looks at
            reference losses.
        labels: Digest of the labels, where classes come by turns or are the strata; else empty.
    """
    select = {f.name: getattr(config, f.name) for f in fields(config) if f.name not in NOT_IDENTITY} | {
        "schedule": settings.schedule.identity,
        "order": settings.order.identity,
        "guidance": guidance,
        "batch_assignments": settings.batch_assignments,
    }
    select = {RECORDED_AS.get(name, name): value for name, value in select.items()}
    # What says nothing is left out, so that selections of kept rows have the digests they had before candidates.
    for name in ("draw", "strata") if settings.draw is None else ("rule", "min_per_class"):
        del select[name]
    if config.reference != BY_CLASS:  # as before there was a choice
        del select["reference"]
    select |= ({"hidden": hidden} if hidden else {}) | ({"labels": labels} if labels else {})
    if settings.draw is not None:
        select |= {"draw_source": settings.draw.source} if settings.draw.source else {}
        # Selections that were made when rows without a loss were not told apart have none, and are drawn from so.
        select |= {"chance": chance} if chance else {}
        return {"algorithm": ALGORITHM, "cache": fingerprint, "select": select, "reference": reference}
    source = {"rule_source": settings.rule.source} if settings.rule.source else {}
    return {"algorithm": ALGORITHM, "cache": fingerprint, "select": select, **source}


def config_arguments(recorded: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a selection's header, or of a ticket, by the names that :class:`SelectConfig` has for them."""
    names = {old: new for new, old in RECORDED_AS.items()}
    return {names.get(name, name): value for name, value in recorded.items() if name not in BESIDE}
