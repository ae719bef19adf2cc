"""Importing an adapter leaves the process as it was (line 12 of the report)."""

import subprocess
import sys
import textwrap

import pytest

FIRST, SECOND = "pytorch_lightning", "lightning.pytorch"
LOGGERS = [FIRST, SECOND, "lightning", "lightning_fabric", "lightning.fabric"]


def run(code):
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


SEEN = """
import logging, sys
def seen():
    loggers = {n: logging.getLogger(n) for n in %r}
    state = {n: (g.level, len(g.handlers), g.propagate) for n, g in loggers.items()}
    rank_zero = sys.modules.get("lightning_utilities.core.rank_zero")
    return state, getattr(getattr(rank_zero, "log", None), "name", None)
""" % (LOGGERS,)


@pytest.mark.parametrize("level", [None, SECOND, FIRST])
@pytest.mark.parametrize(
    "before", [[FIRST], [SECOND], ["lightning"], [FIRST, SECOND], [SECOND, FIRST]], ids="+".join
)
def test_with_a_package_in_use_nothing_changes(before, level):
    imports = "\n".join(f"import {name}" for name in before)
    setting = f"logging.getLogger({level!r}).setLevel(logging.ERROR)" if level else ""
    (same, imported) = run(
        f"{SEEN}\n{imports}\n{setting}\nbefore, names = seen(), set(sys.modules)\n"
        "import wd_callbacks.lightning\n"
        "print(before == seen())\n"
        "print(len({'pytorch_lightning', 'lightning.pytorch'} & (set(sys.modules) - names)))"
    )
    assert (same, imported) == ("True", "0")


@pytest.mark.parametrize("name", LOGGERS)
def test_levels_that_were_set_before_survive(name):
    (level,) = run(f"""
        import logging
        logging.getLogger({name!r}).setLevel(logging.ERROR)
        import wd_callbacks.lightning
        print(logging.getLogger({name!r}).level)
    """)
    assert level == "40"


def test_one_package_is_imported_if_none_is_in_use():
    (count,) = run("""
        import sys
        import wd_callbacks.lightning
        print(len({"pytorch_lightning", "lightning.pytorch"} & set(sys.modules)))
    """)
    assert count == "1"


@pytest.mark.parametrize("first", [FIRST, SECOND])
@pytest.mark.parametrize("second", [FIRST, SECOND])
@pytest.mark.parametrize("is_last", [False, True], ids=["between", "last"])
def test_both_packages_take_the_callback_whatever_was_imported_first(first, second, is_last):
    here = "from wd_callbacks.lightning import DecoupledWD"
    found = run(f"""
        import importlib, logging
        import {first} as A
        {"" if is_last else here}
        import {second} as B
        {here if is_last else ""}
        logging.disable(logging.CRITICAL)
        quiet = dict(max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False,
                     enable_progress_bar=False, enable_model_summary=False, limit_train_batches=2,
                     limit_val_batches=0)
        for package in (A, B):
            decay = DecoupledWD(0.1)
            model = importlib.import_module(package.__name__ + ".demos.boring_classes").BoringModel
            package.Trainer(callbacks=[decay], **quiet).fit(model())
            print(isinstance(decay, package.Callback), decay.coefficients[0][0])
    """)
    assert found == ["True", "0.1"] * 2


@pytest.mark.parametrize("missing", [FIRST, SECOND])
def test_a_package_that_is_barred_is_as_one_that_is_missing(missing):
    (base,) = run(f"""
        import sys
        sys.modules[{missing!r}] = None
        import wd_callbacks.lightning as ours
        print(ours.DecoupledWD.__mro__[2].__module__.removesuffix(".callbacks.callback"))
    """)
    assert base == ({FIRST, SECOND} - {missing}).pop()


def test_without_any_package_the_extra_is_named():
    found = run("""
        import sys
        for name in ("pytorch_lightning", "lightning", "lightning.pytorch"):
            sys.modules[name] = None
        try:
            import wd_callbacks.lightning
        except ImportError as error:
            print("wd_callbacks[lightning]" in str(error))
    """)
    assert found == ["True"]


@pytest.mark.parametrize("module", ["torch", "schedules", "plan"])
def test_the_rest_needs_torch_alone(module):
    found = run(f"""
        import sys
        import torch
        before = set(sys.modules)
        import wd_callbacks.{module}
        new = {{name.partition(".")[0] for name in set(sys.modules) - before}}
        frameworks = {{"fastai", "lightning", "pytorch_lightning", "transformers", "matplotlib"}}
        print(len(new & frameworks))
    """)
    assert found == ["0"]


def test_a_star_import_of_schedules_gives_schedules_alone():  # line 22
    found = run("""
        from wd_callbacks.schedules import *
        print(*(name for name in dir() if not name.startswith("_")))
    """)
    assert not {"math", "Any", "Sequence", "dataclass"} & set(found)
    assert {"Linear", "Cosine", "Timescale", "Restarts"} <= set(found)
