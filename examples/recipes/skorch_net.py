"""skorch: a callback of three lines attaches the decay, and scikit-learn searches for wd.

python examples/recipes/skorch_net.py
"""

from typing import Any

import torch
from data import digits
from sklearn.model_selection import GridSearchCV
from skorch import NeuralNetClassifier
from skorch.callbacks import Callback
from torch import nn

from wd_callbacks.torch import DecoupledWD


class Decay(Callback):
    """Decays the weights during ``fit``.

    Args:
        wd: The coefficient.
    """

    def __init__(self, wd: float = 0.01) -> None:
        self.wd = wd

    def on_train_begin(self, net: NeuralNetClassifier, **kwargs: Any) -> None:
        """Attach to the optimizer of this fit."""
        self.decay_ = DecoupledWD(net.optimizer_, self.wd, model=net.module_, exclude="bias")

    def on_train_end(self, net: NeuralNetClassifier, **kwargs: Any) -> None:
        """Detach: another fit, ``partial_fit`` included, attaches again."""
        self.decay_.detach()


torch.manual_seed(0)
x, y, x_test, y_test = digits()
net = NeuralNetClassifier(
    nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)),
    criterion=nn.CrossEntropyLoss,
    optimizer=torch.optim.Adam,
    lr=1e-2,
    max_epochs=5,
    batch_size=64,
    iterator_train__shuffle=True,
    train_split=None,
    callbacks=[("decay", Decay())],
    verbose=0,
)
search = GridSearchCV(net, {"callbacks__decay__wd": [0.1, 1.0]}, cv=3, scoring="accuracy")
search.fit(x.numpy(), y.numpy())
results = search.cv_results_
for parameters, score in zip(results["params"], results["mean_test_score"]):
    print(f"wd {parameters['callbacks__decay__wd']}: accuracy {score:.1%}")
best = search.best_estimator_
print(dict(best.callbacks_)["decay"].decay_.describe())
print(f"test accuracy {search.score(x_test.numpy(), y_test.numpy()):.1%}")
