"""The hand-written decay, as the sources write it."""

from __future__ import annotations


def decay_by_hand(groups, wds, lrs=None):
    """Multiplies each weight with a gradient by ``1 - lr * wd``, in its own dtype.

    fast.ai, "AdamW and Super-convergence is now the fastest way to train neural nets" (2018),
    between ``loss.backward()`` and ``optimizer.step()``.

    Args:
        groups: Param groups as a torch optimizer has them.
        wds: One coefficient for all groups, or one per group.
        lrs: What multiplies ``wd``, one per group; None for each group's ``lr``.
    """
    for index, group in enumerate(groups):
        wd = wds[index] if isinstance(wds, (list, tuple)) else wds
        lr = group["lr"] if lrs is None else lrs[index]
        for p in group["params"]:
            if p.grad is not None:
                p.data.mul_(1 - lr * wd)
