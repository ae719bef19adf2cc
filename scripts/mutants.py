"""Breaks the package in small ways, one at a time, and shows that the tests notice each.

    python scripts/mutants.py                     # all of them
    python scripts/mutants.py --only "sign"       # those whose name contains this

Every mutant is tried in a copy of the repository in a temporary directory, with the test files that
should notice it. Exits with 1 where one lives, where one no longer applies because the text that it
replaces has changed (then mend it in ``MUTANTS``), or where the tests fail without any.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rich.progress import track
from rich.table import Table
from rich.text import Text

ROOT = Path(__file__).parents[1]
KEPT_OUT = shutil.ignore_patterns(".git", ".venv", ".*_cache", "__pycache__", "build", "dist")
FRAMEWORKS = ["torch", "fastai.vision.all", "pytorch_lightning", "lightning.pytorch"]


@dataclass(frozen=True)
class Mutant:
    """One way to break the package.

    Attributes:
        name: What is broken.
        file: Which module of the package.
        old: What stands there now, exactly once.
        new: What stands there instead.
        tests: The test files that should notice, without ``test_`` and ``.py``.
        first: Part of the name of the tests that are run first, to have it over soon.
    """

    name: str
    file: str
    old: str
    new: str
    tests: str
    first: str = ""

    @property
    def paths(self) -> list[str]:
        """The test files, from the root of the repository."""
        return [f"tests/test_{name}.py" for name in self.tests.split()]

    def apply(self, root: Path) -> None:
        """Writes the mutant into the copy at ``root``.

        Raises:
            ValueError: The text to replace is not there exactly once.
        """
        path = root / "wd_callbacks" / self.file
        source = path.read_text()
        if source.count(self.old) != 1:
            raise ValueError(
                f"mutant no longer applies: {self.name!r} expects {self.old!r} once in "
                f"{self.file}, found it {source.count(self.old)} times"
            )
        path.write_text(source.replace(self.old, self.new))


STEP_LATER = """callable(closure):
            self.give_back = lambda: (  # which is what follows the update
                vars(self).pop("give_back"), self.give_back(),
                self.apply(groups(), progress(), found_inf),
            )
"""

PAID_EARLY = """for index, (wd, group) in enumerate(zip(self.coefficients, groups)):
                factor = self._shrink(index, wd, group).factor
                for p in group["params"]:
                    p.data.mul_(factor)
            return [Shrink(0.0, 1.0) for group in groups]
"""

MUTANTS = [
    # What a step takes
    Mutant(
        "sign flipped",
        "decay.py",
        "factor = 1 - amount",
        "factor = 1 + amount",
        "torch",
        "hand_written",
    ),
    Mutant(
        "sign of what was owed flipped",
        "decay.py",
        "return 1 - payment",
        "return 1 + payment",
        "faithful",
        "what_is_applied",
    ),
    Mutant(
        "decay after the update",
        "decay.py",
        "callable(closure):\n            self.apply(groups(), progress(), found_inf)\n",
        STEP_LATER,
        "torch",
        "adam_is_adamw",
    ),
    Mutant(
        "decay twice where step calls super().step()",
        "torch.py",
        "if _is_running(self._frame):",
        "if False:",
        "torch",
        "calls_super",
    ),
    Mutant(
        "decay at every evaluation of a closure",
        "decay.py",
        "progress(), found_inf)\n            self._awaits_closure = False",
        "progress(), found_inf)",
        "torch",
        "LBFGS",
    ),
    Mutant(
        "decay before a closure has made the gradients",
        "decay.py",
        "if not callable(closure):",
        "if True:",
        "torch",
        "LBFGS",
    ),
    Mutant(
        "lr squared not divided by lr_max",
        "decay.py",
        "lr * lr / lr_max",
        "lr * lr",
        "torch",
        "scale_by",
    ),
    Mutant(
        "lr_ratio is lr",
        "decay.py",
        'lr / lr_max if scale == "lr_',
        'lr if scale == "lr_',
        "torch",
        "scale_by",
    ),
    Mutant(
        "coefficient of another group",
        "arguments.py",
        "in enumerate(self.wd)]",
        "in enumerate(self.wd[::-1])]",
        "torch",
        "per_group",
    ),
    Mutant(
        "scale_by of another group",
        "arguments.py",
        "self.scale_by[index]",
        "self.scale_by[-1 - index]",
        "torch",
        "scale_by",
    ),
    Mutant(
        "max_lr of another group",
        "arguments.py",
        "self.max_lr[index]",
        "self.max_lr[-1 - index]",
        "torch",
        "differ_by_group",
    ),
    Mutant(
        "own weight decay read once, not afresh",
        "arguments.py",
        "enumerate(own)",
        'enumerate(vars(self).setdefault("_own", own))',
        "torch",
        "afresh",
    ),
    Mutant(
        "lr_max taken at every step",
        "decay.py",
        "self.lr_max[index]\n        if group",
        "self.arguments.peak(index, group, None)\n        if group",
        "torch",
        "lr_max",
    ),
    Mutant(
        "initial_lr before max_lr",
        "arguments.py",
        '("max_lr", "initial_lr", "lr")',
        '("initial_lr", "max_lr", "lr")',
        "torch",
        "lr_max",
    ),
    Mutant(
        "autograd's version counters bumped",
        "decay.py",
        ", torch._C._ExcludeDispatchKeyGuard(_VERSIONS):",
        ":",
        "torch",
        "differentiates",
    ),
    # What the optimizer sees
    Mutant(
        "own weight decay not lent",
        "decay.py",
        "group[key] = _LENT",
        "pass",
        "torch",
        "adam_is_adamw",
    ),
    Mutant(
        "own weight decay not given back",
        "decay.py",
        "group[key] = value",
        "pass",
        "torch",
        "user_s_weight_decay",
    ),
    Mutant(
        "own weight decay that is set after a step has raised lost",
        "decay.py",
        "if group[key] is _LENT:",
        "if True:",
        "survivors torch",
        "raised",
    ),
    Mutant(
        "own weight decay given back after others' hooks",
        "torch.py",
        "after.move_to_end(self._handles[1].id, last=False)",
        "pass",
        "torch",
        "post_hooks",
    ),
    Mutant(
        "saved while lent, where a step raised",
        "torch.py",
        "if not _is_running(self._frame):",
        "if False:",
        "torch",
        "raised",
    ),
    Mutant("detach leaves hooks", "torch.py", "handle.remove()", "pass", "torch", "detach"),
    # Which parameters
    Mutant(
        "parameters without gradient decayed",
        "decay.py",
        "p.grad is not None or _is_empty(p)",
        "True",
        "torch",
        "without_gradient",
    ),
    Mutant(
        "tied parameters decayed in each group",
        "decay.py",
        " if p not in seen",
        "",
        "torch fastai",
        "tied",
    ),
    Mutant(
        "parameters listed twice decayed twice",
        "decay.py",
        "dict.fromkeys(params)):",
        "params):",
        "torch",
        "twice",
    ),
    Mutant(
        "no-decay groups decayed", "decay.py", "0.0 if spared else wd", "wd", "torch", "no_decay"
    ),
    Mutant(
        "other parameters with a gradient overlooked",
        "decay.py",
        "and all(map(operator.is_, with_grad, self.with_grad))",
        "",
        "torch faithful",
        "come_and_go",
    ),
    Mutant(
        "lists of parameters never renewed",
        "decay.py",
        "return (\n            len(with_grad)",
        "return bool(self.with_grad) or (\n            len(with_grad)",
        "torch",
        "replaced",
    ),
    Mutant(
        "do_wd ignored",
        "fastai.py",
        'state[p].get("do_wd", True)',
        "True",
        "fastai",
        "own_decoupled",
    ),
    Mutant("exclude inverted", "selection.py", "not any(each) for", "any(each) for", "selection"),
    Mutant(
        "names keep the prefixes of wrappers",
        "selection.py",
        "path if wrapped else (*path, name)",
        "(*path, name)",
        "selection",
        "prefixes",
    ),
    Mutant(
        "some names of a tied parameter forgotten",
        "selection.py",
        "excluded.setdefault(p, []).append(bool(hits))",
        "excluded[p] = [bool(hits)]",
        "selection",
        "tied",
    ),
    Mutant(
        "an entry that matches nothing accepted",
        "selection.py",
        "if index not in matched and",
        "if False and",
        "selection",
        "nothing",
    ),
    Mutant(
        "no_weight_decay() ignored", "selection.py", " or id(p) in listed", "", "selection", "form"
    ),
    Mutant(
        "third-party norms overlooked",
        "selection.py",
        " or type(module).__name__.endswith(NORM_ENDINGS)",
        "",
        "selection",
        "form",
    ),
    # What is owed
    Mutant(
        "a step as large as the quantum owed",
        "decay.py",
        "if shrink >= self.quantum and -math.expm1(-owed) < max",
        "if shrink > self.quantum and -math.expm1(-owed) < max",
        "faithful",
        "at_or_above",
    ),
    Mutant(
        "debt paid when it is above the quantum only",
        "decay.py",
        "if payment < self.quantum:",
        "if payment <= self.quantum:",
        "survivors faithful",
        "quantum",
    ),
    Mutant(
        "debt dropped at payment",
        "decay.py",
        "max(0.0, owed + math.log1p(-payment))",
        "0.0",
        "faithful",
    ),
    Mutant(
        "debts added up as shrinks, not as logs",
        "decay.py",
        "owed -= math.log1p(-shrink)",
        "owed += shrink",
        "faithful",
        "pauses",
    ),
    Mutant(
        "debt lost where a gradient is missing",
        "decay.py",
        "debts.pop(p, Debt())",
        "Debt()",
        "faithful",
        "come_and_go",
    ),
    Mutant(
        "payment not floored to what the dtype can represent",
        "decay.py",
        "math.floor(payment / grain)",
        "payment / grain",
        "survivors faithful",
        "represent",
    ),
    Mutant(
        "payments of one size only",
        "decay.py",
        "(1.0, 5 / 6, 2 / 3)",
        "(1.0, 1.0, 1.0)",
        "faithful",
    ),
    Mutant(
        "bf16 with the quantum of fp16",
        "decay.py",
        "torch.bfloat16: 2.0**-6",
        "torch.bfloat16: 2.0**-8",
        "faithful",
    ),
    Mutant(
        "factor rounded to half precision on the CPU",
        "decay.py",
        'if p.device.type != "cpu":',
        "if True:",
        "torch faithful",
        "dtypes",
    ),
    Mutant(
        "factor rounded to half precision on the device",
        "decay.py",
        "half = dtype in HALF_QUANTA",
        "half = False",
        "torch",
        "half_precision",
    ),
    # A state
    Mutant("debt not saved", "decay.py", "[debt.owed for", "[0.0 for", "resume", "uninterrupted"),
    Mutant(
        "number of payments not saved",
        "decay.py",
        "[debt.payments for",
        "[0 for",
        "resume",
        "bfloat16",
    ),
    Mutant(
        "debt not loaded",
        "decay.py",
        "map(Debt, owed, payments)",
        "[Debt()] * len(owed)",
        "resume",
        "uninterrupted",
    ),
    Mutant(
        "lr_max not loaded",
        "decay.py",
        'list(state["lr_max"])',
        "[]",
        "resume lightning",
        "state_matters",
    ),
    Mutant(
        "position not loaded",
        "torch.py",
        'self._decay.steps = state["steps"]',
        "pass",
        "resume",
        "schedule",
    ),
    Mutant(
        "position not loaded in Lightning",
        "lightning.py",
        'self.position = state["position"] if',
        "self.position = None if",
        "lightning",
        "window",
    ),
    Mutant(
        "state_key depends on wd",
        "lightning.py",
        "_generate_state_key(optimizers=self.optimizers)",
        "_generate_state_key(optimizers=self.optimizers, wd=self.arguments.wd)",
        "lightning",
        "state_key",
    ),
    # Progress
    Mutant(
        "schedule off by one",
        "torch.py",
        "min(self.steps / self.total_steps",
        "min((self.steps + 1) / self.total_steps",
        "torch",
        "schedules",
    ),
    Mutant(
        "schedule off by one in Lightning",
        "lightning.py",
        "(epoch * per_epoch + batch_idx) / self.batches",
        "(epoch * per_epoch + batch_idx + 1) / self.batches",
        "lightning",
        "progress",
    ),
    Mutant(
        "schedule off by one in fastai",
        "fastai.py",
        "self._n_iter + batches) / (",
        "self._n_iter + batches + 1) / (",
        "fastai",
        "progress",
    ),
    Mutant(
        "schedule by micro-batch in Lightning",
        "lightning.py",
        "self._run.start_batch(trainer)",
        "self._run.start_batch(trainer)\n"
        "        for decay in self._attached.values():\n"
        "            decay.has_attempted = True",
        "lightning",
        "progress",
    ),
    Mutant(
        "schedule by micro-batch in fastai",
        "fastai.py",
        "        self._batches += 1",
        "        self._batches += 1\n"
        "        done = self.epoch * self._n_iter + self.iter + 1\n"
        "        self._position = done / (self._n_iter * self.n_epoch)",
        "fastai",
        "progress",
    ),
    Mutant(
        "start_epoch ignored",
        "fastai.py",
        "self._position = self._done(0)",
        "self._position = 0.0",
        "fastai",
        "progress",
    ),
    Mutant(
        "a short last window of accumulation not counted",
        "lightning.py",
        "math.ceil(per_epoch / every)",
        "per_epoch // every",
        "lightning schedules",
        "progress",
    ),
    Mutant(
        "epochs that weight averaging adds counted",
        "lightning.py",
        "_Run(trainer, self._max_epochs,",
        "_Run(trainer, trainer.max_epochs,",
        "lightning",
        "averaging",
    ),
    Mutant(
        "a validation inside a fit ends it",
        "fastai.py",
        "if self._fits == 0 and self._bound:",
        "if self._bound:",
        "fastai",
        "validation",
    ),
    # Schedules
    Mutant(
        "Join gives its pieces the progress of the run",
        "schedules.py",
        "schedule(_clamped((progress - [0.0, *ends][index]) / fraction))",
        "schedule(progress)",
        "schedules",
        "closed_forms",
    ),
    Mutant(
        "Restarts ignores mult",
        "schedules.py",
        "self.mult**cycle",
        "1",
        "schedules",
        "closed_forms",
    ),
    Mutant(
        "Normalized without the root",
        "schedules.py",
        "self.wd_norm / math.sqrt(steps)",
        "self.wd_norm / steps",
        "schedules",
        "normalized",
    ),
    Mutant(
        "Normalized by the steps of the run inside of Restarts",
        "schedules.py",
        "run.steps if run.cycle_steps is None else run.cycle_steps",
        "run.steps",
        "schedules",
        "normalized",
    ),
    Mutant(
        "Timescale without the peak",
        "schedules.py",
        "1 / (steps * run.peak)",
        "1 / steps",
        "schedules",
        "timescale",
    ),
    Mutant(
        "Timescale by the peak lr whatever scale_by says",
        "arguments.py",
        '1.0 if scale in ("lr_ratio", "none") else peak',
        "peak",
        "schedules",
        "timescale",
    ),
    Mutant(
        "schedules go on beyond their ends",
        "schedules.py",
        "min(max(progress, 0.0), 1.0)",
        "progress",
        "schedules",
        "ends",
    ),
    Mutant(
        "peak of fastai's lr schedule from samples alone",
        "fastai.py",
        "peaks[group] = max(peaks[group], -found.fun)",
        "pass",
        "fastai",
        "peak",
    ),
    # Steps that do not happen
    Mutant(
        "found_inf ignored",
        "torch.py",
        "found_inf if isinstance(found_inf, Tensor) else None",
        "None",
        "torch",
        "overflow",
    ),
    Mutant(
        "refused after a weight has changed",
        "decay.py",
        "return list(map(self._shrink, itertools.count(), self.coefficients, groups))\n",
        PAID_EARLY,
        "refusals",
        "at_a_step",
    ),
    # Refusals and warnings
    Mutant(
        "a shrink of 1 accepted",
        "decay.py",
        "if not 0 <= amount < 1:",
        "if not 0 <= amount <= 1:",
        "refusals",
        "at_a_step",
    ),
    Mutant(
        "two decays allowed",
        "torch.py",
        'if any(isinstance(getattr(hook, "__self__", None), DecoupledWD) for hook in hooks):',
        "if False:",
        "refusals",
        "two_decays",
    ),
    Mutant(
        "two decays allowed in fastai",
        "fastai.py",
        "learn.cbs) > 1:",
        "learn.cbs) > 2:",
        "fastai",
        "two_decays",
    ),
    Mutant(
        "probe finds nothing",
        "probe.py",
        "if _undoes_decay(optimizer) or",
        "if",
        "refusals",
        "undo",
    ),
    Mutant(
        "probe refuses Lookahead",
        "probe.py",
        "1e-4, 0.4",
        "1e-4, 0.6",
        "refusals",
        "lookahead",
    ),
    Mutant(
        "warnings said each time",
        "decay.py",
        "if (once or message) not in self._warned:",
        "if True:",
        "torch",
        "once",
    ),
    Mutant(
        "silence where nothing decays",
        "decay.py",
        "if self._has_started and not any(",
        "if False and not any(",
        "visible",
        "nothing",
    ),
    # What is shown
    Mutant(
        "logged at every step",
        "lightning.py",
        "is_due = trainer._logger_connector.should_update_logs",
        "is_due = True",
        "visible",
        "interval",
    ),
    Mutant(
        "names count param groups from 0",
        "lightning.py",
        "enumerate(groups, start=1)]",
        "enumerate(groups)]",
        "visible",
        "names",
    ),
    Mutant(
        "the recorder has no wd",
        "fastai.py",
        'return {**hps, "wd": used[: self._batches]}',
        "return hps",
        "visible",
        "recorder",
    ),
    Mutant(
        "optimizers without a scheduler are counted first",
        "lightning.py",
        "in [*named, *unnamed]:",
        "in [*unnamed, *named]:",
        "visible",
        "names",
    ),
    # What attempts to break promises have found
    Mutant(
        "a step that sets up the state taken for a real one",
        "torch.py",
        "if not optimizer.state and _is_called_from(STATE_SETUP):",
        "if False:",
        "found",
        "distributed",
    ),
    Mutant(
        "one step alone tried of a wrapper",
        "probe.py",
        "_inner(optimizer) is not None",
        "False",
        "refusals",
        "undo",
    ),
    Mutant(
        "half precision tried in single precision",
        "probe.py",
        "return p.ndim, p.dtype if half and p.dtype in HALF else torch.float32",
        "return p.ndim, torch.float32",
        "refusals",
        "copies",
    ),
    Mutant(
        "an explicit max_lr of the saved run outlives it",
        "decay.py",
        ' and state["arguments"].get("max_lr") is None',
        "",
        "found",
        "max_lr",
    ),
    Mutant(
        "globs imported as modules",
        "selection.py",
        "kind = None if is_glob else _module_type(entry)",
        "kind = _module_type(entry)",
        "selection",
        "glob",
    ),
    Mutant(
        "a trial in the middle of training cuts the run off",
        "lightning.py",
        "if any(decay.is_attached for decay in self._attached.values()):",
        "if False:",
        "lengths",
        "trial",
    ),
    Mutant(
        "another number of batches at the position of before",
        "lightning.py",
        "if per_epoch == self.per_epoch < math.inf:",
        "if True:",
        "lengths",
        "changes",
    ),
    Mutant(
        "another optimizer decayed as the one before",
        "fastai.py",
        "if starts or self.opt is not self._opt:",
        "if starts:",
        "lengths",
        "another_model",
    ),
    Mutant(
        "max_steps taken for epochs",
        "lightning.py",
        "if not self.by_epochs:  # whatever",
        "if False:  # whatever",
        "lengths",
        "under_max_steps",
    ),
    Mutant(
        "the hook's index of the batch with a dataloader_iter",
        "lightning.py",
        "batch_idx = trainer.fit_loop.batch_idx",
        "batch_idx = max(trainer.fit_loop.batch_idx - 1, 0)",
        "lengths",
        "iterator",
    ),
    Mutant(
        "logged in windows of accumulation",
        "lightning.py",
        "if is_due and not trainer.fit_loop._should_accumulate():",
        "if is_due:",
        "visible",
        "accumulation",
    ),
    Mutant(
        "an optimizer named by its last scheduler",
        "lightning.py",
        "names.setdefault(id(optimizer), _names_of_groups(name, optimizer.param_groups))",
        "names[id(optimizer)] = _names_of_groups(name, optimizer.param_groups)",
        "visible",
        "two_schedulers",
    ),
    Mutant(
        "the fit forgotten in a test of its checkpoint",
        "lightning.py",
        "            self._loaded = state_dict",
        "            self._attached, self._loaded = {}, state_dict",
        "visible",
        "after_a_test",
    ),
    Mutant(
        "no decay after a fit within a fit",
        "fastai.py",
        "if not self._bound:  # a fit within",
        "if False:  # a fit within",
        "lengths",
        "within",
    ),
    Mutant(
        "a cancelled after_step not made up for",
        "fastai.py",
        "self._position = self._done(self.iter + 1)  # a callback",
        "pass  # a callback",
        "lengths",
        "cancelled",
    ),
    Mutant(
        "a refused step counts",
        "decay.py",
        "        shrinks = self._shrinks(groups, progress)\n"
        "        self._open(groups, shrinks)\n"
        "        self.steps += 1\n",
        "        self.steps += 1\n"
        "        shrinks = self._shrinks(groups, progress)\n"
        "        self._open(groups, shrinks)\n",
        "refusals",
        "refused_step",
    ),
    Mutant(
        "described as before the state was loaded",
        "decay.py",
        'loaded._progress = state.get("progress", 0.0)',
        "pass",
        "found",
        "describe",
    ),
    Mutant(
        "a resumed run is not shown",
        "torch.py",
        "if not self._has_shown:",
        "if self.steps == 0:",
        "found",
        "verbose",
    ),
    Mutant(
        "a wd that is set inside step passed over",
        "decay.py",
        "if any(group[key] is not _LENT and group[key] != 0",
        "if False and any(group[key] is not _LENT and group[key] != 0",
        "found",
        "lent",
    ),
    Mutant(
        "trial steps without gradients before the closure",
        "probe.py",
        "        backward()  # SAM",
        "        pass  # SAM",
        "refusals",
        "undo_it",
    ),
    Mutant(
        "trial steps with the first weight alone",
        "probe.py",
        "if kind not in tiny:",
        "if not tiny or (kind := next(iter(tiny))) not in tiny:",
        "refusals",
        "copies",
    ),
    Mutant(
        "trial steps of groups in single precision for those in half",
        "probe.py",
        "frozenset(_kind(p, half) for p",
        "frozenset(p.ndim for p",
        "refusals",
        "copies",
    ),
    Mutant(
        "trial steps reach the real weights",
        "probe.py",
        "with _Apart(memo):",
        "with _Apart({}):",
        "trials",
        "real_weights",
    ),
    Mutant(
        "trial steps seed every device",
        "probe.py",
        "torch.default_generator.manual_seed(0)",
        "torch.manual_seed(0)",
        "trials",
        "random",
    ),
    Mutant(
        "trial steps are compiled",
        "probe.py",
        'if "torch._dynamo" in sys.modules and',
        "if False and",
        "trials",
        "compiled",
    ),
    Mutant(
        "trial steps of every named group",
        "probe.py",
        'if key != "params" and "name" not in key',
        'if key != "params"',
        "trials",
        "groups",
    ),
    Mutant(
        "a closure that is not evaluated passed over",
        "decay.py",
        "self._awaits_closure = callable(closure)",
        "self._awaits_closure = False",
        "found torch",
        "closure",
    ),
    Mutant(
        "fused updates with a rate in single precision",
        "decay.py",
        'if group.get("fused") and',
        "if False and",
        "found",
        "fused",
    ),
    Mutant(
        "wrapped by Accelerate, the wrapper taken for the optimizer",
        "torch.py",
        ', "AcceleratedOptimizer")',
        ")",
        "wrapped",
        "accelerate",
    ),
]


class FirstFailure:
    """A pytest plugin that notes the first test that fails.

    Args:
        first: Part of the name of the tests that are run first.

    Attributes:
        test: Its id.
        reason: What it said.
    """

    def __init__(self, first: str) -> None:
        self.first = first
        self.test: str | None = None
        self.reason = ""

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Sorts the tests."""
        items.sort(key=lambda item: self.first not in item.name)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Raises where the package, or a test file, cannot be imported: that shows nothing."""
        if report.failed:
            raise RuntimeError(f"{report.nodeid} cannot be imported: {report.longreprtext}")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Notes the test."""
        if report.failed and self.test is None:
            self.test, self.reason = report.nodeid, report.longreprtext


def first_failure(paths: Sequence[str], mutant: Mutant | None) -> FirstFailure:
    """Runs tests in a copy of the repository up to the first that fails, in this process.

    Args:
        paths: The test files.
        mutant: What to break; None for nothing.
    """
    found = FirstFailure("" if mutant is None else mutant.first)
    options = ["-x", "-q", "-n", "0", "-p", "no:cacheprovider"]
    with tempfile.TemporaryDirectory(prefix="mutant-") as directory:
        copy = Path(directory).resolve() / "copy"
        shutil.copytree(ROOT, copy, ignore=KEPT_OUT)
        if mutant is not None:
            mutant.apply(copy)
        os.chdir(copy)
        os.environ |= {"PYTHONPATH": str(copy), "MPLBACKEND": "Agg"}  # of processes in tests, too
        sys.path.insert(0, str(copy))
        with open(os.devnull, "w") as sink, redirect_stdout(sink):
            code = pytest.main([*options, *paths], plugins=[found])
        tested = Path(sys.modules["wd_callbacks"].__file__ or "")
        os.chdir(ROOT)
    if not tested.is_relative_to(copy):
        raise RuntimeError(f"the tests ran with {tested}, not with the copy")
    if (code != pytest.ExitCode.OK) is not (found.test is not None):
        raise RuntimeError(f"pytest ended with {code!r}")
    return found


def killed_by(mutant: Mutant) -> str | None:
    """The first test that fails with ``mutant``; None where it lives."""
    return first_failure(mutant.paths, mutant).test


def passes(path: str) -> str | None:
    """Why a test file fails without any mutant; None where it passes."""
    found = first_failure([path], None)
    return found.test and f"{found.test} fails without any mutant:\n{found.reason}"


def misfits(mutants: Sequence[Mutant]) -> Iterator[str]:
    """Tells which mutants no longer apply."""
    for mutant in mutants:
        with tempfile.TemporaryDirectory() as directory:
            shutil.copytree(ROOT / "wd_callbacks", Path(directory) / "wd_callbacks")
            try:
                mutant.apply(Path(directory))
            except ValueError as error:
                yield str(error)


def main() -> int:
    """Tries the mutants that were asked for, and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", metavar="NAME", help="those with this in their name")
    parser.add_argument("--jobs", type=int, default=2, help="how many at a time (default: 2)")
    options = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 140)
    mutants = [mutant for mutant in MUTANTS if options.only in mutant.name]
    if not mutants:
        parser.error(f"no mutant has {options.only!r} in its name")
    if errors := list(misfits(mutants)):
        console.print("\n".join(errors), style="red", markup=False)
        return 1

    # Each is tried in a process of its own, which finds the frameworks imported.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pytest", *FRAMEWORKS])

    def apart(function: Callable[[Any], str | None], argument: Any) -> str | None:
        with ProcessPoolExecutor(1, context) as process:
            return process.submit(function, argument).result()

    with ThreadPoolExecutor(options.jobs) as pool:
        files = sorted({path for mutant in mutants for path in mutant.paths})
        runs = pool.map(partial(apart, passes), files)
        errors = list(filter(None, track(runs, "testing", len(files), console=console)))
        if errors:
            console.print("\n".join(errors), style="red", markup=False)
            return 1
        runs = pool.map(partial(apart, killed_by), mutants)
        killers = list(track(runs, "breaking", len(mutants), console=console))
    table = Table("mutant", "killed by")
    for mutant, killer in zip(mutants, killers):
        table.add_row(mutant.name, Text("LIVED", "bold red") if killer is None else Text(killer))
    console.print(table)
    lived = killers.count(None)
    console.print(f"{len(mutants)} mutants, {len(mutants) - lived} killed, {lived} lived")
    return int(lived > 0)


if __name__ == "__main__":
    sys.exit(main())
