"""Decoupled weight decay for any optimizer, in one line.

``wd_callbacks.fastai``, ``wd_callbacks.lightning`` and ``wd_callbacks.torch`` each hold a
``DecoupledWD`` with the same arguments. Right before an optimizer's update every parameter that the
update would touch is multiplied by ``1 - lr * wd``, and the optimizer itself steps with a weight
decay of 0 (Loshchilov & Hutter, https://arxiv.org/abs/1711.05101, Algorithm 2, line 12).
"""

__version__ = "0.1.0"
