"""Ignite: the engine steps the optimizer, and Checkpoint saves the decay.

python examples/recipes/ignite_engine.py
"""

import torch
from data import digits
from ignite.engine import Engine, Events, create_supervised_evaluator, create_supervised_trainer
from ignite.handlers import Checkpoint, DiskSaver
from ignite.metrics import Accuracy
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from wd_callbacks.schedules import Linear
from wd_callbacks.torch import DecoupledWD

EPOCHS = 5

torch.manual_seed(0)
x, y, x_test, y_test = digits()
train = DataLoader(TensorDataset(x, y), batch_size=50, shuffle=True)
test = DataLoader(TensorDataset(x_test, y_test), batch_size=397)
model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
decay = DecoupledWD(optimizer, Linear(0.2, 0), total_steps=EPOCHS * len(train))

trainer = create_supervised_trainer(model, optimizer, nn.functional.cross_entropy)
evaluator = create_supervised_evaluator(model, {"accuracy": Accuracy()})
saved = {"model": model, "optimizer": optimizer, "decay": decay, "trainer": trainer}
saver = DiskSaver("out/ignite", create_dir=True, require_empty=False)
checkpoint = Checkpoint(
    saved, saver, n_saved=1, global_step_transform=lambda *_: trainer.state.epoch
)
trainer.add_event_handler(Events.EPOCH_COMPLETED, checkpoint)


@trainer.on(Events.EPOCH_COMPLETED)
def report(engine: Engine) -> None:
    """Print the coefficient and the accuracy."""
    accuracy = evaluator.run(test).metrics["accuracy"]
    print(f"epoch {engine.state.epoch}: wd {decay.coefficients[0]:.3f}, accuracy {accuracy:.1%}")


trainer.run(train, max_epochs=EPOCHS)
print(decay.describe())
state = torch.load(checkpoint.last_checkpoint, weights_only=True)
print(f"{checkpoint.last_checkpoint} has made {state['decay']['steps']} steps")
