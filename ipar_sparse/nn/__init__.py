"""Modules to import into a PyG model."""

from .conv import IPALiteConv
from .encoder import SharedEncoder
from .gate import EdgeGateSoft
from .model import IPALiteModel
from .packed import PackedIPALiteConv
from .terms import LOGIT_TERMS, PairBias

__all__ = [
    "LOGIT_TERMS",
    "EdgeGateSoft",
    "IPALiteConv",
    "IPALiteModel",
    "PackedIPALiteConv",
    "PairBias",
    "SharedEncoder",
]
