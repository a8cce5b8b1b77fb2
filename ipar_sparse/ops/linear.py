"""Products of a linear layer: on a processor by oneDNN, which knows its widest instructions.

MKL, which serves torch's own products in float32, leaves them unused on processors that are not
Intel's.
"""

import torch
from torch import Tensor


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias`` of matrices, without gradients."""
    if x.device.type == "cpu" and x.dtype == torch.float32 and x.numel() and _KNOWN:
        given = _dense(x), _dense(weight), bias
        return torch.ops.mkldnn._linear_pointwise(*given, "none", [], "")
    return torch.nn.functional.linear(x, weight, bias)


def _dense(x: Tensor) -> Tensor:
    """Rows or columns one after another: oneDNN is a hundred times slower on others."""
    return x if x.is_contiguous() or x.T.is_contiguous() else x.contiguous()


_KNOWN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
