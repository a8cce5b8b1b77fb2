"""The gauge: what data leave open about a layout, and the choice made for it.

The centre, scale and rotation of a layout are open, and so are the signs of its axes.
"""

import torch
from torch import Tensor


def gauge_fix(pos: Tensor, batch: Tensor | None = None, num_graphs: int | None = None) -> Tensor:
    r"""Centre a layout and scale it to unit root-mean-square radius; rotation is left alone.

    .. math::
        \mathbf{x}_i \leftarrow
        \frac{\mathbf{x}_i - \bar{\mathbf{x}}}
             {\max(\sqrt{\tfrac1n \sum_j \|\mathbf{x}_j - \bar{\mathbf{x}}\|^2}, 10^{-6})}

    Args:
        pos: positions (n, 2), any units.
        batch: graph of each node (n,), int64; one graph if left out.
        num_graphs: number of graphs in ``batch``; read from it (a host synchronisation on
            CUDA) if left out.

    Returns:
        Positions (n, 2) in the unit-RMS gauge, each graph by itself.
    """
    if batch is None:
        centred = pos - pos.mean(dim=0, keepdim=True) if pos.size(0) else pos
        mean_square = centred.square().sum(-1).mean() if pos.size(0) else pos.new_ones(())
        return centred * mean_square.clamp(min=1e-12).rsqrt()
    if num_graphs is None:
        num_graphs = int(batch.max()) + 1 if batch.numel() else 0
    count = pos.new_zeros(num_graphs).index_add_(0, batch, pos.new_ones(pos.size(0)))
    count = count.clamp(min=1).unsqueeze(-1)
    mean = pos.new_zeros(num_graphs, pos.size(1)).index_add_(0, batch, pos) / count
    centred = pos - mean[batch]
    square = pos.new_zeros(num_graphs, 1).index_add_(
        0, batch, centred.square().sum(-1, keepdim=True)
    )
    return centred * (square / count).clamp(min=1e-12).rsqrt()[batch]


def svd_flip(axes: Tensor) -> Tensor:
    """Axes with their signs chosen: the largest loading of each is positive.

    An eigenvector is known up to its sign, and libraries differ in the one they return.

    Args:
        axes: one axis per column (d, r).

    Returns:
        The same axes (d, r). A column of zeros stays zero.
    """
    largest = axes.gather(0, axes.abs().argmax(dim=0, keepdim=True))
    return axes * largest.sign()


def pca_axes(centred: Tensor) -> tuple[Tensor, Tensor]:
    r"""Principal axes of points, with fixed signs.

    Args:
        centred: points of mean zero (n, d), best in float64.

    Returns:
        Orthonormal axes (d, d), one per column, and :math:`n \cdot` variance along each (d,).
        The axis of largest variance comes first.
    """
    square, axes = torch.linalg.eigh(centred.T @ centred)
    return svd_flip(axes.flip(1)), square.flip(0)


def principal_plane(h: Tensor) -> Tensor:
    """The first two principal components of an embedding, as a layout.

    It depends on the cells at hand alone. It still works on donors whose cells no trained map
    places well.

    Args:
        h: embedding (n, d), d >= 1; with d = 1 the second component is zero.

    Returns:
        Layout (n, 2) in the units of ``h``. The largest loading of each axis is positive.
    """
    centred = h.double() - h.double().mean(dim=0, keepdim=True)
    axes = pca_axes(centred)[0][:, :2]
    pos = (centred @ axes).to(h.dtype)
    return torch.nn.functional.pad(pos, (0, 2 - pos.size(1)))


@torch.no_grad()
def leading_components(h: Tensor, power: float = 1.0) -> Tensor:
    r"""Principal components, each weighted by a power of its standard deviation.

    .. math::
        z_{ir} = (\mathbf{h}_i - \bar{\mathbf{h}})^\top \mathbf{v}_r\, (s_r / s_1)^p

    with :math:`s_r` the standard deviation along the axis :math:`\mathbf{v}_r`. Power 0 leaves
    distances between cells as they are; a large power leaves only the first component.

    Args:
        h: embedding (n, d).
        power: p.

    Returns:
        (n, d), float32, the component of largest variance first.
    """
    centred = h.double() - h.double().mean(0)
    axes, square = pca_axes(centred)
    std = (square.clamp(min=0) / square[0].clamp(min=1e-12)).sqrt()
    return (centred @ (axes * std**power)).float()
