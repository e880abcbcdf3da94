"""A configuration parsed into what a run works with, once; and a selection's identity."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from gstds_cache.config import SelectConfig
from gstds_cache.selection.guidance_spec import GuidanceSpec, parse_guidance
from gstds_cache.selection.order import Order, parse_order
from gstds_cache.selection.rule import Rule
from gstds_cache.selection.rules import find_rule
from gstds_cache.selection.schedule import Schedule, parse_schedule

ALGORITHM = 3  # raised by whoever changes what the same settings select, so that no stored selection is silently stale
NOT_IDENTITY = frozenset({"device", "knn_backend", "solver", "threads"})
RECORDED_AS = {"batch_assignments": "partitions"}
"""Fields that digests and headers name otherwise: they keep the name they had when the first selections were stored."""


@dataclass(frozen=True)
class ParsedSettings:
    """The settings of a configuration that are text, parsed.

    Attributes:
        rule: The rule.
        schedule: Filter ratio over the run.
        order: Order of an epoch.
        guidance: What was asked for, which may be ``auto``.
        batch_assignments: Fixed assignments of rows to batches; a rule that makes no graph gains nothing from them.
    """

    rule: Rule
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
        rule, assignments = find_rule(config.rule), config.batch_assignments
        return cls(
            rule=rule,
            schedule=parse_schedule(config.schedule),
            order=parse_order(config.order),
            guidance=parse_guidance(config.guidance),
            batch_assignments=int(rule.vectors > 0) if assignments is None else assignments,
        )


def identity(fingerprint: str, config: SelectConfig, settings: ParsedSettings, guidance: str) -> dict[str, Any]:
    """Everything that decides a selection's outcome, as JSON-able values.

    Args:
        fingerprint: The store's.
        config: The configuration.
        settings: The same, parsed.
        guidance: Digest of the guidance.
    """
    select = {f.name: getattr(config, f.name) for f in fields(config) if f.name not in NOT_IDENTITY} | {
        "schedule": settings.schedule.identity,
        "order": settings.order.identity,
        "guidance": guidance,
        "batch_assignments": settings.batch_assignments,
    }
    select = {RECORDED_AS.get(name, name): value for name, value in select.items()}
    source = {"rule_source": settings.rule.source} if settings.rule.source else {}
    return {"algorithm": ALGORITHM, "cache": fingerprint, "select": select, **source}


def config_arguments(recorded: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a selection's header, or of a ticket, by the names that :class:`SelectConfig` has for them."""
    names = {old: new for new, old in RECORDED_AS.items()}
    return {names.get(name, name): value for name, value in recorded.items()}
