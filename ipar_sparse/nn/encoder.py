"""SharedEncoder: expression to embedding."""

import torch
from torch import Tensor, nn
from torch_geometric.nn import inits

SMOOTH_CHANNELS = 30
"""Principal components in which cells are compared for smoothing."""


class SharedEncoder(nn.Module):
    r"""MLP from genes to an embedding, one for all slides, and a linear path beside it.

    .. math::
        H = x A + \mathrm{MLP}(x)

    Genes -> 512 -> 256 -> 128, each hidden layer followed by LayerNorm, ReLU and dropout. The
    linear path starts as principal components (:meth:`init_linear`) and the MLP from zero, so that
    training begins where principal components are and leaves them only as far as it pays.

    Args:
        in_channels: number of genes.
        hidden_channels: widths of the hidden layers (default: (512, 256)).
        out_channels: width of the embedding (default: 128).
        dropout: dropout after each hidden layer (default: 0.1).
        skip: whether there is a linear path (default: False).
        smooth: number of nearest cells, in the principal components kept as the buffer ``axes``,
            that a cell is averaged with before it comes here (default: 0).
        prepare: whether to carry how counts become its input, as buffers ``target_sum``, the total
            that a cell is scaled to, and ``gene_weight`` (genes,) (default: False: 1e4, none).

    Shapes:
        - **input:** expression (n, genes): normalised per cell, log1p, weighted, mean-centred per
          gene within the slide
        - **output:** embedding (n, out_channels)
    """

    def __init__(
        self,
        in_channels: int,
        hidden_channels: tuple[int, ...] = (512, 256),
        out_channels: int = 128,
        dropout: float = 0.1,
        skip: bool = False,
        smooth: int = 0,
        prepare: bool = False,
    ):
        super().__init__()
        self.in_channels = in_channels
        self.out_channels = out_channels
        layers: list[nn.Module] = []
        width = in_channels
        for hidden in hidden_channels:
            layers += [nn.Linear(width, hidden), nn.LayerNorm(hidden), nn.ReLU()]
            layers += [nn.Dropout(dropout)]
            width = hidden
        layers.append(nn.Linear(width, out_channels))
        self.mlp = nn.Sequential(*layers)
        self.linear = nn.Linear(in_channels, out_channels, bias=False) if skip else None
        self.smooth = smooth
        axes = torch.zeros(in_channels, min(SMOOTH_CHANNELS, in_channels))
        self.register_buffer("axes", axes if smooth else None)
        self.register_buffer("target_sum", torch.tensor(1e4) if prepare else None)
        self.register_buffer("gene_weight", torch.ones(in_channels) if prepare else None)
        self.reset_parameters()

    def reset_parameters(self):
        """Draw all weights anew; beside a linear path the MLP starts at zero."""
        inits.reset(self.mlp)
        if self.linear is not None:
            self.linear.reset_parameters()
            nn.init.zeros_(self.mlp[-1].weight)
            nn.init.zeros_(self.mlp[-1].bias)

    @torch.no_grad()
    def init_linear(self, axes: Tensor, scale: float = 1.0) -> None:
        """Begin from components of the expression: the linear path, and what cells are compared by.

        Args:
            axes: (genes, r), the most telling first; the linear path takes as many as the
                embedding has room for.
            scale: factor of the linear path.
        """
        if self.linear is not None:
            taken = axes[:, : self.out_channels].T
            self.linear.weight.zero_()
            self.linear.weight[: len(taken)] = scale * taken
        if self.axes is not None:
            self.axes.zero_()
            taken = axes[:, : self.axes.size(1)]
            self.axes[:, : taken.size(1)] = taken

    @torch.no_grad()
    def rotate_output(self, own: Tensor, added: Tensor) -> None:
        """Replace the embedding H of expression x by H @ own + x @ added, in the weights.

        Args:
            own: (out_channels, out_channels).
            added: (genes, out_channels).

        Raises:
            ValueError: without a linear path, which takes what is added.
        """
        if self.linear is None:
            raise ValueError("an encoder without a linear path (skip) takes nothing added to it")
        last = self.mlp[-1]
        last.weight.copy_(own.T @ last.weight)
        last.bias.copy_(last.bias @ own)
        self.linear.weight.copy_(own.T @ self.linear.weight + added.T)

    def forward(self, expression: Tensor) -> Tensor:
        """Embed cells; see the class for shapes."""
        h = self.mlp(expression)
        return h if self.linear is None else h + self.linear(expression)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.in_channels}, {self.out_channels})"
