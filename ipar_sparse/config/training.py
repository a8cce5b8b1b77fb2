"""Settings of training, and of the cross-validation that precedes it."""

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from .types import Count, Fraction, Inside, MinisetSize, Positive, Rate, Section, Weight


class TrainConfig(Section):
    """How the gate and the model are trained."""

    batch_kind: Literal["auto", "miniset", "slide", "mixed"] = "auto"
    """What one step sees: miniset = a random subset of a slide, slide = a whole slide, mixed =
    both in turn; auto = chosen by size and device, and said. Minisets need the least memory."""
    epochs: Positive = 5
    """Largest number of epochs. Raise it where the validation score still improves at the end."""
    minisets: Positive = 120
    """Number of training minisets, balanced over the slides; an epoch uses each once. Raise it for
    many or large slides."""
    miniset_min: MinisetSize = 96
    """Smallest miniset, in cells. Lower it for slides of fewer cells."""
    miniset_max: MinisetSize = 384
    """Largest miniset, in cells. Lower it to save memory."""
    val_minisets: Positive = 32
    """Number of minisets of the validation slides that score each epoch. More give a less noisy
    score."""
    steps_per_epoch: Positive | None = None
    """Optimiser steps per epoch; none = each miniset once, or 100 steps on whole slides."""
    batch_size: Positive = 1
    """Minisets per optimiser step. Raise it to use a GPU better."""
    slides_per_step: Positive = 1
    """Whole slides per optimiser step, where it sees whole slides. Several devices share them; one
    computes them one after another."""
    lr: Rate = 5e-4
    """Learning rate at the start of the cosine schedule. Lower it where the loss diverges."""
    lr_min: Weight = 1e-5
    """Learning rate at the end of the cosine schedule."""
    weight_decay: Weight = 5e-4
    """Weight decay of AdamW. Raise it against overfitting."""
    grad_clip: Rate = 1.0
    """Largest norm of the gradient."""
    noise_h: Weight = 0.3
    """Augmentation: standard deviation of Gaussian noise on the embedding. Raise it where new
    slides are placed much worse than training slides."""
    dropout_h: Fraction = 0.1
    """Augmentation: probability that an entry of the embedding is set to zero."""
    edge_drop: Fraction = 0.2
    """Augmentation: fraction of candidate edges that are dropped; each cell keeps one at least."""
    gate_noise: bool = False
    """Whether the gate reads the augmented embedding in joint training, as the model does."""
    vary_augmentation: bool = False
    """Whether each step draws noise_h and dropout_h anew, from half to 1.5 times their value."""
    attention_graph: Literal["candidates", "target"] = "candidates"
    """Edges that training attends on: candidates, or true neighbours (target). The second is an
    oracle, for comparison only."""
    k_fraction_range: tuple[Inside, Inside] | None = None
    """Each step keeps a random number of candidates in this range, as a fraction of the cells;
    none = all candidates."""
    mutual_prob: Fraction = 0.0
    """Probability that a step keeps mutual nearest neighbours only."""
    gate_target_weights: tuple[Weight, ...] = (1.0,)
    """Weights of 1, 2, ... random-walk steps in the target of the gate."""
    gate_steps: Count = 150
    """Optimiser steps that train the gate alone, before joint training."""
    warmup_epochs: Count = 1
    """Number of epochs before the random-walk loss sets in."""
    ramp_epochs: Count = 2
    """Number of epochs over which the weight of the random-walk loss grows to rw_cap."""
    rw_cap: Weight = 0.3
    """Full weight of the random-walk loss, which supervises neighbourhoods."""
    lambda_stress: Weight = 0.1
    """Weight of the log-stress loss, which supervises distances up to the middle range."""
    lambda_gate: Weight = 0.05
    """Weight of the gate loss in joint training."""
    lambda_rep: Weight = 0.01
    """Weight of the repulsion loss, which keeps cells from lying on each other."""
    lambda_ent: Weight = 0.01
    """Weight of the regulariser on the entropy of the random walk."""
    lambda_long: Weight = 0.0
    """Weight of the log-stress loss on random pairs at all distances."""
    lambda_gram: Weight = 1.0
    """Weight of the loss on inner products of all pairs, which supervises the shape of the
    tissue."""
    lambda_multiscale: Weight = 0.0
    """Weight of the log-stress loss on equally many pairs at each scale."""
    probe_rows: Positive = 256
    """Rows of the random walk that are sampled per step on whole slides. Fewer save memory."""
    stress_pairs: Positive = 200_000
    """Pairs of cells that each stress loss samples per step on whole slides."""
    patience: Positive = 4
    """Epochs without a better validation score before training stops, counted from where rw_cap is
    reached."""
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """Arithmetic of the forward pass. bfloat16 saves time and memory on a recent GPU."""
    seed: Count = 0
    """Seed of everything random. The same seed on the same machine gives the same run."""
    device: str = "auto"
    """Where to compute: cpu, cuda, cuda:1, ...; auto = a GPU where there is one."""

    @model_validator(mode="after")
    def _ranges_are_ordered(self):
        if self.miniset_min > self.miniset_max:
            raise ValueError(
                f"miniset_min ({self.miniset_min}) must not exceed miniset_max ({self.miniset_max})"
            )
        if self.lr_min > self.lr:
            raise ValueError(f"lr_min ({self.lr_min}) must not exceed lr ({self.lr})")
        if self.k_fraction_range is not None:
            low, high = self.k_fraction_range
            if low > high:
                raise ValueError(f"k_fraction_range must rise, got {low:g} to {high:g}")
        if not 1 <= len(self.gate_target_weights) <= 5 or not sum(self.gate_target_weights) > 0:
            raise ValueError("gate_target_weights takes one to five weights, one of them above 0")
        return self


class SelectionConfig(Section):
    """Cross-validation over donors, which selects the settings that a request leaves open."""

    mode: Literal["quick", "full", "none"] = "quick"
    """quick = few candidates and short trainings, full = all candidates, none = named defaults at
    once. Use full where time does not matter."""
    folds: Annotated[int, Field(ge=2)] = 3
    """Largest number of cross-validation folds; each leaves a group of donors out."""
    slides_per_donor: Positive = 3
    """Largest number of slides per donor that take part in cross-validation."""

    @field_validator("mode", mode="before")
    @classmethod
    def _none_is_a_mode(cls, value):
        return "none" if value is None else value  # as --set and YAML read none
