"""The settings of a run, each with its type, its default and its help text.

A *request* may leave settings open (:data:`DECIDED_FROM_DATA`). A run decides them from its
training slides, saves what it decided, and uses what it saved.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from ..errors import UserError
from ..files import atomic_write
from .validation import explain, merge

Positive = Annotated[int, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Inside = Annotated[float, Field(gt=0, lt=1)]
Beta = Annotated[float, Field(gt=0, lt=2.5)]
Term = Literal["mono", "mono_clamped", "rbf", "point_ipa", "pair"]


FORMAT = 2
"""Of a run folder; a run of another format is refused with one line."""
CONFIG = "config.json"
REQUESTED = "requested.yaml"

DECIDED_FROM_DATA = (
    "data.normalized",
    "data.target_sum",
    "encoder.steps",
    "encoder.component_kind",
    "model.init",
    "model.recycling",
    "train.steps_per_epoch",
    "refine.distance_correction_steps",
    "refine.steps",
    "refine.anchor_weight",
    "refine.rca_power",
    "uncertainty.error_intercept",
    "uncertainty.error_slope",
    "uncertainty.calibrated",
)
"""Settings that a request may leave open, and that a run decides before it is trained."""


class Section(BaseModel):
    """A group of settings: unknown keys are refused, docstrings of fields are the help text."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, validate_default=True
    )


class DataConfig(Section):
    """What is read from the AnnData files."""

    layer: str | None = None
    """AnnData layer that holds the expression; none = X"""
    normalized: bool | None = None
    """true = log-normalised values, false = raw counts; none = recognised: whole numbers are counts"""
    embedding: str | None = None
    """obsm key of an embedding to use in place of the encoder, e.g. obsm:X_pca"""
    slide_key: str | None = None
    """obs column that names the slide of each cell, where a file holds several"""
    spatial_key: str = "spatial"
    """obsm key of the measured positions"""
    max_genes: Positive | None = 2000
    """number of genes, the most variable ones; none = all"""
    target_sum: Rate | None = None
    """counts per cell after scaling, before log1p; none = median total of the training slides"""

    @model_validator(mode="after")
    def _embedding_names_a_slot(self):
        if self.embedding is not None and not self.embedding.removeprefix("obsm:"):
            raise ValueError("embedding must name an obsm key, e.g. obsm:X_pca")
        return self


class EncoderConfig(Section):
    """Stage A: the encoder from genes to the embedding, trained without labels, then frozen."""

    hidden: tuple[Positive, ...] = (512, 256)
    """widths of the hidden layers"""
    out: Positive = 128
    """width of the embedding"""
    skip: bool = True
    """adds a linear path beside the MLP, initialised with principal components"""
    knn_smoothing: Count = 10
    """averages each cell with this many nearest cells in expression before encoding; 0 = off"""
    scale_power: Share = 0.5
    """divides each gene by its standard deviation to this power: 0 = unscaled, 0.5 = Pareto scaling,
    1 = unit variance"""
    morans_i_power: Share = 0.25
    """multiplies each gene by its Moran's I on the training slides to this power; 0 = off"""
    component_weight: Weight = 0.5
    """weight of linear components of expression that are appended to the trained embedding; 0 = none"""
    component_kind: Literal["principal", "spatial"] | None = None
    """which components: principal = largest variance, spatial = largest spatial autocorrelation;
    none = chosen by cross-validation"""
    dropout: Fraction = 0.3
    """dropout after every hidden layer"""
    steps: Count | None = None
    """optimiser steps of the encoder; none = 50 passes over the cells, from 400 to 2000 steps; 0 keeps
    the principal components it starts with"""
    batch_size: Positive = 512
    """anchor cells per step, all of one slide"""
    lr: Rate = 1e-3
    """learning rate"""
    weight_decay: Weight = 1e-4
    """weight decay"""
    temperature: Rate = 0.1
    """temperature of the spatial InfoNCE loss"""
    neighbors: Positive = 15
    """spatial nearest neighbours that count as positives"""
    far_quantile: Fraction = 0.5
    """negatives lie farther away than this quantile of the distances"""
    hard_negatives: Count = 8
    """negatives per anchor that are near in expression but far in space"""
    infonce_weight: Weight = 0.3
    """weight of the spatial InfoNCE loss"""
    distance_weight: Weight = 1.0
    """weight of the loss that makes distances in the embedding follow those in the tissue"""
    invariance_weight: Weight = 0.0
    """VICReg: weight of the distance between two views"""
    variance_weight: Weight = 0.0
    """VICReg: weight of the variance hinge"""
    covariance_weight: Weight = 0.0
    """VICReg: weight of the off-diagonal covariance"""
    gene_dropout: Fraction = 0.5
    """share of genes set to zero in a view"""
    noise: Weight = 0.3
    """standard deviation of the Gaussian noise of a view, where genes have 1"""
    gene_log_std: Weight = 0.3
    """standard deviation of the log factor that each view multiplies a gene by"""

    def steps_for(self, cells: int) -> int:
        """Optimiser steps on so many training cells.

        On 2,000 cells 1,200 steps served an unseen slide worse than 400; 400 are seven passes over
        30,000, where 1,600 served better (`docs/experiments.md`).
        """
        if self.steps is not None:
            return self.steps
        return min(max(round(50 * cells / self.batch_size), 400), 2000)

    def weights(self) -> dict[str, float]:
        """Losses with a weight, by name."""
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
    """candidate neighbours of each cell, at most n - 1"""
    metric: Literal["euclidean", "cosine"] = "euclidean"
    """distance in the embedding"""
    backend: Literal["auto", "exact", "triton", "torch_cluster", "faiss"] = "auto"
    """how nearest neighbours are found"""
    candidate_pool: Count = 256
    """on slides of more cells, candidates come from a random sample of this size, as in training on
    minisets; 0 = from all cells"""
    target_mode: Literal["auto", "exact", "sketch"] = "auto"
    """walk targets in full, or sampled at the same radius; auto = exact up to 384 cells"""


class ModelConfig(Section):
    """The attention model from embedding to positions."""

    dim: Positive = 128
    """width of the embedding it takes; follows the data when an embedding is brought along"""
    channels: Positive = 96
    """width of the state of a cell"""
    heads: Positive = 4
    """attention heads"""
    head_channels: Positive = 32
    """channels of a head"""
    recycles: Positive = 5
    """passes through the attention block"""
    shared: bool = True
    """one block for all recycles, or one each"""
    terms: tuple[Term, ...] = ()
    """extra terms of the attention logits: one of the geometry terms, pair, both or none"""
    geo_schedule: Literal["all", "last"] | tuple[Positive, ...] = "all"
    """recycles that carry the geometry term: all, last, or a list counted from 1"""
    rbf_max: Rate = 5.0
    """largest absolute value of the rbf term"""
    pair_hidden: tuple[Positive, ...] = (64, 64)
    """widths of the hidden layers of the pair term, one or two"""
    qk: bool = True
    """whether queries and keys take part in the attention logits"""
    qk_norm: bool = False
    """normalise queries and keys, with a learned scale"""
    qk_scale: Rate = 1.0
    """start of that scale; 1 / sqrt(head_channels) starts at logits of standard deviation 1"""
    qk_range: tuple[Rate, Rate] | None = None
    """range of that scale times sqrt(head_channels); none = free"""
    gate_heads: Positive = 1
    """gate logits per edge: 1, or one for each head"""
    beta: Weight = 2.0
    """weight of the gate in the attention logits; 0 = no gate"""
    learned_betas: tuple[Beta, ...] | None = None
    """initial values of one learned gate weight per recycle, below 2.5; none = beta, fixed"""
    init_step_size: Inside | None = None
    """initial value of a learned step size per recycle, between 0 and 1; none = full steps"""
    init: Literal["auto", "atlas", "mlp", "pca"] = "auto"
    """initial layout: atlas = posterior mean under an atlas of the training slides, mlp = learned
    map of the embedding, pca = its two principal components, auto = chosen by cross-validation"""
    recycling: bool | None = None
    """whether recycles move the initial layout; none = chosen by cross-validation"""
    init_std: Weight = 0.05
    """standard deviation of the training noise on the initial layout, in tissue radii"""
    backend: Literal["auto", "reference", "chunked", "triton"] = "auto"
    """how attention is computed"""
    checkpoint_recycles: bool = False
    """recompute each recycle in the backward pass, for less memory"""

    @property
    def gated(self) -> bool:
        """Whether the gate takes part: it has a weight, and recycles that attend by it."""
        return self.beta > 0 and self.recycling is not False

    @property
    def gate_weight(self) -> float:
        """What the gate is multiplied by before the model sees it."""
        return self.beta if self.learned_betas is None else 1.0

    @property
    def geometry(self) -> str | None:
        """The geometry term, if there is one."""
        return next((term for term in self.terms if term != "pair"), None)

    @model_validator(mode="after")
    def _gate_fits(self):
        if self.gate_heads not in (1, self.heads):
            raise ValueError(f"gate_heads must be 1 or heads ({self.heads}), got {self.gate_heads}")
        if not self.beta > 0 and self.gate_heads > 1:
            raise ValueError(f"gate_heads={self.gate_heads} needs a gate, but beta=0 removes it")
        if self.learned_betas is not None:
            if len(self.learned_betas) != self.recycles:
                raise ValueError(
                    f"learned_betas needs one value for each of {self.recycles} recycles, "
                    f"got {len(self.learned_betas)}; none = one fixed beta"
                )
            if self.beta != ModelConfig.model_fields["beta"].default:
                raise ValueError(
                    f"learned_betas stands in place of beta={self.beta}; set learned_betas=none"
                )
        return self

    @model_validator(mode="after")
    def _terms_fit(self):
        geometry = [term for term in self.terms if term != "pair"]
        if len(set(self.terms)) < len(self.terms):
            raise ValueError(f"terms names one twice: {', '.join(self.terms)}")
        if len(geometry) > 1:
            raise ValueError(f"terms takes one geometry term, got {' and '.join(geometry)}")
        for term, key in (("rbf", "rbf_max"), ("pair", "pair_hidden")):
            if (
                term not in self.terms
                and getattr(self, key) != type(self).model_fields[key].default
            ):
                raise ValueError(f"{key} needs {term} among terms")
        if len(self.pair_hidden) not in (1, 2):
            raise ValueError(f"pair_hidden takes one or two widths, got {len(self.pair_hidden)}")
        schedule = self.geo_schedule
        if schedule != "all" and not geometry:
            raise ValueError("geo_schedule needs a geometry term among terms, e.g. terms=[mono]")
        if isinstance(schedule, tuple):
            if not schedule:
                raise ValueError("geo_schedule names no recycle; leave the term out of terms")
            wrong = [r for r in schedule if r > self.recycles or schedule.count(r) > 1]
            if wrong:
                raise ValueError(
                    f"geo_schedule takes recycles 1 to {self.recycles}, each once; "
                    f"got {', '.join(map(str, schedule))}"
                )
        return self

    @model_validator(mode="after")
    def _attention_fits(self):
        if not self.qk:
            if self.qk_norm:
                raise ValueError("qk_norm normalises queries and keys, but qk=false removes them")
            if not self.beta > 0 and not self.terms:
                raise ValueError("qk=false, beta=0 and no terms leave nothing to attend by")
        if not self.qk_norm and (self.qk_scale != 1.0 or self.qk_range is not None):
            raise ValueError("qk_scale and qk_range belong to qk_norm; set qk_norm=true")
        if self.qk_range is not None:
            start = self.qk_scale * self.head_channels**0.5
            low, high = self.qk_range
            if not low < start < high:
                raise ValueError(
                    f"qk_range {low:g} to {high:g} must hold the start, qk_scale times "
                    f"sqrt(head_channels) = {start:.3g}"
                )
        return self


class TrainConfig(Section):
    """How the gate and the model are trained."""

    batch_kind: Literal["miniset", "slide", "mixed"] = "miniset"
    """what one step sees: miniset = a random subset of a slide, slide = a whole slide, mixed = both"""
    epochs: Positive = 5
    """epochs at most"""
    minisets: Positive = 120
    """minisets in the training pool, balanced over the slides"""
    miniset_min: Annotated[int, Field(ge=8)] = 96
    """smallest miniset, in cells"""
    miniset_max: Annotated[int, Field(ge=8)] = 384
    """largest miniset, in cells"""
    val_minisets: Positive = 32
    """minisets of the validation slides on which every epoch is scored"""
    steps_per_epoch: Positive | None = None
    """optimiser steps per epoch; none = every miniset once, 100 on whole slides"""
    batch_size: Positive = 1
    """minisets per step"""
    lr: Rate = 5e-4
    """learning rate at the start of the cosine schedule"""
    lr_min: Weight = 1e-5
    """learning rate at its end"""
    weight_decay: Weight = 5e-4
    """weight decay of AdamW"""
    grad_clip: Rate = 1.0
    """largest gradient norm"""
    noise_h: Weight = 0.3
    """augmentation: standard deviation of Gaussian noise on the embedding"""
    dropout_h: Fraction = 0.1
    """augmentation: share of embedding entries set to zero"""
    edge_drop: Fraction = 0.2
    """augmentation: share of candidate edges dropped; each cell keeps one at least"""
    gate_noise: bool = False
    """whether the gate sees the augmented embedding in joint training, as the model does"""
    vary_augmentation: bool = False
    """whether each step draws noise_h and dropout_h anew, between half and 1.5 times their value"""
    attention_graph: Literal["candidates", "target"] = "candidates"
    """edges that training attends on: candidates, or true neighbours (target: an oracle, no gate)"""
    k_fraction_range: tuple[Inside, Inside] | None = None
    """range of candidates per step, as a fraction of the cells; none = all graph.k"""
    mutual_prob: Fraction = 0.0
    """probability that a step keeps mutual neighbours only"""
    gate_target_weights: tuple[Weight, ...] = (1.0,)
    """weights of 1, 2, ... random-walk steps in the target of the gate"""
    gate_steps: Count = 150
    """steps of gate training before joint training"""
    warmup_epochs: Count = 1
    """epochs before the random-walk loss enters"""
    ramp_epochs: Count = 2
    """epochs over which its weight grows to rw_cap"""
    rw_cap: Weight = 0.3
    """full weight of the random-walk loss"""
    lambda_stress: Weight = 0.1
    """weight of the log-stress loss"""
    lambda_gate: Weight = 0.05
    """weight of the gate loss in joint training"""
    lambda_rep: Weight = 0.01
    """weight of the repulsion loss"""
    lambda_ent: Weight = 0.01
    """weight of the walk-entropy regulariser"""
    lambda_long: Weight = 0.0
    """weight of the distances of random pairs, near and far"""
    lambda_gram: Weight = 1.0
    """weight of the inner products over all pairs"""
    lambda_multiscale: Weight = 0.0
    """weight of log-stress on equally many pairs at every scale"""
    probe_rows: Positive = 256
    """walk rows sampled per step on whole slides"""
    stress_pairs: Positive = 200_000
    """pairs sampled per step by each stress loss on whole slides"""
    patience: Positive = 4
    """epochs without a better validation E_geo before stopping, counted once rw_cap is reached"""
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """arithmetic of the forward pass"""
    seed: Count = 0
    """seed of everything random"""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto = cuda where there is one"""

    @model_validator(mode="after")
    def _ranges_are_ordered(self):
        if self.miniset_min > self.miniset_max:
            raise ValueError(
                f"miniset_min ({self.miniset_min}) must not exceed miniset_max ({self.miniset_max})"
            )
        if self.lr_min > self.lr:
            raise ValueError(f"lr_min ({self.lr_min}) must not exceed lr ({self.lr})")
        if (
            self.k_fraction_range is not None
            and self.k_fraction_range[0] > self.k_fraction_range[1]
        ):
            raise ValueError(
                f"k_fraction_range must rise, got {self.k_fraction_range[0]:g} to {self.k_fraction_range[1]:g}"
            )
        if not 1 <= len(self.gate_target_weights) <= 5 or not sum(self.gate_target_weights) > 0:
            raise ValueError("gate_target_weights takes one to five weights, one of them above 0")
        return self


class RefineConfig(Section):
    """What is done to the layout after the recycles."""

    distance_correction_steps: Count | None = None
    """optimiser steps that correct distances for the uncertainty of each cell's place; 0 = off;
    none = 200 or 0, chosen by cross-validation"""
    steps: Count | None = None
    """optimiser steps that pull nearest candidates together; 0 = off; none = 400 or 0, chosen by
    cross-validation"""
    neighbors: Positive = 15
    """nearest candidates that attract a cell"""
    anchor_weight: Weight | None = None
    """weight of staying where the recycles placed a cell; larger = closer to them; none = chosen by
    cross-validation"""
    rca_power: Weight | None = None
    """power of the relevant component analysis before nearest candidates are sought: 0 = off,
    1 = full; none = chosen by cross-validation"""
    pc_power: Weight = 0.0
    """weights principal components by their standard deviation to this power, in the same search"""
    skip_if_overlap: Weight = 0.5
    """no refinement where this fraction of nearest candidates are neighbours in the layout already"""


class UncertaintyConfig(Section):
    """How far a cell may lie from its place, in tissue radii: sqrt(intercept + slope * variance)."""

    error_intercept: Weight | None = None
    """square error of a cell whose place is certain; none = fitted by cross-validation"""
    error_slope: Weight | None = None
    """square error per predictive variance; none = fitted by cross-validation"""
    calibrated: bool | None = None
    """whether both were fitted on left-out donors of the training slides; set by the run"""
    noise_share: Share = 0.15
    """share of the square error that follows how far noise moves a cell"""


class SelectionConfig(Section):
    """Cross-validation over donors, which chooses what is left open above."""

    mode: Literal["quick", "full", "none"] = "quick"
    """quick = few candidates and short trainings, full = all of them, none = defaults at once"""
    folds: Annotated[int, Field(ge=2)] = 3
    """groups in which donors are left out in turn, at most"""
    slides_per_donor: Positive = 3
    """slides of a donor that take part, at most"""

    @field_validator("mode", mode="before")
    @classmethod
    def _none_is_a_mode(cls, value: Any) -> Any:
        return "none" if value is None else value  # `--set selection.mode=none` reads as null


class EvalConfig(Section):
    """How a prediction is scored."""

    ks: tuple[Positive, ...] = (10, 15)
    """neighbourhood sizes of the neighbour metrics"""
    sample_pairs: Positive = 200_000
    """pairs of cells sampled for the distance metrics of a large slide"""
    sample_rows: Positive = 2_000
    """cells sampled for the neighbour metrics of a large slide"""
    baselines: bool = True
    """score the baselines beside the model"""
    noise_samples: Positive = 1
    """predictions under training noise; more than one adds their spread to the uncertainty"""


class RunConfig(Section):
    """Everything that decides what a run computes."""

    preset: str = "v1"
    """named variant that the other settings start from"""
    data: DataConfig = DataConfig()
    encoder: EncoderConfig = EncoderConfig()
    graph: GraphConfig = GraphConfig()
    model: ModelConfig = ModelConfig()
    train: TrainConfig = TrainConfig()
    refine: RefineConfig = RefineConfig()
    uncertainty: UncertaintyConfig = UncertaintyConfig()
    selection: SelectionConfig = SelectionConfig()
    eval: EvalConfig = EvalConfig()

    @model_validator(mode="after")
    def _model_takes_the_embedding(self):
        if self.data.embedding is None and self.model.dim != self.encoder.out:
            raise ValueError(
                f"model.dim ({self.model.dim}) must equal encoder.out ({self.encoder.out}); "
                "set both"
            )
        return self

    @model_validator(mode="after")
    def _supervision_fits(self):
        train = self.train
        if train.attention_graph == "target":
            if self.model.gated:
                raise ValueError(
                    "train.attention_graph=target attends on true neighbours, which the gate does not score; "
                    "set model.beta=0"
                )
            if train.k_fraction_range is not None or train.mutual_prob > 0:
                raise ValueError(
                    "train.k_fraction_range and train.mutual_prob choose among candidates; "
                    "train.attention_graph=target uses none"
                )
        if not self.model.gated and train.gate_target_weights != (1.0,):
            raise ValueError(
                "train.gate_target_weights supervises the gate, but model.beta=0 removes it"
            )
        return self

    def unresolved(self) -> list[str]:
        """Keys whose values are still to be decided from data, e.g. ``model.init``."""
        return [key for key in DECIDED_FROM_DATA if self.get(key) in (None, "auto")]

    def get(self, key: str) -> Any:
        """The value of a key such as ``"train.epochs"``."""
        value: Any = self
        for part in key.split("."):
            value = getattr(value, part)
        return value

    def replace(self, **sections: Mapping[str, Any]) -> RunConfig:
        """A copy with some values changed, checked: ``config.replace(train={"epochs": 3})``."""
        return self.checked(merge(self.model_dump(), sections), source="replace()")

    def with_values(self, values: Mapping[str, Any]) -> RunConfig:
        """A copy with some values changed, by key: ``{"train.epochs": 3}``."""
        sections: dict[str, dict[str, Any]] = {}
        for key, value in values.items():
            section, _, name = key.partition(".")
            sections.setdefault(section, {})[name] = value
        return self.replace(**sections)

    @classmethod
    def checked(cls, values: Mapping[str, Any], source=None) -> RunConfig:
        """A configuration from nested values.

        Raises:
            UserError: an unknown key (the nearest is suggested) or a bad value.
        """
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise UserError(explain(error, source, list(setting_names()))) from None

    def save(self, folder: Path) -> None:
        """Writes ``config.json`` into ``folder``: settings that are all decided.

        Raises:
            ValueError: if a value is still to be decided from data.
        """
        if self.unresolved():
            raise ValueError(f"settings to be decided first: {', '.join(self.unresolved())}")
        document = {"format": FORMAT, **self.model_dump(mode="json")}
        atomic_write(folder / CONFIG, json.dumps(document, indent=2) + "\n")

    def save_request(self, folder: Path) -> None:
        """Writes ``requested.yaml`` into ``folder``: what was asked for, open values included."""
        values = yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)
        atomic_write(folder / REQUESTED, values)

    @classmethod
    def load(cls, folder: Path) -> RunConfig:
        """Reads the configuration that a run was computed with.

        Raises:
            UserError: the folder holds no readable configuration, or one of another format.
        """
        path = Path(folder) / CONFIG
        try:
            values = json.loads(path.read_text())
        except FileNotFoundError:
            if (Path(folder) / REQUESTED).is_file():
                raise UserError(
                    f"{folder} was stopped before its model was trained; go on with it first: "
                    f"ipar-sparse train --resume --out {folder}"
                ) from None
            raise UserError(
                f"{folder} is not a run directory: it has no {CONFIG}; "
                "give the --out folder of `ipar-sparse train`"
            ) from None
        except (OSError, ValueError) as error:
            raise UserError(f"{path} cannot be read ({error}); train the run again") from None
        found = values.pop("format", None) if isinstance(values, dict) else None
        if found != FORMAT:
            raise UserError(
                f"{path} has run format {found}, this version reads format {FORMAT}; "
                "train the run again"
            )
        return cls.checked(values, source=str(path))

    @classmethod
    def load_request(cls, folder: Path) -> RunConfig:
        """Reads what was asked of a run.

        Raises:
            UserError: the folder holds no readable request.
        """
        path = Path(folder) / REQUESTED
        try:
            values = yaml.safe_load(path.read_text())
        except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{path} cannot be read ({reason}); train the run again") from None
        if not isinstance(values, dict):
            raise UserError(f"{path} holds no settings; train the run again")
        return cls.checked(values, source=str(path))


def setting_names() -> Iterator[str]:
    """Every setting, as ``section.key``."""
    for name, field in RunConfig.model_fields.items():
        if isinstance(field.default, Section):
            yield from (f"{name}.{key}" for key in type(field.default).model_fields)
        else:
            yield name
