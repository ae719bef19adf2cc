"""What all adapters share: read-only arguments, and a word to those who took the wrong one."""

from __future__ import annotations

from typing import Any

from wd_callbacks.core.config import Config

# The first attribute of a callback that each framework asks for, and callbacks of others lack.
FOREIGN = {
    "name": "fastai",
    "setup": "lightning",
    "state_key": "lightning",
    "on_init_end": "transformers",
}
CLEANUP = ("on_exception", "teardown")  # which Lightning calls after an error


class Adapter:
    """Base of the adapters, which hold their arguments as ``config``."""

    config: Config

    def __repr__(self) -> str:
        """Show how it was built."""
        return f"{type(self).__name__}({self.config!r})"

    def __setattr__(self, name: str, value: Any) -> None:
        """Raise for an argument: the values in force were checked when it was built."""
        if name in Config.__dataclass_fields__:
            raise AttributeError(
                f"{name} is fixed when DecoupledWD is built. To change the coefficient during "
                f"training, pass a schedule as wd, or pass wd=None and set the weight decay of "
                f"each param group"
            )
        super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        """Return an argument; raise TypeError if another framework's trainer asks for its event."""
        if name in Config.__dataclass_fields__ and "config" in vars(self):
            return getattr(self.config, name)
        if name in FOREIGN:
            module = type(self).__module__
            raise TypeError(
                f"this is the DecoupledWD of {module}, which would never decay here: import "
                f"DecoupledWD from wd_callbacks.{FOREIGN[name]}"
            )
        if name in CLEANUP:
            return lambda *args, **kwargs: None
        parent = getattr(super(), "__getattr__", None)
        if parent is None:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return parent(name)
