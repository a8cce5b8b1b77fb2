"""The gauge: what a layout is known up to, and the representative we keep."""

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


def principal_plane(h: Tensor) -> Tensor:
    """The two principal components of an embedding, each at its own variance, as a first layout.

    Found from the cells at hand alone, it places cells by how they differ from one another and
    not by what they are, so it holds where a map learned on other donors does not.

    Args:
        h: embedding (n, d), d >= 1; missing second components are zero.

    Returns:
        (n, 2), in h's units; the largest loading of each component is positive.
    """
    centred = h.double() - h.double().mean(dim=0, keepdim=True)
    axes = torch.linalg.eigh(centred.T @ centred).eigenvectors.flip(1)[:, :2]
    largest = axes.gather(0, axes.abs().argmax(dim=0, keepdim=True))
    pos = (centred @ (axes * largest.sign())).to(h.dtype)
    return torch.nn.functional.pad(pos, (0, 2 - pos.size(1)))


@torch.no_grad()
def leading_components(h: Tensor, power: float = 1.0) -> Tensor:
    """An embedding in which components count more the more they vary.

    Principal components, each times this power of its standard deviation, relative to the largest;
    0 leaves distances between cells as they are, large powers leave nothing but the first.

    Args:
        h: embeddings (n, d).
        power: p.

    Returns:
        (n, d), float32.
    """
    x = h.double() - h.double().mean(0)
    variance, axes = torch.linalg.eigh(x.T @ x)
    spread = (variance.clamp(min=0) / variance.max().clamp(min=1e-12)).sqrt()
    return (x @ (axes * spread**power)).float()
