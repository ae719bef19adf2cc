"""The package alone: torch is all it needs; a missing framework is an error with a remedy."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import wd_callbacks

ROOT = Path(__file__).parents[1]


def python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def test_importing_it_imports_no_framework():
    code = """
import sys, wd_callbacks, wd_callbacks.torch
print([m for m in ("fastai", "pytorch_lightning", "lightning") if m in sys.modules])
"""
    assert python(code).stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("adapter", "hidden"),
    [("fastai", ["fastai"]), ("lightning", ["pytorch_lightning", "lightning"])],
)
def test_a_missing_framework_names_an_extra_that_exists(adapter, hidden):
    code = f"""
import sys
for name in {hidden}:
    sys.modules[name] = None
import wd_callbacks.{adapter}
"""
    error = python(code).stderr.strip().splitlines()[-1]
    assert error.startswith("ImportError: ")
    assert f"pip install 'wd_callbacks[{adapter}]'" in error
    assert adapter in metadata.metadata("wd_callbacks").get_all("Provides-Extra")


@pytest.mark.parametrize("hidden", ["pytorch_lightning", "lightning"])
def test_one_lightning_package_is_enough(hidden):
    code = f"""
import sys
sys.modules[{hidden!r}] = None
from wd_callbacks.lightning import DecoupledWD
print(DecoupledWD(1e-4).state_key)
"""
    assert python(code).stdout.strip() == "DecoupledWD{'optimizers': None}"


def test_the_version_is_the_changelog_s():
    changelog = (ROOT / "CHANGELOG.md").read_text()
    assert f"## [{wd_callbacks.__version__}]" in changelog
    assert metadata.version("wd_callbacks") == wd_callbacks.__version__
