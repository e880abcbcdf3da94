"""Models by the names people say: which timm model, made ready and pooled as its authors do."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from gstds_cache.encoders import aliases, factory
from gstds_cache.encoders.aliases import ALIASES
from gstds_cache.encoders.factory import open_encoder
from gstds_cache.errors import EncoderError, UsageError

KINDS = ("dinov2-small", "dinov2-small-reg", "dinov3-small", "siglip2-base", "clip-vit-b16")
TINY = {"depth": 1, "embed_dim": 48, "num_heads": 3}


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """The aliases' own models, of one narrow block each: their pooling, positions and heads are what is tested."""
    small = {name: replace(alias, options=alias.options | TINY) for name, alias in ALIASES.items()}
    monkeypatch.setattr(factory, "ALIASES", small)


def naive(name: str, model: torch.nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    """What the authors take, spelled out."""
    tokens = model.forward_features(pixels)
    if name.startswith("dino"):
        return tokens[:, 0]  # the class token, behind the last norm
    if name.startswith("siglip"):
        return model.attn_pool(tokens)
    return tokens[:, 0] @ model.head.weight.T + model.head.bias  # CLIP's projection


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("name", KINDS)
def test_an_alias_is_pooled_as_its_authors_do(name: str, tmp_path: Path) -> None:
    alias = ALIASES[name]
    torch.manual_seed(1)
    model = timm.create_model(alias.timm, **alias.options, **TINY).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    encoder = open_encoder(f"{name}?weights={tmp_path / 'w.safetensors'}")
    assert encoder.input_shape == (3, alias.size, alias.size)
    assert encoder.spec.model == f"timm:{alias.timm}"
    assert encoder.spec.pooling == alias.pooling
    assert encoder.spec.pretrained
    pixels = torch.randint(0, 256, (2, *encoder.input_shape), dtype=torch.uint8)
    mean, std = (
        torch.tensor(values).view(1, 3, 1, 1) for values in (model.pretrained_cfg["mean"], model.pretrained_cfg["std"])
    )
    with torch.inference_mode():
        rows = torch.nn.functional.normalize(naive(name, model, (pixels / 255 - mean) / std))
    torch.testing.assert_close(encoder.embed(pixels), rows, atol=2e-5, rtol=0)


@pytest.mark.parametrize("name", sorted(ALIASES))
def test_every_alias_names_a_model_of_timm_that_has_weights_and_these_features(name: str) -> None:
    alias = ALIASES[name]
    config = timm.get_pretrained_cfg(alias.timm)
    assert config is not None
    assert config.hf_hub_id
    with torch.device("meta"):
        model = timm.create_model(alias.timm, **alias.options)
    assert model.patch_embed.patch_size == (alias.patch, alias.patch)
    assert alias.size % alias.patch == 0
    dim = model.head.out_features if alias.pooling == "projection" else model.num_features
    assert dim == alias.dim
    assert model.global_pool == ("map" if alias.pooling == "map" else "token")


@pytest.mark.usefixtures("tiny")
def test_images_are_made_ready_as_the_authors_do() -> None:
    def of(name: str) -> tuple[object, ...]:
        ready = open_encoder(name, allow_untrained=True).spec.preprocessing
        return ready.resize, ready.crop, ready.interpolation, ready.crop_mode, ready.mean[0]

    assert of("dinov2-small") == (256, (224, 224), "bicubic", "center", 0.485)
    assert of("dinov3-small") == (256, (256, 256), "bicubic", "center", 0.485)
    assert of("siglip2-base") == ((224, 224), (224, 224), "bicubic", "squash", 0.5)
    assert of("clip-vit-b16") == (224, (224, 224), "bicubic", "center", 0.48145466)


@pytest.mark.usefixtures("tiny")
def test_an_alias_takes_other_sizes_of_whole_patches_where_its_positions_are_interpolated() -> None:
    assert open_encoder("dinov2-small?size=112", allow_untrained=True).input_shape == (3, 112, 112)
    assert open_encoder("dinov3-small?size=128", allow_untrained=True).input_shape == (3, 128, 128)
    with pytest.raises(UsageError, match="size=100, expected a multiple of 14"):
        open_encoder("dinov2-small?size=100", allow_untrained=True)
    with pytest.raises(EncoderError, match="does not take images of 112 x 112"):
        open_encoder("clip-vit-b16?size=112", allow_untrained=True)
    auto = open_encoder("dinov2-small?size=auto", allow_untrained=True)
    assert auto.sizes is None  # its own size stays
    assert "size=auto is for models that take any size" in auto.notes[-1]


@pytest.mark.usefixtures("tiny")
def test_weights_as_openclip_and_the_authors_name_them_are_taken(tmp_path: Path) -> None:
    alias = ALIASES["siglip2-base"]
    model = timm.create_model(alias.timm, **TINY)
    save_file({f"visual.trunk.{name}": value for name, value in model.state_dict().items()}, tmp_path / "w.safetensors")
    encoder = open_encoder(f"siglip2-base?weights={tmp_path / 'w.safetensors'}")
    loaded = encoder._model.state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in model.state_dict().items())
    # DINOv2's own files hold a token for masked patches that nobody needs, and another name for registers.
    alias = ALIASES["dinov2-small-reg"]
    model = timm.create_model(alias.timm, **alias.options, **TINY)
    state = {"mask_token": torch.zeros(1, 48), **model.state_dict()}
    state["register_tokens"] = state.pop("reg_token")
    torch.nn.init.normal_(state["register_tokens"])
    # Their class token has a position of its own; timm's has none here, and adds it to the token.
    state["pos_embed"] = torch.cat([torch.ones(1, 1, 48), state["pos_embed"]], dim=1)
    save_file(state, tmp_path / "d.safetensors")
    loaded = open_encoder(f"dinov2-small-reg?weights={tmp_path / 'd.safetensors'}")._model.state_dict()
    assert torch.equal(loaded["reg_token"], state["register_tokens"])
    assert torch.equal(loaded["cls_token"], state["cls_token"] + 1)


def test_a_name_that_is_nearly_an_alias_gets_the_nearest() -> None:
    for wrong, right in (
        ("dinov2-smal", "dinov2-small"),
        ("clip-vitb16", "clip-vit-b16"),
        ("DINOv3-base", "dinov3-base"),
    ):
        with pytest.raises(UsageError, match="unknown model") as caught:
            open_encoder(wrong)
        assert caught.value.hint == f"did you mean {right!r}?"
    with pytest.raises(UsageError, match="it is an alias") as caught:
        open_encoder("timm:dinov2-small")
    assert caught.value.hint == "did you mean 'dinov2-small', without timm:?"


def test_without_a_network_the_error_says_how_to_bring_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(EncoderError, match="dinov2-small: no pretrained weights here") as caught:
        open_encoder("dinov2-small")
    assert "hf download timm/vit_small_patch14_dinov2.lvd142m model.safetensors" in caught.value.hint
    assert "`model='dinov2-small?weights=FILE'`" in caught.value.hint


def test_the_tables_of_the_documentation_name_every_alias() -> None:
    text = (Path(aliases.__file__).parents[2] / "docs" / "models.md").read_text()
    for name, alias in ALIASES.items():
        assert f"| `{name}` | `{alias.timm}` | {alias.size} | {alias.dim:,} |" in text
