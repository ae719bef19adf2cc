"""What weights decay towards: their initial values, or tensors given by parameter name."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.nn.parameter import is_lazy

from wd_callbacks.core.selection import clean_name


class Anchors:
    """Finds the anchors of parameters.

    Args:
        anchor: None, ``"initial"``, or a mapping from parameter name to tensor.
    """

    def __init__(self, anchor: Any) -> None:
        self._is_initial = anchor == "initial"
        is_mapping = isinstance(anchor, Mapping)
        self._named = {clean_name(k): v for k, v in anchor.items()} if is_mapping else {}
        self._bare = {_bare(name): name for name in self._named}

    def find(self, p: Tensor, names: Sequence[str]) -> Tensor | None:
        """Return the anchor of ``p``, whose names are ``names``; None: it decays towards zero."""
        if self._is_initial:
            return p.detach().clone()
        name = self.key(names)
        return None if name is None else follow(self._named[name], p)

    def key(self, names: Sequence[str]) -> str | None:
        """Return the name in the mapping of a parameter; None if it is not there."""
        exact = [name for name in names if name in self._named]
        bare = [self._bare[_bare(name)] for name in names if _bare(name) in self._bare]
        return next(iter(exact + bare), None)

    def check(self, p: Tensor, names: Sequence[str]) -> None:
        """Raise ValueError if ``p`` cannot decay towards its anchor."""
        if self._is_initial and hasattr(p, "device_mesh"):
            raise ValueError(
                "anchor='initial' cannot be saved with sharded weights (DTensor): pass a mapping "
                "as anchor, such as the full state_dict() from before sharding"
            )
        name = self.key(names)
        if (self._is_initial or name is not None) and getattr(p, "_fsdp_flattened", False):
            raise ValueError(
                "an anchor needs the parameters themselves, but FSDP has flattened them: use "
                "fully_shard, and pass a mapping as anchor"
            )
        if name is None or is_lazy(p) or self._named[name].shape == p.shape:
            return
        raise ValueError(
            f"anchor[{name!r}] has shape {tuple(self._named[name].shape)}, but the parameter has "
            f"shape {tuple(p.shape)}: leave this entry out, and the parameter decays towards 0, "
            f"or exclude the parameter"
        )

    def check_names(self, names: Sequence[str]) -> None:
        """Raise ValueError if a mapping names none of the parameters ``names``."""
        if self._named and self.key(names) is None:
            first = next(iter(self._named))
            near = difflib.get_close_matches(first, names, n=3, cutoff=0)
            raise ValueError(
                f"anchor names no parameter of the model: it has {first!r}, and the nearest names "
                f"of the model are {', '.join(map(repr, near))}. Use the model's names"
            )


def _bare(name: str) -> str:
    """Return a name without the parts that DDP and DataParallel add wherever they stand."""
    return ".".join(part for part in name.split(".") if part != "module")


def follow(anchor: Tensor, p: Tensor) -> Tensor:
    """Return ``anchor`` on the device, in the dtype and with the sharding of ``p``."""
    anchor = anchor.to(device=p.device, dtype=p.dtype)
    if hasattr(p, "device_mesh") and not hasattr(anchor, "device_mesh"):
        from torch.distributed import _tensor as sharding  # public since torch 2.5

        return sharding.distribute_tensor(anchor, p.device_mesh, p.placements)  # type: ignore
    return anchor
