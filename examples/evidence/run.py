"""Runs the evidence for the package's claims, and draws a figure for each.

A finished run is a row of a CSV and is not made again, so that a stopped command goes on where it
was. The claims and the rules that decide them are in claims and docs/evidence.md::

    python examples/evidence/run.py                      # all claims, about an hour
    python examples/evidence/run.py anchor cautious      # some of them
    python examples/evidence/run.py --figures-only       # from the CSVs
    python examples/evidence/run.py --quick              # a few steps each, to see that it runs
    python examples/evidence/run.py --scale 4 --out big  # the text alone, larger, on a GPU
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path

import drawing
import page
import table
import torch
from claims import CLAIMS
from rich.console import Console
from rich.markdown import Markdown
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from training import Outcome, Run, train

DOCS = Path(__file__).parents[2] / "docs"
TEXT_COST = 60  # of a step of the transformer, in steps of the network for digits

Job = tuple[str, Run]  # the claim, and what to do


def cost(run: Run) -> int:
    """About how long a run takes, for the estimate of the time that is left."""
    return (
        (run.steps if run.scale else 4)
        * (TEXT_COST if run.task == "text" else 1)
        * (2 if run.exact else 1)
    )


def scaled(run: Run, scale: int) -> Run:
    """The run with a transformer ``scale`` times as wide, and as many times as long."""
    pieces = run.examples * (scale if run.data == "base" else 1)
    return replace(run, steps=run.steps * scale, examples=pieces, scale=scale)


def made(jobs: Sequence[Job], workers: int) -> Iterator[tuple[Job, Outcome]]:
    """Makes the runs, each in a thread, and yields each when it ends."""
    torch.set_num_threads(1)
    if workers == 1:
        yield from ((job, train(job[1])) for job in jobs)
        return
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, spawn, torch.set_num_threads, (1,)) as pool:
        futures = {pool.submit(train, job[1]): job for job in jobs}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def make(jobs: Sequence[Job], folder: Path, workers: int, console: Console) -> None:
    """Makes the runs and writes a row for each."""
    columns = (TextColumn("{task.description:<62}"), BarColumn(16), TaskProgressColumn())
    times = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
    with Progress(*columns, *times, console=console) as progress:
        total = sum(cost(run) for _, run in jobs)
        task = progress.add_task(f"{len(jobs)} runs", total=total)
        for done, ((name, run), outcome) in enumerate(made(jobs, workers), 1):
            table.append(folder / f"{name}.csv", run, outcome)
            what = f"{name}: {run.task}, seed {run.seed}, lr {run.lr:g}, wd {run.wd:.3g}"
            progress.update(task, advance=cost(run), description=f"{done}/{len(jobs)} {what}")


def main() -> None:
    """Makes the runs, and reports."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("claims", nargs="*", help=f"of {', '.join(CLAIMS)}; default: all")
    parser.add_argument("--quick", action="store_true", help="2 seeds, a few steps, a tiny network")
    parser.add_argument("--figures-only", action="store_true", help="from the rows that are there")
    parser.add_argument(
        "--scale", type=int, default=1, help="the text alone, so many times as large"
    )
    parser.add_argument("--seeds", type=int, nargs="+", help="instead of those in claims/base.py")
    parser.add_argument("--out", type=Path, help="a folder; default: docs/evidence")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="default: all cores")
    args = parser.parse_args()
    unknown = sorted(set(args.claims) - set(CLAIMS))
    if unknown:
        parser.error(f"no claim is called {', '.join(unknown)}: {', '.join(CLAIMS)}")
    if args.scale < 1:
        parser.error("--scale must be at least 1")
    if args.out is None and (args.quick or args.scale > 1 or args.seeds):
        parser.error("--quick, --scale and --seeds need an --out, or they would mix with the docs'")

    folder = args.out or DOCS / "evidence"
    folder.mkdir(parents=True, exist_ok=True)
    console, names = Console(), args.claims or list(CLAIMS)
    jobs: list[Job] = []
    for name in names:
        runs = CLAIMS[name].seeded(args.seeds or (range(2) if args.quick else ()))
        if args.quick:
            runs = [replace(run, scale=0) for run in runs]
        if args.scale > 1:
            runs = [scaled(run, args.scale) for run in runs if run.task == "text"]
        jobs += [(name, run) for run in table.missing(folder / f"{name}.csv", runs)]
    jobs.sort(key=lambda job: job[1].task)  # digits, which are quick, of all claims first
    if not args.figures_only:
        make(jobs, folder, args.workers, console)

    outcomes = {}
    for name in names:
        rows = table.load(folder / f"{name}.csv")
        if rows:
            drawing.save(CLAIMS[name].draw, rows, folder / f"{name}.svg")
            outcomes[name] = page.outcome(CLAIMS[name], rows)
    text = "\n\n".join(f"## {CLAIMS[name].title}\n\n{found}" for name, found in outcomes.items())
    console.print(Markdown(text))
    if args.out:
        (folder / "outcomes.md").write_text(text + "\n")
    else:
        page.fill(DOCS / "evidence.md", outcomes)


if __name__ == "__main__":
    main()
