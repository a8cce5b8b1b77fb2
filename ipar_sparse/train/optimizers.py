"""The optimiser of all stages, and its learning rate."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


def cosine(step: int, total: int, high: float, low: float) -> float:
    """A learning rate that falls from ``high`` to ``low`` over ``total`` steps as a cosine."""
    return low + 0.5 * (high - low) * (1 + math.cos(math.pi * min(1.0, step / max(1, total))))


def adamw(
    parameters: Iterable[nn.Parameter], lr: float, weight_decay: float, device: torch.device
) -> Optimizer:
    """AdamW; on a GPU it keeps step and learning rate there, so that steps can be recorded."""
    if device.type != "cuda":
        return torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay)
    rate = torch.tensor(lr, device=device)
    return torch.optim.AdamW(parameters, lr=rate, weight_decay=weight_decay, capturable=True)


def set_lr(optimizer: Optimizer, lr: float) -> None:
    """Sets the learning rate of all parameters."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr
