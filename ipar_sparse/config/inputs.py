"""Settings of what a run reads: files, the encoder of expression, and candidate graphs."""

from typing import Literal

from pydantic import model_validator

from .types import Count, Fraction, Positive, Rate, Section, Share, Weight


class DataConfig(Section):
    """What is read from the AnnData files."""

    layer: str | None = None
    """Layer of the AnnData file that holds the expression; none = X. Set it where the counts are in
    a layer."""
    normalized: bool | None = None
    """Whether the expression is log-normalised (true) or raw counts (false); none = counts where
    all values are whole numbers. Set it where that guess is wrong."""
    embedding: str | None = None
    """obsm key of an embedding to use instead of a trained encoder, e.g. obsm:X_pca. All slides
    must carry the same embedding."""
    slide_key: str | None = None
    """obs column that names the slide of each cell; none = one slide per file. Set it where a file
    holds several slides."""
    spatial_key: str = "spatial"
    """obsm key of the measured positions, in any unit. Change it where they have another name."""
    max_genes: Positive | None = 2000
    """Number of genes that the encoder reads, the most variable ones; none = all. Lower it to save
    memory."""
    target_sum: Rate | None = None
    """Counts per cell after scaling, before log1p; none = median of the training cells. Set it,
    e.g. to 10000, to follow another pipeline."""
    ignore_case: bool = False
    """Whether gene names that differ in letter case alone are taken as one gene. Set it for slides
    of another species."""
    drop_outliers: bool = False
    """Whether cells are left out whose measured positions lie far outside the tissue, or at one
    point. Set it where positions were filled in."""

    @model_validator(mode="after")
    def _embedding_names_a_slot(self):
        if self.embedding is not None and not self.embedding.removeprefix("obsm:"):
            raise ValueError("embedding must name an obsm key, e.g. obsm:X_pca")
        return self


class EncoderConfig(Section):
    """The encoder from genes to the embedding: trained first, then frozen."""

    hidden: tuple[Positive, ...] = (512, 256)
    """Widths of the hidden layers of the encoder. Smaller layers train faster."""
    out: Positive = 128
    """Width of the embedding. Change it together with model.dim."""
    skip: bool = True
    """Whether a linear path runs beside the MLP, initialised with principal components. Without it,
    slides of new donors are placed worse."""
    knn_smoothing: Count = 10
    """Number of nearest cells in expression that each cell is averaged with before encoding; 0 =
    off. Raise it where cells have few counts."""
    scale_power: Share = 0.5
    """Each gene is divided by its standard deviation to this power: 0 = unscaled, 0.5 = Pareto
    scaling, 1 = unit variance. Raise it where most genes are informative."""
    morans_i_power: Share = 0.25
    """Each gene is multiplied by its Moran's I on the training slides to this power; 0 = off. Raise
    it where few genes vary in space."""
    component_weight: Weight = 0.5
    """Weight of linear components of the expression that are appended to the learned embedding; 0 =
    none. Raise it where new donors differ from those trained on."""
    component_kind: Literal["principal", "spatial"] | None = None
    """Components that are appended: principal = of largest variance, spatial = of largest spatial
    autocorrelation; none = selected by cross-validation."""
    dropout: Fraction = 0.3
    """Dropout probability after each hidden layer. Raise it against overfitting."""
    steps: Count | None = None
    """Optimiser steps of the encoder; none = 50 passes over the cells, from 400 to 2000 steps. With
    0 it keeps the principal components that it starts with."""
    batch_size: Positive = 512
    """Cells per optimiser step, all of one slide. Lower it to save memory."""
    lr: Rate = 1e-3
    """Learning rate of the encoder. Lower it where its loss diverges."""
    weight_decay: Weight = 1e-4
    """Weight decay of the encoder. Raise it against overfitting."""
    temperature: Rate = 0.1
    """Temperature of the spatial InfoNCE loss. A lower one weighs the hardest negatives more."""
    neighbors: Positive = 15
    """Number of spatial nearest neighbours of a cell that InfoNCE takes as positives."""
    far_quantile: Fraction = 0.5
    """InfoNCE takes its negatives beyond this quantile of the distances on a slide."""
    hard_negatives: Count = 8
    """Number of negatives per cell that are near in expression but far in space."""
    infonce_weight: Weight = 0.3
    """Weight of the spatial InfoNCE loss, which draws cells together that lie together."""
    distance_weight: Weight = 1.0
    """Weight of the loss that makes distances in the embedding follow distances in the tissue."""
    invariance_weight: Weight = 0.0
    """Weight of the VICReg loss between two views of a cell. The preset spec uses it."""
    variance_weight: Weight = 0.0
    """Weight of the VICReg variance hinge. The preset spec uses it."""
    covariance_weight: Weight = 0.0
    """Weight of the VICReg penalty on off-diagonal covariance. The preset spec uses it."""
    gene_dropout: Fraction = 0.5
    """Augmentation: probability that a view sets a gene to zero."""
    noise: Weight = 0.3
    """Augmentation: standard deviation of Gaussian noise on a view, in standard deviations of a
    gene."""
    gene_log_std: Weight = 0.3
    """Augmentation: standard deviation of the log factor that a view multiplies each gene by. Raise
    it where slides differ by batch."""

    def steps_for(self, cells: int) -> int:
        """Optimiser steps on so many training cells.

        The limits were measured: on 2,000 cells, 400 steps placed an unseen slide better than
        1,200; on 30,000 cells, 1,600 steps placed it better than 400.
        """
        if self.steps is not None:
            return self.steps
        return min(max(round(50 * cells / self.batch_size), 400), 2000)

    def weights(self) -> dict[str, float]:
        """Losses whose weight is above 0, by name."""
        names = ("infonce", "distance", "invariance", "variance", "covariance")
        found = {name: getattr(self, f"{name}_weight") for name in names}
        return {name: weight for name, weight in found.items() if weight > 0}

    @model_validator(mode="after")
    def _learns_something(self):
        if not self.weights():
            raise ValueError("all weights of the encoder's losses are 0; set encoder.steps=0")
        return self


class GraphConfig(Section):
    """Candidate graph (nearest neighbours in the embedding) and target graph (in space)."""

    k: Positive = 100
    """Number of candidate neighbours per cell. Lower it to save time and memory."""
    metric: Literal["euclidean", "cosine"] = "euclidean"
    """Distance in the embedding by which candidates are sought."""
    backend: Literal["auto", "exact", "triton", "partitioned", "torch_cluster", "faiss"] = "auto"
    """How nearest neighbours are found; auto = the fastest search of this machine, exact but on
    very large slides."""
    candidate_pool: Count = 256
    """On slides of more cells, candidates come from a random sample of this many cells, as in
    training on minisets; 0 = from all cells."""
    target_mode: Literal["auto", "exact", "sketch"] = "auto"
    """Random-walk targets in full (exact) or sampled (sketch); auto = exact up to 384 cells."""
