"""LightningCLI builds the callback from a config or the command line, and writes it back."""

from __future__ import annotations

import functools
import inspect
import os
import re
import subprocess
import sys
from dataclasses import is_dataclass
from pathlib import Path

import pytest
import torch
import yaml
from pytorch_lightning.cli import LightningCLI
from pytorch_lightning.demos.boring_classes import BoringModel

from wd_callbacks import schedules
from wd_callbacks.lightning import DecoupledWD
from wd_callbacks.schedules import Cosine, Linear

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
    text = yaml.safe_dump(
        value, default_flow_style=True, sort_keys=False, width=10**6
    ).removesuffix("\n...\n")
    return f"--trainer.callbacks.{name}={text.strip()}"


NORMALIZED = spec("Normalized", wd_norm=0.05)
STEPS = spec("Steps", values={0.0: 0.1, 0.5: 0.01})
COSINE, LINEAR = spec("Cosine", start=0.1, end=0.01), spec("Linear", start=0, end=0.1)

RESTARTS = spec("Restarts", schedule=LINEAR, cycles=2)
FORMS = {  # what is written, of one argument or several
    "nothing": {"wd": None, "anchor": None},
    "a number": {"wd": 0.1, "scale_by": "none", "quantum": 1e-6, "exclude": ["vector"]},
    "zero": {"wd": 0, "scale_by": ["lr", "none"], "exclude": ["*.bias", "layer.weight"]},
    "words": {
        "wd": 0.1,
        "scale_by": "lr_ratio",
        "max_lr": 0.1,
        "quantum": 0,
        "verbose": True,
        "cautious": True,
        "anchor": "initial",
        "exclude": "bias",
        "optimizers": 0,
    },
    "lists": {
        "wd": [0.1, 0, 0.2],
        "scale_by": ["lr", "torch.relu"],
        "max_lr": [0.1, 1],
        "exclude": ["bias", "torch.nn.LayerNorm"],
        "optimizers": [0, 1],
    },
    "a callable": {"wd": "torch.relu"},
    "a schedule and a number": {"wd": [COSINE, 0.1]},
    "optimizers": {"wd": {0: COSINE, 1: [0.1, LINEAR], 2: None, 3: [0.1], 4: 0.1}},
    "keys": {"wd": {"head.*": COSINE, "torch.nn.LayerNorm": 0.0, "0": STEPS, "*": 1e-4}},
    "numbers by keys": {"wd": {"backbone.*": 0.05, "*": 0}},
    "Linear": {"wd": LINEAR},
    "Cosine": {"wd": COSINE},
    "Exponential": {"wd": spec("Exponential", start=1e-4, end=1e-2)},
    "Polynomial": {"wd": spec("Polynomial", start=1, end=0, power=2)},
    "Steps": {"wd": spec("Steps", values={0: 1, 0.5: 0})},
    "Join": {"wd": spec("Join", pieces=[[0.5, RESTARTS], [0.5, COSINE]])},
    "Restarts": {"wd": spec("Restarts", schedule=NORMALIZED, cycles=3, mult=2)},
    "Normalized": {"wd": NORMALIZED},
    "Timescale": {"wd": spec("Timescale", steps=100)},
}


def of_spec(value):
    """What a value that is written stands for."""
    if isinstance(value, dict) and "class_path" in value:
        name = value["class_path"].removeprefix("wd_callbacks.schedules.")
        return getattr(schedules, name)(**of_spec(value["init_args"]))
    if isinstance(value, dict):
        return {key: of_spec(each) for key, each in value.items()}
    if isinstance(value, list):
        values = list(map(of_spec, value))
        return tuple(values) if any(map(is_dataclass, values)) else values
    return torch.relu if value == "torch.relu" else value


@pytest.mark.parametrize("form", FORMS)
def test_what_is_written_is_built_and_written_back(given, form):  # P14
    written = FORMS[form]
    built = build(given, *[option(name, value) for name, value in written.items()])
    for name, value in written.items():
        assert built[name] == of_spec(value)
        if isinstance(built[name], dict):
            assert list(built[name]) == list(value)  # the first key that matches counts


@pytest.mark.parametrize("number", ["1e-4", ".0001"])
def test_small_numbers_are_numbers(given, number):  # YAML 1.1 takes the first for text
    assert build(given, f"--trainer.callbacks.wd={number}")["wd"] == 1e-4


PREDICATE = """
class Large:
    def __init__(self, least: int) -> None:
        self.least = least

    def __call__(self, name, parameter):
        return parameter.numel() > self.least
"""


def test_a_predicate_is_built_from_its_path(given, tmp_path, monkeypatch):
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


OVERRIDES = {
    "wd.end=0.05": Cosine(0.1, 0.05),
    "wd=0.2": 0.2,
    "wd=null": None,
    "wd=[0.2, 0.3]": [0.2, 0.3],
    "wd={0: 0.2}": {0: 0.2},
    "wd={head.*: 0.2}": {"head.*": 0.2},
    "wd=wd_callbacks.schedules.Linear wd.start=0 wd.end=1": Linear(0, 1),
}


@pytest.mark.parametrize("options", OVERRIDES)
def test_the_command_line_changes_a_schedule(given, options):
    changes = [f"--trainer.callbacks.{text}" for text in re.split(" (?=wd)", options)]
    assert build(given, option("wd", COSINE), *changes)["wd"] == OVERRIDES[options]


def test_entries_are_added_one_by_one(given):
    added = ["wd+=0.1", "wd+=0.2", "exclude+=bias", "exclude+=norm"]
    arguments = build(given, *[f"--trainer.callbacks.{text}" for text in added])
    assert (arguments["wd"], arguments["exclude"]) == ([0.1, 0.2], ["bias", "norm"])


WRONG = {
    "a number": ("wd", -1, "wd.* -1"),
    "text": ("wd", "fast", "fast"),
    "a schedule": ("wd", spec("Linear", start=0.1, end=-1), "end.* -1"),
    "an argument": ("wd", spec("Linear", start=0.1, stop=0), "stop"),
    "keys of two kinds": ("wd", {"*": 0.1, 0: 0.1}, "wd"),
    "an anchor": ("anchor", "zero", "initial"),
    "a word": ("scale_by", "lrs", "lr_ratio"),
    "an index": ("optimizers", -1, "optimizers"),
}


@pytest.mark.parametrize("case", WRONG)
def test_nonsense_is_refused_with_its_reason(given, capsys, case):  # P10
    name, value, message = WRONG[case]
    with pytest.raises((ValueError, SystemExit)) as refusal:
        build(given, option(name, value))
    assert re.search(message, str(refusal.value) + capsys.readouterr().err, re.S)
