from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torchvision import models

from gstds_cache.encoders.factory import UNTRAINED, open_encoder, packaged_weights
from gstds_cache.errors import EncoderError, UsageError
from gstds_cache.files.digest import sha256_file


@pytest.fixture(scope="module")
def default():
    return open_encoder("timm:tf_efficientnet_lite0")


def test_the_default_model_has_its_packaged_imagenet_weights(default) -> None:
    assert default.notes == ()
    weights = packaged_weights("tf_efficientnet_lite0")
    assert default.spec.pretrained
    assert default.spec.weights == sha256_file(weights)
    assert (default.spec.dim, default.spec.pooling, default.input_shape) == (1280, "avg", (3, 224, 224))


def test_the_default_models_features_are_timms_pooled_features(default) -> None:
    # The naive way: timm's whole model, weights by order, its own pooling, then rows to unit length.
    model = timm.create_model("tf_efficientnet_lite0").eval()
    packaged = torch.load(packaged_weights("tf_efficientnet_lite0"), weights_only=True).values()
    model.load_state_dict(dict(zip(model.state_dict(), packaged, strict=True)))
    pixels = torch.randint(0, 256, (3, 3, 224, 224), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        features = model.forward_head(model.forward_features((pixels / 255 - 0.5) / 0.5), pre_logits=True)
    expected = features / features.norm(dim=1, keepdim=True)
    torch.testing.assert_close(default.embed(pixels), expected, atol=2e-5, rtol=0)


def test_the_packaged_weights_classify_as_imagenet_weights_do() -> None:
    # Loading by order would be silently wrong if two neighbouring tensors of one shape were swapped. The classifier of
    # a rightly loaded network is confident about a clear picture: here, scikit-learn's photograph of a flower.
    from sklearn.datasets import load_sample_image

    model = timm.create_model("tf_efficientnet_lite0").eval()
    packaged = torch.load(packaged_weights("tf_efficientnet_lite0"), weights_only=True).values()
    model.load_state_dict(dict(zip(model.state_dict(), packaged, strict=True)))
    from PIL import Image

    transform = timm.data.create_transform(**timm.data.resolve_data_config({}, model=model), is_training=False)
    image = Image.fromarray(np.asarray(load_sample_image("flower.jpg")))
    with torch.inference_mode():
        top = model(transform(image)[None]).softmax(1)[0].max()
    assert top > 0.3


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_weights_files_of_both_kinds_load_and_are_identity(tmp_path: Path, suffix: str) -> None:
    torch.manual_seed(1)
    model = models.get_model("mobilenet_v3_small")
    path = tmp_path / f"w.{suffix}"
    save_file(model.state_dict(), path) if suffix == "safetensors" else torch.save(
        {"state_dict": model.state_dict()}, path
    )
    encoder = open_encoder(f"torchvision:mobilenet_v3_small?weights={path}")
    assert (encoder.spec.pretrained, encoder.spec.weights, encoder.spec.dim) == (True, sha256_file(path), 576)
    model.classifier, pixels = torch.nn.Identity(), torch.rand(2, 3, 64, 64)
    with torch.inference_mode():  # not the weights themselves: normalisation is folded into them
        torch.testing.assert_close(encoder._model(pixels), model.eval()(pixels), rtol=1e-4, atol=1e-6)


def test_an_untrained_model_is_refused_unless_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(EncoderError, match="`allow_untrained=True`"):
        open_encoder("timm:test_resnet")
    encoder = open_encoder("timm:test_resnet", allow_untrained=True)
    assert encoder.spec.dim == timm.create_model("test_resnet").num_features  # and not classes: no classifier is left
    assert not encoder.spec.pretrained
    assert encoder.notes == (UNTRAINED,)
    again = open_encoder("timm:test_resnet", allow_untrained=True)
    assert again.spec == encoder.spec  # random weights, but always the same ones


def test_a_factory_that_says_it_is_untrained_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "untrained_factory.py").write_text(
        "from torch import nn\n"
        "def build():\n"
        "    m = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())\n"
        "    m.pretrained = False\n"
        "    return m\n"
    )
    monkeypatch.chdir(tmp_path)
    with pytest.raises(EncoderError, match="no pretrained weights"):
        open_encoder("untrained_factory:build")
    assert open_encoder("untrained_factory:build", allow_untrained=True).spec.dim == 3


class _Evil:
    def __reduce__(self):
        return (Path.touch, (Path("executed"),))


def test_pickled_code_in_a_weights_file_is_never_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evil.pth").write_bytes(pickle.dumps({"a": _Evil()}))
    torch.save({"a": _Evil()}, tmp_path / "evil2.pth")
    for name in ("evil.pth", "evil2.pth"):
        with pytest.raises(EncoderError, match="plain weights"):
            open_encoder(f"timm:test_resnet?weights={tmp_path / name}")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("timm:tf_efficientnet_lite", ["unknown timm model", "tf_efficientnet_lite0"]),
        ("torchvision:resnet19", ["unknown torchvision model", "resnet18"]),
        ("resnet18", ["unknown model", "timm:resnet18", "torchvision:resnet18"]),
        ("no_such_module:build", ["unknown", "no_such_module"]),
        ("timm:resnet18?sizes=3", ["unknown parameter 'sizes'", "weights, size"]),
        ("timm:resnet18?size=3", ["size=3, expected pixels from 16 to 4096"]),
        ("timm:resnet18?weights=/no/such/file", ["weights file not found", "/no/such/file"]),
    ],
)
def test_a_model_that_is_not_known_says_what_there_is(uri: str, words: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        open_encoder(uri)
    for word in words:
        assert word in str(caught.value)


def test_weights_of_another_architecture_are_refused(tmp_path: Path) -> None:
    save_file(models.get_model("mobilenet_v3_small").state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(EncoderError, match="does not fit"):
        open_encoder(f"timm:test_resnet?weights={tmp_path / 'w.safetensors'}")


def test_nan_features_are_an_error() -> None:
    encoder = open_encoder("timm:test_resnet", allow_untrained=True)
    next(encoder._model.parameters()).fill_(float("nan"))
    with pytest.raises(EncoderError, match="NaN or Inf"):
        encoder.embed(torch.zeros(2, *encoder.input_shape, dtype=torch.uint8))


def test_a_model_looks_at_the_size_it_is_told(default) -> None:
    small = open_encoder("timm:tf_efficientnet_lite0?size=64")
    assert small.input_shape == (3, 64, 64)
    assert (small.spec.model, small.spec.weights, small.spec.dim) == (default.spec.model, default.spec.weights, 1280)
    assert small.spec.preprocessing.resize == int(64 / 0.875)
    assert small.spec.to_dict() != default.spec.to_dict()  # other embeddings: another store
    pixels = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert small.embed(pixels).shape == (2, 1280)
    other = open_encoder("torchvision:resnet18?size=112", allow_untrained=True)
    assert (other.spec.preprocessing.resize, other.spec.preprocessing.crop) == (128, (112, 112))
    with pytest.raises(EncoderError, match=r"vit_b_16 does not take images of 64 x 64 pixels(.|\n)*") as raised:
        open_encoder("torchvision:vit_b_16?size=64", allow_untrained=True)
    assert "leave size= out" in raised.value.hint
