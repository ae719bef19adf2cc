"""One training run: its settings, a plain loop, and what came of it."""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import tasks
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from wd_callbacks.schedules import Cosine
from wd_callbacks.torch import DecoupledWD

WARMUP = 0.05  # of the steps; then lr falls to 0 along a cosine
WIDTH, TINY = 128, 16  # of the transformer
SHAPES: dict[str, Callable[[float], float | Cosine]] = {
    "constant": lambda wd: wd,
    "rising": lambda wd: Cosine(0.04 / 0.22 * wd, 0.4 / 0.22 * wd),  # its mean is wd
    "falling": lambda wd: Cosine(0.4 / 0.22 * wd, 0.04 / 0.22 * wd),
}


@dataclass(frozen=True)
class Run:
    """The settings of a run; two runs with the same settings give the same weights."""

    task: str  # "digits" or "text"
    seed: int  # draws the split (digits) or the blocks (text), their order, and the first weights
    lr: float  # at its peak
    wd: float  # the coefficient; its mean, if it has a shape
    steps: int
    batch: int
    examples: int  # images, or pieces of text, to train on
    optimizer: str = "DecoupledWD"  # on Adam. Or "AdamW", "AdamW fused", "stochastic rounding"
    exact: bool = False  # decay with quantum=0, and train with AdamW too, to compare the weights
    scale_by: str = "lr"
    shape: str = "constant"  # a key of SHAPES
    normalized: bool = True  # digits: whether the hidden layers are normalized. Text: always
    dtype: str = "float32"
    cautious: bool = False
    anchored: bool = False  # decay towards the pretrained weights instead of zero
    data: str = "base"  # "new": few other examples, from weights that were trained on "old" ones
    trace: bool = False  # whether to note the gradient's norm
    scale: int = 1  # how many times as wide the transformer is; 0: tiny, and a few steps are made

    def epoch(self) -> float:
        """Steps per epoch."""
        return self.examples / self.batch


@dataclass(frozen=True)
class Outcome:
    """The figures of a run."""

    train: float  # mean loss over the last tenth of the steps
    valid: float  # loss on the data to choose a coefficient with
    test: float  # loss on the data to report
    error: float  # on the test data, in %
    norm: float  # of the weights that decay
    difference: float = math.nan  # if exact: the largest one between final weights and AdamW's
    gradient: str = ""  # norm over the run, if traced: 50 means of the hidden layers' gradient
    seconds: float = 0.0


def device(run: Run) -> str:
    """The GPU if the run is scaled up and there is one."""
    return "cuda" if run.scale > 1 and torch.cuda.is_available() else "cpu"


def data(run: Run) -> list[tasks.Split]:
    """The examples to train on, to choose with, to test on."""
    if run.task == "digits":
        if run.data == "old":
            return [tasks.old_digits()] * 3
        if run.data == "new":
            return tasks.new_digits(run.seed, run.examples)
        return tasks.digits(run.seed, run.examples)
    train, valid, test = tasks.source("sklearn" if run.data == "new" else "")
    held = 256 if run.scale else 8
    return [
        tasks.blocks(train, run.examples, run.seed),
        *(tasks.blocks(part, held, 0) for part in (valid, test)),  # the same for every seed
    ]


@functools.lru_cache(1)
def pretrained(run: Run) -> dict[str, Tensor]:
    """The weights to start from, trained on other data: old digits, or the standard library."""
    return fit(run).net.state_dict()


def pretraining(run: Run) -> Run:
    """The run that makes the weights that this one starts from."""
    batch, steps = (32, 800) if run.task == "digits" else (8, 400 * max(1, run.scale))
    examples = len(tasks.old_digits()[0]) if run.task == "digits" else steps * batch
    known = Run(run.task, run.seed, 3e-3, 0.1, steps, batch, examples, data="old")
    return dataclasses.replace(known, scale=run.scale)


def has_new_head(run: Run) -> bool:
    """Whether the classes are new, and with them the head."""
    return run.task == "digits" and run.data == "new"


def network(run: Run) -> nn.Module:
    """The network with its first weights."""
    torch.manual_seed(run.seed)
    if run.task == "digits":
        net: nn.Module = tasks.Perceptron(run.normalized)
    else:
        net = tasks.Transformer(WIDTH * run.scale or TINY)
    if run.data == "new":
        known = pretrained(pretraining(run))
        if has_new_head(run):
            known = {name: value for name, value in known.items() if "head" not in name}
        net.load_state_dict(known, strict=False)
    return net


def matrices(net: nn.Module) -> list[nn.Parameter]:
    """The parameters that decay: no biases, and no weights of normalization layers."""
    return [p for p in net.parameters() if p.ndim > 1]


def hidden(net: nn.Module) -> list[nn.Parameter]:
    """Those of them that are not the head's."""
    return [p for name, p in net.named_parameters() if p.ndim > 1 and "head" not in name]


def optimizer_of(run: Run, net: nn.Module) -> torch.optim.Optimizer:
    """AdamW, or Adam with a DecoupledWD, over three groups: hidden layers, head, vectors."""
    own = run.wd if "AdamW" in run.optimizer else 0.0
    head = [p for p in matrices(net) if all(p is not other for other in hidden(net))]
    groups = [
        {"params": hidden(net), "weight_decay": own},
        {"params": head, "weight_decay": own},
        {"params": [p for p in net.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    fused = run.dtype == "float32" or "fused" in run.optimizer  # else torch's default for bf16
    if "AdamW" in run.optimizer:
        return torch.optim.AdamW(groups, run.lr, fused=fused)
    optimizer = torch.optim.Adam(groups, run.lr, fused=fused)
    if run.optimizer == "stochastic rounding":
        optimizer.register_step_pre_hook(lambda *_: decay_on_average(optimizer, matrices(net), run))
        return optimizer
    DecoupledWD(
        optimizer,
        SHAPES[run.shape](run.wd),
        # AdamC: for the normalized layers, so not for the head
        scale_by=["lr_squared", "lr", "lr"] if run.scale_by == "lr_squared" else run.scale_by,
        max_lr=run.lr,
        # a new head has no pretrained weights, and would have another best coefficient
        exclude=["vector", "head*"] if has_new_head(run) else "vector",
        anchor="initial" if run.anchored else None,
        cautious=run.cautious,
        quantum=0 if run.exact else None,
        model=net,
        total_steps=run.steps,
    )
    return optimizer


@torch.no_grad()
def decay_on_average(
    optimizer: torch.optim.Optimizer, weights: list[nn.Parameter], run: Run
) -> None:
    """Decays bfloat16 weights by hand, and rounds up or down at random: right on average."""
    shrink = optimizer.param_groups[0]["lr"] * run.wd
    for p in weights:
        bits = (p.float() * (1 - shrink)).view(torch.int32)
        bits += torch.randint_like(bits, 1 << 16)
        p.copy_((bits & -(1 << 16)).view(torch.float32))  # the bits that bfloat16 has


def fraction(step: int, steps: int) -> float:
    """The fraction of the peak lr: a warmup, then a cosine to 0."""
    warmup = max(1, round(WARMUP * steps))
    if step < warmup:
        return (step + 1) / warmup
    return (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2


def loss_of(net: nn.Module, split: tasks.Split, reduction: str = "mean") -> Tensor:
    """The cross-entropy, computed in float32 whatever the weights are."""
    logits = net(split[0]).float()
    return nn.functional.cross_entropy(
        logits.flatten(0, -2), split[1].flatten(), reduction=reduction
    )


@torch.no_grad()
def judge(net: nn.Module, split: tasks.Split) -> float:
    """The loss on all examples of a split."""
    parts = zip(split[0].split(64), split[1].split(64))
    return sum(loss_of(net, part, "sum").item() for part in parts) / split[1].numel()


@torch.no_grad()
def error(net: nn.Module, split: tasks.Split) -> float:
    """Wrong predictions, in %."""
    parts = zip(split[0].split(64), split[1].split(64))
    return 100 * sum(int((net(x).argmax(-1) != y).sum()) for x, y in parts) / split[1].numel()


@dataclass(frozen=True)
class Fitted:
    """A trained network, and what was noted on the way."""

    net: nn.Module
    losses: list[float]  # of every step
    gradients: list[float]  # their norms at every step, if traced
    held: list[tasks.Split]  # to choose with, to test on

    def weights(self) -> Tensor:
        """All parameters."""
        return nn.utils.parameters_to_vector(self.net.parameters()).detach().float()


def fit(run: Run) -> Fitted:
    """Trains."""
    place, dtype = device(run), getattr(torch, run.dtype)
    train, *held = (
        (x.to(place, dtype if x.is_floating_point() else None), y.to(place)) for x, y in data(run)
    )
    net = network(run).to(place, dtype)
    optimizer = optimizer_of(run, net)
    scheduler = LambdaLR(optimizer, lambda step: fraction(step, run.steps))
    losses, norms, traced = [], [], hidden(net) if run.trace else []
    made = run.steps if run.scale else 4
    for _, batch in zip(range(made), tasks.batches(train, run.batch, run.seed)):
        loss = loss_of(net, batch)
        optimizer.zero_grad()
        loss.backward()
        if traced:
            norms.append(torch.stack([p.grad.norm() for p in traced if p.grad is not None]).norm())
        optimizer.step()
        scheduler.step()
        losses.append(loss.detach())
    return Fitted(net, torch.stack(losses).tolist(), [float(norm) for norm in norms], held)


def train(run: Run) -> Outcome:
    """Does the run."""
    began = time.perf_counter()
    fitted, difference = fit(run), math.nan
    if run.exact:
        other = fit(dataclasses.replace(run, optimizer="AdamW"))
        difference = (fitted.weights() - other.weights()).abs().max().item()
    last = fitted.losses[-max(1, len(fitted.losses) // 10) :]
    bins = (
        torch.tensor(fitted.gradients).tensor_split(min(50, len(fitted.losses)))
        if run.trace
        else ()
    )
    return Outcome(
        train=sum(last) / len(last),
        valid=judge(fitted.net, fitted.held[0]),
        test=judge(fitted.net, fitted.held[1]),
        error=error(fitted.net, fitted.held[1]),
        norm=torch.stack([p.detach().float().norm() for p in matrices(fitted.net)]).norm().item(),
        difference=difference,
        gradient=" ".join(f"{part.mean():.4g}" for part in bins),
        seconds=round(time.perf_counter() - began, 2),
    )
