"""Break the package in one line at a time, and see that the tests notice.

Each row names a file, a line of it, what the line becomes, and the tests that should turn red. The
package is copied, so that the checkout stays as it is::

    python scripts/mutants.py            # all rows; a survivor is an error
    python scripts/mutants.py deferred   # those whose file or tests have this in their name
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent


class Mutant(NamedTuple):
    """A line of a file, what it becomes, and the tests that should fail."""

    file: str
    line: str
    broken: str
    tests: str


MUTANTS = [
    Mutant("core/inplace.py", "torch._foreach_mul_(params, factor)", "pass", "test_step"),
    Mutant("core/rules.py", "factor: Any = 1 - amount", "factor: Any = 1 + amount", "test_step"),
    Mutant("core/rules.py", "lr / self.max_lr if", "lr if", "test_scale"),
    Mutant("core/rules.py", "if not 0 <= amount < 1:", "if not 0 <= amount:", "test_validation"),
    Mutant("core/deferred.py", "if total < quantum:", "if False:", "test_deferred"),
    Mutant("core/deferred.py", "(1.0, 5 / 6, 2 / 3) if", "(1.0,) if", "test_deferred"),
    Mutant("core/layout.py", "updated.discard(p)", "pass", "test_changing_parameters"),
    Mutant("core/layout.py", "if p in selected}", "if False}", "test_changing_parameters"),
    Mutant("core/step.py", "group[key] = _ZERO", "pass", "test_step"),
    Mutant("core/step.py", "group[key] = value", "pass", "test_step"),
    Mutant("core/step.py", "if not self._awaits_closure:", "if True:", "test_step"),
    Mutant("core/attach.py", "if self._depth > 1:\n                return None", "", "test_step"),
    Mutant("core/attach.py", "lambda _: decay.release()", "None", "test_memory"),
    Mutant("core/state.py", "each.log for each in row", "0.0 for each in row", "test_resume"),
    Mutant("core/state.py", "each.applied for each", "0 for each", "test_kill_and_resume"),
    Mutant("core/selection.py", "p.ndim < 2", "p.ndim < 1", "test_mapping"),
    Mutant("core/selection.py", 'own == "bias"', 'own == "bia"', "test_selection"),
    Mutant("core/anchors.py", "return p.detach().clone()", "return p.detach()", "test_anchor"),
    Mutant("core/cautious.py", "torch._foreach_clamp_max_(moved, 1)", "pass", "test_cautious"),
    Mutant("fastai.py", "if has_stepped or self._has_attempted:", "if False:", "test_progress"),
    Mutant("lightning.py", "if self.has_stepped or", "if False or", "test_progress"),
    Mutant("transformers.py", "state.global_step / max(", "0.0 * max(", "test_transformers"),
]  # fmt: skip


def survives(mutant: Mutant) -> bool:
    """Return True if the tests pass on a copy of the checkout that is broken."""
    with tempfile.TemporaryDirectory() as folder:
        for name in ("wd_callbacks", "tests", "examples", "docs"):
            shutil.copytree(ROOT / name, Path(folder) / name)
        for name in ("pyproject.toml", "README.md"):
            shutil.copy(ROOT / name, folder)
        path = Path(folder) / "wd_callbacks" / mutant.file
        text = path.read_text()
        if mutant.line not in text:
            raise ValueError(f"{mutant.file} has no {mutant.line!r}")
        path.write_text(text.replace(mutant.line, mutant.broken, 1))
        tests = sorted(str(test) for test in Path(folder, "tests").glob(f"{mutant.tests}*.py"))
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-n", "0", *tests]
        environment = {**os.environ, "PYTHONPATH": folder}
        run = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        if run.returncode not in (0, 1):
            raise RuntimeError(run.stdout + run.stderr)
        return run.returncode == 0


def main(names: list[str]) -> int:
    """Run the rows that match ``names``; return the number of survivors."""
    rows = [m for m in MUTANTS if not names or any(n in m.file or n in m.tests for n in names)]
    survivors = 0
    for number, mutant in enumerate(rows, start=1):
        lives = survives(mutant)
        survivors += lives
        verdict = "SURVIVED" if lives else "noticed"
        print(f"{number}/{len(rows)} {verdict}: {mutant.file}: {mutant.line!r}", flush=True)
    print(f"{len(rows) - survivors} of {len(rows)} noticed")
    return survivors


if __name__ == "__main__":
    sys.exit(min(main(sys.argv[1:]), 1))
