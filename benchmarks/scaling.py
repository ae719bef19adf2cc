"""How the time of a decay grows with tensors, weights and param groups.

The decay is attached to an optimizer that does nothing. "outside" is its host time outside the
multi-tensor call: that of the step, less that of the step without the decay, less that of
`torch._foreach_mul_` on the same tensors, with a number or a 0-dim tensor, whichever takes less.
Times are medians and hold for one machine; "in lists" tells them in a unit that any machine has:
the time of `[p.data for p in params]`. The limit that memory sets is one pass in place, `mul_`,
over one flat tensor of the same bytes::

    python benchmarks/scaling.py            # tables and docs/scaling.png, up to 1e8 weights
    python benchmarks/scaling.py --full     # up to 3e8
    python benchmarks/scaling.py --quick    # few and tiny, to see that it runs; no picture is kept
"""

from __future__ import annotations

import io
import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib.pyplot as plt
import torch
from step_cost import LR, WD, Idle, machine, options, show
from torch import nn

from wd_callbacks.torch import DecoupledWD

FACTOR = 1 - LR * WD
TARGET = 0.3  # µs per tensor, outside the multi-tensor call
TINY = 4  # weights in a tensor where their number does not matter
PICTURE = Path(__file__).parents[1] / "docs" / "scaling.png"

Row = dict[str, Any]


def medians(
    steps: dict[str, Callable[[], object]], device: str, rounds: int
) -> tuple[dict[str, float], dict[str, float]]:
    """The µs until each step returns, and until the device has finished it.

    All steps are measured in every round, in random order.
    """
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    host: dict[str, list[float]] = {name: [] for name in steps}
    total: dict[str, list[float]] = {name: [] for name in steps}
    order, names = random.Random(0), list(steps)
    for _ in range(rounds + 2):
        for name in order.sample(names, len(names)):
            wait()
            start = time.perf_counter()
            steps[name]()
            host[name].append(time.perf_counter() - start)
            wait()
            total[name].append(time.perf_counter() - start)
    host_us, total_us = (  # the first two rounds warm up
        {name: 1e6 * median(seconds[2:]) for name, seconds in times.items()}
        for times in (host, total)
    )
    return host_us, total_us


def measured(tensors: int, size: int, groups: int, device: str, rounds: int) -> Row:
    """The times for so many tensors of ``size`` weights, in so many param groups."""
    flat = torch.ones(tensors * size, device=device)
    params = [nn.Parameter(part) for part in flat.split(size)]
    for p in params:
        p.grad = torch.zeros(1, device=device).expand(size)  # takes no memory: nothing reads it
    parts = [{"params": params[index::groups]} for index in range(groups)]
    lists = [[p.data for p in part["params"]] for part in parts]
    scalar = torch.tensor(FACTOR, device=device)
    with_decay, without = Idle(parts), Idle(params)
    DecoupledWD(with_decay, WD)

    def calls(factor: Any) -> Callable[[], None]:
        def call() -> None:
            for part in lists:
                torch._foreach_mul_(part, factor)

        return call

    steps: dict[str, Callable[[], object]] = {
        "step": with_decay.step,
        "idle": without.step,
        "number": calls(FACTOR),
        "tensor": calls(scalar),
        "list": lambda: [p.data for p in params],
        "pass": lambda: flat.mul_(FACTOR),
    }
    host, total = medians(steps, device, rounds)
    outside = host["step"] - host["idle"] - min(host["number"], host["tensor"])
    return {
        "tensors": tensors,
        "weights": tensors * size,
        "groups": groups,
        "decay, µs": total["step"] - total["idle"],
        "call, µs": min(total["number"], total["tensor"]),
        "outside, µs": outside,
        "per tensor": outside / tensors,
        "in lists": outside / host["list"],
        "one pass, µs": total["pass"],
        "in passes": (total["step"] - total["idle"]) / total["pass"],
    }


def measure_all(device: str, quick: bool, full: bool) -> dict[str, list[Row]]:
    """The rows over the number of tensors, of weights and of param groups."""
    counts = [10, 100, 1000] if quick else [10, 30, 100, 300, 1000, 3000, 10_000]
    weights = [10.0**k for k in range(5, 7 if quick else 9)] + [3e8] * full
    groups = [1, 10] if quick else [1, 2, 5, 10, 20, 50, 100, 200]
    rounds = 5 if quick else 200
    return {
        "tensors": [measured(n, TINY, 1, device, rounds) for n in counts],
        "weights": [
            measured(30, round(n / 30), 1, device, 15 if n > 1e7 else rounds) for n in weights
        ],
        "groups": [
            measured(counts[-1] if quick else 1000, TINY, n, device, rounds) for n in groups
        ],
    }


def slope(rows: list[Row]) -> float:
    """The µs outside the call that one more tensor takes, from the two largest numbers of them."""
    less, more = rows[-2:]
    return (more["outside, µs"] - less["outside, µs"]) / (more["tensors"] - less["tensors"])


def draw(tables: dict[str, list[Row]], title: str, out: Any) -> None:
    """Draws the times over what grows."""
    figure, axes = plt.subplots(1, 3, figsize=(13, 4.2), layout="constrained")
    lines = {
        "tensors": ("decay, µs", "call, µs", "outside, µs"),
        "weights": ("decay, µs", "call, µs", "one pass, µs"),
        "groups": ("decay, µs", "call, µs", "outside, µs"),
    }
    names = {
        "decay, µs": ("the decay's step", "black", "-"),
        "call, µs": ("torch._foreach_mul_ alone", "#56B4E9", "--"),
        "outside, µs": ("Python outside it", "#E69F00", "-"),
        "one pass, µs": ("memory limit: one mul_ over a flat tensor", "#D55E00", "--"),
    }
    for ax, (x, rows) in zip(axes, tables.items()):
        for y in lines[x]:
            label, color, dashes = names[y]
            points = [row[x] for row in rows], [row[y] for row in rows]
            ax.plot(*points, dashes, c=color, marker=".", label=label)
        ax.set(xscale="log", yscale="log", xlabel=x, title=heading(x, rows))
        if x == "tensors":
            counts = [row[x] for row in rows]
            aim = [TARGET * count for count in counts]
            ax.plot(counts, aim, ":", c="#009E73", label=f"target for it, {TARGET} µs a tensor")
            ax.set_ylabel("µs")
        ax.grid(alpha=0.3)
        ax.legend(fontsize="small")
    figure.suptitle(title, fontsize="medium")
    figure.savefig(out, dpi=150)
    plt.close(figure)


def heading(x: str, rows: list[Row]) -> str:
    """What stays as it is while ``x`` grows."""
    fixed = rows[0]
    return {
        "tensors": f"tensors of {TINY} weights, 1 group",
        "weights": f"weights in {fixed['tensors']} tensors, 1 group",
        "groups": f"groups, with {fixed['tensors']:,} tensors of {TINY} weights",
    }[x]


def main() -> None:
    """Measures, prints and draws."""
    parser = options(__doc__)
    parser.add_argument("--out", type=Path, help="the picture (default: docs/scaling.png)")
    parser.add_argument("--full", action="store_true", help="up to 3e8 weights")
    args = parser.parse_args()
    where = machine(args.device)
    tables = measure_all(args.device, args.quick, args.full)
    shared = ("decay, µs", "call, µs", "outside, µs")
    for x, *columns in (
        ("tensors", *shared, "per tensor", "in lists"),
        ("weights", "decay, µs", "call, µs", "one pass, µs", "in passes"),
        ("groups", *shared, "per group"),
    ):
        rows = [{**row, "per group": row["outside, µs"] / row["groups"]} for row in tables[x]]
        cells = [{x: f"{row[x]:,}", **{name: row[name] for name in columns}} for row in rows]
        show(f"{heading(x, rows)} ({where})", cells, args.markdown, words=0)
    found = slope(tables["tensors"])
    print(
        f"Outside the multi-tensor call one more tensor takes {found:.3f} µs, "
        f"target under {TARGET}: {'met' if found < TARGET else 'not met'}."
    )
    if args.json:
        told = {"machine": where, "quick": args.quick, "per tensor, µs": found, "tables": tables}
        args.json.write_text(json.dumps(told, indent=1) + "\n")
    out = args.out or (io.BytesIO() if args.quick else PICTURE)
    draw(tables, f"Time of a step of the decay alone ({where})", out)
    if isinstance(out, Path):
        print(f"Picture: {out}")


if __name__ == "__main__":
    main()
