"""Parameters whose shapes are read from the first input."""

from typing import Any

from torch import nn
from torch.nn.parameter import UninitializedParameter

_WIDTHS = ("in_features", "out_features", "normalized_shape")


def defer(module: nn.Module) -> None:
    """Replace all parameters by ones without a shape, of the same device and dtype."""
    for child in module.modules():
        for name, parameter in child.named_parameters(recurse=False):
            options: dict[str, Any] = {"device": parameter.device, "dtype": parameter.dtype}
            child.register_parameter(name, UninitializedParameter(**options))


def materialize(module: nn.Module, like: nn.Module) -> None:
    """Give a module the widths of another of the same structure; values are left undefined.

    Parameters stay the same objects, so that whoever holds them already need not look again.
    """
    for own, other in zip(module.modules(), like.modules(), strict=True):
        for name in _WIDTHS:
            if hasattr(other, name):
                setattr(own, name, getattr(other, name))
        for parameter, wanted in zip(
            own.parameters(recurse=False), other.parameters(recurse=False), strict=True
        ):
            parameter.materialize(wanted.shape)
