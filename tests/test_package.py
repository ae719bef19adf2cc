"""The package alone: what its imports need, load and leave as it was, each in a fresh process."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import wd_callbacks

ROOT = Path(__file__).parents[1]
FIRST, SECOND = "pytorch_lightning", "lightning.pytorch"
LOGGERS = [FIRST, SECOND, "lightning", "lightning_fabric", "lightning.fabric"]


def python(code):
    """Runs it in a new process; its assertions are the test."""
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_torch_is_all_it_needs_and_a_missing_framework_names_its_extra():
    extras = metadata.metadata("wd_callbacks").get_all("Provides-Extra")
    assert {"fastai", "lightning", "transformers"} <= set(extras)
    python("""
import importlib, sys
import torch
before = set(sys.modules)
import wd_callbacks, wd_callbacks.plan, wd_callbacks.torch
frameworks = ["fastai", "lightning", "lightning.pytorch", "pytorch_lightning", "transformers"]
assert not {*frameworks, "matplotlib"} & (set(sys.modules) - before)
for name in frameworks:
    sys.modules[name] = None
for name in ("fastai", "lightning", "transformers"):
    try:
        importlib.import_module(f"wd_callbacks.{name}")
    except ImportError as error:
        assert f"pip install 'wd_callbacks[{name}]'" in str(error), error
    else:
        raise AssertionError(name)
try:
    from wd_callbacks import DecoupledWD
except ImportError as error:
    for name in ("torch", "fastai", "lightning", "transformers"):
        assert f"wd_callbacks.{name}" in str(error), error
else:
    raise AssertionError
assert not hasattr(wd_callbacks, "DecoupledWD")
names = {}
exec("from wd_callbacks.schedules import *", names)
assert {"Linear", "Cosine", "Timescale", "Restarts"} <= set(names)
assert not {"math", "Any", "Sequence", "dataclass"} & set(names)
""")


SEEN = f"""
import logging, sys
LOGGERS = {LOGGERS}
for name in LOGGERS[::2]:
    logging.getLogger(name).setLevel(logging.ERROR)
def seen():
    loggers = [logging.getLogger(name) for name in LOGGERS]
    rank_zero = sys.modules.get("lightning_utilities.core.rank_zero")
    imported = {{"{FIRST}", "{SECOND}"}} & {{k for k, v in sys.modules.items() if v is not None}}
    states = [(logger.level, len(logger.handlers), logger.propagate) for logger in loggers]
    return imported, states, getattr(getattr(rank_zero, "log", None), "name", None)
"""
FITS = f"""
import importlib
logging.disable(logging.CRITICAL)
quiet = dict(max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False,
             enable_progress_bar=False, enable_model_summary=False, limit_train_batches=2,
             limit_val_batches=0)
for name in [it for it in ("{FIRST}", "{SECOND}") if sys.modules.get(it)]:
    package = importlib.import_module(name)
    model = importlib.import_module(name + ".demos.boring_classes").BoringModel
    decay = DecoupledWD(0.1)
    assert isinstance(decay, package.Callback), name
    package.Trainer(callbacks=[decay], **quiet).fit(model())
    assert decay.coefficients == {{0: [0.1]}}
"""
IN_USE = {  # what is imported before, and after
    "the first": (FIRST, SECOND),
    "the second": ("lightning", ""),
    "both": (f"{SECOND}, {FIRST}", ""),
}


@pytest.mark.parametrize("case", IN_USE)
def test_with_a_lightning_package_in_use_an_import_changes_nothing(case):
    before, after = IN_USE[case]
    python(f"""{SEEN}
import {before}
before = seen()
from wd_callbacks.lightning import DecoupledWD
assert seen() == before
{after and f"import {after}"}
{FITS}
""")


MISSING = {  # what is not there, what is imported, and later on
    "none": ([], SECOND, FIRST),
    "the second": (["lightning", SECOND], FIRST, ""),
}


@pytest.mark.parametrize("case", MISSING)
def test_with_none_in_use_one_that_is_there_is_imported(case):
    missing, expected, after = MISSING[case]
    python(f"""{SEEN}
for name in {missing}:
    sys.modules[name] = None
for name in LOGGERS:
    logging.getLogger(name).setLevel(logging.ERROR)
from wd_callbacks.lightning import DecoupledWD
assert all(logging.getLogger(name).level == logging.ERROR for name in LOGGERS)
assert seen()[0] == {{"{expected}"}}
{after and f"import {after}"}
{FITS}
""")


def test_the_version_is_the_changelog_s():
    changelog = (ROOT / "CHANGELOG.md").read_text()
    assert f"## [{wd_callbacks.__version__}]" in changelog
    assert metadata.version("wd_callbacks") == wd_callbacks.__version__
