"""Batch normalisation folded into convolutions: the features that the model's own layers give."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from torch import nn

from gstds_cache.encoders import factory
from gstds_cache.encoders.folding import folded

CROP = (64, 64)
LAYOUTS = (torch.channels_last, torch.contiguous_format)


def trained(model: nn.Module) -> nn.Module:
    """As if it had been: a normalisation that was never trained changes nothing wherever it stands."""
    generator = torch.Generator().manual_seed(1)
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_(0, 0.2, generator=generator)
            layer.running_var.uniform_(0.5, 2, generator=generator)
            layer.weight.data.uniform_(0.5, 1.5, generator=generator)
            layer.bias.data.normal_(0, 0.2, generator=generator)
    return model.eval()


def layers(model: nn.Module) -> int:
    return sum(isinstance(layer, nn.BatchNorm2d) for layer in model.modules())


@torch.inference_mode()
def difference(a: nn.Module, b: nn.Module) -> float:
    pixels = torch.rand((3, 3, *CROP), generator=torch.Generator().manual_seed(2))
    expected, got = a(pixels), b(pixels)
    return float((torch.linalg.vector_norm(got - expected, dim=1) / torch.linalg.vector_norm(expected, dim=1)).max())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("name", "left"),
    [
        ("tf_efficientnet_lite0", 0),  # convolutions that pad by themselves among them
        ("regnety_002", 0),
        ("test_resnet", 1),  # some of its layers, and of the next, have no convolution before them
        ("resnetv2_18", 9),
    ],
)
def test_a_timm_model_gives_the_same_features_with_fewer_layers(
    name: str, left: int, layout: torch.memory_format
) -> None:
    torch.manual_seed(0)
    model = trained(timm.create_model(name, num_classes=0))
    model.to(memory_format=layout)
    before = copy.deepcopy(model)
    quicker = folded(model, CROP, layout)
    assert left == layers(quicker) < layers(model) == layers(before)
    assert difference(model, quicker) < 1e-5
    assert difference(model, before) == 0  # the model itself stays


def test_a_model_whose_layers_behind_convolutions_have_other_channels_opens() -> None:
    model = factory.open_encoder("timm:xception41p?size=96", allow_untrained=True)._model
    whole = timm.create_model("xception41p", num_classes=0)
    assert 0 < layers(model) < layers(whole)


def test_a_torchvision_model_gives_the_same_features() -> None:
    torch.manual_seed(0)
    model = trained(torchvision.models.mobilenet_v2(weights=None))
    model.classifier = nn.Identity()
    quicker = folded(model, CROP, torch.contiguous_format)
    assert layers(quicker) == 0 < layers(model)
    assert difference(model, quicker) < 1e-5


class Elsewhere(nn.Module):
    """Its normalisation is registered behind a convolution, and runs before it; its features are so many times."""

    def __init__(self, times: float = 1.0) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 3, 3)
        self.normalisation = nn.BatchNorm2d(3)
        self.times = times

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.convolution(self.normalisation(pixels)).mean((2, 3)) * self.times


@pytest.mark.parametrize("times", [1.0, 0.0, 1e30, float("inf"), float("nan")])
def test_layers_that_run_in_another_order_are_left_as_they_are(times: float) -> None:
    torch.manual_seed(0)
    model = trained(Elsewhere(times))
    assert folded(model, CROP, torch.contiguous_format) is model


class Asked(nn.Module):
    """Asks its normalisation for what only that has."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 4, 3)
        self.normalisation = nn.BatchNorm2d(4)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        features = self.normalisation(self.convolution(pixels)).mean((2, 3))
        return features + self.normalisation.weight


def test_a_model_that_fails_without_a_layer_keeps_it() -> None:
    model = trained(Asked())
    assert folded(model, CROP, torch.contiguous_format) is model


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False), nn.Flatten()),
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.BatchNorm2d(4), nn.Flatten()),
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.SyncBatchNorm(4), nn.Flatten()),
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(5), nn.Flatten()),
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten()),
    ],
)
def test_what_cannot_be_folded_is_left_as_it_is(model: nn.Module) -> None:
    assert folded(model.eval(), CROP, torch.contiguous_format) is model


def test_an_encoder_is_folded_and_has_the_identity_it_had(monkeypatch) -> None:
    mine = factory.open_encoder("timm:tf_efficientnet_lite0?size=64")
    monkeypatch.setattr(factory, "folded", lambda model, *_: model)
    plain = factory.open_encoder("timm:tf_efficientnet_lite0?size=64")
    assert layers(mine._model) == 0 < layers(plain._model)
    assert mine.spec == plain.spec
    pixels = torch.randint(256, (4, *mine.input_shape), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    assert float((mine.embed(pixels) - plain.embed(pixels)).abs().max()) < 5e-6
    assert not any(parameter.requires_grad for parameter in mine._model.parameters())


def test_a_module_of_ones_own_keeps_its_layers(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "own_normalised.py").write_text(
        "from torch import nn\n"
        "def build():\n"
        "    pool = (nn.AdaptiveAvgPool2d(1), nn.Flatten())\n"
        "    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), *pool)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert layers(factory.open_encoder("own_normalised:build")._model) == 1
