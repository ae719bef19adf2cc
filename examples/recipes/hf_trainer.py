"""Hugging Face's Trainer: a schedule, in its logs and in TensorBoard.

python examples/recipes/hf_trainer.py && tensorboard --logdir out/trainer
"""

import os

import torch
from data import blocks, text
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from wd_callbacks.schedules import Cosine
from wd_callbacks.transformers import DecoupledWD

os.environ.setdefault("TENSORBOARD_LOGGING_DIR", "out/trainer/tensorboard")
torch.manual_seed(0)
tokens = blocks(text(), count=512, length=32, seed=0)
data = [{"input_ids": block, "labels": block} for block in tokens]
config = GPT2Config(vocab_size=128, n_positions=32, n_embd=64, n_layer=2, n_head=2)
args = TrainingArguments(
    "out/trainer",
    num_train_epochs=3,
    per_device_train_batch_size=32,
    learning_rate=3e-3,
    lr_scheduler_type="cosine",
    warmup_steps=4,
    logging_steps=6,
    save_steps=24,
    report_to="tensorboard",
    use_cpu=True,
)
decay = DecoupledWD(Cosine(0.1, 0.01), verbose=True)  # biases and norms do not decay
trainer = Trainer(
    GPT2LMHeadModel(config),
    args,
    train_dataset=data,
    callbacks=[decay],
    optimizer_cls_and_kwargs=(torch.optim.NAdam, {"lr": 3e-3}),
)
trainer.train()

print(decay.describe())
for log in trainer.state.log_history:
    if "wd" in log:
        print(f"step {log['step']}: loss {log['loss']:.3f}, wd {log['wd']:.4f}")
