"""Invalid schedules: what test_schedules.py leaves out, and trees of schedules by hypothesis.

More of them, at random: ``HYPOTHESIS_PROFILE=deep pytest -n 0 tests/test_invalid_schedules.py``.
"""

from __future__ import annotations

import math
import pickle

import pytest
from helpers import fuzz
from hypothesis import example, given
from hypothesis import strategies as st

from wd_callbacks import schedules
from wd_callbacks.schedules import (
    Cosine,
    Exponential,
    Join,
    Linear,
    Normalized,
    Polynomial,
    Restarts,
    Steps,
    Timescale,
)

HALF = (0.5, Linear(0, 1))
SCHEDULES = [
    (lambda: Linear(None, 0), TypeError, "Linear.*start.*None"),
    (lambda: Linear([0, 1], 1), TypeError, "Linear.*start.*list"),
    (lambda: Linear(Linear(0, 1), 1), TypeError, "Linear.*start.*Linear"),
    (lambda: Exponential(math.inf, 1), ValueError, "Exponential.*start.*inf"),
    (lambda: Polynomial(0, 1, math.nan), ValueError, "Polynomial.*power.*nan"),
    (lambda: Polynomial(0, 1, "2"), TypeError, "Polynomial.*power.*'2'"),
    (lambda: Steps(None), TypeError, "Steps.*values.*None"),
    (lambda: Steps({0: 1, 1.5: 1}), ValueError, r"Steps.*key.*1\.5"),
    (lambda: Steps({0: 1, -1: 1}), ValueError, "Steps.*key.*-1"),
    (lambda: Steps({"0": 1}), TypeError, "Steps.*key.*'0'"),
    (lambda: Steps({0: None}), TypeError, r"Steps.*values\[0\].*None"),
    (lambda: Steps({0: 1})(math.nan), ValueError, "progress.*nan"),
    (lambda: Join(None), TypeError, "Join.*pairs"),
    (lambda: Join(Linear(0, 1)), TypeError, "Join.*pairs"),
    (lambda: Join((1.0, Linear(0, 1))), TypeError, r"Join.*pairs.*1\.0"),
    (lambda: Join([HALF, (1, Linear(0, 1))]), ValueError, r"Join.*1\.5"),
    (lambda: Join([(0.99999, Linear(0, 1))]), ValueError, r"Join.*0\.99999"),
    (lambda: Join([(0, Linear(0, 1)), HALF, HALF]), ValueError, "Join.*fraction.*got 0"),
    (lambda: Join([("1", len)]), TypeError, "Join.*fraction.*'1'"),
    *((lambda v=v: Restarts(len, v), ValueError, f"Restarts.*cycles.*{v}") for v in (-1, None)),
    *((lambda v=v: Restarts(len, v), ValueError, f"Restarts.*cycles.*{v}") for v in ("2", True)),
    (lambda: Restarts(len, 2, math.nan), ValueError, "Restarts.*mult.*nan"),
    (lambda: Restarts(len, 2, None), TypeError, "Restarts.*mult.*None"),
    (lambda: Restarts(Linear(0, 1), 2000, 2), ValueError, "Restarts.*2000.*mult 2"),
    (lambda: Normalized(math.nan), ValueError, "Normalized.*wd_norm.*nan"),
    (lambda: Normalized("1"), TypeError, "Normalized.*wd_norm.*'1'"),
    (lambda: Timescale(math.nan), ValueError, "Timescale.*epochs.*nan"),
    (lambda: Timescale("3"), TypeError, "Timescale.*epochs.*'3'"),
    (lambda: Timescale(steps=1), ValueError, "Timescale.*steps.*above 1, got 1"),
    (lambda: Timescale(3)(0), TypeError, "Timescale.*no value before"),
]


@pytest.mark.parametrize(("build", "error", "pattern"), SCHEDULES)
def test_schedules(build, error, pattern):  # P10
    with pytest.raises(error, match=pattern):
        build()


# Schedules as trees: a class and its arguments

valid = st.floats(0, 2) | st.floats(0, 1.7e308) | st.sampled_from([0, 1, 5e-324, 0.1])
invalid = (
    st.integers(-2, 60)
    | st.floats()
    | st.sampled_from([None, "0.1", True, 10**400, math.nan, -1, 0, 1e308, 5e-324])
)


def leaves(number, positive):
    keys = st.floats(0, 1, exclude_max=True) if number is valid else number
    values = st.dictionaries(keys, number, max_size=3)
    return (
        st.tuples(st.sampled_from([Linear, Cosine]), number, number)
        | st.tuples(st.just(Exponential), positive, positive)
        | st.tuples(st.just(Polynomial), number, number, positive)
        | st.tuples(st.just(Steps), st.builds(lambda v, first: {0.0: first, **v}, values, number))
    )


def joined(inner):
    def with_fractions(parts):
        total = sum(length for length, _ in parts)
        return Join, [(length / total, schedule) for length, schedule in parts]

    pieces = st.lists(st.tuples(st.integers(1, 9), inner), min_size=1, max_size=4)
    return pieces.map(with_fractions)


def compounds(inner):
    restarts = st.tuples(st.just(Restarts), inner, st.integers(1, 9), st.floats(0.25, 4))
    return joined(inner) | restarts


def invalid_compounds(inner):
    pieces = st.lists(st.tuples(invalid, inner) | invalid, max_size=3)
    cycles = st.integers(-1, 60) | st.just(2.5)
    restarts = st.tuples(st.just(Restarts), inner, cycles, invalid | valid)
    return st.tuples(st.just(Join), pieces | invalid) | joined(inner) | restarts


trees = st.recursive(leaves(valid, valid.filter(bool)), compounds, max_leaves=5) | st.recursive(
    leaves(invalid, invalid) | invalid, invalid_compounds, max_leaves=4
)


def built(tree):
    if isinstance(tree, list):
        return [built(each) for each in tree]
    if isinstance(tree, tuple):
        head, *rest = map(built, tree)
        return head(*rest) if isinstance(head, type) else (head, *rest)
    return tree


def bounds(schedule):
    """The values between which a schedule stays."""
    if isinstance(schedule, Join):
        return [bound for _, piece in schedule.pieces for bound in bounds(piece)]
    if isinstance(schedule, Restarts):
        return bounds(schedule.schedule)
    if isinstance(schedule, Steps):
        return list(schedule.values.values())
    return [schedule.start, schedule.end]


LARGEST = 1.7976931348623157e308


@given(trees, st.lists(st.floats(0, 1), max_size=4))
@example((Exponential, LARGEST, LARGEST), [0.3])
@example((Restarts, (Linear, 0, 1), 3, 1e300), [])
@example((Restarts, (Linear, 0, 1), 3, 1e-300), [])
@fuzz
def test_fuzz_schedules(tree, points):  # P10
    """A schedule is refused when it is built, or right wherever it is called."""
    try:
        schedule = built(tree)
    except (TypeError, ValueError):
        return
    if not callable(schedule):
        return
    low, high = min(bounds(schedule)), max(bounds(schedule))
    copies = pickle.loads(pickle.dumps(schedule)), eval(repr(schedule), vars(schedules))
    assert all(each == schedule for each in copies)
    for progress in (0, 0.25, 1 / 3, 0.5, 1 - 1e-10, 1, *points):
        value = schedule(progress)
        assert math.isfinite(value)
        assert low * (1 - 1e-12) - 1e-323 <= value <= high * (1 + 1e-12) + 1e-323
        assert all(each(progress) == value for each in copies)
    for outside, end in ((-0.5, 0), (-math.inf, 0), (1.5, 1), (math.inf, 1)):
        assert schedule(outside) == schedule(end)
