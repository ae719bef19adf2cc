"""Decoupled weight decay for any PyTorch optimizer, with one line.

``wd_callbacks.torch``, ``wd_callbacks.fastai``, ``wd_callbacks.lightning`` and
``wd_callbacks.transformers`` each have a ``DecoupledWD`` with the same arguments. Right before an
optimizer's update, it multiplies every parameter that the update touches by ``1 - lr * wd``. The
optimizer itself steps with a weight decay of 0 (Loshchilov & Hutter, arXiv 1711.05101,
Algorithm 2, line 12).
"""

import importlib
import sys

__version__ = "0.2.0"


def __getattr__(name: str) -> object:
    """Raise an error that names the modules to import DecoupledWD and the schedules from."""
    if name == "DecoupledWD":
        message = (
            "DecoupledWD has one class per framework: import it from wd_callbacks.torch (plain "
            "loops), wd_callbacks.fastai, wd_callbacks.lightning or wd_callbacks.transformers"
        )
    elif name in importlib.import_module("wd_callbacks.schedules").__all__:
        message = f"import {name} from wd_callbacks.schedules"
    else:
        raise AttributeError(f"module 'wd_callbacks' has no attribute {name!r}")
    is_import = sys._getframe(1).f_code.co_name == "_handle_fromlist"  # and not getattr()
    raise (ImportError if is_import else AttributeError)(message)
