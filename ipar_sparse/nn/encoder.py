"""SharedEncoder: expression to embedding."""

import torch
from torch import Tensor, nn

from .pyg import inits

SMOOTH_CHANNELS = 30
"""Principal components in which nearest cells are found for smoothing."""


class SharedEncoder(nn.Module):
    r"""MLP from genes to an embedding, shared by all slides, with an optional linear skip.

    .. math::
        H = x A + \mathrm{MLP}(x)

    Genes -> 512 -> 256 -> 128, each hidden layer followed by LayerNorm, ReLU and dropout. With
    the skip, the last layer of the MLP starts at zero, and A usually at principal components
    (:meth:`init_linear`): training then starts from a PCA.

    Buffers keep what must be applied to counts before they are encoded. The encoder stores them
    and does not apply them.

    Args:
        in_channels: number of genes.
        hidden_channels: widths of the hidden layers (default: (512, 256)).
        out_channels: width of the embedding (default: 128).
        dropout: dropout after each hidden layer (default: 0.1).
        skip: add the linear map A (default: False).
        smooth: number of nearest cells to average each cell with; the buffer ``axes``
            (genes, 30) holds the components in which they are found (default: 0).
        prepare: keep the buffers ``target_sum``, the total to which a cell's counts are scaled,
            and ``gene_weight`` (genes,) (default: False).

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
        self.axes: Tensor | None
        axes = torch.zeros(in_channels, min(SMOOTH_CHANNELS, in_channels))
        self.register_buffer("axes", axes if smooth else None)
        self.register_buffer("target_sum", torch.tensor(1e4) if prepare else None)
        self.register_buffer("gene_weight", torch.ones(in_channels) if prepare else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all weights anew; with a linear skip the MLP's last layer is zero."""
        inits.reset(self.mlp)
        if self.linear is not None:
            self.linear.reset_parameters()
            for parameter in self.mlp[-1].parameters():
                nn.init.zeros_(parameter)

    @torch.no_grad()
    def init_linear(self, axes: Tensor, scale: float = 1.0) -> None:
        """Set the linear skip, and the components for smoothing, to given components.

        Args:
            axes: components (genes, r) in order of importance. The skip takes the first
                ``out_channels``, the buffer ``axes`` the first 30; missing ones are zero.
            scale: factor of the linear skip.
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
        """Change the weights so that the embedding H of expression x becomes H @ own + x @ added.

        Args:
            own: linear map of the embedding (out_channels, out_channels).
            added: linear map of the expression (genes, out_channels).

        Raises:
            ValueError: without a linear skip, which the second map is added to.
        """
        if self.linear is None:
            raise ValueError("rotate_output needs an encoder with a linear map: skip=True")
        last = self.mlp[-1]
        assert isinstance(last, nn.Linear)  # for type checkers
        last.weight.copy_(own.T @ last.weight)
        last.bias.copy_(last.bias @ own)
        self.linear.weight.copy_(own.T @ self.linear.weight + added.T)

    def forward(self, expression: Tensor) -> Tensor:
        """Embed cells; see the class for shapes."""
        h = self.mlp(expression)
        return h if self.linear is None else h + self.linear(expression)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.in_channels}, {self.out_channels})"
