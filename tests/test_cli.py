"""LightningCLI builds the callback from a config or the command line, and writes it back."""

from __future__ import annotations

import functools
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from pytorch_lightning.cli import LightningCLI
from pytorch_lightning.demos.boring_classes import BoringModel

from wd_callbacks.lightning import DecoupledWD
from wd_callbacks.schedules import (
    Cosine,
    Exponential,
    Join,
    Linear,
    Normalized,
    Polynomial,
    Restarts,
    Steps,
    Timescale,
)

EXAMPLE = Path(__file__).parents[1] / "examples" / "lightning_cli"

pytestmark = [
    pytest.mark.filterwarnings("ignore:LightningCLI's args parameter"),
    pytest.mark.filterwarnings(r"ignore:[\s\S]*was deprecated:DeprecationWarning"),
]


# The example, as a user runs it


@pytest.mark.slow
def test_the_example_runs(package, tmp_path):
    def example(*args):
        return subprocess.run(
            [sys.executable, "main.py", *map(str, args)],
            cwd=tmp_path,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        ).stdout

    script = (EXAMPLE / "main.py").read_text().replace("pytorch_lightning", package.__name__)
    (tmp_path / "main.py").write_text(script)
    config = EXAMPLE / "config.yaml"
    if package.__name__ == "pytorch_lightning":  # by the config that it prints
        printed = example("fit", "--config", config, "--print_config")
        asked = yaml.safe_load(config.read_text())["trainer"]["callbacks"][0]
        (callback,) = yaml.safe_load(printed)["trainer"]["callbacks"]
        assert callback["class_path"] == asked["class_path"]
        assert callback["init_args"].items() >= asked["init_args"].items()
        config = tmp_path / "printed.yaml"
        config.write_text(printed)
    tiny = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=2"]
    output = example("fit", "--config", config, *tiny)
    (row,) = [line.split() for line in output.splitlines() if line.startswith("0 ")]
    assert row[:2] == ["0", "0.01"]
    assert {"lr", "(4,736)", "(202)"} <= set(row)  # the Linear weights decay, nothing else


# The form of each argument


@pytest.fixture
def given(monkeypatch):
    """The arguments with which the callback was built last."""
    arguments, init = {}, DecoupledWD.__init__

    @functools.wraps(init)
    def record(self, *args, **kwargs):
        arguments.clear()
        arguments.update(inspect.signature(init).bind(self, *args, **kwargs).arguments)
        init(self, *args, **kwargs)

    monkeypatch.setattr(DecoupledWD, "__init__", record)
    return arguments


def parsed(*args):
    """The parsed command line, with everything in it built."""
    return LightningCLI(
        BoringModel,
        run=False,
        save_config_callback=None,
        seed_everything_default=False,
        trainer_defaults={"logger": False, "enable_checkpointing": False, "accelerator": "cpu"},
        args=list(args),
    )


def build(given, *args):
    """The arguments that the command line gives, which survive that its config is written."""
    cli = parsed("--trainer.callbacks+=wd_callbacks.lightning.DecoupledWD", *args)
    first = {k: v for k, v in given.items() if k != "self"}
    written = cli.parser.dump(cli.config, skip_none=False)  # as LightningCLI saves it
    parsed(f"--config={written}")
    assert {k: v for k, v in given.items() if k != "self"} == first
    return first


def spec(name, **init_args):
    """A schedule as a config names it, in YAML on one line."""
    path = f"wd_callbacks.schedules.{name}"
    return {"class_path": path, "init_args": init_args}


def option(name, value):
    text = yaml.safe_dump(value, default_flow_style=True, width=10**6).removesuffix("\n...\n")
    return f"--trainer.callbacks.{name}={text.strip()}"


COSINE, LINEAR = spec("Cosine", start=0.1, end=0.01), spec("Linear", start=0, end=0.1)
NORMALIZED = spec("Normalized", wd_norm=0.05)

FORMS = [
    ("wd", 0.1, 0.1),
    ("wd", 0, 0),
    ("wd", None, None),
    ("wd", [0.1, 0, 0.2], [0.1, 0, 0.2]),
    ("wd", [COSINE, 0.1], (Cosine(0.1, 0.01), 0.1)),
    ("wd", {0: 1e-4, 1: 0.1}, {0: 1e-4, 1: 0.1}),
    (
        "wd",
        {0: COSINE, 1: [0.1, LINEAR], 2: None, 3: [0.1]},
        {0: Cosine(0.1, 0.01), 1: (0.1, Linear(0, 0.1)), 2: None, 3: [0.1]},
    ),
    ("wd", COSINE, Cosine(0.1, 0.01)),
    ("wd", spec("Exponential", start=1e-4, end=1e-2), Exponential(1e-4, 1e-2)),
    ("wd", spec("Polynomial", start=1, end=0, power=2), Polynomial(1, 0, 2)),
    ("wd", spec("Steps", values={0.0: 0.1, 0.5: 0.01}), Steps({0.0: 0.1, 0.5: 0.01})),
    ("wd", spec("Steps", values={0: 1, 0.5: 0}), Steps({0: 1, 0.5: 0})),
    (
        "wd",
        spec("Join", pieces=[[0.1, LINEAR], [0.9, COSINE]]),
        Join([(0.1, Linear(0, 0.1)), (0.9, Cosine(0.1, 0.01))]),
    ),
    ("wd", spec("Restarts", schedule=COSINE, cycles=3), Restarts(Cosine(0.1, 0.01), 3)),
    (
        "wd",
        spec("Restarts", schedule=NORMALIZED, cycles=3, mult=2),
        Restarts(Normalized(0.05), 3, 2),
    ),
    (
        "wd",
        spec("Join", pieces=[[0.5, spec("Restarts", schedule=LINEAR, cycles=2)], [0.5, COSINE]]),
        Join([(0.5, Restarts(Linear(0, 0.1), 2)), (0.5, Cosine(0.1, 0.01))]),
    ),
    ("wd", NORMALIZED, Normalized(0.05)),
    ("wd", spec("Timescale", epochs=3), Timescale(epochs=3)),
    ("wd", spec("Timescale", steps=100), Timescale(steps=100)),
    ("wd", "torch.relu", torch.relu),
    ("wd", {"backbone.*": 0.05, "*": 0}, {"backbone.*": 0.05, "*": 0}),
    (
        "wd",
        {"head.*": COSINE, "torch.nn.LayerNorm": 0.0, "*": 1e-4},
        {"head.*": Cosine(0.1, 0.01), "torch.nn.LayerNorm": 0.0, "*": 1e-4},
    ),
    (
        "wd",
        {"bias": spec("Steps", values={0.0: 0.1, 0.5: 0.01}), "vector": LINEAR},
        {"bias": Steps({0.0: 0.1, 0.5: 0.01}), "vector": Linear(0, 0.1)},
    ),
    ("scale_by", "lr_ratio", "lr_ratio"),
    ("scale_by", "none", "none"),
    ("scale_by", ["lr", "none"], ["lr", "none"]),
    ("scale_by", ["lr", "torch.relu"], ["lr", torch.relu]),
    ("max_lr", 0.1, 0.1),
    ("max_lr", [0.1, 1], [0.1, 1]),
    ("quantum", 0, 0),
    ("quantum", 1e-6, 1e-6),
    ("verbose", True, True),
    ("cautious", True, True),
    ("anchor", "initial", "initial"),
    ("anchor", None, None),
    ("exclude", "bias", "bias"),
    ("exclude", ["vector", "marked"], ["vector", "marked"]),
    ("exclude", ["bias", "torch.nn.LayerNorm"], ["bias", "torch.nn.LayerNorm"]),
    ("exclude", ["*.bias", "layer.weight"], ["*.bias", "layer.weight"]),
    ("optimizers", 0, 0),
    ("optimizers", [0, 1], [0, 1]),
]


@pytest.mark.parametrize(("name", "value", "expected"), FORMS)
def test_forms(given, name, value, expected):
    assert build(given, option(name, value))[name] == expected


@pytest.mark.parametrize("number", ["1e-4", "1E-4", ".0001", "0.0001"])
def test_small_numbers(given, number):  # YAML 1.1 takes the first for text
    assert build(given, f"--trainer.callbacks.wd={number}")["wd"] == 1e-4


PREDICATE = """
class Large:
    def __init__(self, least: int) -> None:
        self.least = least

    def __call__(self, name, parameter):
        return parameter.numel() > self.least
"""


def test_a_predicate(given, tmp_path, monkeypatch):
    (tmp_path / "predicates.py").write_text(PREDICATE)
    monkeypatch.syspath_prepend(tmp_path)
    entry = {"class_path": "predicates.Large", "init_args": {"least": 9}}
    callback = "--trainer.callbacks+=wd_callbacks.lightning.DecoupledWD"
    cli = parsed(callback, option("exclude", ["bias", entry]))
    word, predicate = given["exclude"]
    assert word == "bias"
    assert predicate("weight", torch.ones(10))
    (written,) = yaml.safe_load(cli.parser.dump(cli.config))["trainer"]["callbacks"]
    assert written["init_args"]["exclude"] == ["bias", entry]


OVERRIDES = [
    (["wd.end=0.05"], Cosine(0.1, 0.05)),
    (["wd=0.2"], 0.2),
    (["wd=null"], None),
    (["wd=[0.2, 0.3]"], [0.2, 0.3]),
    (["wd={0: 0.2}"], {0: 0.2}),
    (["wd={head.*: 0.2}"], {"head.*": 0.2}),
    (["wd=wd_callbacks.schedules.Linear", "wd.start=0", "wd.end=1"], Linear(0, 1)),
]


@pytest.mark.parametrize(("options", "expected"), OVERRIDES)
def test_the_command_line_changes_a_schedule(given, options, expected):
    changes = [f"--trainer.callbacks.{text}" for text in options]
    assert build(given, option("wd", COSINE), *changes)["wd"] == expected


def test_entries_are_added_one_by_one(given):
    added = ["wd+=0.1", "wd+=0.2", "exclude+=bias", "exclude+=norm"]
    arguments = build(given, *[f"--trainer.callbacks.{text}" for text in added])
    assert (arguments["wd"], arguments["exclude"]) == ([0.1, 0.2], ["bias", "norm"])


WRONG = [
    ("wd", -1, "wd.* -1"),
    ("wd", True, "float"),
    ("wd", "fast", "fast"),
    ("wd", spec("Linear", start=0.1, end=-1), "end.* -1"),
    ("wd", spec("Linear", start=0.1, stop=0), "stop"),
    ("wd", {"*": -1}, "wd.* -1"),
    ("wd", {"*": 0.1, 0: 0.1}, "wd"),
    ("anchor", "zero", "initial"),
    ("cautious", "maybe", "cautious"),
    ("scale_by", "lrs", "lr_ratio"),
    ("optimizers", -1, "optimizers"),
]


@pytest.mark.parametrize(("name", "value", "message"), WRONG)
def test_nonsense_is_refused_with_its_reason(given, capsys, name, value, message):  # P10
    with pytest.raises((ValueError, SystemExit)) as refusal:
        build(given, option(name, value))
    assert re.search(message, str(refusal.value) + capsys.readouterr().err, re.S)
