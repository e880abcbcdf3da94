from __future__ import annotations

from dataclasses import asdict
from fractions import Fraction
from typing import get_type_hints

import numpy as np
import pytest

from gstds_cache.config import (
    AuditConfig,
    AuditSettings,
    EmbedConfig,
    EmbedSettings,
    OnceConfig,
    OnceSettings,
    SelectConfig,
    SelectSettings,
    TrainConfig,
    TrainSettings,
    as_type,
    require_settings,
)
from gstds_cache.errors import UsageError


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (lambda: SelectConfig(batch_size=3), ("`batch_size`", "3", "expected 4 to")),
        (lambda: SelectConfig(batch_size=8, knn=8), ("`knn`", "8", "batch size - 1 = 7")),
        (lambda: SelectConfig(knn=0), ("`knn`", "0")),
        (lambda: SelectConfig(epochs=0), ("`epochs`", "0")),
        (lambda: SelectConfig(seed=-1), ("`seed`", "-1")),
        (lambda: SelectConfig(tolerance=0.0), ("`tolerance`", "0.0")),
        (lambda: EmbedConfig(batch_size=0), ("`batch_size`", "0")),
        (lambda: EmbedConfig(workers=-1), ("`workers`", "-1")),
        # Numbers that would take all processes, memory or time before they fail.
        (lambda: EmbedConfig(workers=1 << 31), ("`workers`", "2,147,483,648", "expected 0 to 1,024")),
        (lambda: EmbedConfig(batch_size=1 << 31), ("`batch_size`", "expected 1 to")),
        (lambda: SelectConfig(epochs=1 << 31), ("`epochs`", "expected 1 to 100,000")),
        (lambda: SelectConfig(threads=10**20), ("`threads`", "expected 0 to")),
        (lambda: TrainConfig(image_size=10**20), ("`image_size`", "expected 8 to 4,096, or 0")),
        (lambda: TrainConfig(lr=1e39), ("`lr`", "1e+39", "at most 1e+12")),
        (lambda: TrainConfig(weight_decay=float("inf")), ("`weight_decay`", "inf")),
        (lambda: TrainConfig(lr=float("nan")), ("`lr`", "nan")),
        (lambda: TrainConfig(image_size=4), ("`image_size`", "4")),
    ],
)
def test_a_bad_value_never_makes_a_configuration(make, names) -> None:
    with pytest.raises(UsageError) as caught:
        make()
    for name in names:
        assert name in str(caught.value)


@pytest.mark.parametrize(
    ("config", "settings"),
    [
        (EmbedConfig, EmbedSettings),
        (SelectConfig, SelectSettings),
        (TrainConfig, TrainSettings),
        (AuditConfig, AuditSettings),
        (OnceConfig, OnceSettings),
    ],
)
def test_keyword_arguments_are_the_fields_of_the_configuration(config: type, settings: type) -> None:
    assert get_type_hints(settings) == get_type_hints(config)


@pytest.mark.usefixtures("no_type_checks")
@pytest.mark.parametrize(
    ("config", "name", "value", "expected"),
    [
        (TrainConfig, "repack", 2.5, "a whole number"),
        (TrainConfig, "repack", "32", "a whole number"),
        (TrainConfig, "workers", True, "a whole number"),
        (TrainConfig, "seed", None, "a whole number"),
        (TrainConfig, "lr", "0.1", "a number"),
        (TrainConfig, "lr", False, "a number"),
        (TrainConfig, "momentum", None, "a number"),
        pytest.param(TrainConfig, "weight_decay", 10**400, "a number", id="weight_decay-beyond-floats"),
        (TrainConfig, "arch", 18, "text"),
        (TrainConfig, "augment", "mixup", "one of auto, none, crop, crop+flip"),
        (EmbedConfig, "batch_size", np.float64(4), "a whole number"),
        (EmbedConfig, "workers", np.True_, "a whole number"),
        (EmbedConfig, "allow_untrained", 1, "True or False"),
        (EmbedConfig, "allow_untrained", "no", "True or False"),
        (EmbedConfig, "model", None, "text"),
        (EmbedConfig, "dtype", np.float16, "one of float16, float32"),
        (SelectConfig, "knn", 3.0, "a whole number"),
        (SelectConfig, "knn_backend", ["torch"], "one of auto, cuda, torch, faiss-cpu, faiss-gpu"),
        (SelectConfig, "schedule", 0.75, "text"),
    ],
)
def test_a_value_of_another_type_never_makes_a_configuration(config, name, value, expected) -> None:
    with pytest.raises(UsageError) as caught:
        config(**{name: value})
    assert str(caught.value) == f"`{name}`: got {value!r:.80}, expected {expected}"


@pytest.mark.usefixtures("no_type_checks")
def test_numbers_of_numpy_become_those_of_python() -> None:
    config = TrainConfig(repack=np.int64(32), seed=np.uint8(3), lr=np.float32(0.5), momentum=0)
    assert config == TrainConfig(repack=32, seed=3, lr=0.5, momentum=0.0)
    assert {name: type(value) for name, value in asdict(config).items()} == {
        name: type(value) for name, value in asdict(TrainConfig()).items()
    }
    assert EmbedConfig(batch_size=np.int32(4)).batch_size.__class__ is int
    assert as_type("lr", Fraction(1, 4), float) == 0.25
    assert as_type("batch_size", None, int | None) is None


def _call(store, *, keep=None, **settings) -> None: ...


@pytest.mark.parametrize(
    ("config", "name", "words"),
    [
        (EmbedConfig, "modle", "did you mean 'model'?"),
        (SelectConfig, "epoch", "did you mean 'epochs'?"),
        (SelectConfig, "kep", "did you mean 'keep'?"),
        (EmbedConfig, "xyzzy", "there are: model, batch_size, "),
    ],
)
def test_a_setting_that_there_is_not_is_refused_with_the_nearest_one(config, name, words) -> None:
    with pytest.raises(TypeError) as caught:
        require_settings(_call, config, {"device": "cpu", name: 1})
    assert str(caught.value).startswith(f"_call() has no setting {name!r}; {words}")
    require_settings(_call, config, {"device": "cpu"})
