"""Settings of the attention model."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from .types import Beta, Inside, Positive, Rate, Section, Term, Weight


class ModelConfig(Section):
    """The attention model from embedding to positions."""

    dim: Positive = 128
    """Width of the embedding that the model reads. It must equal encoder.out, and follows
    data.embedding where that is set."""
    channels: Positive = 96
    """Channels of the state of a cell. Lower it to save memory."""
    heads: Positive = 4
    """Number of attention heads."""
    head_channels: Positive = 32
    """Channels of an attention head."""
    recycles: Annotated[int, Field(gt=0, le=1000)] = 5
    """Number of passes through the attention block. Fewer passes take less time."""
    shared: bool = True
    """Whether all recycles share one block. Separate blocks have more parameters to fit."""
    terms: tuple[Term, ...] = ()
    """Further terms of the attention logits: one geometry term (mono, mono_clamped, rbf,
    point_ipa), pair, or both."""
    geo_schedule: Literal["all", "last"] | tuple[Positive, ...] = "all"
    """Recycles with the geometry term: all, last, or a list of recycles counted from 1."""
    rbf_max: Rate = 5.0
    """Largest absolute value of the rbf term, in logits."""
    pair_hidden: tuple[Positive, ...] = (64, 64)
    """Widths of the hidden layers of the pair term: one or two."""
    qk: bool = True
    """Whether queries and keys take part in the attention logits. Switch it off to measure what
    they are worth."""
    qk_norm: bool = False
    """Whether queries and keys are normalised and multiplied by a learned scale. Try it where
    training is unstable."""
    qk_scale: Rate = 1.0
    """Initial value of that scale. At 1 / sqrt(head_channels) the logits start with standard
    deviation 1."""
    qk_range: tuple[Rate, Rate] | None = None
    """Range of that scale times sqrt(head_channels); none = unbounded."""
    gate_heads: Positive = 1
    """Gate logits per edge: 1, or one for each head."""
    beta: Weight = 2.0
    """Weight of the gate in the attention logits; 0 = no gate."""
    learned_betas: tuple[Beta, ...] | None = None
    """Initial values, below 2.5, of one learned gate weight per recycle; none = beta, fixed."""
    init_step_size: Inside | None = None
    """Initial value of a learned step size per recycle; none = full steps."""
    init: Literal["auto", "atlas", "mlp", "pca"] = "auto"
    """Initial layout: atlas = posterior mean under an atlas of the training slides, mlp = learned
    map of the embedding, pca = principal components. With auto, cross-validation selects it."""
    recycling: bool | None = None
    """Whether recycles move the initial layout; none = selected by cross-validation."""
    init_std: Weight = 0.05
    """Standard deviation of the noise on the initial layout in training, in tissue radii."""
    backend: Literal["auto", "reference", "chunked", "triton"] = "auto"
    """How attention is computed; auto = triton on a GPU, chunked on a CPU. The results agree."""
    checkpoint_recycles: bool = False
    """Whether the backward pass computes each recycle again. Set it where a GPU runs out of
    memory."""

    @property
    def gated(self) -> bool:
        """Whether the gate takes part: it has a weight, and recycles that attend by it."""
        return self.beta > 0 and self.recycling is not False

    @property
    def gate_weight(self) -> float:
        """Factor of the gate logits before the model reads them."""
        return self.beta if self.learned_betas is None else 1.0

    @property
    def geometry(self) -> str | None:
        """The geometry term, None where there is none."""
        return next((term for term in self.terms if term != "pair"), None)

    @model_validator(mode="after")
    def _gate_fits(self):
        if self.gate_heads not in (1, self.heads):
            raise ValueError(f"gate_heads must be 1 or heads ({self.heads}), got {self.gate_heads}")
        if self.beta == 0 and self.gate_heads > 1:
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
        if len(set(self.terms)) < len(self.terms):
            raise ValueError(f"terms names one twice: {', '.join(self.terms)}")
        geometry = [term for term in self.terms if term != "pair"]
        if len(geometry) > 1:
            raise ValueError(f"terms takes one geometry term, got {' and '.join(geometry)}")
        for term, key in (("rbf", "rbf_max"), ("pair", "pair_hidden")):
            default = type(self).model_fields[key].default
            if term not in self.terms and getattr(self, key) != default:
                raise ValueError(f"{key} needs {term} among terms")
        if len(self.pair_hidden) not in (1, 2):
            raise ValueError(f"pair_hidden takes one or two widths, got {len(self.pair_hidden)}")
        return self

    @model_validator(mode="after")
    def _schedule_fits(self):
        schedule = self.geo_schedule
        if schedule != "all" and self.geometry is None:
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
            if self.beta == 0 and not self.terms:
                raise ValueError("qk=false, beta=0 and no terms leave nothing to attend by")
        if not self.qk_norm and (self.qk_scale != 1.0 or self.qk_range is not None):
            raise ValueError("qk_scale and qk_range belong to qk_norm; set qk_norm=true")
        if self.qk_range is not None:
            initial = self.qk_scale * self.head_channels**0.5
            low, high = self.qk_range
            if not low < initial < high:
                raise ValueError(
                    f"qk_range {low:g} to {high:g} must hold the initial value, qk_scale times "
                    f"sqrt(head_channels) = {initial:.3g}"
                )
        return self
