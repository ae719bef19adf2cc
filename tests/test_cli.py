"""LightningCLI builds the callback from a config or the command line, and writes it back."""

from __future__ import annotations

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


def parsed(*args):
    """The callback that the command line builds, and the config as LightningCLI saves it."""
    quiet = {"logger": False, "enable_checkpointing": False, "accelerator": "cpu"}
    options = {"run": False, "save_config_callback": None, "seed_everything_default": False}
    cli = LightningCLI(BoringModel, trainer_defaults=quiet, args=list(args), **options)
    (callback,) = (it for it in cli.trainer.callbacks if isinstance(it, DecoupledWD))
    return callback, cli.parser.dump(cli.config, skip_none=False)


def arguments(callback):
    return callback.config, callback.optimizers


def build(*args):
    """The callback of the command line, which the written config builds again."""
    callback, config = parsed("--trainer.callbacks+=wd_callbacks.lightning.DecoupledWD", *args)
    assert arguments(parsed(f"--config={config}")[0]) == arguments(callback)
    return callback


def spec(name, **init_args):
    """A schedule as a config names it."""
    return {"class_path": f"wd_callbacks.schedules.{name}", "init_args": init_args}


def option(name, value):
    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10**6)
    return f"--trainer.callbacks.{name}={text.splitlines()[0]}"


COSINE, LINEAR = spec("Cosine", start=0.1, end=0.01), spec("Linear", start=0, end=0.1)
STEPS = spec("Steps", values={0: 1, 0.5: 0})
NORMALIZED = spec("Normalized", wd_norm=0.05)
RESTARTS = spec("Restarts", schedule=LINEAR, cycles=2)
WORDS = {"scale_by": "none", "exclude": "bias", "anchor": "initial", "cautious": True}
LISTS = {"scale_by": ["lr", "torch.relu"], "exclude": ["*.bias", "torch.nn.LayerNorm"]}
FORMS = {  # what is written, of one argument or several
    "nothing": {"wd": None, "anchor": None},
    "a number": {"wd": 0.1, "max_lr": 0.1, "quantum": 1e-6, "verbose": True, "optimizers": 0},
    "words": {"wd": 0, "quantum": 0, **WORDS},
    "lists": {"wd": [0.1, 0, 0.2], "max_lr": [0.1, 1], "optimizers": [0, 1], **LISTS},
    "a callable": {"wd": "torch.relu"},
    "a schedule and a number": {"wd": [COSINE, 0.1]},
    "optimizers": {"wd": {0: COSINE, 1: [0.1, LINEAR], 2: None, 3: [0.1], 4: 0.1}},
    "keys": {"wd": {"head.*": COSINE, "torch.nn.LayerNorm": 0.0, "0": STEPS, "*": 1e-4}},
    "numbers by keys": {"wd": {"backbone.*": 0.05, "*": 0}},
    "Exponential": {"wd": spec("Exponential", start=1e-4, end=1e-2)},
    "Polynomial": {"wd": spec("Polynomial", start=1, end=0, power=2)},
    "Join": {"wd": spec("Join", pieces=[[0.5, RESTARTS], [0.5, COSINE]])},
    "Restarts": {"wd": spec("Restarts", schedule=NORMALIZED, cycles=3, mult=2)},
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
        return list(map(of_spec, value))
    return torch.relu if value == "torch.relu" else value


@pytest.mark.parametrize("written", FORMS.values(), ids=FORMS)
def test_what_is_written_is_built_and_written_back(written):  # P14
    built = build(*[option(name, value) for name, value in written.items()])
    expected = DecoupledWD(**of_spec(written))
    assert arguments(built) == arguments(expected)
    if isinstance(built.wd, dict):
        assert list(built.wd) == list(expected.wd)  # the first key that matches counts


def test_small_numbers_are_numbers():  # YAML 1.1 takes this one for text
    assert build("--trainer.callbacks.wd=1e-4").wd == 1e-4


PREDICATE = """
class Large:
    def __init__(self, least: int) -> None:
        self.least = least

    def __call__(self, name, parameter):
        return parameter.numel() > self.least
"""


def test_a_predicate_is_built_from_its_path(tmp_path, monkeypatch):
    (tmp_path / "predicates.py").write_text(PREDICATE)
    monkeypatch.syspath_prepend(tmp_path)
    entry = {"class_path": "predicates.Large", "init_args": {"least": 9}}
    add = "--trainer.callbacks+=wd_callbacks.lightning.DecoupledWD"
    callback, config = parsed(add, option("exclude", ["bias", entry]))
    word, predicate = callback.exclude
    assert word == "bias"
    assert predicate("weight", torch.ones(10))
    assert not predicate("weight", torch.ones(9))
    (written,) = yaml.safe_load(config)["trainer"]["callbacks"]
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


@pytest.mark.parametrize(("options", "wd"), OVERRIDES.items(), ids=OVERRIDES)
def test_the_command_line_changes_a_schedule(options, wd):
    changes = [f"--trainer.callbacks.{text}" for text in re.split(" (?=wd)", options)]
    assert arguments(build(option("wd", COSINE), *changes)) == arguments(DecoupledWD(wd))


def test_entries_are_added_one_by_one():
    added = ["wd+=0.1", "wd+=0.2", "exclude+=bias", "exclude+=norm"]
    built = build(*[f"--trainer.callbacks.{text}" for text in added])
    assert arguments(built) == arguments(DecoupledWD([0.1, 0.2], exclude=["bias", "norm"]))


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


@pytest.mark.parametrize(("name", "value", "message"), WRONG.values(), ids=WRONG)
def test_nonsense_is_refused_with_its_reason(capsys, name, value, message):  # P10
    with pytest.raises((ValueError, SystemExit)) as refusal:
        build(option(name, value))
    assert re.search(message, str(refusal.value) + capsys.readouterr().err, re.S)
