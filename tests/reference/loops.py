"""The hand-written decay, as the sources write it."""

from __future__ import annotations

import torch


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


def decays_by_hand(optimizer, wd):
    """Has every step of ``optimizer`` decay by hand once its gradients are there.

    With a closure that is after the first evaluation; of LBFGS it is before that (P1).
    """

    def before_step(optimizer, args, kwargs):
        evaluate, evaluations = args[1] if len(args) > 1 else None, []
        if isinstance(optimizer, torch.optim.LBFGS):
            for group in optimizer.param_groups:
                for p in group["params"]:
                    p.data.mul_(1 - group["lr"] * wd)
            return None
        if evaluate is None:
            decay_by_hand(optimizer.param_groups, wd)
            return None

        def closure():
            evaluations.append(evaluate())
            if len(evaluations) == 1:
                decay_by_hand(optimizer.param_groups, wd)
            return evaluations[-1]

        return (optimizer, closure), kwargs

    optimizer.register_step_pre_hook(before_step)
