"""Models and factories of a user's own: run as they are, or told in one error with what to do."""

from __future__ import annotations

import importlib
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from gstds_cache.encoders.factory import open_encoder
from gstds_cache.errors import EncoderError, UsageError

MODELS = """
import random
import numpy
import torch
from torch import nn
from gstds_cache.encoders.preprocessing import Preprocessing

class Net(nn.Module):
    preprocessing = Preprocessing(resize=16, crop=(16, 16))
    def __init__(self, after=lambda f, x: f):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.after = nn.Conv2d(3, 16, 3, 2), after
    def forward(self, x):
        return self.after(self.conv(x).relu().mean(dim=(2, 3)), x)

class Plain(nn.Module):
    def __init__(self, inputs=3):
        super().__init__()
        self.conv = nn.Conv2d(inputs, 16, 3, 8)
    def forward(self, x):
        return self.conv(x).relu().mean(dim=(2, 3))

def raises(error):
    def after(f, x):
        raise error  # here
    return Net(after)

class Mute(Exception):
    def __str__(self):
        raise ValueError

def with_(**attributes):
    net = Net()
    for name, value in attributes.items():
        setattr(net, name, value)
    return net

class View(Net):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(16 * 7 * 7, 8)
    def forward(self, x):
        maps = self.conv(x)
        return self.head(maps.view(len(maps), -1))

class Volumes(Net):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv3d(3, 8, (1, 3, 3))
    def forward(self, x):
        return self.conv(x.unsqueeze(2)).relu().mean(dim=(2, 3, 4))

class Extra(Net):
    def get_extra_state(self):
        return {"scale": (1, 2)}
    def set_extra_state(self, state):
        pass

class Drawn(Net):
    def __init__(self):
        super().__init__(lambda f, x: f * self.scale)
        self.scale = torch.from_numpy(numpy.random.rand(16)).float() + random.random()

class Panic(BaseException):
    pass

class NoEval(Net):
    def eval(self):
        raise ValueError("never")

class Keyword(Net):
    def forward(self, *, pixel_values):
        return super().forward(pixel_values)

def export(batch, **options):
    return torch.export.export(Plain().eval(), (torch.zeros(batch, 3, 224, 224),), **options)

DYNAMIC = {"dynamic_shapes": ({0: torch.export.Dim("batch")},)}
MAKE = {
    "float16": lambda: Net().half(),
    "bfloat16": lambda: Net().bfloat16(),
    "float64": lambda: Net().double(),
    "script": lambda: torch.jit.script(Plain()),
    "trace": lambda: torch.jit.trace(Plain(), torch.zeros(1, 3, 224, 224)),
    "compiled": lambda: torch.compile(Net(), backend="eager"),
    "exported": lambda: export(2, **DYNAMIC),
    "exported module": lambda: export(2, **DYNAMIC).module(),
    "parallel": lambda: nn.DataParallel(Net()),
    "lazy": lambda: nn.Sequential(nn.LazyConv2d(4, 3, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
    "integers": lambda: Net(lambda f, x: (f * 100).int() + 1),
    "another size": lambda: nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 8)),
    "gray": lambda: Plain(1),
    "fixed batch": lambda: export(16).module(),
    "dict": lambda: Net(lambda f, x: {"last": x, "pooled": f}),
    "tuple": lambda: Net(lambda f, x: (f, f)),
    "nothing": lambda: Net(lambda f, x: None),
    "numpy": lambda: Net(lambda f, x: f.numpy()),
    "maps": lambda: Net(lambda f, x: x),
    "one number": lambda: Net(lambda f, x: f[:, 0]),
    "no feature": lambda: Net(lambda f, x: f[:, :0]),
    "complex": lambda: Net(lambda f, x: f + 0j),
    "one row": lambda: Net(lambda f, x: f[:1]),
    "sparse": lambda: Net(lambda f, x: f.to_sparse()),
    "keyword": lambda: Keyword(),
    "meta": lambda: Net().to("meta"),
    "no eval": lambda: NoEval(),
    "TypeError": lambda: raises(TypeError("mine")),
    "KeyError": lambda: raises(KeyError("mine")),
    "IndexError": lambda: raises(IndexError("mine")),
    "NotImplementedError": lambda: raises(NotImplementedError("mine")),
    "OSError": lambda: raises(OSError("mine")),
    "mute": lambda: raises(Mute()),
    "function": lambda: lambda x: x,
    "class": lambda: Net,
    "None": lambda: None,
    "pretrained": lambda: with_(pretrained="false"),
    "preprocessing": lambda: with_(preprocessing={"crop": 224}),
    "crop": lambda: Preprocessing(crop=(0, 224)),
    "std": lambda: Preprocessing(std=(0.0, 1.0, 1.0)),
    "mean": lambda: Preprocessing(mean=(float("nan"), 1.0, 1.0)),
    "factory TypeError": lambda: len(3),
    "factory KeyError": lambda: {}["mine"],
    "factory import": lambda: __import__("surely_not_installed"),
    "factory file": lambda: torch.load("/no/such/file"),
}

def build(what, **_):
    return MAKE[what]()

def leave():
    raise SystemExit(7)

model = Net()
"""

HERE = MODELS.splitlines().index("        raise error  # here") + 1


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = f"own_models_{abs(hash(tmp_path)) % 10**9}"
    (tmp_path / f"{name}.py").write_text(MODELS)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.import_module(name)
    return name


RUN = ["float16", "bfloat16", "float64", "script", "trace", "compiled", "exported", "exported module", "parallel"]


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning", "ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("what", [*RUN, "lazy", "integers"])
def test_kinds_of_models_that_are_run(module: str, what: str) -> None:
    encoder = open_encoder(f"{module}:build?what={what}")
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (4, *encoder.input_shape), dtype=torch.uint8, generator=generator)
    rows = encoder.embed(pixels)
    torch.testing.assert_close(torch.linalg.vector_norm(rows, dim=1), torch.ones(4))
    if what in {"float16", "bfloat16", "float64"}:
        assert (encoder.spec.autocast, what in encoder.notes[0]) == (what, True)  # other features: another fingerprint
        plain = open_encoder(f"{module}:Net")
        assert plain.spec.autocast == "none"
        assert (rows * plain.embed(pixels)).sum(1).min() > 0.999


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("another size", r"given float32 \[2, 3, 224, 224\], the model failed: RuntimeError(.|\n)*crop=\(H, W\)"),
        ("gray", r"failed: RuntimeError: .* to have 1 channels(.|\n)*number of channels"),
        ("fixed batch", r"== 16(.|\n)*a fixed B"),
        ("dict", r"got a dict of 'last', 'pooled'(.|\n)*output\['pooled'\]"),
        ("tuple", r"got a tuple of 2(.|\n)*output\[0\]"),
        ("nothing", "got a NoneType for 2 images"),
        ("numpy", "got a ndarray for 2 images"),
        (
            "maps",
            r"got float32 \[2, 3, 16, 16\] for 2 images, expected pooled features \[2, D\](.|\n)*mean\(dim=\(2, 3\)",
        ),
        ("one number", r"got float32 \[2\](.|\n)*keep a row for each image"),
        ("no feature", r"got float32 \[2, 0\]"),
        ("complex", r"got complex64 \[2, 16\]"),
        ("one row", r"got float32 \[1, 16\] for 2 images"),
        ("keyword", "failed: TypeError: .*positional"),
        ("meta", "2 of its tensors are on the meta device"),
        ("no eval", r"putting the model in eval mode.*ValueError: never \(.*own_models_\d+\.py:\d+\)"),
        *(
            (f"{kind}Error", rf"failed: {kind}Error: '?mine'? \(.*\.py:{HERE}\)")
            for kind in ("Type", "Key", "Index", "OS")
        ),
        ("NotImplementedError", rf"failed: NotImplementedError: mine \(.*\.py:{HERE}\)"),
        ("mute", "failed: Mute: it gives no reason"),
        ("function", "returned a function, expected a torch.nn.Module"),
        ("class", r"returned the class Net, expected(.|\n)*an instance"),
        ("None", "returned a NoneType"),
        ("pretrained", "its attribute pretrained is 'false', expected True or False"),
        ("preprocessing", "its attribute preprocessing is a dict"),
        ("crop", r"Preprocessing: crop: got \(0, 224\)"),
        ("std", r"Preprocessing: std: got \(0.0"),
        ("mean", r"Preprocessing: mean: got \(nan"),
        ("factory TypeError", r"the call .* failed: TypeError: object of type 'int' has no len\(\) \(.*\.py:\d+\)"),
        ("factory KeyError", r"failed: KeyError: 'mine' \(.*\.py:\d+\)"),
        ("factory import", "failed: ModuleNotFoundError: No module named 'surely_not_installed'"),
        ("factory file", "failed: FileNotFoundError: .*no/such/file"),
    ],
)
def test_what_is_refused_is_one_error_that_says_what_to_do(module: str, what: str, words: str) -> None:
    with pytest.raises(EncoderError, match=words) as caught:
        open_encoder(f"{module}:build?what={what}")
    assert caught.value.exit_code == 2
    assert caught.value.hint


def test_features_that_cannot_be_normalised_are_the_models_error(module: str) -> None:
    encoder = open_encoder(f"{module}:build?what=sparse")
    with pytest.raises(EncoderError, match="the model failed"):
        encoder.embed(torch.zeros(4, 3, 16, 16, dtype=torch.uint8))


@pytest.mark.parametrize("what", ["View", "Volumes", "Extra"])
def test_models_that_take_no_channels_last_pixels_or_keep_more_than_tensors(module: str, what: str) -> None:
    pixels = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8)
    one, other = (open_encoder(f"{module}:{what}") for _ in range(2))
    assert torch.equal(one.embed(pixels), other.embed(pixels))
    assert one.spec == other.spec


@pytest.mark.parametrize("uri", ["torchvision:resnet18", "timm:resnet18"])
def test_without_a_home_nothing_is_downloaded_to_a_folder_named_so(monkeypatch, tmp_path, uri: str) -> None:
    def nobody(_path: object) -> None:
        raise RuntimeError("Could not determine home directory.")

    for name in ("TORCH_HOME", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "expanduser", nobody)
    monkeypatch.setattr(Path, "home", lambda: nobody(None))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(EncoderError, match="HOME is not set") as caught:
        open_encoder(uri)
    assert "TORCH_HOME" in caught.value.hint
    assert list(tmp_path.iterdir()) == []


def test_a_factory_that_draws_gives_the_same_model_each_time(module: str) -> None:
    pixels = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8)
    before = np.random.get_state()[1].tolist()  # noqa: NPY002
    one, other = (open_encoder(f"{module}:Drawn") for _ in range(2))
    assert torch.equal(one.embed(pixels), other.embed(pixels))
    assert np.random.get_state()[1].tolist() == before  # noqa: NPY002


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("lambda f, x: torch.nested.nested_tensor(list(f))", "got a nested tensor for 2 images"),
        ("lambda f, x: (_ for _ in ()).throw(Panic('rust'))", "the model failed: Panic: rust"),
    ],
)
def test_what_is_no_tensor_and_what_is_no_exception(module: str, monkeypatch, what: str, words: str) -> None:
    models = importlib.import_module(module)
    monkeypatch.setitem(models.MAKE, "odd", lambda: models.Net(eval(what, vars(models))))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of nested tensors
        with pytest.raises(EncoderError, match=words):
            open_encoder(f"{module}:build?what=odd")


def test_a_wrong_call_is_told_from_an_error_inside(module: str) -> None:
    for query, words in (("", "missing a required argument: 'what'"), ("?what=TypeError&what2=1", "mine")):
        with pytest.raises(EncoderError, match=words) as caught:
            open_encoder(f"{module}:build{query}")
        assert ("passed to the factory by name" in caught.value.hint) is not bool(query)
    with pytest.raises(EncoderError, match=r"itself a Net, expected a function(.|\n)*return model"):
        open_encoder(f"{module}:model")
    with pytest.raises(EncoderError, match=r"leave\(\) ended the program: SystemExit\(7\) \(.*\.py:\d+\)"):
        open_encoder(f"{module}:leave")


def test_a_script_that_parses_arguments_when_it_is_imported(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["gstds-embed", "--of-ours"])
    name = f"script_{tmp_path.name}"
    Path(f"{name}.py").write_text("import argparse\nargparse.ArgumentParser().parse_args()\n")
    with pytest.raises(
        UsageError, match=rf"importing {name} ended the program: SystemExit\(2\) \({name}\.py:2\)"
    ) as caught:
        open_encoder(f"{name}:build")
    assert "__main__" in caught.value.hint


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("def build(:", r"failed: SyntaxError: .* \(.*:1\)"),
        ("x = 1\nundefined", r"failed: NameError: name 'undefined' is not defined \(.*broken_\d+\.py:2\)"),
        ("import surely_not_installed", "imports what is not installed: No module named 'surely_not_installed'"),
        ("raise ValueError('mine\\nsecond')", r"failed: ValueError: mine \(.*:1\)"),
        ("from torch import surely_not_there", "failed: ImportError: cannot import name"),
        ("def __getattr__(name): return 1 / 0", "failed: ZeroDivisionError"),
        ("\0", "failed: (SyntaxError|ValueError): "),
    ],
)
@pytest.mark.parametrize("what", ["model", "data set", "rule"])
def test_a_module_that_cannot_be_imported(tmp_path, monkeypatch, what: str, text: str, words: str) -> None:
    from gstds_cache.data.sources import open_source
    from gstds_cache.selection.rules import find_rule

    name = f"broken_{abs(hash((tmp_path, text))) % 10**9}"
    (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    opening = {"model": open_encoder, "data set": open_source, "rule": find_rule}[what]
    with pytest.raises(UsageError, match=words):
        opening(f"{name}:build")
