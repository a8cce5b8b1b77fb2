"""SharedEncoder: expression to embedding."""

from torch import Tensor, nn
from torch_geometric.nn import inits


class SharedEncoder(nn.Module):
    """MLP from genes to an embedding, one for all slides.

    Genes -> 512 -> 256 -> 128, each hidden layer followed by LayerNorm, ReLU and dropout.

    Args:
        in_channels: number of genes.
        hidden_channels: widths of the hidden layers (default: (512, 256)).
        out_channels: width of the embedding (default: 128).
        dropout: dropout after each hidden layer (default: 0.1).

    Shapes:
        - **input:** expression (n, genes): normalised per cell, log1p, mean-centred per gene
          within the slide
        - **output:** embedding (n, out_channels)
    """

    def __init__(
        self,
        in_channels: int,
        hidden_channels: tuple[int, ...] = (512, 256),
        out_channels: int = 128,
        dropout: float = 0.1,
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

    def reset_parameters(self):
        """Draw all weights anew."""
        inits.reset(self.mlp)

    def forward(self, expression: Tensor) -> Tensor:
        """Embed cells; see the class for shapes."""
        return self.mlp(expression)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.in_channels}, {self.out_channels})"
