"""Adam on a layout, whose steps can be recorded as a CUDA graph."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim.adam import adam


class Descent:
    """Adam (Kingma and Ba 2015) on one tensor, with a step size that is set before each step.

    It is torch's own update. Making an optimiser of torch imports its compiler, which takes two
    seconds; a prediction does without.

    Args:
        x: changed in place (n, ...).
    """

    def __init__(self, x: Tensor) -> None:
        self.x, on_gpu = x, x.is_cuda
        self._moments = torch.zeros_like(x), torch.zeros_like(x)
        self._count = torch.zeros((), device=x.device if on_gpu else None)
        self._lr = torch.zeros((), device=x.device) if on_gpu else 0.0

    def set_lr(self, lr: float) -> None:
        """Set the step size of the following steps."""
        if isinstance(self._lr, Tensor):
            self._lr.fill_(lr)
        else:
            self._lr = lr

    def step(self, gradient: Tensor) -> None:
        """Move against a gradient of the shape of x."""
        first, second = self._moments
        adam(
            [self.x],
            [gradient],
            [first],
            [second],
            [],
            [self._count],
            foreach=False,
            capturable=self.x.is_cuda,
            amsgrad=False,
            beta1=0.9,
            beta2=0.999,
            lr=self._lr,
            weight_decay=0.0,
            eps=1e-8,
            maximize=False,
        )
