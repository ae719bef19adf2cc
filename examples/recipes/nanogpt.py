"""nanoGPT's loop: warm-up and cosine by hand, accumulation, bf16, checkpoint and resume.

python examples/recipes/nanogpt.py [--compile]
"""

import math
import sys
from pathlib import Path

import torch
from data import blocks, text
from gpt import GPT
from torch import nn

from wd_callbacks.torch import DecoupledWD

STEPS, WARM_UP, ACCUMULATION, BLOCK, MAX_LR, PATH = 40, 4, 2, 32, 3e-3, Path("out/nanogpt.pt")


def train(first: int, last: int) -> nn.Module:
    """Make steps ``first`` to ``last``, from the checkpoint unless ``first`` is 0, and save."""
    torch.manual_seed(0)
    model = GPT(BLOCK)
    optimizer = torch.optim.Adam(model.parameters(), lr=MAX_LR, betas=(0.9, 0.95))
    decay = DecoupledWD(optimizer, 0.1, exclude="vector")  # nanoGPT's rule: only matrices decay
    saved = {"model": model, "optimizer": optimizer, "decay": decay}
    for name in saved if first else ():
        saved[name].load_state_dict(torch.load(PATH)[name])
    forward = torch.compile(model) if "--compile" in sys.argv else model
    for step in range(first, last):
        cosine = 0.55 + 0.45 * math.cos(math.pi * (step - WARM_UP) / (STEPS - WARM_UP))
        optimizer.param_groups[0]["lr"] = MAX_LR * min((step + 1) / WARM_UP, cosine)
        for micro_step in range(ACCUMULATION):
            batch = blocks(text(), 16, BLOCK + 1, seed=ACCUMULATION * step + micro_step)
            with torch.autocast("cpu", torch.bfloat16):
                logits = forward(batch[:, :-1]).transpose(1, 2)
                loss = nn.functional.cross_entropy(logits, batch[:, 1:])
            (loss / ACCUMULATION).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    PATH.parent.mkdir(exist_ok=True)
    torch.save({name: it.state_dict() for name, it in saved.items()}, PATH)
    print(f"steps {first} to {last}: loss {loss:.3f}\n{decay.describe()}")
    return model


whole, _, resumed = train(0, STEPS), train(0, STEPS // 2), train(STEPS // 2, STEPS)
gaps = [(p - q).abs().max() for p, q in zip(whole.parameters(), resumed.parameters())]
print(f"largest difference between the resumed run and the whole one: {max(gaps):g}")
