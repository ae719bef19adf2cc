"""Which parameters decay together: the rules of param groups, and buckets of their parameters."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from wd_callbacks.core.anchors import Anchors, follow
from wd_callbacks.core.cautious import check_dtype
from wd_callbacks.core.config import Config
from wd_callbacks.core.deferred import Bucket, Call, Deferred, Key, precision_of
from wd_callbacks.core.groups import Group, own_wd
from wd_callbacks.core.rules import GroupState, Rule, make_rule, read_groups
from wd_callbacks.core.selection import Selected, Selection
from wd_callbacks.core.warn import warn
from wd_callbacks.schedules import Run

FEW_BUCKETS = 8  # up to which one call per rule is cheaper than one with a list of factors


def _always(p: Tensor) -> bool:
    return True


@dataclass(frozen=True)
class Setup:
    """What a decay is built with.

    Attributes:
        config: What the user asked for.
        selection: Which parameters the entries of ``exclude`` and the keys of ``wd`` select.
        run: The length of the run, as far as it is known.
        max_lrs: Peak learning rates of the first param groups from a better source than the groups.
        least_lrs: Learning rates that the first param groups have had before the first step.
        no_decay: Whether each of the first param groups is a no-decay group, if that is known.
        schedules_own_wd: Whether the optimizer's own weight decay may be 0 for now only.
        may_decay: Whether a parameter may decay, such as fastai's ``do_wd``.
        warn: Where warnings go.
    """

    config: Config
    selection: Selection
    run: Run = Run()  # noqa: RUF009 frozen
    max_lrs: Sequence[float | None] = ()
    least_lrs: Sequence[float] = ()
    no_decay: Sequence[bool] = ()
    schedules_own_wd: bool = False
    may_decay: Callable[[Tensor], bool] = _always
    warn: Callable[[str], None] = warn

    @functools.cached_property
    def anchors(self) -> Anchors:
        """Finds the anchors of parameters."""
        return Anchors(self.config.anchor)


@dataclass(frozen=True, eq=False)
class Layout:
    """What was made of the param groups as they were at some step.

    Attributes:
        params: The parameters that the step updates.
        sizes: The number of parameters of each group.
        states: What was read from each group when it was new.
        rules: One per (group, key), in the order of the groups and of the keys.
        calls: Those of ``params`` that decay.
        deferred: What parameters outside of the buckets have deferred.
        anchors: Of every parameter that has one.
        selected: What the entries of ``exclude`` and the keys of ``wd`` say of every parameter.
    """

    params: Sequence[Tensor] = ()
    sizes: Sequence[int] = ()
    states: Sequence[GroupState] = ()
    rules: Sequence[Rule] = ()
    calls: Sequence[Call] = ()
    deferred: Mapping[Tensor, Deferred] = field(default_factory=dict)
    anchors: Mapping[Tensor, Tensor] = field(default_factory=dict)
    selected: Mapping[Tensor, Selected] = field(default_factory=dict)

    @functools.cached_property
    def active(self) -> list[int]:
        """The indices of the rules that have a bucket."""
        return sorted({bucket.rule for bucket in self.buckets()})

    @functools.cached_property
    def watched(self) -> list[Rule]:
        """The active rules whose ``max_lr`` matters."""
        return [self.rules[i] for i in self.active if self.rules[i].uses_max_lr]

    @functools.cached_property
    def with_gradient(self) -> set[Tensor]:
        """The parameters that have had a gradient in some step."""
        return {*self.all_deferred(), *self.params}

    def buckets(self) -> Iterator[Bucket]:
        """Return all buckets."""
        return (bucket for call in self.calls for bucket in call.buckets)

    def all_deferred(self) -> dict[Tensor, Deferred]:
        """Return what each parameter has deferred."""
        in_buckets = {p: bucket.deferred for bucket in self.buckets() for p in bucket.params}
        return {**self.deferred, **in_buckets}


def updated_params(groups: Sequence[Group], needs_grad: bool) -> list[Tensor]:
    """Return the parameters that a step of the optimizer updates.

    FSDP's processes hold no element of some parameters, but defer the same for them.
    """
    if not needs_grad:
        params = (p for group in groups for p in group["params"])
        return [p for p in params if p.requires_grad and not is_lazy(p)]
    return [
        p
        for group in groups
        for p in group["params"]
        if p.grad is not None or (not is_lazy(p) and p.numel() == 0)
    ]


def make_layout(
    setup: Setup, groups: Sequence[Group], params: Sequence[Tensor], old: Layout
) -> Layout:
    """Return the layout of ``groups`` for a step that updates ``params``.

    Args:
        setup: What the decay was built with.
        groups: The param groups.
        params: The parameters that the step updates.
        old: The layout so far, whose rules, anchors and deferred shrinks go on.

    Raises:
        ValueError: The config does not fit the groups.
    """
    config = setup.config
    check_fit(config, groups, old)
    states = read_groups(config, groups, old.states, setup.max_lrs, setup.least_lrs, setup.no_decay)
    selected = setup.selection.look_up(p for group in groups for p in group["params"])
    rules = _rules(setup, groups, states, selected, old)
    _warn_of_idle_keys(setup, rules, selected)
    deferred = {p: value for p, value in old.all_deferred().items() if p in selected}
    anchors = {p: anchor for p, anchor in old.anchors.items() if p in selected}
    buckets: dict[Any, Bucket] = {}
    for p, rule in _decaying(setup, groups, set(params), selected, rules):
        anchor = anchors.get(p)
        if anchor is None:
            setup.anchors.check(p, selected[p].names)
            anchor = setup.anchors.find(p, selected[p].names)
        if anchor is not None:
            anchors[p] = anchor = follow(anchor, p)
        _add(setup, buckets, rule, p, anchor, deferred.pop(p, Deferred()))
    sizes = [len(group["params"]) for group in groups]
    calls = _calls(list(buckets.values()))
    return Layout(params, sizes, states, rules, calls, deferred, anchors, selected)


def _decaying(
    setup: Setup,
    groups: Sequence[Group],
    updated: set[Tensor],
    selected: Mapping[Tensor, Selected],
    rules: Sequence[Rule],
) -> Iterator[tuple[Tensor, int]]:
    """Yield those of the ``updated`` parameters that decay, with the index of their rule."""
    index = {(rule.group, rule.key): i for i, rule in enumerate(rules)}
    for number, group in enumerate(groups):
        for p in group["params"]:
            if p not in updated:
                continue
            updated.discard(p)  # one that is listed twice belongs to the first group
            rule = index.get((number, key_of(setup.config, selected[p])))
            if rule is None or not rules[rule].decays or selected[p].exclude is not None:
                continue
            if setup.may_decay(p):
                yield p, rule


def check_fit(config: Config, groups: Sequence[Group], old: Layout) -> None:
    """Check that the config fits the groups, and that no group is missing that decays differently.

    Raises:
        ValueError: It does not, or one is.
    """
    first = [_treatment(rule) for rule in old.rules[:1]]
    differ = config.is_scheduled or any(_treatment(rule) not in first for rule in old.rules)
    if len(groups) < len(old.states) and differ:
        raise ValueError(
            f"the optimizer had {len(old.states)} param groups and now has {len(groups)}. Groups "
            f"are matched by index, so removing one, or stepping one alone (as DeepSpeed's ZeRO "
            f"does), works only if all of them decay alike: pass one number as wd"
        )
    config.check_groups(groups)


def check_parameters(setup: Setup, groups: Sequence[Group], layout: Layout) -> None:
    """Check what can be checked of parameters before training.

    Raises:
        ValueError: One cannot decay as the config asks.
    """
    config, selected = setup.config, layout.selected
    setup.anchors.check_names(setup.selection.names())
    trained = {p for group in groups for p in group["params"] if p.requires_grad}
    for p, _ in _decaying(setup, groups, trained, selected, layout.rules):
        setup.anchors.check(p, selected[p].names)
        if config.cautious:
            check_dtype(p.dtype)
    is_zero = [own_wd(group, index) == 0 for index, group in enumerate(groups)]
    if len(groups) < 2 or not all(is_zero) or config.keys or not config.keeps_no_decay_groups:
        return
    vectors = [_are_vectors(setup, selected, group["params"]) for group in groups]
    if any(vectors) and not all(vectors) and not setup.no_decay:
        setup.warn(
            f"param group {vectors.index(True)} holds only vectors (such as biases and norms), and "
            f"they decay too, because every group's own weight decay is 0: if they should not, "
            f"pass exclude='vector', or set a weight decay above 0 in the other groups"
        )


def _are_vectors(
    setup: Setup, selected: Mapping[Tensor, Selected], params: Sequence[Tensor]
) -> bool:
    """Return True if ``params`` are vectors alone, of which at least one decays."""
    are_vectors = all(not is_lazy(p) and p.ndim < 2 for p in params)
    return are_vectors and any(selected[p].exclude is None and setup.may_decay(p) for p in params)


def key_of(config: Config, selected: Selected) -> str | None:
    """Return the text of the key of ``wd`` that matches; ``""`` if none of several does."""
    if not config.keys:
        return None
    return "" if selected.key is None else config.key_names[selected.key]


def _treatment(rule: Rule) -> Any:
    return rule.key, rule.wd, rule.scale_by, rule.max_lr if rule.uses_max_lr else None


def _rules(
    setup: Setup,
    groups: Sequence[Group],
    states: Sequence[GroupState],
    selected: Mapping[Tensor, Selected],
    old: Layout,
) -> list[Rule]:
    """Return a rule for each group and each key that one of its parameters matches."""
    known = {(rule.group, rule.key): rule for rule in old.rules}
    names = setup.config.key_names
    rules = []
    for index, (group, state) in enumerate(zip(groups, states)):
        matched = {key_of(setup.config, selected[p]) for p in group["params"]} if names else ()
        for key in [name for name in names if name in matched] if names else [None]:
            rule = known.get((index, key))
            rules.append(rule or make_rule(setup.config, setup.run, index, state, key))
    return rules


def _warn_of_idle_keys(
    setup: Setup, rules: Sequence[Rule], selected: Mapping[Tensor, Selected]
) -> None:
    for index, key in enumerate(setup.config.key_names):
        of_key = [rule.is_no_decay for rule in rules if rule.key == key]
        # Others of its parameters may be in another optimizer.
        if of_key and all(of_key) and setup.selection.matched(index) <= selected.keys():
            setup.warn(
                f"the key {key!r} of wd has no effect: all of its parameters are in no-decay "
                f"groups, which a mapping leaves alone. Leave the key out, or put these "
                f"parameters into another param group"
            )


def _calls(buckets: Sequence[Bucket]) -> list[Call]:
    """Group the buckets that share a call: those of one rule, or of all rules if they are many."""
    groups: dict[Any, list[Bucket]] = {}
    for bucket in buckets:
        rule = bucket.rule if len(buckets) <= FEW_BUCKETS else None
        groups.setdefault((bucket.key, bucket.anchors is None, rule), []).append(bucket)
    return [Call(each, [p for bucket in each for p in bucket.params]) for each in groups.values()]


def _add(
    setup: Setup,
    buckets: dict[Any, Bucket],
    rule: int,
    p: Tensor,
    anchor: Tensor | None,
    deferred: Deferred,
) -> None:
    """Put a parameter into the bucket of its rule, kind and deferred shrink."""
    key: Key = (p.device, p.dtype, type(p), getattr(p, "device_mesh", None))
    if setup.config.cautious:
        check_dtype(p.dtype)
    if p.grad is not None and p.grad.layout != torch.strided:
        setup.warn(
            "a parameter has a sparse gradient: the whole tensor decays, not only the rows that "
            "the gradient touches. If it should not decay, exclude it"
        )
    is_anchored = anchor is not None
    bucket = buckets.get((rule, key, is_anchored, deferred))
    if bucket is None:
        precision = precision_of(p.dtype, is_anchored, setup.config.quantum)
        bucket = Bucket(rule, key, [], [] if is_anchored else None, precision, deferred)
        buckets[rule, key, is_anchored, deferred] = bucket
    bucket.params.append(p)
    if bucket.anchors is not None and anchor is not None:
        bucket.anchors.append(anchor)
