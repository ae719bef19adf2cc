"""What the decay adds to a step, and what a user would pick instead, as ratios of times.

In each row the two sides, A and B, are stepped in turn on the same gradients, in random order
within each pair, so that a change in the machine's speed meets both. A / B is the median of the
pairs' ratios, with its 95 % interval by bootstrap over the pairs. "sums" is the time of all of A's
steps over that of B's: what counts if the decay is deferred, as most pairs then apply none. The
first rows, AdamW against itself, show the noise.

The row of fastai's Adam times the step event (before_step, opt.step, after_step) of two Learners
that are inside a fit. A whole training step is the time from one request for a batch to the next,
of two fits that go on in turn by a batch each, in threads of their own; on a CPU torch computes
with one thread in each. Times themselves are printed if they are a GPU's.

"Added to a step" is what the decay adds to an optimizer whose own step does nothing, over what the
hand-written loop takes, with one thread: the least that any user can see::

    python benchmarks/step_cost.py                # the GPU if there is one, else the CPU
    python benchmarks/step_cost.py --quick        # few and tiny, to see that it runs
    python benchmarks/step_cost.py --markdown --json step_cost.json
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import logging
import os
import random
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Semaphore, Thread
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch reads it when it is imported

import torch
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor, nn
from torch.optim import Adam, AdamW
from torch.utils.data import DataLoader, IterableDataset

from wd_callbacks.torch import DecoupledWD

LR, WD = 1e-4, 0.1  # a shrink of 1e-5, above the default quantum
QUANTUM, PERIOD = 1e-3, 101  # one that defers, and the steps from one application to the next
PAIRS, WARM_UP = 2 * PERIOD, 10
FITS = 8
QUICK_PAIRS, QUICK_MODEL = 3, "3 x 8²"
SCALARS = 512  # bytes: the least that CUDA's allocator takes
FOREACH, FUSED = {"foreach": True}, {"fused": True}
MODELS, TRAINING, BILLION = ("400 x 64²", "30 x 1024²"), "ResNet-18", "239 x 2048²"
BORING = "BoringModel"
FASTAI = "fastai's Adam(decouple_wd=True)"
THIRD_PARTY = ("optimi.AdamW", "pytorch_optimizer.StableAdamW", "pytorch_optimizer.AdamP")

Step = Callable[[], object]
Recipe = Callable[[list[nn.Parameter]], Step]  # what makes a step for weights
Sides = Callable[[], AbstractContextManager[list[Step]]]  # what makes the steps of A and B


@dataclass(frozen=True)
class Case:
    """What is compared: A and B, and the most that A / B should be, or by the name of the model."""

    name: str
    a: Recipe
    against: str
    b: Recipe
    target: float | dict[str, float] | None = None
    pairs: int = PAIRS
    sums_count: bool = False
    models: Sequence[str] = MODELS
    fits: int = 1  # how often both are made anew: where their memory lies changes the ratio


# Ways to make a step


class Idle(torch.optim.Optimizer):
    """An optimizer that does nothing."""

    def __init__(self, params: Any, lr: float = LR) -> None:
        super().__init__(params, {"lr": lr})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Nothing."""


def idle(params: list[nn.Parameter]) -> Step:
    """A step that does nothing."""
    return Idle(params).step


def own(make: Callable[..., Any], **kwargs: Any) -> Recipe:
    """An optimizer with its own decay."""
    return lambda params: make(params, lr=LR, weight_decay=WD, **kwargs).step


def decayed(make: Callable[..., Any], options: Any = None, **kwargs: Any) -> Recipe:
    """An optimizer with DecoupledWD, which takes ``options``."""

    def recipe(params: list[nn.Parameter]) -> Step:
        optimizer = make(params, lr=LR, **kwargs)
        DecoupledWD(optimizer, WD, **(options or {}))
        return optimizer.step

    return recipe


def loop(make: Callable[..., Any], **kwargs: Any) -> Recipe:
    """The loop of fast.ai's article, before an optimizer's step."""

    def recipe(params: list[nn.Parameter]) -> Step:
        optimizer = make(params, lr=LR, **kwargs)

        def step() -> None:
            for group in optimizer.param_groups:
                for p in group["params"]:
                    p.data = p.data.add(p.data, alpha=-WD * group["lr"])
            optimizer.step()

        return step

    return recipe


def third_party(name: str) -> Recipe:
    """An optimizer of another package with its own, decoupled decay."""
    package, _, kind = name.partition(".")
    return lambda params: own(getattr(importlib.import_module(package), kind))(params)


def fastai_own(params: list[nn.Parameter]) -> Step:
    """The Adam of fastai with its own, decoupled decay, outside a Learner."""
    from fastai import optimizer

    return optimizer.Adam(params, lr=LR, wd=WD, decouple_wd=True).step


class Fit(IterableDataset[Any]):
    """A fit in a thread of its own, which trains on some batches whenever it is called."""

    def __init__(self, batch: Any, train: Callable[[Any], object], batches: int = 1) -> None:
        self.batch, self.train, self.ended, self.error = batch, train, False, None
        self.batches = batches
        self.go, self.done = Semaphore(0), Semaphore(0)
        self.thread = Thread(target=self._run, daemon=True)
        self.thread.start()
        self._wait()

    def _run(self) -> None:
        try:
            self.train(DataLoader(self, batch_size=None))
        except BaseException as error:
            self.error = error
        self.done.release()

    def _wait(self) -> None:
        self.done.acquire()
        if self.error:
            raise self.error

    def __len__(self) -> int:
        return 10**6

    def __iter__(self) -> Iterator[Any]:
        while True:
            self.done.release()
            self.go.acquire()
            if self.ended:
                return
            yield from [self.batch] * self.batches

    def __call__(self) -> None:
        """Trains on the batches."""
        self.go.release()
        self._wait()

    def end(self) -> None:
        """Ends the fit."""
        self.ended = True
        self()
        self.thread.join()


def fastai_fit(
    own_decay: bool, batch: list[Tensor], make: Callable[[], nn.Module], *cbs: Any
) -> tuple[Fit, Any]:
    """A fit with fastai's Adam, and its Learner."""
    from fastai import optimizer
    from fastai.data.core import DataLoaders
    from fastai.learner import Learner

    from wd_callbacks import fastai

    adam = partial(optimizer.Adam, wd=WD, decouple_wd=own_decay)
    cbs = cbs if own_decay else (*cbs, fastai.DecoupledWD(WD))
    learners = []

    def train(batches: Any) -> None:
        dls = DataLoaders(batches, [], device=batch[0].device)
        loss = nn.functional.cross_entropy
        learners.append(learn := Learner(dls, make(), loss, opt_func=adam, lr=LR, cbs=cbs))
        with learn.no_bar(), learn.no_logging():
            learn.fit(1)

    return Fit(batch, train), learners[0]


def fastai_event(own_decay: bool, _: Any, params: list[nn.Parameter]) -> Step:
    """The step event of a Learner whose fit is between its first batch and the second."""
    from fastai.callback.core import Callback, CancelBatchException, CancelStepException

    class Skip(Callback):  # type: ignore[misc]
        def before_batch(self) -> None:
            raise CancelBatchException

    batch = [torch.zeros(1, device=params[0].device)] * 2
    fit, learn = fastai_fit(own_decay, batch, lambda: nn.ParameterList(params), Skip())
    fit()

    def step() -> None:
        learn._with_events(learn._step, "step", CancelStepException)

    step.end = fit.end  # type: ignore[attr-defined]
    return step


def resnet(device: Any) -> nn.Module:
    """A ResNet-18, the same every time."""
    from torchvision.models import resnet18

    torch.manual_seed(0)
    return resnet18(num_classes=10).to(device)


def fastai_training(own_decay: bool, batch: list[Tensor], _: Any) -> Step:
    """Trains with a Learner and fastai's Adam."""
    return fastai_fit(own_decay, batch, partial(resnet, batch[0].device))[0]


def lightning_training(own_decay: bool, batch: list[Tensor], _: Any) -> Step:
    """Trains with a Trainer and torch's Adam, in the form that Adam chooses by itself."""
    import pytorch_lightning as pl

    class Classifier(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = resnet(batch[0].device)

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            if own_decay:
                return AdamW(self.parameters(), LR, weight_decay=WD)
            return Adam(self.parameters(), LR)

    return lightning_fit(own_decay, batch, Classifier)


def boring_training(own_decay: bool, batch: list[Tensor], _: Any) -> Step:
    """Trains a single layer with a Trainer: little else than Lightning's own time."""
    from pytorch_lightning.demos.boring_classes import BoringModel

    class Boring(BoringModel):  # type: ignore[misc]
        def configure_optimizers(self) -> Any:
            if own_decay:
                return AdamW(self.parameters(), LR, weight_decay=WD)
            return Adam(self.parameters(), LR)

    # Several batches at once: to wake a thread takes a part of the time that a batch takes.
    return lightning_fit(own_decay, torch.ones(2, 32, device=batch[0].device), Boring, batches=50)


def lightning_fit(own_decay: bool, batch: Any, make: Callable[[], Any], batches: int = 1) -> Fit:
    """A fit by Lightning, with the callback unless the optimizer decays."""
    import pytorch_lightning as pl

    from wd_callbacks import lightning

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)  # of pytorch_lightning too
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="gpu" if batch[0].is_cuda else "cpu",
        devices=1,
        callbacks=[] if own_decay else [lightning.DecoupledWD(WD)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    return Fit(batch, lambda loader: trainer.fit(make(), loader), batches)


# What is compared


def decay_cases(batch: list[Tensor]) -> Iterable[Case]:
    """What the decay adds, with targets."""
    foreach, fused = own(AdamW, **FOREACH), own(AdamW, **FUSED)
    yield Case("AdamW(foreach)", foreach, "itself", foreach)
    yield Case("AdamW(fused)", fused, "itself", fused)
    ours = decayed(Adam, **FOREACH)
    yield Case("Adam(foreach) + DecoupledWD", ours, "AdamW(foreach)", foreach, 1.01)
    # Large tensors: the fused step moves 7 words per weight to and from memory, the decay 2.
    targets, ours = {"400 x 64²": 1.25, "30 x 1024²": 1.30}, decayed(Adam, **FUSED)
    yield Case("Adam(fused) + DecoupledWD", ours, "AdamW(fused)", fused, targets)
    name, ours = (
        f"the same, applied every {PERIOD} steps",
        decayed(Adam, {"quantum": QUANTUM}, **FUSED),
    )
    yield Case(name, ours, "AdamW(fused)", fused, 1.02, 3 * PERIOD, sums_count=True)
    yield Case("the decay alone", decayed(Idle), "the hand-written loop", loop(Idle), 0.35)
    for name, options in (("anchor", {"anchor": "initial"}), ("cautious", {"cautious": True})):
        ours = decayed(Adam, options, **FOREACH)
        yield Case(f"Adam(foreach) + DecoupledWD, {name}", ours, "AdamW(foreach)", foreach)
    for name, make in (("fastai", fastai_training), ("Lightning", lightning_training)):
        trained = partial(make, True, batch)
        name = f"training step, {name}, AdamW"
        yield Case(name, trained, "itself", trained, models=[TRAINING], fits=FITS)
    for name, against, make, target, models in (
        ("fastai's Adam + DecoupledWD", FASTAI, fastai_event, 1.00, MODELS),
        ("training step, fastai", FASTAI, fastai_training, 1.01, [TRAINING]),
        ("training step, Lightning", "AdamW", lightning_training, 1.01, [TRAINING]),
        ("training step, Lightning", "AdamW", boring_training, None, [BORING]),
    ):
        ours, theirs = (partial(make, own_decay, batch) for own_decay in (False, True))
        yield Case(name, ours, against, theirs, target, models=models, fits=FITS)
    if batch[0].is_cuda and torch.cuda.mem_get_info()[0] > 48e9:
        for kind, form in (("foreach", FOREACH), ("fused", FUSED)):
            name, ours = f"Adam({kind}) + DecoupledWD", decayed(Adam, **form)
            yield Case(name, ours, f"AdamW({kind})", own(AdamW, **form), models=[BILLION])


def alternative_cases() -> Iterable[Case]:
    """What a user would pick instead."""
    alternatives = {
        "AdamW(for-loop)": own(AdamW, foreach=False, fused=False),
        "AdamW(foreach)": own(AdamW, **FOREACH),
        "AdamW(fused)": own(AdamW, **FUSED),
        "the hand-written loop, Adam(foreach)": loop(Adam, **FOREACH),
        "Adam(foreach) + DecoupledWD": decayed(Adam, **FOREACH),
        "Adam(fused) + DecoupledWD": decayed(Adam, **FUSED),
        FASTAI: fastai_own,
    }
    alternatives |= {name: third_party(name) for name in THIRD_PARTY}
    for name, recipe in alternatives.items():
        yield Case(name, recipe, "AdamW(foreach)", alternatives["AdamW(foreach)"], pairs=PAIRS // 4)


def memory_cases() -> Iterable[Case]:
    """What the decay allocates; the last one shows that it would be seen."""
    adam, adamw = decayed(Adam, **FUSED), own(AdamW, **FUSED)
    yield Case("Adam(fused) + DecoupledWD", adam, "AdamW(fused)", adamw, SCALARS)
    yield Case("the decay alone", decayed(Idle), "a step that does nothing", idle, SCALARS)
    yield Case("the hand-written loop", loop(Idle), "a step that does nothing", idle)


# What the decay adds to a step that does nothing

ADDED = (
    ("1 x 64²", 1, False, 4.0),
    ("10 x 64²", 10, False, 2.0),
    ("62 x 64²", 62, False, 0.7),
    ("400 x 64²", 400, False, 0.5),
    ("100 groups of 1 x 64²", 100, True, 1.5),
    ("464 groups of 1 x 64²", 464, True, 1.5),
)
"""Tensors, how many, whether each has a group of its own, and the most that is wanted."""


def decay_in_a_loop(optimizer: torch.optim.Optimizer) -> None:
    """The hand-written loop of fast.ai's article, in place."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            if p.grad is not None:
                p.data.add_(p.data, alpha=-WD * group["lr"])


def added(count: int, has_groups: bool, target: float, quick: bool) -> dict[str, Any]:
    """What the decay adds to a step over what the hand-written loop takes."""

    def make() -> torch.optim.Optimizer:
        params = weights([torch.zeros(64, 64)] * count)
        return Idle([{"params": [p]} for p in params] if has_groups else params)

    ours, plain, by_hand = make(), make(), make()
    DecoupledWD(ours, WD)
    repeats, rounds = (2, 3) if quick else (max(20, 4000 // count), 31)
    steps = ours.step, plain.step, partial(decay_in_a_loop, by_hand)
    times = []
    gc.disable()
    for _ in range(1 + rounds):  # the first one sets up
        times.append([time_of(step, repeats) for step in steps])
    gc.enable()
    a, b, loop = torch.tensor(times[1:]).double().T
    ratio = ((a - b) / loop).quantile(0.5).item()
    return {
        "added / loop": ratio,
        "added, µs": 1e6 * (a - b).quantile(0.5).item(),
        "loop, µs": 1e6 * loop.quantile(0.5).item(),
        "target": target,
        "met": ratio <= target,
    }


def time_of(step: Step, repeats: int) -> float:
    """Seconds of one call, mean over some."""
    start = time.perf_counter()
    for _ in range(repeats):
        step()
    return (time.perf_counter() - start) / repeats


def added_rows(quick: bool) -> Iterator[dict[str, Any]]:
    """What the decay adds to steps on a CPU, with one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for tensors, count, has_groups, target in ADDED:
        row = {"A": "DecoupledWD", "B": "the hand-written loop", "tensors": tensors}
        yield {**row, **added(count, has_groups, target, quick)}
    torch.set_num_threads(threads)


# Measuring


def gradients(tensors: str, device: str) -> list[Tensor]:
    """Gradients for tensors like ``30 x 1024²``; none where a network comes with its own."""
    if tensors in (TRAINING, BORING):
        return []
    count, width = (int(part.strip("²")) for part in tensors.split(" x "))
    torch.manual_seed(0)
    return [torch.randn(width, width, device=device) for _ in range(count)]


def weights(grads: list[Tensor]) -> list[nn.Parameter]:
    """Weights with these gradients, which both sides share."""
    params = [nn.Parameter(torch.ones_like(grad)) for grad in grads]
    for p, grad in zip(params, grads):
        p.grad = grad
    return params


def seconds(step: Step, device: str) -> float:
    """How long a step takes, also on a GPU."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    step()
    wait()
    return time.perf_counter() - start


def times_of(a: Step, b: Step, pairs: int, warm_up: int, device: str) -> list[tuple[float, float]]:
    """How long steps of A and B take, in pairs, side by side."""
    order, times = random.Random(0), []
    gc.disable()
    for _ in range(warm_up + pairs):
        first = order.choice((a, b))
        one, other = seconds(first, device), seconds(b if first is a else a, device)
        times.append((one, other) if first is a else (other, one))
    gc.enable()
    return times[warm_up:]


def compare_times(case: Case, make: Sides, device: str, quick: bool) -> dict[str, Any]:
    """The figures of A against B."""
    pairs, warm_up = (QUICK_PAIRS, 1) if quick else (case.pairs // case.fits, WARM_UP)
    times = []
    for _ in range(1 if quick else case.fits):
        with make() as (a, b):
            times += times_of(a, b, pairs, warm_up, device)
    a_times, b_times = torch.tensor(times).double().T
    ratios, count = a_times / b_times, len(times)
    drawn = torch.randint(count, (2000, count), generator=torch.Generator().manual_seed(0))
    interval = ratios[drawn].quantile(0.5, dim=1).quantile(torch.tensor([0.025, 0.975]).double())
    ratio, sums = ratios.quantile(0.5).item(), (a_times.sum() / b_times.sum()).item()
    return {
        "A / B": ratio,
        "95 %": interval.tolist(),
        "sums": sums,
        "A, ms": 1e3 * a_times.quantile(0.5).item(),
        "B, ms": 1e3 * b_times.quantile(0.5).item(),
        "judged": sums if case.sums_count else ratio,
    }


def allocated(step: Step, device: str) -> int:
    """How many bytes a step takes: on a GPU its peak, on a CPU all, which is at least the peak."""
    seconds(step, device)  # the first one sets up the optimizer's state
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        seconds(step, device)
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(profile_memory=True) as profiler:
        step()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    return sum(max(e["args"]["Bytes"], 0) for e in events if e["name"] == "[memory]")


def compare_memory(case: Case, make: Sides, device: str, quick: bool) -> dict[str, Any]:
    """How many bytes more A allocates."""
    with make() as (a, b):
        more = allocated(a, device) - allocated(b, device)
    return {"bytes": more, "judged": more}


def measured(case: Case, model: str, compare: Any, device: str, quick: bool) -> dict[str, Any]:
    """The row of a case with one of its models."""
    is_training = model in (TRAINING, BORING)
    tensors = QUICK_MODEL if quick and not is_training else model
    row: dict[str, Any] = {"A": case.name, "B": case.against, "tensors": tensors}
    threads = torch.get_num_threads()

    @contextmanager
    def make() -> Iterator[list[Step]]:
        gc.collect()  # the weights before
        gc.freeze()  # all that is left, or collecting would take longer than measuring
        grads = gradients(tensors, device)
        sides = [recipe(weights(grads)) for recipe in (case.a, case.b)]
        try:
            yield sides
        finally:
            for side in sides:
                getattr(side, "end", int)()

    try:
        if is_training:
            torch.set_num_threads(1)  # else each fit's thread would have its own pool of them
        found = compare(case, make, device, quick)
    except ImportError as error:
        return {**row, "tensors": f"{str(error.name).partition('.')[0]} is not installed"}
    finally:
        torch.set_num_threads(threads)
    judged = found.pop("judged")
    target = case.target[model] if isinstance(case.target, dict) else case.target
    return {**row, **found, "target": target, "met": None if target is None else judged <= target}


# The report


def shown(value: Any) -> str:
    """A figure as it is printed."""
    if isinstance(value, list):
        return " to ".join(map(shown, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.3f}" if isinstance(value, float) else str("" if value is None else value)


def show(title: str, found: Sequence[dict[str, Any]], markdown: bool, words: int = 3) -> None:
    """Prints a table of rows with the same keys or fewer; the first columns hold words."""
    headings = list(max(found, key=len))
    lines = [[shown(row.get(heading)) for heading in headings] for row in found]
    if markdown:
        rule = ["---" if index < words else "---:" for index in range(len(headings))]
        text = "\n".join(f"| {' | '.join(cells)} |" for cells in (headings, rule, *lines))
        print(f"{title}\n\n{text}\n")
        return
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=0, pad_edge=False)
    for index, heading in enumerate(headings):
        look = {"overflow": "fold"} if index < words else {"justify": "right", "no_wrap": True}
        table.add_column(heading, **look)  # type: ignore[arg-type]
    for cells in lines:
        table.add_row(*cells)
    console = Console()
    console.width = max(console.width, 100)
    console.print(table)


def machine(device: str) -> str:
    """What the figures hold for."""
    cpu = f"CPU, {torch.get_num_threads()} threads"
    where = torch.cuda.get_device_name() if device == "cuda" else cpu
    return f"{where}, torch {torch.__version__}"


def options(description: str | None) -> argparse.ArgumentParser:
    """The options of a benchmark of speed."""
    parser = argparse.ArgumentParser(description=(description or "").partition("\n")[0])
    gpu = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=gpu)
    parser.add_argument("--json", type=Path, help="a file for the figures")
    parser.add_argument("--markdown", action="store_true", help="print Markdown tables")
    parser.add_argument("--quick", action="store_true", help="few and tiny, to see that it runs")
    return parser


def main() -> None:
    """Measures and prints."""
    parser = options(__doc__)
    parser.add_argument("--only", default="", help="only rows of which A contains this")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")  # of frameworks about batches, workers and hardware
    images, pixels = (2, 32) if args.quick else (8, 64)
    batch = [torch.randn(images, 3, pixels, pixels), torch.arange(images)]
    cases: dict[str, tuple[Iterable[Case], Callable[..., Any]]] = {
        "Time of a step": (decay_cases([b.to(args.device) for b in batch]), compare_times),
        "Time of a step with what a user would pick": (alternative_cases(), compare_times),
        "Bytes that a step allocates, beyond B's": (memory_cases(), compare_memory),
    }
    tables: dict[str, list[dict[str, Any]]] = {title: [] for title in cases}
    rows = [
        (title, case, model, compare)
        for title, (listed, compare) in cases.items()
        for case in listed
        if args.only in case.name
        for model in case.models
    ]
    console = Console(stderr=True)
    if not args.quick:
        console.print("A row takes seconds to a minute, all of them about 20 minutes.")
    columns = TextColumn("{task.description:<60}"), BarColumn(20), MofNCompleteColumn()
    with Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as progress:
        task = progress.add_task("", total=len(rows) + len(ADDED))
        for title, case, model, compare in rows:
            progress.update(task, description=f"{case.name}, {model}")
            tables[title].append(measured(case, model, compare, args.device, args.quick))
            progress.advance(task)
        gc.unfreeze()
        title = "Added to a step that does nothing, one thread"
        tables[title] = []
        if args.only in title:
            for row in added_rows(args.quick):
                progress.update(task, description=f"{title}, {row['tensors']}", advance=1)
                tables[title].append(row)
    if args.json:
        told = {"machine": machine(args.device), "quick": args.quick, "tables": tables}
        args.json.write_text(json.dumps(told, indent=1) + "\n")
    for title, found in tables.items():
        if not found:
            continue
        hidden = () if args.device == "cuda" else ("A, ms", "B, ms")  # which are the machine's
        printed = [{key: row[key] for key in row if key not in hidden} for row in found]
        show(f"{title} ({machine(args.device)})", printed, args.markdown)


if __name__ == "__main__":
    main()
