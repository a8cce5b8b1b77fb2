"""One typed configuration for a whole run, saved beside every checkpoint.

What a run does is decided here and nowhere else: a preset, then a YAML file, then ``--set``
overrides, each laid over the one before and checked as a whole.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from .errors import UserError
from .files import atomic_write

Positive = Annotated[int, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Inside = Annotated[float, Field(gt=0, lt=1)]
Beta = Annotated[float, Field(gt=0, lt=2.5)]
Term = Literal["mono", "mono_clamped", "rbf", "point_ipa", "pair"]


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
    """is the expression log-normalised already? none = recognise it (non-integer values)"""
    embedding: str | None = None
    """use this embedding instead of training the encoder, e.g. obsm:X_pca"""
    slide_key: str | None = None
    """obs column that tells the slides of one file apart"""
    spatial_key: str = "spatial"
    """obsm key of the measured positions"""
    max_genes: Positive | None = 2000
    """keep this many most variable genes; none = all"""
    target_sum: Rate | None = None
    """total that raw counts of a cell are scaled to before log1p; none = the training slides'
    median"""
    cache: str | None = None
    """folder of cached graphs and targets; none = $IPAR_SPARSE_CACHE or the user's cache folder"""

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
    """a linear path beside the MLP, which starts as principal components of the training slides"""
    input: Literal["log", "counts"] | None = None
    """what it reads: log = normalised, log1p expression; counts = factors of a negative binomial
    model of raw counts, whose genes are not weighted; none = log, or counts where those place
    donors left out better (not tried where standardize or spatial_genes is set)"""
    smooth: Count = 10
    """average each cell with this many nearest in expression before it is encoded; 0 = none"""
    standardize: Share | None = None
    """divide each gene by its standard deviation to this power: 0 = leave them, 1 = unit variance;
    then all by one number, for a mean variance of 1; none = 0.5, or 1 with spatial_genes 0, if
    that places donors left out better"""
    spatial_genes: Share | None = None
    """and multiply it by its Moran's I on the training slides to this power; 0 = not; none = 0.25,
    or as standardize says"""
    keep: Weight = 0.5
    """weight of the components that the embedding keeps beside what it has learned, once it is
    trained; 0 = none; without a linear path none are kept"""
    kept: Literal["principal", "spatial"] | None = None
    """which: principal = of largest variance; spatial = directions in which a cell is like the
    cells around it, by signal to noise; none = principal, or spatial if those place donors left
    out better"""
    dropout: Fraction = 0.3
    """dropout after every hidden layer"""
    steps: Count | None = None
    """optimiser steps; none = 50 passes over the training cells, but 400 to 2000 steps; 0 = leave
    it at its start, principal components with a linear path"""
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
    gene_scale: Weight = 0.3
    """standard deviation of the log factor of each gene of a view, as between batches"""

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
    pool: Count = 256
    """on more cells than this a model trained on minisets attends to the nearest among a random
    sample of this many, which reach as far as in training; 0 = to the nearest of all"""
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
    betas: tuple[Beta, ...] | None = None
    """starts of one learned weight of the gate per recycle, below 2.5; none = beta, fixed"""
    step_gate: Inside | None = None
    """start of a learned step size per recycle; none = whole steps"""
    start: Literal["auto", "atlas", "fields", "mlp", "pca"] = "auto"
    """first layout: an MLP of the embedding, the embedding's own two principal components, an atlas
    of the training slides, or where the fields of their genes make a cell's counts likeliest; auto
    = what places the slides of donors left out best, the atlas where there is one donor"""
    init_noise: Weight = 0.05
    """standard deviation of the noise on the first layout in training"""
    backend: Literal["auto", "reference", "chunked", "triton"] = "auto"
    """how attention is computed"""
    checkpoint_recycles: bool = False
    """recompute each recycle in the backward pass, for less memory"""

    @property
    def gated(self) -> bool:
        """Whether the gate takes part."""
        return self.beta > 0

    @property
    def gate_weight(self) -> float:
        """What the gate is multiplied by before the model sees it."""
        return self.beta if self.betas is None else 1.0

    @property
    def geometry(self) -> str | None:
        """The geometry term, if there is one."""
        return next((term for term in self.terms if term != "pair"), None)

    @model_validator(mode="after")
    def _gate_fits(self):
        if self.gate_heads not in (1, self.heads):
            raise ValueError(f"gate_heads must be 1 or heads ({self.heads}), got {self.gate_heads}")
        if not self.gated and self.gate_heads > 1:
            raise ValueError(f"gate_heads={self.gate_heads} needs a gate, but beta=0 removes it")
        if self.betas is not None:
            if len(self.betas) != self.recycles:
                raise ValueError(
                    f"betas needs one value for each of {self.recycles} recycles, "
                    f"got {len(self.betas)}; none = one fixed beta"
                )
            if self.beta != ModelConfig.model_fields["beta"].default:
                raise ValueError(f"betas stands in place of beta={self.beta}; set betas=none")
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
            if not self.gated and not self.terms:
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

    unit: Literal["miniset", "slide", "mixed"] = "miniset"
    """what one step sees: a random subset of a slide, a whole slide, or both in turn"""
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
    """optimiser steps per epoch; none = every miniset once, or 100 on whole slides"""
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
    edges: Literal["candidates", "target"] = "candidates"
    """what training attends on: candidates, or the true neighbours (an oracle without gate)"""
    k_range: tuple[Inside, Inside] | None = None
    """candidates of a step as a share of the cells, drawn between these; none = all of graph.k"""
    mutual_share: Fraction = 0.0
    """share of steps that keep mutual neighbours only"""
    gate_walk: tuple[Weight, ...] = (1.0,)
    """weights of 1, 2, ... steps of the random walk in what the gate learns"""
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
        if self.k_range is not None and self.k_range[0] > self.k_range[1]:
            raise ValueError(f"k_range must rise, got {self.k_range[0]:g} to {self.k_range[1]:g}")
        if not 1 <= len(self.gate_walk) <= 5 or not sum(self.gate_walk) > 0:
            raise ValueError("gate_walk takes one to five weights, one of them above 0")
        return self


class RefineConfig(Section):
    """The last two steps of a prediction: distances in the layout become what they are expected to
    be, and candidates of a cell its neighbours."""

    expected: Count | None = None
    """steps towards the distances that are to be expected, given how far a cell may lie from its
    place; 0 = none; none = 200 where an atlas or fields tell that and donors left out are placed
    better so, else 0"""
    steps: Count | None = None
    """steps of descent towards the nearest candidates; 0 = none; none = 400, or 0 if they cost
    neighbours on donors left out"""
    neighbors: Positive | None = None
    """nearest candidates that attract a cell; none = 15"""
    anchor: Weight | None = None
    """what it costs to leave the layout so far; none = 5, or 2, 12 or 20 if donors left out are
    placed better so and neighbors, whiten, power and narrow are none too"""
    whiten: Weight | None = None
    """power by which what neighbours on the training slides differ in counts less where a cell's
    nearest are sought, 1 = they differ as much in all directions; none = 0.5, or 0 or 1 if donors
    left out are placed better so and the others are none too"""
    power: Weight | None = None
    """of their standard deviation, by which components of the embedding count where a cell's
    nearest are sought; none = 0, or 1 or 2 if donors left out are placed better so and the others
    are none too"""
    narrow: Weight | None = None
    """width of the second axis of a layout whose first is kept and whose second is replaced by what
    tells neighbours, in standard deviations of the first; 0 = the layout as it is; none = 0, or
    0.05 if donors left out are placed better so and the others are none too"""
    enough: Weight = 0.5
    """share of nearest candidates that are neighbours in the layout already from which on it is
    left as it is"""


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
    seeds: Positive = 1
    """noise seeds whose layouts are aligned into one prediction with an uncertainty"""


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
    eval: EvalConfig = EvalConfig()

    @model_validator(mode="after")
    def _model_takes_the_embedding(self):
        if self.data.embedding is None and self.model.dim != self.encoder.out:
            raise ValueError(
                f"model.dim ({self.model.dim}) must equal encoder.out ({self.encoder.out}); "
                "set both"
            )
        if self.data.embedding is not None and self.model.start == "fields":
            raise ValueError(
                f"model.start=fields reads counts, but data.embedding={self.data.embedding} stands "
                "in place of expression; use atlas, mlp or pca"
            )
        return self

    @model_validator(mode="after")
    def _supervision_fits(self):
        train = self.train
        if train.edges == "target":
            if self.model.gated:
                raise ValueError(
                    "train.edges=target attends on true neighbours, which the gate does not score; "
                    "set model.beta=0"
                )
            if train.k_range is not None or train.mutual_share > 0:
                raise ValueError(
                    "train.k_range and train.mutual_share choose among candidates; "
                    "train.edges=target uses none"
                )
        if not self.model.gated and train.gate_walk != (1.0,):
            raise ValueError("train.gate_walk supervises the gate, but model.beta=0 removes it")
        return self

    def save(self, folder: Path) -> None:
        """Writes ``config.yaml`` (for people) and ``config.json`` into ``folder``."""
        values = self.model_dump(mode="json")
        atomic_write(folder / "config.yaml", yaml.safe_dump(values, sort_keys=False))
        atomic_write(folder / "config.json", json.dumps(values, indent=2) + "\n")

    @classmethod
    def load(cls, folder: Path) -> RunConfig:
        """Reads the configuration of a run back.

        Raises:
            UserError: the folder holds no readable configuration.
        """
        path = Path(folder) / "config.json"
        try:
            values = json.loads(path.read_text())
        except FileNotFoundError:
            raise UserError(
                f"{folder} is not a run directory: it has no config.json; "
                "give the --out folder of `ipar-sparse train`"
            ) from None
        except (OSError, ValueError) as error:
            raise UserError(f"{path} cannot be read ({error}); train the run again") from None
        for section, settings in _ABSENT.items():
            if isinstance(values, dict) and isinstance(values.get(section), dict):
                values[section] = settings | values[section]
                for name in _RETIRED.get(section, ()):
                    values[section].pop(name, None)
                if values[section].get("keep", 0.0) is None:  # once left to donors left out
                    values[section]["keep"] = 0.5
        return _validate(values, source=str(path))

    def replace(self, **sections: Mapping[str, Any]) -> RunConfig:
        """A copy with some values changed, checked: ``config.replace(train={"epochs": 3})``."""
        return _validate(_merge(self.model_dump(), sections), source="replace()")


_ABSENT: dict[str, dict[str, Any]] = {
    "data": {"target_sum": 1e4},
    "encoder": {
        "standardize": 0.0,
        "spatial_genes": 0.0,
        "keep": 0.0,
        "kept": "principal",
    },
    "graph": {},
    "refine": {"expected": 0},
}
"""What was done before there was a setting for it, for runs saved then."""

_RETIRED = {"graph": ("fine",)}
"""Settings that runs saved before may have, of what is not done any more."""

_LEARNED_BETAS = {"shared": False, "recycles": 3, "betas": (2.0, 2.0, 2.0)}

PRESETS: dict[str, dict[str, Any]] = {
    "v1": {},
    "record": {
        "data": {"target_sum": 1e4},
        "encoder": {
            "steps": 1000,
            "skip": False,
            "smooth": 0,
            "standardize": 0.0,
            "spatial_genes": 0.0,
            "keep": 0.0,
            "dropout": 0.1,
            "infonce_weight": 1.0,
            "distance_weight": 0.0,
            "invariance_weight": 25.0,
            "variance_weight": 50.0,
            "covariance_weight": 1.0,
            "gene_dropout": 0.2,
            "noise": 0.1,
            "gene_scale": 0.0,
        },
        "graph": {"pool": 0},
        "model": {"start": "mlp"},
        "train": {
            "lambda_gram": 0.0,
            "epochs": 15,
            "minisets": 1000,
            "gate_steps": 500,
            "ramp_epochs": 6,
        },
        "refine": {"expected": 0, "steps": 0},
    },
    "v1-rbf": {"model": {"terms": ["rbf"]}},
    "v1-mono": {"model": {"terms": ["mono"]}},
    "v1-point-ipa": {"model": {"terms": ["point_ipa"]}},
    "v1-pair": {"model": {"terms": ["pair"]}},
    "v1-head-gate": {"model": {"gate_heads": 4}},
    "v1-qk-norm": {"model": {"qk_norm": True}},
    "v1-qk-norm-geo": {"model": {"qk_norm": True, "terms": ["mono_clamped"]}},
    "v2-3r": {"model": _LEARNED_BETAS},
    "v2-3r-geo-last": {"model": {**_LEARNED_BETAS, "terms": ["mono"], "geo_schedule": "last"}},
    "v2-5r": {"model": {"shared": False, "recycles": 5, "betas": (2.0,) * 5}},
    "ipa-r": {
        "model": {
            "shared": False,
            "recycles": 3,
            "qk_norm": True,
            "qk_range": (1.0, 10.0),
            "betas": (0.5, 1.5, 2.0),
            "terms": ["pair", "point_ipa"],
            "pair_hidden": [64],
            "geo_schedule": "last",
            "step_gate": 0.2,
        }
    },
    "gate-t2": {"train": {"gate_walk": [0.0, 1.0]}},
    "gate-mix": {"train": {"gate_walk": [0.5, 0.5]}},
    "no-gate": {"model": {"beta": 0.0}},
    "no-qk": {"model": {"qk": False}},
    "target-edges": {"model": {"beta": 0.0}, "train": {"edges": "target"}},
    "knn-static": {"model": {"beta": 0.0}, "graph": {"k": 50}},
    "later": {
        "graph": {"metric": "cosine"},
        "model": {"qk_norm": True, "terms": ["mono_clamped"]},
        "train": {
            "gate_noise": True,
            "vary_augmentation": True,
            "k_range": (0.12, 0.18),
            "mutual_share": 0.2,
        },
    },
}
"""Named variants, each the values in which it differs from the defaults.

The unshared ones learn one gate weight per recycle: their parameter counts on record hold one
number per recycle more than the blocks do, which that count alone does not name. A weight that
starts at the fixed one changes least; ``model.betas=none`` is without.
"""


def load_config(
    path: Path | None = None,
    overrides: Iterable[str] = (),
    *,
    preset: str | None = None,
    **sections: Mapping[str, Any],
) -> RunConfig:
    """Builds the configuration of a run: preset, then file, then ``sections``, then overrides.

    Args:
        path: YAML file with any part of the tree.
        overrides: ``"train.epochs=30"`` strings; the value is read as YAML, ``none`` as null.
        preset: name in ``PRESETS``; default: the file's ``preset``, else ``v1``.
        **sections: values by section, e.g. ``train={"seed": 1}``.

    Raises:
        UserError: unknown key (the nearest is suggested), bad value, unreadable file.
    """
    given: dict[str, Any] = _read_yaml(path) if path is not None else {}
    given = _merge(given, sections)
    for text in overrides:
        given = _merge(given, _parse_override(text))
    name = preset or given.get("preset") or "v1"
    if name not in PRESETS:
        raise UserError(
            f"unknown preset {name!r}{_suggest(str(name), PRESETS)}; known: {', '.join(PRESETS)}"
        )
    return _validate(_merge(_merge(PRESETS[name], given), {"preset": name}), source=path)


def resolve_device(name: str):
    """The torch device of a name; ``auto`` is the GPU where there is one, else the CPU.

    Raises:
        UserError: no such device on this machine.
    """
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):
        raise UserError(
            f"device {name!r} is not available here; use cpu"
            + (", cuda" if torch.cuda.is_available() else "")
            + " or auto"
        ) from None
    return device


def describe() -> list[tuple[str, str, str, str]]:
    """Every setting as (key, type, default, what it is)."""
    rows = []
    for name, field in RunConfig.model_fields.items():
        if isinstance(field.default, Section):
            for key, leaf in type(field.default).model_fields.items():
                rows.append((f"{name}.{key}", *_field_row(leaf)))
        else:
            rows.append((name, *_field_row(field)))
    return rows


def _field_row(field) -> tuple[str, str, str]:
    default = field.default
    shown = list(default) if isinstance(default, tuple) else default
    text = yaml.safe_dump(shown, default_flow_style=True).removesuffix("...\n").strip()
    return _type_name(field.annotation), "none" if default is None else text, field.description


def _type_name(annotation) -> str:
    origin, args = getattr(annotation, "__origin__", None), getattr(annotation, "__args__", ())
    if origin is Literal:
        return " | ".join(map(str, args))
    if origin is tuple:
        return f"list of {_type_name(args[0])}"
    if hasattr(annotation, "__metadata__"):  # Annotated
        return _type_name(annotation.__origin__)
    if args:  # a union
        return " | ".join(_type_name(a) for a in args)
    return {"NoneType": "none", "str": "text", "float": "number", "bool": "true | false"}.get(
        annotation.__name__, annotation.__name__
    )


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise UserError(f"config file {path} cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        where = getattr(error, "problem_mark", None)
        line = f" at line {where.line + 1}" if where else ""
        raise UserError(f"config file {path} is not valid YAML{line}; correct it") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(
            f"config file {path} must hold sections such as `train:` with keys under them, "
            f"not a {type(values).__name__}"
        )
    return {key: value for key, value in values.items() if value is not None}


def _parse_override(text: str) -> dict[str, Any]:
    key, equals, raw = text.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise UserError(f"--set takes section.key=value, e.g. train.epochs=30; got {text!r}")
    try:
        value = yaml.safe_load(raw)
    except yaml.YAMLError:
        raise UserError(f"--set {key}: the value {raw!r} is not valid YAML") from None
    if isinstance(value, str) and value.lower() == "none":
        value = None
    for part in reversed(parts):
        value = {part: value}
    return value


def _merge(base: Mapping[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in top.items():
        below = merged.get(key)
        both = isinstance(below, Mapping) and isinstance(value, Mapping)
        merged[key] = _merge(below, value) if both else value
    return merged


def _validate(values: Mapping[str, Any], source) -> RunConfig:
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        raise UserError(_explain(error, source)) from None


def _explain(error: ValidationError, source) -> str:
    first, *others = error.errors()
    where = f" in {source}" if source else ""
    more = f" (and {len(others)} more)" if others else ""
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        known = [row[0] for row in describe()]
        return f"unknown config key {key}{where}{_suggest(key, known)}{more}"
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error":
        section = f"config section {key}" if key else "config"
        return f"{section}{where}: {message}{more}"
    if first["type"] == "model_type":
        return (
            f"config section {key}{where} needs keys under it, e.g. {key}.KEY=VALUE; "
            f"given {first['input']!r}{more}"
        )
    expected = message.removeprefix("Input should be ").split(", unable to parse")[0]
    expected = expected.replace("a valid tuple", "a list, e.g. [10, 15]")
    return f"config key {key}{where}: given {first['input']!r}, expected {expected}{more}"


def _suggest(name: str, known: Iterable[str]) -> str:
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if not close:
        leaf = name.rsplit(".", 1)[-1]
        leaves = {row.rsplit(".", 1)[-1]: row for row in reversed(known)}
        close = [leaves[k] for k in difflib.get_close_matches(leaf, leaves, n=1, cutoff=0.6)]
    return f"; did you mean {close[0]}?" if close else "; `ipar-sparse config` lists them all"
