"""Expression where it is used: dense rows made on the device, from a sparse copy there."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from .expression import Expression

_TABLE = 1 << 26  # values of a slide that are kept dense on the host: 256 MiB
_TABLE_SHARE = 32  # what one slide may take of a GPU's memory, if kept dense: a 32nd
_BLOCK = 1 << 25  # dense values made at once on a GPU
BLOCK_ROWS = 8192
"""Cells made dense at once."""


class ResidentExpression:
    """Centred dense rows of a slide's expression, as :meth:`Expression.rows` gives them.

    On a GPU the stored values, and which cells are averaged, are copied there once, and rows are
    made there. On the host rows are those of the expression itself.

    Args:
        expression: n cells of G genes.
        device: where rows are wanted.
    """

    def __init__(self, expression: Expression, device: torch.device):
        self.shape, self.device, self._source = expression.shape, device, expression
        self._table: Tensor | None = None
        if device.type != "cuda":
            return

        def put(array: np.ndarray, dtype) -> Tensor:
            return torch.from_numpy(array.astype(dtype, copy=False)).to(device)

        matrix, mix = expression.matrix, expression.mix
        self._start = put(matrix.indptr, np.int64)
        self._gene, self._value = put(matrix.indices, np.int32), put(matrix.data, np.float32)
        self._mean, self._empty = put(expression.mean, np.float32), put(expression.empty, bool)
        self._mixed: tuple[Tensor, Tensor] | None = None
        if mix is not None:
            shape = (self.shape[0], -1)
            self._mixed = (
                put(mix.indices, np.int32).view(shape),
                put(mix.data, np.float32).view(shape),
            )

    @property
    def is_dense(self) -> bool:
        """Whether rows are read from a table, without waiting for the device."""
        return self._table is not None

    def keep_dense(self) -> ResidentExpression:
        """Make all rows now, for many later reads, if they fit; returns itself."""
        room = _TABLE
        if self.device.type == "cuda":
            memory = torch.cuda.get_device_properties(self.device).total_memory
            room = memory // (4 * _TABLE_SHARE)
        if self._table is None and math.prod(self.shape) <= room:
            self._table = torch.cat([self.rows(part) for part in self.blocks()])
        return self

    def blocks(self) -> tuple[Tensor, ...]:
        """All row numbers, in parts of a size to be made dense at once."""
        return torch.arange(self.shape[0], device=self.device).split(BLOCK_ROWS)

    def rows(self, index: Tensor) -> Tensor:
        """Expression (m, G) of some cells, float32, on the device.

        Args:
            index: row numbers (m,), on the device.
        """
        if self._table is not None:
            return self._table[index]
        if self.device.type != "cuda":
            return torch.from_numpy(self._source.rows(index.numpy()))
        width = 1 if self._mixed is None else self._mixed[0].size(1)
        step = max(1, _BLOCK // (width * max(1, self.shape[1])))
        parts = [self._dense(part) for part in index.split(step)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _dense(self, index: Tensor) -> Tensor:
        cells = index if self._mixed is None else self._mixed[0][index].flatten().long()
        count = self._start[cells + 1] - self._start[cells]
        total = int(count.sum())
        row = torch.repeat_interleave(count, output_size=total)
        first = self._start[cells] - (count.cumsum(0) - count)
        at = torch.arange(total, device=self.device) + first[row]
        dense = torch.zeros(len(cells), self.shape[1], device=self.device)
        dense[row, self._gene[at].long()] = self._value[at]
        if self._mixed is not None:
            share = self._mixed[1][index]
            dense = torch.bmm(share.unsqueeze(1), dense.view(*share.shape, -1)).squeeze(1)
        return (dense - self._mean).masked_fill_(self._empty[index].unsqueeze(1), 0.0)


def resident(expression: Expression, device: torch.device) -> ResidentExpression:
    """The expression on a device, copied there once."""
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    kept = expression.resident
    if device not in kept:
        kept[device] = ResidentExpression(expression, device)
    return kept[device]
