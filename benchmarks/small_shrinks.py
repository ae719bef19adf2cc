"""How faithfully shrinks are applied that are too small for the arithmetic of the weights.

A step that should multiply a weight by ``1 - 1e-8`` multiplies it by 1 in float32, and one that
should by ``1 - 3e-8`` does so by ``1 - 6e-8``. ``torch.optim.AdamW`` loses or doubles such shrinks;
``DecoupledWD`` saves them up until they can be applied. Here the gradients are zero, so that the
decay alone changes the weights. Columns: what is due after all steps, what each applied (both as
fractions of the weights, in percent), and what ``DecoupledWD`` still owes::

    python benchmarks/small_shrinks.py              # a table
    python benchmarks/small_shrinks.py --markdown   # the same in Markdown
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass

import torch
from rich import box
from rich.console import Console
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
    "still owed %",
    "of due less owed",
)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Case:
    """A shrink per step, and for how many steps."""

    dtype: str
    shrink: float
    steps: int

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


def applied(case: Case, decoupled: bool) -> tuple[float, float]:
    """What was taken from the weights, and what they still owe: fractions, means over elements."""
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.empty(ELEMENTS).uniform_(0.5, 2).to(DTYPES[case.dtype]))
    weight.grad = torch.zeros_like(weight)
    before = weight.detach().double()
    make = torch.optim.Adam if decoupled else torch.optim.AdamW
    wd = case.shrink / LR
    optimizer = make([weight], LR, eps=1e-3, weight_decay=wd)  # the default eps is 0 in float16
    decay = DecoupledWD(optimizer, wd) if decoupled else None
    for _ in range(case.steps):
        optimizer.step()
    owed = -math.expm1(-decay.state_dict()["owed"][0][0]) if decay else 0.0
    return (1 - weight.detach().double() / before).mean().item(), owed


def row(case: Case) -> tuple[str, ...]:
    """The figures of a case."""
    due = case.due()
    adamw, _ = applied(case, decoupled=False)
    ours, owed = applied(case, decoupled=True)
    less_owed = 1 - (1 - due) / (1 - owed)
    return (
        case.dtype,
        f"{case.shrink:.3g}".replace("0.0001", "1e-04").replace("e-0", "e-"),
        f"{case.steps:,}",
        f"{100 * due:.4g}",
        f"{100 * adamw:.4g}",
        f"{adamw / due:.3f}",
        f"{100 * ours:.4g}",
        f"{100 * owed:.2g}",
        f"{ours / less_owed:.3f}",
    )


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--markdown", action="store_true", help="print a Markdown table")
    markdown = parser.parse_args().markdown
    torch.set_num_threads(1)
    rows = [row(case) for case in CASES]
    if markdown:
        for cells in (HEADINGS, ("---", *["---:"] * (len(HEADINGS) - 1)), *rows):
            print(f"| {' | '.join(cells)} |")
        return
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=0)
    for name in HEADINGS:
        table.add_column(name, justify="right", min_width=max(map(len, name.split())))
    for cells in rows:
        table.add_row(*cells)
    Console().print(table)


if __name__ == "__main__":
    main()
