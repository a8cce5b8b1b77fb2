"""Colours as an eye sees them: OKLab space, and colour-blind readers."""

from __future__ import annotations

import numpy as np

# Ottosson (2020), OKLab: linear sRGB to cone responses, and those to lightness and two hues
_CONES = np.array(
    [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ]
)
_OPPONENT = np.array(
    [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ]
)


def to_oklab(rgb: np.ndarray) -> np.ndarray:
    """Colours (n, 3) in OKLab space, where distances are those that an eye sees."""
    return _linear_to_oklab(_linear(rgb))


def from_oklab(lab: np.ndarray) -> np.ndarray:
    """RGB (n, 3) in [0, 1] of colours in OKLab space."""
    linear = (lab @ np.linalg.inv(_OPPONENT).T) ** 3 @ np.linalg.inv(_CONES).T
    linear = np.clip(linear, 0, 1)
    return np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


# Machado, Oliveira and Fernandes (2009), linear sRGB: full deuteranopia and protanopia
_BLINDNESS = np.array(
    [
        [
            [0.367322, 0.860646, -0.227968],
            [0.280085, 0.672501, 0.047413],
            [-0.011820, 0.042940, 0.968881],
        ],
        [
            [0.152286, 1.052583, -0.204868],
            [0.114503, 0.786281, 0.099216],
            [-0.003882, -0.048116, 1.051998],
        ],
    ]
)


def color_distances(rgb: np.ndarray, others: np.ndarray) -> np.ndarray:
    """OKLab distances (n, m) of colours (n, 3) and (m, 3), for whoever sees them least apart.

    That is full colour vision, deuteranopia or protanopia.
    """
    found = []
    for matrix in (np.eye(3), *_BLINDNESS):
        a, b = (
            _linear_to_oklab(np.clip(_linear(colors) @ matrix.T, 0, 1)) for colors in (rgb, others)
        )
        found.append(np.linalg.norm(a[:, None] - b[None], axis=-1))
    return np.minimum.reduce(found)


def _linear(rgb: np.ndarray) -> np.ndarray:
    return np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)


def _linear_to_oklab(linear: np.ndarray) -> np.ndarray:
    return np.cbrt(linear @ _CONES.T) @ _OPPONENT.T
