"""How faithfully shrinks are applied that are too small for the arithmetic of the weights.

A step that should multiply a weight by ``1 - 1e-8`` multiplies it by 1 in float32, and one that
should multiply it by ``1 - 3e-8`` multiplies it by ``1 - 6e-8``. ``torch.optim.AdamW`` loses or
doubles such shrinks. ``DecoupledWD`` defers them until enough has added up. Gradients are zero, so
that the decay alone changes the weights.

The first table is of decay towards zero: what is due after all steps, what each has applied (both
in percent of the weights), and what ``DecoupledWD`` still defers. The second one is of decay
towards an anchor, at some distance from it, relative to the weight: what is due, what has been
applied (both in percent of the distance), and what is still deferred::

    python benchmarks/small_shrinks.py              # about a minute
    python benchmarks/small_shrinks.py --markdown   # the same in Markdown
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass, replace

import torch
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

from wd_callbacks.torch import DecoupledWD

ELEMENTS, LR = 4096, 1e-3
HEADINGS = (
    "dtype",
    "lr*wd",
    "steps",
    "due %",
    "AdamW %",
    "of due",
    "DecoupledWD %",
    "still deferred, %",
    "applied / (due - deferred)",
)
ANCHORED_HEADINGS = (
    "dtype",
    "distance",
    "lr*wd",
    "steps",
    "due %",
    "DecoupledWD %",
    "still deferred, %",
    "applied / (due - deferred)",
)
DTYPES = {
    "fp64": torch.float64,
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}


@dataclass(frozen=True)
class Case:
    """A shrink per step, and for how many steps."""

    dtype: str
    shrink: float
    steps: int
    distance: float | None = None  # from the anchor, relative to the weight; None: no anchor

    def due(self) -> float:
        """What is due after all steps: the closed form."""
        return -math.expm1(self.steps * math.log1p(-self.shrink))


CASES = (
    Case("fp32", 1e-8, 20_000),
    Case("fp32", 3e-8, 20_000),
    Case("fp32", 1e-7, 20_000),
    Case("fp32", 9.84e-7, 10_000),  # 16.5 times 2**-24, the grain of fp32 below 1: rounds worst
    Case("fp32", 1e-6, 10_000),
    Case("fp32", 1e-5, 4_000),
    Case("fp32", 1e-4, 400),
    Case("bf16", 1e-5, 10_000),
    Case("bf16", 1e-4, 2_000),
    Case("fp16", 1e-5, 5_000),
    Case("fp16", 1e-4, 1_000),
)
ANCHORED = tuple(
    Case(dtype, shrink, steps, distance)
    for dtype, pairs in (
        ("fp32", ((1e-7, 40_000), (1e-6, 10_000), (1e-5, 4_000))),
        ("fp64", ((1e-7, 40_000), (1e-5, 4_000))),
        ("bf16", ((1e-5, 40_000), (1e-4, 4_000))),
    )
    for shrink, steps in pairs
    for distance in (1.0, 0.1, 0.01, 0.001)
)


def applied(case: Case, decoupled: bool) -> tuple[float, float]:
    """What was applied, and what is still deferred: fractions, means over elements."""
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.empty(ELEMENTS).uniform_(0.5, 2).to(DTYPES[case.dtype]))
    weight.grad = torch.zeros_like(weight)
    anchor = None
    if case.distance is not None:
        signs = torch.randint(2, (ELEMENTS,)) * 2 - 1
        anchor = (weight.detach() * (1 + case.distance * signs)).to(weight.dtype)
    before = weight.detach().double() - (0 if anchor is None else anchor.double())
    make = torch.optim.Adam if decoupled else torch.optim.AdamW
    wd = case.shrink / LR
    optimizer = make([weight], LR, eps=1e-3, weight_decay=wd)  # the default eps is 0 in float16
    named = {} if anchor is None else {"anchor": {"0": anchor}}
    model = torch.nn.ParameterList([weight])
    decay = DecoupledWD(optimizer, wd, model=model, **named) if decoupled else None
    for _ in range(case.steps):
        optimizer.step()
    deferred = -math.expm1(-decay.state_dict()["owed"][0][0]) if decay else 0.0
    after = weight.detach().double() - (0 if anchor is None else anchor.double())
    moved = 1 - after / before
    return moved[before != 0].mean().item(), deferred  # half precision may round a distance to 0


def as_text(shrink: float) -> str:
    """A shrink as in the tables."""
    return f"{shrink:.3g}".replace("0.0001", "1e-04").replace("e-0", "e-")


def row(case: Case) -> tuple[str, ...]:
    """The figures of a case."""
    due = case.due()
    ours, deferred = applied(case, decoupled=True)
    less_deferred = 1 - (1 - due) / (1 - deferred)
    share = "-" if math.isnan(ours) or less_deferred < 1e-9 else f"{ours / less_deferred:.3f}"
    last = "-" if math.isnan(ours) else f"{100 * ours:.4g}", f"{100 * deferred:.2g}", share
    first = as_text(case.shrink), f"{case.steps:,}", f"{100 * due:.4g}"
    if case.distance is not None:
        return case.dtype, f"{case.distance:g}", *first, *last
    adamw, _ = applied(case, decoupled=False)
    return case.dtype, *first, f"{100 * adamw:.4g}", f"{adamw / due:.3f}", *last


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--markdown", action="store_true", help="print Markdown tables")
    parser.add_argument("--quick", action="store_true", help="a tenth of the steps")
    args = parser.parse_args()
    torch.set_num_threads(1)
    bar = Console(stderr=True)
    bar.print("This takes about a minute.")
    for title, headings, cases in (
        ("Towards zero", HEADINGS, CASES),
        ("Towards an anchor", ANCHORED_HEADINGS, ANCHORED),
    ):
        if args.quick:
            cases = [replace(case, steps=max(case.steps // 10, 1)) for case in cases]
        rows = [row(case) for case in track(cases, title, console=bar, transient=True)]
        if args.markdown:
            for cells in (headings, ("---", *["---:"] * (len(headings) - 1)), *rows):
                print(f"| {' | '.join(cells)} |")
            print()
            continue
        table = Table(title=title, box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=0)
        for name in headings:
            table.add_column(name, justify="right", min_width=max(map(len, name.split())))
        for cells in rows:
            table.add_row(*cells)
        Console().print(table)


if __name__ == "__main__":
    main()
