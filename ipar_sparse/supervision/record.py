"""Frozen records of tensors that move between devices as one."""

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from itertools import accumulate
from typing import Any, Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class TensorRecord:
    """A dataclass whose tensors, and records of tensors, move between devices together."""

    def to(self, device: torch.device | str) -> Self:
        """The same record on another device; itself where it is there already."""
        moved: dict[str, Any] = {}
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, Tensor | TensorRecord):
                there = value.to(device)
                if there is not value:
                    moved[item.name] = there
        if not moved:
            return self
        if hasattr(self, "_cache"):
            moved["_cache"] = {}
        return replace(self, **moved)


def offsets(sizes: Iterable[int]) -> list[int]:
    """Where each of several parts begins once they stand one after the other."""
    return [0, *accumulate(sizes)][:-1]
