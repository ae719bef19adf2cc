"""The plain callback under Fabric and Accelerate, each in two processes."""

from __future__ import annotations

from typing import Any

import lightning.fabric
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState, GradientState
from processes.common import (
    LR,
    WD,
    batch_of,
    main,
    network,
    rank,
    scenario,
    three_runs,
    values,
)
from torch.nn.functional import mse_loss
from torch.nn.parallel import DistributedDataParallel

from wd_callbacks.torch import DecoupledWD

BATCHES, EVERY = 8, 2
ATTACHED = ("before", "wrapped", "raw")
"""When the decay is attached: before the optimizer is wrapped, or after, to either of the two."""


def seen_by(progress: list[float], wd: float) -> Any:
    """A constant schedule that notes what it is asked."""
    return lambda position: progress.append(position) or wd


def attach(when: str, optimizers: dict[str, Any], progress: list[float]) -> None:
    """Attaches the decay to the optimizer that ``when`` says, if it is there."""
    if when in optimizers:
        DecoupledWD(
            optimizers[when], seen_by(progress, WD), quantum=0, total_steps=BATCHES // EVERY
        )


def everywhere(train: Any) -> dict[str, Any]:
    """Ours for each way to attach."""
    ends = {}
    for when in ATTACHED:
        progress: list[float] = []
        ends[when] = three_runs(
            lambda cls, wd, decays, when=when, progress=progress: train(
                cls, wd, when if decays else "never", progress
            )
        )
        ends[when]["progress"] = progress
    return ends


def fabric(precision: Any) -> dict[str, Any]:
    def train(cls: Any, wd: float, when: str, progress: list[float]) -> Any:
        fabric = lightning.fabric.Fabric(
            accelerator="cpu", devices=2, strategy="ddp", precision=precision
        )
        fabric.launch()
        model = network()
        raw = cls(model.parameters(), lr=LR, weight_decay=wd)
        attach(when, {"before": raw}, progress)
        model, optimizer = fabric.setup(model, raw)
        attach(when, {"wrapped": optimizer, "raw": raw}, progress)
        for index in range(BATCHES):
            x, y = batch_of(index)
            last = (index + 1) % EVERY == 0
            with fabric.no_backward_sync(model, enabled=not last):
                fabric.backward(mse_loss(model(x), y))
            if last:
                optimizer.step()
                optimizer.zero_grad()
        assert raw.param_groups[0]["weight_decay"] == wd
        return values(model.parameters())

    return everywhere(train)


@scenario
def fabric_ddp() -> Any:
    return fabric("32-true")


@scenario
def fabric_ddp_bf16() -> Any:
    return fabric("bf16-mixed")


def accelerate(precision: str) -> dict[str, Any]:
    def train(cls: Any, wd: float, when: str, progress: list[float]) -> Any:
        accelerator = Accelerator(
            cpu=True, gradient_accumulation_steps=EVERY, mixed_precision=precision
        )
        assert accelerator.num_processes == 2
        model = network()
        raw = cls(model.parameters(), lr=LR, weight_decay=wd)
        attach(when, {"before": raw}, progress)
        model, optimizer = accelerator.prepare(model, raw)
        attach(when, {"wrapped": optimizer, "raw": raw}, progress)
        for index in range(BATCHES):
            x, y = batch_of(index)
            with accelerator.accumulate(model):
                accelerator.backward(mse_loss(model(x), y))
                accelerator.clip_grad_norm_(model.parameters(), 0.1)
                optimizer.step()
                optimizer.zero_grad()
        assert raw.param_groups[0]["weight_decay"] == wd
        assert isinstance(model, DistributedDataParallel)
        AcceleratorState._reset_state()
        GradientState._reset_state()
        return values(model.parameters())

    return everywhere(train)


@scenario
def accelerate_ddp() -> Any:
    return accelerate("no")


@scenario
def accelerate_ddp_bf16() -> Any:
    return accelerate("bf16")


def accelerate_overflow(fused: bool) -> dict[str, Any]:
    """In process 1 alone; what it sends makes process 0 skip the step too."""

    def train(cls: Any, wd: float, when: str, progress: list[float]) -> Any:
        Accelerator(cpu=True)
        model = DistributedDataParallel(network())
        raw = cls(model.parameters(), lr=LR, weight_decay=wd, fused=fused)
        attach(when, {"before": raw}, progress)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20)
        optimizer = AcceleratedOptimizer(raw, scaler=scaler)
        attach(when, {"wrapped": optimizer, "raw": raw}, progress)
        for index in range(BATCHES // EVERY):
            x, y = batch_of(index)
            loss = mse_loss(model(x), y) * (torch.inf if rank() == 1 and index == 1 else 1)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            optimizer.step()
        assert raw.state[raw.param_groups[0]["params"][0]]["step"] == BATCHES // EVERY - 1
        return values(model.parameters())

    return everywhere(train)


@scenario
def accelerate_skips() -> Any:
    return accelerate_overflow(fused=False)


@scenario
def accelerate_skips_fused() -> Any:
    return accelerate_overflow(fused=True)


if __name__ == "__main__":
    main()
