"""Which draw suits a data set and a run: probes on the embeddings try them out before a network relies on one.

Which draw is better differs between data sets: rows that are hard for the reference model are worth learning on clean
data, and are mislabelled on others. So ``draw="auto"`` asks the probes of :mod:`gstds_cache.selection.advice`, at the
run's own ratio and number of epochs, and takes what is furthest ahead of random rows, or the usual draw where that is
not clearly behind it. The adaptive draw is taken for either of the two that it is made of: which is better for a
network no probe can tell. Where nothing is clearly ahead, rows are kept by the default rule, whose guidance has a trial
of its own.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import astuple, replace
from pathlib import Path

import torch

from gstds_cache.config import BY_CLASS, SelectConfig
from gstds_cache.files.atomic import atomic_write
from gstds_cache.files.derived import GUIDANCE, derived_paths, keep
from gstds_cache.files.digest import digest_of, sealed, unsealed
from gstds_cache.selection.advice import RANDOM, ROWS, RULE, Forecast, forecasts, preferred
from gstds_cache.selection.difficulty import Difficulty
from gstds_cache.selection.draws import find_draw
from gstds_cache.selection.guidance import load_or_make_guidance
from gstds_cache.selection.guidance_spec import GuidanceKey, GuidanceSpec, key_of
from gstds_cache.selection.reference import by_class
from gstds_cache.selection.rows import count_labels
from gstds_cache.store.reader import EmbeddingStore

ALGORITHM = 3  # raised by whoever changes how draws are tried, so that no outcome kept is believed for another trial
TRIED = (RULE, "loss-minus-reference", "damped-loss", "loss-squared")
DRAWN = 1 << 16  # rows that a probe learns from in all its epochs, about: longer runs are tried as shorter ones


def choose_draw(
    store: EmbeddingStore, config: SelectConfig, share: float, *, threads: int, device: torch.device
) -> tuple[SelectConfig, str]:
    """``config`` with a draw in the place of ``auto``, or with none where the default rule is to keep rows.

    Args:
        store: Where embeddings and labels are.
        config: A configuration whose draw is ``auto``.
        share: Share of the rows that stays, over the whole run.
        threads: CPU threads; their number changes nothing.
        device: Where the probes' products are computed.

    Returns:
        The configuration, and what was found, in a sentence.
    """
    labels = count_labels(store)
    if labels.different < 2 or labels.one_each:
        return without_draw(
            config
        ), f"{store.location} has no labels that a probe could learn; rows are kept by the rule"
    probe, share = key_of(store, GuidanceSpec("probe")), round(share, 2)
    if share == 1:
        return without_draw(config), "nothing is left out, so there is nothing to draw"
    epochs = max(1, min(config.epochs, round(DRAWN / max(1, ROWS // 2 * share))))
    tried = {"draws": TRIED, "probe": probe.probe, "share": share, "epochs": epochs, "rows": ROWS}
    relative = config.reference == BY_CLASS
    tried |= {"reference": BY_CLASS} if relative else {}
    digest = digest_of({"algorithm": ALGORITHM, **tried})
    records = [folder / f"{digest[:16]}.trial.json" for folder in derived_paths(store.location, GUIDANCE)]
    found = _recorded(records, digest)
    if found is None:
        found = _try_out(store, probe, relative, share, epochs, threads, device)
        facts = {"digest": digest, "draws": {f.way: list(astuple(f))[2:] for f in found}}
        keep(lambda path: _write(path, sealed(facts)), records)  # where that fails each run tries
    taken = preferred(found)
    best = taken or max(found, key=lambda forecast: forecast.over_random)
    random = best.accuracy - best.over_random
    how = f"by {best.way}, a part of it," if best.is_part else "so"
    shares = (
        f"a probe that learns from rows drawn {how} is right on {best.accuracy:.1%}, from random rows on {random:.1%}"
    )
    if taken is None:
        return without_draw(
            config
        ), f"no draw is clearly ahead of random rows ({best.draw or RULE}: {shares}); the rule keeps rows"
    if best.way == RULE:
        return without_draw(config), f"the rule keeps rows: {shares}, and no draw does better"
    assert best.draw is not None
    reference = config.reference if find_draw(best.draw).needs_reference else SelectConfig.reference
    return replace(config, draw=best.draw, reference=reference), f"{best.draw}: {shares}"


def without_draw(config: SelectConfig) -> SelectConfig:
    """The same run with rows kept by the rule."""
    return replace(config, draw=None, strata=None, reference=SelectConfig.reference)


def _try_out(
    store: EmbeddingStore,
    probe: GuidanceKey,
    relative: bool,
    share: float,
    epochs: int,
    threads: int,
    device: torch.device,
) -> list[Forecast]:
    columns = load_or_make_guidance(store, probe, threads=threads, device=device).columns
    assert columns is not None
    loss = Difficulty(columns["loss"])
    found = forecasts(
        store,
        Difficulty(columns["entropy"]),
        by_class(loss, store.labels) if relative else loss,
        ratios=(1 - share,),
        epochs=epochs,
        ways=(RANDOM, *TRIED),
        threads=threads,
        device=device,
    )
    return [forecast for forecast in found if forecast.way in TRIED]


def _recorded(records: list[Path], digest: str) -> list[Forecast] | None:
    for record in records:
        with suppress(OSError, ValueError, KeyError, TypeError):  # no record, a damaged one, or one without a hash
            facts = unsealed(record.read_bytes())
            if facts["digest"] == digest:
                return [Forecast(way, 0.0, *map(float, facts["draws"][way])) for way in TRIED]
    return None


def _write(path: Path, text: bytes) -> None:
    with atomic_write(path, durable=False) as file:
        file.write(text)
