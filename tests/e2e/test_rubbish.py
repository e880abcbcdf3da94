"""Every option and argument of every command, given rubbish: one clear error, or the work; never a traceback or a hang.

The usual tests give each option some values, in turn; ``make faults`` gives each all of them.
"""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import click
import numpy as np
import pytest
from forked import ALWAYS, FORKS, Forks
from gstds_cache.cli import cache_command, embed_command, select_command, train_command
from PIL import Image

COMMANDS: dict[str, click.Command] = {
    "gstds-embed": embed_command.main,
    "gstds-select": select_command.main,
    "gstds-train": train_command.main,
    **{f"gstds-cache {name}": command for name, command in cache_command.main.commands.items()},
}
WORK = {
    "gstds-embed": "imagefolder:photos --model m:build --cache new.store --batch-size 4 --workers 0",
    "gstds-select": "s --batch-size 8 --knn 3 --epochs 2 --out new.arrow",
    "gstds-train": "imagefolder:photos --selection s.arrow --arch conv3 --image-size 16 --workers 0 --out new",
    "gstds-cache ls": ".",
    "gstds-cache info": "s",
    "gstds-cache verify": "s --level sample",
    "gstds-cache repair": "s",
    "gstds-cache export": "s new.npy",
    "gstds-cache report": "s.arrow --out new.html",
    "gstds-cache rm": "s --yes",
    "gstds-cache audit": "s --out new --threads 1",
    "gstds-cache import": "v.npy --out new.store",
    "gstds-cache append": "s imagefolder:photos --workers 0",
    "gstds-cache hide": "s 3",
}
LONG = ("gstds-cache audit",)  # in the long fault suite alone: their own tests take their wrong values
FILES = ("empty", "noise", "text.csv", "pickled.npy", "objects.npy", "packed.npz", "photos", "nothing/there", "loop")
NUMBERS = (
    *("", "rubbish", "-1", "0", "2147483648", "-9223372036854775809", "99999999999999999999", "1" * 5000, "1e400"),
    *("nan", "inf", "-inf", "1.5", "0x10", "\uff11", "1_0"),
)
TEXTS = (
    *("", " ", "rubbish", "-", "?", ":", "::", "?x", "x?y=1&y=2", "\u00e9\u2603", "\udcff\udcfe", "line\nline"),
    *("x" * 300, "~nobody/x", "s3:/x", "s3://", "S3://no.such.bucket/x", "file://x", "http://x", "/dev/null"),
    *("/dev/full", "/proc/self/mem", "{}%s$(x)", "0", "nan", *FILES),
)
DATASETS = (
    *("imagefolder:", "imagefolder:empty", "imagefolder:nothing", "imagefolder:hollow", "imagefolder:/proc/self"),
    *("imagefolder:photos?split=x", "imagefolder:photos?split=train&holdout=nan", "imagefolder:photos?x=1"),
    *("imagefolder:photos?split=train&holdout=0.999", "imagefolder:photos?split", "digits?x=1", "torchvision:"),
    *("torchvision:nothing", "torchvision:CIFAR10", "torchvision:CIFAR10?root=photos", "torchvision:FakeData?size=x"),
    *("torchvision:FakeData?root=.&size=-1", "torchvision:Kinetics?root=photos", "os:getcwd", "os:", "json:loads"),
    *("builtins:list", "builtins:dict", "m:nothing", "m:build", "m:raises", "m:leaves", "m:generator", "m:numbers"),
    *("m:short", "m:deep?x=1", "m:deep?depth=1", "m:text", "broken:x", "script:x", "a.b.c:d", "module:m:numbers"),
)
MODELS = (
    *("timm:", "timm:nothing", "timm:resnet18", "torchvision:vgg16", "torchvision:nothing", "m:", "m:nothing"),
    *("m:raises", "m:numbers", "m:leaves", "os:getcwd", "json:dumps", "builtins:list", "broken:x", "script:x"),
    *("torch.nn:Identity", "m:build?x=1&x=2", "m:build?size=16", "timm:tf_efficientnet_lite0?size=-1"),
    *("timm:tf_efficientnet_lite0?size=1e9", *(f"m:build?weights={name}" for name in (*FILES, "~nobody/x"))),
)
BEYOND: dict[str, tuple[str, ...]] = {  # what a parameter takes beside plain text
    **dict.fromkeys(("dataset", "--dataset", "--eval"), DATASETS),
    "--model": MODELS,
    "--guidance": (
        *(f"file:{name}" for name in (*FILES, "scores.npy", "~nobody/x")),
        *("probe?cutoff=nan", "probe?cutoff=-1", "probe?x=1", "uncertainty?cutoff=0.1"),
    ),
    "--schedule": (
        *(f"file:{name}" for name in (*FILES, "~nobody/x")),
        *("constant:", "constant:nan", "constant:2", "constant:-inf", "linear:0.5", "step:", "budget:-1", "budget:nan"),
        *("budget:1e30", "budget:0", "+full:0.5", "constant:0.5+full:2", "constant:0.5+full:nan", "cosine:0.1:inf"),
    ),
    "--order": ("window:", "window:-1", "window:0", "window:x", "window:99999999999999999999", "window:1"),
    "--rule": ("m:raises", "m:leaves", "m:text", "m:nothing", "broken:x", "script:x", "os:getcwd"),
    "--serve": (
        *("localhost", "localhost:", "localhost:-1", "localhost:99999", "localhost:x", "999.999.999.999:1", "[::1"),
        *("0.0.0.0:0", "nobody.invalid:0"),
    ),
    "--selection": ("grpc://", "grpc://localhost:1", "grpc://x:y", "grpc://localhost:1/x?y", "s", "s.arrow/x"),
    "--arch": ("timm:", "timm:nothing", "torchvision:", "torchvision:nothing", "resnet18?x", "vit_b_16", "m:build"),
    "--device": ("cuda:99", "cuda:-1", "cuda:x", "meta", "mps", "cpu:3", "xla"),
    "--out": ("s", "s.arrow", "new/new", "empty/new", "photos/new"),
    "--cache": ("s.arrow", "empty/new", "s/new"),
    "file": ("x.npy", "x.parquet", "x.xyz", "nothing/x.npy", "photos", "\udcff.npy", "empty/x.npy", "/dev/full.npy"),
    "what": ("s", "run", "s.arrow/x"),
    **dict.fromkeys(
        ("--ids", "--labels"), ("pickled.npy", "scores.npy", "v.npy", "s.arrow?column=kept", "x.txt?column=y")
    ),
    "vectors": ("pickled.npy", "objects.npy", "scores.npy", "s.arrow", "x.safetensors"),
    "rows": ("3-1", "99", "0-99", "0-23", "1,,2", "9" * 30, "0-" + "9" * 18),
    "--scores": ("s", "s.arrow/x"),
}
ENVIRONMENT = {
    "GSTDS_CACHE": ("", "empty", "/proc/x", "/dev/null/x", "\udcff", "~nobody/x", "x" * 300, "loop", "s3://x/y"),
    "HOME": ("", "empty", "/proc/x", "nothing/there", "\udcff"),
    "TMPDIR": ("", "empty", "/proc/x", "nothing/there", "loop"),
    "AWS_ENDPOINT_URL": ("rubbish", "http://localhost:1"),
    "CUDA_VISIBLE_DEVICES": ("rubbish",),
    "COLUMNS": ("rubbish", "-1"),
}
MODULE = """
import sys
import torch
from gstds_cache.encoders.preprocessing import Preprocessing
class Tiny(torch.nn.Module):
    preprocessing = Preprocessing(resize=16, crop=(16, 16))
    def forward(self, x): return torch.nn.functional.adaptive_avg_pool2d(x, 2).flatten(1)
def build(**_): return Tiny()
def raises(*_, **__): raise KeyError("made to fail")
def leaves(*_, **__): sys.exit(7)
def generator(**_): return ((None, row) for row in range(4))
def numbers(**_): return list(range(8))
def short(**_): return [(None,)] * 4
def deep(depth, **_): return deep(depth, **_)
def text(*_, **__): return "images"
"""


def name_of(parameter: click.Parameter) -> str:
    return (
        (parameter.opts or parameter.secondary_opts)[0] if isinstance(parameter, click.Option) else str(parameter.name)
    )


def values_for(parameter: click.Parameter) -> tuple[str, ...]:
    if isinstance(parameter, click.Option) and parameter.is_flag:
        return ()
    numeric = isinstance(parameter.type, click.types.IntParamType | click.types.FloatParamType)
    values = NUMBERS if numeric or name_of(parameter) == "--workers" else TEXTS
    return values + BEYOND.get(name_of(parameter), ())


def words_with(command: str, parameter: click.Parameter, value: str | None) -> list[str]:
    """The command's usual words, with ``value`` for this parameter in place of what it is there; a flag has none."""
    words, name = WORK[command].split(), name_of(parameter)
    if isinstance(parameter, click.Option):
        if name in words:
            at = words.index(name)
            del words[at : at + (1 if parameter.is_flag else 2)]
        return [*command.split(), *words, name, *([] if value is None else [value])]
    arguments = [name_of(other) for other in COMMANDS[command].params if isinstance(other, click.Argument)]
    words[arguments.index(name)] = str(value)
    if str(value).startswith("-"):  # else it would be taken for an option
        words = [*words[len(arguments) :], "--", *words[: len(arguments)]]
    return [*command.split(), *words]


def cases(most: int | None) -> Iterator[tuple[str, list[str]]]:
    """What is varied, and the words; ``most`` values of each, evenly from all there are, or all."""
    commands = [command for command in WORK if most is None or command not in LONG]
    for number, (command, parameter) in enumerate((c, p) for c in commands for p in COMMANDS[c].params):
        for value in _some(values_for(parameter), most, number) or [None]:
            yield f"{command} {name_of(parameter)}", words_with(command, parameter, value)
    for number, (name, values) in enumerate(ENVIRONMENT.items()):
        for command in ("gstds-embed", "gstds-select", "gstds-train", "gstds-cache ls", "gstds-cache report"):
            for value in _some(values, most and 1, number):
                yield f"${name}", [f"{name}={value}", *command.split(), *WORK[command].split()]


def _some(values: tuple[str, ...], most: int | None, first: int) -> list[str]:
    if most is None or len(values) <= most:
        return list(values)
    step = len(values) / most
    return [values[(first + int(place * step)) % len(values)] for place in range(most)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, forks: Forks) -> Path:
    """A folder ``inputs`` with a data set, a store, a selection, a run, and files that are not what they should be."""
    root = tmp_path_factory.mktemp("rubbish")
    inputs = root / "inputs"
    for name in ("a", "b"):
        (inputs / "photos" / name).mkdir(parents=True)
        for number in range(12):
            pixels = np.random.default_rng([ord(name), number]).integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(inputs / "photos" / name / f"{number}.png")
    (inputs / "hollow" / "a").mkdir(parents=True)
    (inputs / "m.py").write_text(MODULE)
    (inputs / "broken.py").write_text("def x(:")
    (inputs / "script.py").write_text("import argparse\nargparse.ArgumentParser().parse_args()\n")
    (inputs / "empty").touch()
    (inputs / "noise").write_bytes(np.random.default_rng(0).bytes(3000))
    (inputs / "text.csv").write_text("path,label\nphotos/a/0.png,a\n")
    (inputs / "pickled.npy").write_bytes(pickle.dumps([1, 2, 3]))
    np.save(inputs / "objects.npy", np.array([None, {}], dtype=object), allow_pickle=True)
    np.save(inputs / "scores.npy", np.full(24, 1e300))
    np.save(inputs / "v.npy", np.random.default_rng(1).normal(size=(24, 8)))
    np.savez(inputs / "packed.npz", x=np.arange(24))
    (inputs / "loop").symlink_to("loop")
    for words in (
        "gstds-embed imagefolder:photos --model m:build --cache s --batch-size 4 --shard-rows 8 --workers 0",
        "gstds-select s --batch-size 8 --knn 3 --epochs 1 --out s.arrow",
        "gstds-train imagefolder:photos --selection s.arrow --arch conv3 --image-size 16 --out run",
    ):
        process = forks.start(words.split(), cwd=inputs, env=os.environ | {"GSTDS_CACHE": str(root / "stores")})
        told = process.communicate(120)
        assert process.returncode == 0, told
    return root


def outcomes(folder: Path, cases: list[list[str]]) -> list[dict[str, object]]:
    (folder / "cases.json").write_text(json.dumps(cases))
    driver = Path(__file__).parents[1] / "shared" / "rubbish_driver.py"
    results = folder / "outcomes.jsonl"
    words = [FORKS.executable(), driver, folder, folder / "cases.json", results]
    subprocess.run(words, env=os.environ | ALWAYS, check=True)
    return [json.loads(line) for line in results.read_text().splitlines()]


def faults_in(code: int, stdout: str, stderr: str) -> list[str]:
    """What is wrong with how a command ended."""
    found = ["a traceback"] if "Traceback (most recent call last)" in stdout + stderr else []
    if code not in {0, 2, 3, 4, 5}:
        return [*found, f"exit code {code}"]
    errors = sum(line.lower().startswith("error:") for line in stderr.splitlines())
    return [*found, f"{errors} errors"] if code and errors != 1 else found


def walk(folder: Path, most: int | None) -> tuple[Counter[str], list[str]]:
    """How many values each option was given, and what went wrong."""
    varied = list(cases(most))
    wrong = []
    for (_, words), outcome in zip(varied, outcomes(folder, [words for _, words in varied]), strict=True):
        told = [str(outcome[key]) for key in ("stdout", "stderr")]
        if faults := faults_in(int(str(outcome["code"])), *told):
            wrong.append(f"{words}: {', '.join(faults)} after {outcome['seconds']} s\n    {told[1][-700:]}")
    counts = Counter(option for option, _ in varied)
    print(f"{len(counts)} options and variables, {counts.total()} command lines, {len(wrong)} that do not end well")
    return counts, wrong


def test_every_option_takes_rubbish(folder) -> None:
    counts, wrong = walk(folder, 2)
    assert not wrong, "\n".join(wrong)
    assert len(counts) >= 105
    assert sum(counts.values()) >= 210


@pytest.mark.faults
def test_every_option_takes_all_rubbish(folder) -> None:
    counts, wrong = walk(folder, None)
    assert not wrong, "\n".join(wrong)
    assert sum(counts.values()) >= 2100


def test_the_walk_sees_what_it_looks_for() -> None:
    ends = {
        "raise KeyError('x')": ["a traceback", "exit code 1"],
        "import os; os.abort()": ["exit code -6"],
        "import sys; sys.exit(7)": ["exit code 7"],
        "import sys; sys.exit(2)": ["0 errors"],
        "import sys; print('error: a\\nerror: b', file=sys.stderr); sys.exit(4)": ["2 errors"],
        "import sys; print('error: a', file=sys.stderr); sys.exit(4)": [],
    }
    for program, faults in ends.items():
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
        assert faults_in(done.returncode, done.stdout, done.stderr) == faults
