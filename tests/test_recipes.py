"""Every recipe runs as a script, in a folder of its own, and shows what its page promises."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDER, PAGE = ROOT / "examples" / "recipes", ROOT / "docs" / "recipes.md"
SHARED = ("data.py", "gpt.py")

RESUMED = "largest difference between the resumed run and the whole one: 0\n"
ENDS = {
    "accelerate_loop": RESUMED,
    "dino": r"0\.4 now, Cosine\(start=0\.04, end=0\.4\)",
    "fabric_loop": RESUMED,
    "fastai_finetune": r"anchor='initial': accuracy [\d.]+%, the body moved by",
    "gan": r"loss of d: [\d.]+\n",
    "hf_trainer": r"step 48: loss [\d.]+, wd 0\.0101\n",
    "ignite_engine": r"has made 140 steps\n",
    "muon": r"loss [\d.]+, accuracy",
    "nanogpt": RESUMED,
    "skorch_net": r"test accuracy",
    "timm_layer_decay": r"accuracy [\d.]+%",
}
"""A pattern of what each prints, by the name of its file."""

NEEDS = {
    "accelerate_loop": "accelerate",
    "dino": "pytorch_lightning",
    "fabric_loop": "lightning.fabric",
    "fastai_finetune": "fastai",
    "gan": "pytorch_lightning",
    "hf_trainer": "tensorboard",
    "ignite_engine": "ignite",
    "skorch_net": "skorch",
    "timm_layer_decay": "timm",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ENDS)
def test_a_recipe_runs(name, tmp_path):
    module = NEEDS.get(name, "torch")
    if importlib.util.find_spec(module.partition(".")[0]) is None:
        pytest.skip(f"needs {module}")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(FOLDER / f"{name}.py")],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert re.search(ENDS[name], done.stdout), done.stdout
    assert "DecoupledWDWarning" not in done.stderr, done.stderr


def test_every_recipe_is_short_tested_and_on_the_page():
    files = [path for path in FOLDER.glob("*.py") if path.name not in SHARED]
    assert sorted(path.stem for path in files) == sorted(ENDS)
    page = PAGE.read_text()
    for path in files:
        assert len(path.read_text().splitlines()) <= 60, path.name
        assert f"python examples/recipes/{path.name}" in page
        assert f"python examples/recipes/{path.name}" in path.read_text()


def test_the_chooser_of_the_readme_links_to_every_recipe():
    readme = (ROOT / "README.md").read_text()
    headings = re.findall(r"^## (.+)$", PAGE.read_text(), re.MULTILINE)
    assert len(headings) == len(ENDS)
    for heading in headings:
        anchor = re.sub(r"[^a-z -]", "", heading.lower()).replace(" ", "-")
        assert f"(docs/recipes.md#{anchor})" in readme
