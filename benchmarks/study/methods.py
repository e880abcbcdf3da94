"""Every method by name: which batches it reads, who chooses from them, and what has to be known beforehand."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from benchmarks.study.variants import PREFIX, Variant, parse_variant, settings_of
from gstds_cache.config import BY_CLASS, SelectConfig
from gstds_cache.errors import UsageError
from gstds_cache.selection.draws import find_draw
from gstds_cache.selection.rules import find_rule

DRAW = re.compile(
    r"draw:(?P<draw>[a-z-]+)(\^(?P<strata>\d+))?(/(?P<guidance>[^@+%]+))?(?P<weights>\+weights)?"
    r"(?P<relative>\+by-class)?(@(?P<schedule>[^%]+))?(%(?P<assignments>\d+))?"
)
INFOBATCH_KEEPS = 0.6  # about what it keeps at r = 0.5: its batches are cut so that steps have the others' size


@dataclass(frozen=True)
class Method:
    """How a method is run.

    Attributes:
        name: On the command line and in the results.
        kind: ``rule`` selects from embeddings or at random; ``batch`` chooses while training; ``fixed`` knows its rows
            beforehand.
        rule: For ``rule``: the selection rule.
        schedule: For ``rule``: a schedule instead of a constant ratio.
        guidance: For ``rule``: the difficulty it looks at.
        embeds: Whether it needs the cache of embeddings.
        batch_assignments: For ``rule``: ways the rows are dealt out to batches; None for the rule's own.
        needs: Scores to prepare: ``probe``, ``early`` networks, ``forgetting`` counts.
        draw: For ``rule``: rows are not kept by a rule but drawn so, by the losses that training reports.
        strata: For ``draw``: spectral strata; None for the study's usual ones.
        importance_weights: For ``draw``: whether losses are weighted.
        reference: For ``draw``: what it takes for reference losses.
        variant: For ``draw``: what is drawn in proportion to, where it is none of the library's.
    """

    name: str
    kind: Literal["rule", "batch", "fixed"]
    rule: str = ""
    schedule: str = ""
    guidance: str = "auto"
    embeds: bool = False
    batch_assignments: int | None = None
    needs: frozenset[str] = frozenset()
    draw: str | None = None
    strata: int | None = None
    importance_weights: bool = False
    reference: Literal["raw", "by-class"] = "raw"
    variant: Variant | None = None


BASELINES = {
    method.name: method
    for method in (
        Method("full", "rule", rule="random", schedule="constant:0"),
        Method("random", "rule", rule="random"),
        Method("rs2", "fixed"),
        Method("infobatch", "batch"),
        Method("seta", "batch"),
        Method("orderdp", "batch"),
        Method("rho-loss", "batch", embeds=True, needs=frozenset({"probe"})),
        Method("jest", "batch", embeds=True, needs=frozenset({"probe"})),
        Method("selective-backprop", "batch"),
        Method("proxy-mask", "batch", needs=frozenset({"early"})),
        Method("el2n", "fixed", needs=frozenset({"early"})),
        Method("ccs", "fixed", needs=frozenset({"early"})),
        Method("forgetting", "fixed", needs=frozenset({"forgetting"})),
        Method("prototypicality", "fixed", embeds=True),
        Method("k-centre", "fixed", embeds=True),
    )
}


def find_method(name: str) -> Method:
    """A baseline, ``default``, or ``RULE[/GUIDANCE][@SCHEDULE][%BATCH_ASSIGNMENTS]`` for any rule of ``gstds-select``.

    ``draw:NAME[^STRATA][/GUIDANCE][+weights][+by-class][@SCHEDULE][%BATCH_ASSIGNMENTS]`` draws by training losses,
    with reference losses as they are unless it says so; ``variant:KEY=VALUE[+...]`` by a variant that was tried
    (``variants.py``).

    Raises:
        UsageError: There is no such baseline or rule.
    """
    if name in BASELINES:
        return BASELINES[name]
    if name.startswith("draw:"):
        return _drawing(name)
    if name.startswith(PREFIX):
        variant = parse_variant(name.removeprefix(PREFIX))
        return Method(name, "rule", rule=SelectConfig.rule, variant=variant, **settings_of(variant))
    rest, _, batch_assignments = name.partition("%")
    before, _, schedule = rest.partition("@")
    rule_name, _, guidance = before.partition("/")
    if rule_name == "default":
        rule_name = SelectConfig().rule
    try:
        rule = find_rule(rule_name)
    except UsageError as error:
        raise UsageError(f"no method {name!r}: there is default, {', '.join(BASELINES)}, and the rules") from error
    needs = frozenset({"probe"}) if rule.needs_guidance else frozenset[str]()
    return Method(
        name,
        "rule",
        rule=rule_name,
        schedule=schedule,
        guidance=guidance or SelectConfig().guidance,
        embeds=rule.vectors > 0 or bool(needs),
        needs=needs,
        batch_assignments=int(batch_assignments) if batch_assignments else None,
    )


def _drawing(name: str) -> Method:
    """A method that draws by training losses.

    Raises:
        UsageError: It is not spelled so, or there is no such draw.
    """
    parts = DRAW.fullmatch(name)
    if parts is None:
        spelled = "draw:NAME[^STRATA][/GUIDANCE][+weights][+by-class][@SCHEDULE][%N]"
        raise UsageError(f"no method {name!r}: expected {spelled}")
    draw, strata = find_draw(parts["draw"]), int(parts["strata"]) if parts["strata"] else None
    if parts["relative"] and not draw.needs_reference:
        raise UsageError(f"no method {name!r}: {draw.name} looks at no reference losses")
    probe = draw.needs_reference or draw.needs_prior
    return Method(
        name,
        "rule",
        rule=SelectConfig.rule,
        schedule=parts["schedule"] or "",
        guidance=parts["guidance"] or SelectConfig.guidance,
        embeds=strata != 1 or probe,
        needs=frozenset({"probe"}) if probe else frozenset[str](),
        draw=draw.name,
        strata=strata,
        importance_weights=parts["weights"] is not None,
        reference=BY_CLASS if parts["relative"] else "raw",
        batch_assignments=int(parts["assignments"]) if parts["assignments"] else None,
    )
