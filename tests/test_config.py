from __future__ import annotations

from typing import get_type_hints

import pytest

from gstds_cache.config import EmbedConfig, EmbedSettings, SelectConfig, SelectSettings, TrainConfig, TrainSettings
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
        (lambda: EmbedConfig(batch_size=0), ("--batch-size", "0")),
        (lambda: EmbedConfig(workers=-1), ("--workers", "-1")),
        # Numbers that would take all processes, memory or time before they fail.
        (lambda: EmbedConfig(workers=1 << 31), ("--workers", "2,147,483,648", "expected 0 to 1,024")),
        (lambda: EmbedConfig(batch_size=1 << 31), ("--batch-size", "expected 1 to")),
        (lambda: SelectConfig(epochs=1 << 31), ("`epochs`", "expected 1 to 100,000")),
        (lambda: SelectConfig(threads=10**20), ("`threads`", "expected 0 to")),
        (lambda: TrainConfig(image_size=10**20), ("--image-size", "expected 8 to 4,096, or 0")),
        (lambda: TrainConfig(lr=1e39), ("--lr", "1e+39", "at most 1e+12")),
        (lambda: TrainConfig(weight_decay=float("inf")), ("--weight-decay", "inf")),
        (lambda: TrainConfig(lr=float("nan")), ("--lr", "nan")),
        (lambda: TrainConfig(image_size=4), ("--image-size", "4")),
    ],
)
def test_a_bad_value_never_makes_a_configuration(make, names) -> None:
    with pytest.raises(UsageError) as caught:
        make()
    for name in names:
        assert name in str(caught.value)


@pytest.mark.parametrize(
    ("config", "settings"),
    [(EmbedConfig, EmbedSettings), (SelectConfig, SelectSettings), (TrainConfig, TrainSettings)],
)
def test_keyword_arguments_are_the_fields_of_the_configuration(config: type, settings: type) -> None:
    assert get_type_hints(settings) == get_type_hints(config)
