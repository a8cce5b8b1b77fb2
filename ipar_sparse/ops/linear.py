"""Linear layers: on a processor by oneDNN, which knows its widest instructions.

MKL, which serves torch's own products in float32, leaves them unused on processors that are not
Intel's.
"""

import torch
from torch import Tensor, nn


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias`` of matrices, without gradients."""
    if _serves(x, weight):
        given = _dense(x), _dense(weight), bias
        return torch.ops.mkldnn._linear_pointwise(*given, "none", [], "")
    return nn.functional.linear(x, weight, bias)


class Linear(nn.Linear):
    """torch's layer, whose products of matrices on a processor are oneDNN's."""

    def forward(self, x: Tensor) -> Tensor:
        """See :class:`torch.nn.Linear`."""
        apart = torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu")
        if apart or x.dim() != 2 or not _serves(x, self.weight):
            return super().forward(x)
        return _Product.apply(x, self.weight, self.bias)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return product(x, weight, bias)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        return (
            _Product.apply(grad, weight.T, None) if wanted[0] else None,
            _Product.apply(grad.T, x.T, None) if wanted[1] else None,
            grad.sum(0) if wanted[2] else None,
        )


def _serves(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN multiplies these: float32 on a processor, and not empty."""
    known = _KNOWN and x.dtype == weight.dtype == torch.float32
    return known and x.device.type == "cpu" and x.numel() > 0


def _dense(x: Tensor) -> Tensor:
    """Rows or columns one after another: oneDNN is a hundred times slower on others."""
    return x if x.is_contiguous() or x.T.is_contiguous() else x.contiguous()


_KNOWN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
