"""Saved states: what a decay needs to go on after a checkpoint, as plain numbers.

The keys are those of version 0.1.0, whose checkpoints keep loading; ``owed``, ``payments`` and
``lr_max`` are what is deferred, how often it was applied, and ``max_lr``.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

from torch import Tensor

from wd_callbacks.core.checks import as_float, is_sequence
from wd_callbacks.core.config import Config
from wd_callbacks.core.decay import Decay
from wd_callbacks.core.deferred import MAX_DEFERRED, Deferred
from wd_callbacks.core.groups import Group
from wd_callbacks.core.layout import Layout, make_layout
from wd_callbacks.core.rules import GroupState, Shrink

Lengths: TypeAlias = Mapping[str, tuple[Any, Any]]
"""What tells the length of the run, by its name: as saved and in this run."""

NOT_A_STATE = "this is not the state of a DecoupledWD"


def state_dict(decay: Decay, groups: Sequence[Group]) -> dict[str, Any]:
    """Return what is deferred and what was read once, with the arguments it belongs to."""
    layout = Layout() if decay.rereads_groups else decay.layout  # nothing before the first step
    deferred = layout.all_deferred()
    saved = groups if layout.states else ()
    rows = [[deferred.pop(p, Deferred()) for p in group["params"]] for group in saved]
    state = {
        "steps": decay.steps,
        "arguments": dict(decay.setup.config.record),
        "lr_max": [each.max_lr for each in layout.states],
        "guess": [int(each.is_guess) for each in layout.states],
        "no_decay": [int(each.no_decay) for each in layout.states],
        "owed": [[each.log for each in row] for row in rows],
        "payments": [[each.applied for each in row] for row in rows],
        "rules": [[rule.group, rule.key] for rule in layout.rules],
        "due": [rule.due for rule in layout.rules],
        "known": [int(rule.is_known) for rule in layout.rules],
        "highest_lr": [rule.highest_lr for rule in layout.rules],
        "progress": decay.progress,
    }
    if decay.setup.config.anchor == "initial":
        anchors = dict(layout.anchors)
        state["anchors"] = [[anchors.pop(p, None) for p in group["params"]] for group in saved]
    return state


def load_state_dict(
    decay: Decay, state: Mapping[str, Any], groups: Sequence[Group], lengths: Lengths
) -> None:
    """Go on from what ``state_dict`` returned; the arguments of ``decay`` stay in force.

    Args:
        decay: The decay, with the arguments of this run.
        state: The saved state.
        groups: The optimizer's param groups.
        lengths: The length of the run.

    Raises:
        ValueError: It is not such a state, or of other param groups. Nothing changes then.
    """
    check(state, [len(group["params"]) for group in groups])
    layout, config = None, decay.setup.config
    if state["owed"]:  # else it was saved before the first step, when nothing was read
        # max_lr is read anew if it is an argument now, or was one.
        keeps = config.max_lr is None and state["arguments"].get("max_lr") is None
        no_decay = list(map(bool, state["no_decay"]))
        setup = replace(decay.setup, no_decay=no_decay)
        old = Layout(
            states=_states(state, no_decay) if keeps else (),
            deferred=_per_parameter(groups, map(_deferred, state["owed"], state["payments"])),
            anchors=_anchors(config, state, groups),
        )
        layout = make_layout(setup, groups, (), old)
        _load_rules(layout, state)
    progress = float(state.get("progress", 0.0)) if layout else 0.0
    rules = layout.rules if layout else ()
    coefficients = [rule.coefficient(groups[rule.group], progress) for rule in rules]
    # Only now, as any of it may have raised.
    decay.rereads_groups = layout is None
    decay.layout = layout or make_layout(decay.setup, groups, (), Layout())
    decay.steps, decay.progress = state["steps"], progress
    decay.shrinks = [Shrink(coefficient, 0.0, 1.0) for coefficient in coefficients]
    for message in _changes(config, state, lengths):
        decay.warn(message)


def _changes(config: Config, state: Mapping[str, Any], lengths: Lengths) -> list[str]:
    """Return a warning for each argument that is not that of the run that was saved."""
    old, new = state["arguments"], config.record
    names = [name for name in new if name in old and name not in ("shown", "keys")]
    shown = old.get("shown")
    texts = shown if isinstance(shown, Mapping) else {}, new["shown"]
    pairs = {
        name: (_text(old[name], texts[0].get(name)), _text(new[name], texts[1].get(name)))
        for name in names
        if _differs(old[name], new[name], *[text.get(name) for text in texts])
        or (name == "wd" and old.get("keys", new["keys"]) != new["keys"])
    }
    pairs |= {name: pair for name, pair in lengths.items() if pair[0] != pair[1]}
    return [
        f"{name} was {before} in the saved run and is {now} in this one: the new value counts"
        for name, (before, now) in pairs.items()
    ]


def _differs(old: Any, new: Any, old_text: str | None, new_text: str | None) -> bool:
    if _is_unknown(old, old_text) or _is_unknown(new, new_text):
        return None not in (old_text, new_text) and old_text != new_text
    return bool(_listed(old) != _listed(new))


def _is_unknown(value: Any, text: str | None) -> bool:
    """Return True for a schedule or a callable that gave no value outside of training."""
    if isinstance(value, Mapping):
        return any(_is_unknown(element, "") for element in value.values())
    if is_sequence(value):
        return any(_is_unknown(element, "") for element in value)
    return value is None and text not in ("None", None)


def _listed(value: Any) -> Any:
    """Return ``value`` with lists for tuples, and texts for keys."""
    if isinstance(value, Mapping):
        return {str(key): _listed(element) for key, element in value.items()}
    return list(map(_listed, value)) if is_sequence(value) else value


def _text(value: Any, text: str | None) -> str:
    """Return what an argument was, with its first and last value if it is a schedule."""
    is_sampled = is_sequence(value) and len(value) == 5 and not _is_unknown(value, "")
    if text is None:
        text = "a schedule" if is_sampled else "None" if value is None else f"{value}"
    is_plain = not is_sampled or any(mark in text for mark in "([{")
    return text if is_plain else f"{text} (from {value[0]:g} to {value[-1]:g})"


def _states(state: Mapping[str, Any], no_decay: Sequence[bool]) -> list[GroupState]:
    guesses = map(bool, state.get("guess", [1] * len(no_decay)))
    return list(map(GroupState, state["lr_max"], guesses, no_decay))


def _deferred(logs: Sequence[float], applied: Sequence[int]) -> list[Deferred]:
    return list(map(Deferred, logs, applied))


def _per_parameter(groups: Sequence[Group], rows: Any) -> dict[Tensor, Any]:
    """Return the values by parameter; a tied one's stands where it is listed first."""
    values: dict[Tensor, Any] = {}
    for group, row in zip(groups, rows):
        for p, value in zip(group["params"], row):
            values.setdefault(p, value)
    return values


def _anchors(
    config: Config, state: Mapping[str, Any], groups: Sequence[Group]
) -> dict[Tensor, Any]:
    saved = state.get("anchors") if config.anchor == "initial" else None
    found = _per_parameter(groups, saved or [])
    return {p: anchor for p, anchor in found.items() if anchor is not None}


def _load_rules(layout: Layout, state: Mapping[str, Any]) -> None:
    """Take up the totals of the rules that are still there."""
    saved = [tuple(each) for each in state.get("rules", ())]
    if not saved:  # version 0.1.0 had one rule per group
        saved = [(index, None) for index in range(len(state["due"]))]
    known = state.get("known", [1] * len(saved))
    highest = state.get("highest_lr", [None] * len(saved))  # version 0.1.0 did not know
    totals = dict(zip(saved, zip(state["due"], known, highest)))
    for rule in layout.rules:
        if (rule.group, rule.key) in totals:
            rule.due, is_known, highest_lr = totals[rule.group, rule.key]
            rule.is_known = bool(is_known)
            rule.highest_lr = (rule.max_lr or 0.0) if highest_lr is None else highest_lr


def check(state: Any, sizes: list[int]) -> None:
    """Raise ValueError unless ``state`` is that of a decay of param groups of these sizes."""
    check_entries(
        state,
        steps=is_count,
        arguments=lambda value: isinstance(value, Mapping),
        owed=_all(_all(lambda value: is_amount(value) and value < MAX_DEFERRED)),
        payments=_all(_all(is_count)),
        due=_all(is_amount),
        lr_max=_all(lambda value: value is None or (is_amount(value) and value > 0)),
        no_decay=_all(lambda value: value in (0, 1)),
    )
    later = {"progress": 0.0, "guess": [], "known": [], "highest_lr": [], "rules": [], **state}
    check_entries(
        later,
        progress=is_fraction,
        guess=_all(lambda value: value in (0, 1)),
        known=_all(lambda value: value in (0, 1)),
        highest_lr=_all(is_amount),
        rules=_all(lambda value: is_sequence(value) and len(value) == 2),
    )
    for name in ("owed", "payments"):
        saved = list(map(len, state[name]))
        if saved not in ([], sizes):
            raise ValueError(
                f"the state is of param groups with {saved} parameters, but the optimizer's have "
                f"{sizes}: build the optimizer as in the saved run"
            )
    _check_lengths(state)


def _check_lengths(state: Mapping[str, Any]) -> None:
    per_group = [len(state[name]) for name in ("lr_max", "no_decay", "guess") if name in state]
    per_rule = [
        len(state[name]) for name in ("due", "known", "highest_lr", "rules") if name in state
    ]
    owed, payments = len(state["owed"]), len(state["payments"])
    # < if groups were added after the last step.
    fits = owed == payments and max(per_group) <= owed and len(set(per_group)) == 1
    has_rules = "rules" in state or state["due"] == [] or per_rule[0] == owed
    if not (fits and has_rules and len(set(per_rule)) == 1):
        raise ValueError(f"{NOT_A_STATE}: its lists do not agree in length")
    anchors = state.get("anchors", [])
    fits_groups = is_sequence(anchors) and len(anchors) in (0, owed)
    if not (fits_groups and all(len(a) == len(o) for a, o in zip(anchors, state["owed"]))):
        raise ValueError(f"{NOT_A_STATE}: its anchors do not match the parameters")


def check_entries(state: Any, **fits: Callable[[Any], bool]) -> None:
    """Raise ValueError if ``state`` lacks one of the keys, or holds there what does not fit."""
    missing = [key for key in fits if not isinstance(state, Mapping) or key not in state]
    if missing:
        raise ValueError(f"{NOT_A_STATE}: it lacks {', '.join(missing)}")
    for key, is_fit in fits.items():
        if not is_fit(state[key]):
            raise ValueError(f"{NOT_A_STATE}: {key} cannot be {reprlib.repr(state[key])}")


def is_count(value: Any) -> bool:
    """Return True for a whole number of at least 0."""
    return type(value) is int and is_amount(value)


def is_amount(value: Any) -> bool:
    """Return True for a finite number of at least 0."""
    return type(value) in (int, float) and 0 <= as_float(value) < math.inf


def is_fraction(value: Any) -> bool:
    """Return True for a number in [0, 1]."""
    return is_amount(value) and value <= 1


def _all(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda values: is_sequence(values) and all(map(fits, values))
