"""Our pixels against the transforms of the libraries the models come from."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torchvision import models

from gstds_cache.encoders.factory import open_encoder
from gstds_cache.encoders.preprocessing import Preprocessing, without_ends


def _images() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [
        Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for h, w in ((8, 8), (300, 200), (90, 431))
    ]


def _as_the_encoder_sees(encoder, image) -> torch.Tensor:
    pixels = encoder.spec.preprocessing.pixels(image).float()[None]
    return ((pixels - encoder._mean) / encoder._std)[0]


@pytest.mark.parametrize("name", ["tf_efficientnet_lite0", "test_vit", "test_convnext"])
def test_pixels_are_those_of_timms_own_transform(name: str) -> None:
    encoder = open_encoder(f"timm:{name}", allow_untrained=True)
    config = timm.data.resolve_data_config({}, model=timm.create_model(name))
    theirs = timm.data.create_transform(**config, is_training=False)
    for image in _images():
        torch.testing.assert_close(_as_the_encoder_sees(encoder, image), theirs(image), atol=1e-5, rtol=0)


def test_a_squashing_timm_model_is_followed() -> None:
    name = next(n for n in ("vit_base_patch16_siglip_224", "vit_so150m_patch16_reg4_gap_256") if timm.is_model(n))
    config = timm.data.resolve_data_config(pretrained_cfg=timm.get_pretrained_cfg(name).to_dict())
    transform = timm.data.create_transform(**config, is_training=False)
    from gstds_cache.encoders.preprocessing import Preprocessing

    resize = transform.transforms[0].size
    ours = Preprocessing(
        resize=tuple(resize) if not isinstance(resize, int) else resize,
        crop=config["input_size"][1:],
        interpolation=config["interpolation"],
    )
    for image in _images():
        theirs = (
            transform(image) * torch.tensor(config["std"])[:, None, None] + torch.tensor(config["mean"])[:, None, None]
        ) * 255
        torch.testing.assert_close(ours.pixels(image).float(), theirs, atol=1e-3, rtol=0)


def test_pixels_are_those_of_torchvisions_preset() -> None:
    encoder = open_encoder("torchvision:mobilenet_v3_small", allow_untrained=True)
    theirs = models.get_model_weights("mobilenet_v3_small").DEFAULT.transforms()
    for image in _images():
        torch.testing.assert_close(_as_the_encoder_sees(encoder, image), theirs(image), atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", [(1, 20_000), (20_000, 1), (3, 100)])
def test_the_ends_of_a_very_long_image_cost_no_memory(size: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    short = without_ends(image, 16)
    assert sorted(short.size) == [min(size), 16 * min(size)]
    wide = Preprocessing(resize=40, crop=(32, 32))
    got = wide.pixels(image)
    assert got.shape == (3, 32, 32)
    if max(size) < 1000:  # resized whole, the centre is the same but for the place of the samples
        whole = Preprocessing(resize=40, crop=(32, 32), max_aspect=1000).pixels(image)
        assert (got.float() - whole.float()).abs().mean() < 3


def test_an_image_of_usual_shape_is_left_alone() -> None:
    image = Image.new("RGB", (160, 10))
    assert without_ends(image, 16) is image
