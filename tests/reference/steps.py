"""A training loop with a place for a decay written by hand, before or after the update."""

from __future__ import annotations


def nothing(step):
    """Decays nothing."""


def make_steps(case, model, optimizer, steps, before=nothing, after=nothing, closure=False):
    """Trains ``model`` on the losses of ``case``, a row of ``helpers.CASES``.

    ``before`` is called with the index of the step when the gradients are there, before the update.
    With a ``closure`` they are not there yet, as with LBFGS, which decays first (P1).
    """
    for step in steps:

        def evaluate(step=step):
            optimizer.zero_grad()
            loss = case.loss(model, step)
            loss.backward()
            return loss

        closes = closure or case.needs_closure
        if not closes:
            evaluate()
        before(step)
        optimizer.step(*[evaluate] * closes)
        after(step)


def without_wd(case, params):
    """The optimizer of a case with a weight decay of its own of 0."""
    return case.build(params, **({"weight_decay": 0} if case.has_wd else {}))
