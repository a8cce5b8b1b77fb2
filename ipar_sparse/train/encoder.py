"""The encoder from expression to embedding: trained without labels, then frozen.

A spatial InfoNCE loss pulls a cell towards its neighbours in the tissue and pushes it away from
cells far from it. A distance loss makes distances in the embedding proportional to those in the
tissue. VICReg keeps two noisy views of a cell together, and every dimension in use.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import progress
from ..config import EncoderConfig, RunConfig
from ..data.expression import Expression, gene_weights, morans_i
from ..data.held import Holders, added, held_here, holders_of, of_each, of_held
from ..data.resident import resident
from ..data.slide import Slide
from ..distributed import from_rank
from ..estimators.components import principal_axes, spatial_axes
from ..geometry.gauge import gauge_fix
from ..graph import knn
from ..inference.embedding import normalize_expression, read_expression
from ..nn import SharedEncoder
from ..nn.encoder import SMOOTH_CHANNELS
from ..ops.recording import Recorder
from .loop import Loop
from .optimizers import adamw, cosine, set_lr

_ROWS = 8192  # cells of dense expression at once
_AXES_CELLS = 20_000  # a slide; more do not move the leading components
_AROUND = 15  # nearest cells that a gene is compared with for Moran's I
_NEAREST = 0.02  # of the slide's radius; log distances below it say nothing of the layout


class ContrastiveSlide:
    """A training slide as the encoder sees it: expression, spatial neighbours, what counts as far.

    Args:
        expression: n cells.
        pos: positions (n, 2).
        neighbors: spatial neighbours that are positives.
        far_quantile: quantile of the pairwise distances beyond which cells are negatives.
        device: where all of it is kept.
    """

    def __init__(
        self,
        expression: Expression,
        pos,
        neighbors: int,
        far_quantile: float,
        device: torch.device | str = "cpu",
    ):
        device = torch.device(device)
        self.expression = resident(expression, device).keep_dense()
        self.rows = self.expression.rows
        place = gauge_fix(torch.from_numpy(np.asarray(pos, dtype=np.float64)))
        generator = torch.Generator().manual_seed(0)
        sample = torch.randint(0, len(place), (2, 20_000), generator=generator)
        distance = (place[sample[0]] - place[sample[1]]).norm(dim=-1)
        self.far = float(distance.quantile(far_quantile))
        self.pos = place.to(device)
        self.neighbors = knn(self.pos, neighbors).index.long()


def encoder_loss(
    encoder: nn.Module,
    slide: ContrastiveSlide,
    settings: EncoderConfig,
    generator: torch.Generator,
    device: torch.device,
) -> dict[str, Tensor]:
    r"""Losses of one step on a batch of cells of one slide.

    .. math::
        L = -\log \frac{e^{\langle z_i, z_i^+ \rangle / \tau}}
        {e^{\langle z_i, z_i^+ \rangle / \tau} + \sum_{j \in \mathrm{far}(i)}
        e^{\langle z_i, z_j^+ \rangle / \tau} + \sum_{j \in \mathrm{hard}(i)} \dots}
        + 25\, L_\mathrm{inv} + 50\, L_\mathrm{var} + L_\mathrm{cov} + L_\mathrm{dist}

    where hard(i) are the most similar of the far cells, counted once more, and

    .. math::
        L_\mathrm{dist} = \operatorname{Var}_{i<j}
        \bigl[\log \|h_i - h_j\| - \log \|x_i - x_j\|\bigr]

    which does not depend on the scale of either. Weights are settings; a term without weight is
    not computed.

    Args:
        encoder: genes to embedding.
        slide: where the batch is drawn.
        settings: weights, temperature, noise.
        generator: of the batch and its views, on the slide's device.
        device: where the encoder lies.

    Returns:
        Scalars ``loss`` and, of those with weight, ``infonce``, ``invariance``, ``variance``,
        ``covariance``, ``distance``.
    """
    n = slide.expression.shape[0]
    draw: dict[str, Any] = {"generator": generator, "device": device}
    anchor = torch.randperm(n, **draw)[: settings.batch_size]
    pick = torch.randint(0, slide.neighbors.size(1), (anchor.numel(),), **draw)
    positive = slide.neighbors[anchor, pick]

    def view(rows: Tensor) -> Tensor:
        return encoder(_view(slide.rows(rows), settings, generator))

    weights = settings.weights()
    first, losses = view(anchor), {}
    if "infonce" in weights:
        far = torch.cdist(slide.pos[anchor], slide.pos[positive]) > slide.far
        losses["infonce"] = _infonce(first, view(positive), far, settings)
    if weights.keys() & {"invariance", "variance", "covariance"}:
        second = view(anchor)
        losses["invariance"] = F.mse_loss(first, second)
        losses["variance"] = (_variance(first) + _variance(second)) / 2
        losses["covariance"] = _covariance(first) + _covariance(second)
    if "distance" in weights:
        losses["distance"] = _distance(first, slide.pos[anchor])
    losses = {name: losses[name] for name in weights}
    total: Any = sum(weights[name] * loss for name, loss in losses.items())
    return {"loss": total, **losses}


def train_encoder(
    encoder: SharedEncoder,
    slides: Sequence[Slide],
    genes: Sequence[str],
    config: RunConfig,
    loop: Loop,
) -> list[Expression | None]:
    """Train an encoder in place; it keeps what it has learned, and no components yet.

    Args:
        encoder: untrained, or as a stopped run left it.
        slides: training slides with positions.
        genes: G genes of the encoder.
        config: ``encoder``.
        loop: random numbers, logs and checkpoints.

    Returns:
        The expression of each slide as the encoder takes it; None where another rank holds it.
    """
    settings, total, device = config.encoder, config.encoder.steps, loop.device
    plain: Sequence[Expression | None] = [None] * len(slides)
    holders = holders_of(slides)
    if loop.state.step == 0:
        with progress.stage("Gene weights and components"):
            plain = initialize_encoder(encoder, slides, genes, config)
    read, batches = _as_seen(encoder, slides, plain, genes, settings)
    optimizer = adamw(encoder.parameters(), settings.lr, settings.weight_decay, device)
    generator = torch.Generator(device)
    dense = all(slide.expression.is_dense for slide in batches if slide is not None)
    recorder = Recorder(device, generator, enabled=dense)
    parameters, names = [*encoder.parameters()], ["loss", *settings.weights()]
    sizes = [p.numel() for p in parameters] + [1] * len(names)
    encoder.train()

    def learn(slide: ContrastiveSlide) -> dict[str, Tensor]:
        losses = encoder_loss(encoder, slide, settings, generator, device)
        optimizer.zero_grad(set_to_none=True)
        losses["loss"].backward()
        optimizer.step()
        return {name: loss.detach() for name, loss in losses.items()}

    def gradients(slide: ContrastiveSlide) -> Tensor:
        losses = encoder_loss(encoder, slide, settings, generator, device)
        found = [*torch.autograd.grad(losses["loss"], parameters)]
        return torch.cat([one.detach().view(-1) for one in [*found, *(losses[n] for n in names)]])

    def learn_from(number: int, holder: int) -> dict[str, Tensor]:
        """The step of :func:`learn`, whose gradients the rank computes that holds the slide."""
        own = batches[number]
        found = torch.zeros(sum(sizes), device=device)
        found = found if own is None else recorder(number, partial(gradients, own))
        parts = from_rank(found, holder).split(sizes)
        for parameter, part in zip(parameters, parts, strict=False):
            parameter.grad = part.view_as(parameter)
        optimizer.step()
        return {n: loss.view(()) for n, loss in zip(names, parts[-len(names) :], strict=True)}

    with loop.stage("encoder", total, optimizer) as stage:
        for step in stage:
            seed = loop.seed_of("encoder", step)
            generator.manual_seed(seed)
            torch.manual_seed(seed)  # dropout draws from the global one
            set_lr(optimizer, cosine(step, total, settings.lr, settings.lr * 0.01))
            number = step % len(batches)
            if holders is None:
                stage.record(recorder(number, partial(learn, batches[number])))
            else:
                stage.record(learn_from(number, holders[number]))
        if total:
            with progress.stage("Appending components"):
                places = [slide.pos for slide in slides]
                append_components(encoder, read, places, settings, holders)
        encoder.eval().requires_grad_(False)
    return read


def _as_seen(
    encoder: SharedEncoder,
    slides: Sequence[Slide],
    plain: Sequence[Expression | None],
    genes: Sequence[str],
    settings: EncoderConfig,
) -> tuple[list[Expression | None], list[ContrastiveSlide | None]]:
    """The slides that this rank holds, as the encoder takes them and as its loss does."""
    holders, device = holders_of(slides), next(encoder.parameters()).device
    given = settings.neighbors, settings.far_quantile, device
    read = of_held(
        progress.track(list(zip(slides, plain, strict=True)), "Smoothing expression"),
        lambda pair: read_expression(pair[0], genes, encoder, pair[1]),
        holders,
    )
    batches = of_held(
        progress.track(list(zip(read, slides, strict=True)), "Neighbours in space"),
        lambda pair: ContrastiveSlide(pair[0], pair[1].pos, *given),
        holders,
    )
    return read, batches


@torch.no_grad()
def initialize_encoder(
    encoder: SharedEncoder, slides: Sequence[Slide], genes: Sequence[str], config: RunConfig
) -> list[Expression | None]:
    """Set what an encoder has before its first step: gene weights, and principal components.

    Returns the expression of each slide, weighted so; None where another rank holds it.

    Args:
        encoder: untrained.
        slides: training slides.
        genes: G genes of the encoder.
        config: ``data.target_sum`` and ``encoder``.
    """
    settings, device = config.encoder, next(encoder.parameters()).device
    holders = holders_of(slides)
    if encoder.gene_weight is not None:
        encoder.target_sum.fill_(config.data.target_sum)
        total = float(encoder.target_sum)
        plain = of_held(slides, lambda one: Expression.from_slide(one, genes, total), holders)
        weight = _gene_weights(plain, slides, settings, device, holders)
        encoder.gene_weight.copy_(torch.from_numpy(weight))
        plain = of_held(plain, lambda one: one.weighted(weight), holders)
    else:
        plain = of_held(slides, lambda one: normalize_expression(one, genes, encoder), holders)
    if settings.skip or settings.knn_smoothing:
        width = max(settings.out, SMOOTH_CHANNELS)
        encoder.init_linear(*principal_axes(plain, width, device, holders))
    return plain


def _gene_weights(
    plain: Sequence[Expression | None],
    slides: Sequence[Slide],
    settings: EncoderConfig,
    device: torch.device,
    holders: Holders,
) -> np.ndarray:
    morans = None
    if settings.morans_i_power > 0:
        pairs = list(zip(plain, slides, strict=True))
        found = of_each(pairs, lambda pair: _morans(pair[0], pair[1].pos, device), holders)
        morans = np.mean(found, axis=0)
    return gene_weights(plain, settings.scale_power, morans, settings.morans_i_power, holders)


@torch.no_grad()
def append_components(
    encoder: SharedEncoder,
    slides: Sequence[Expression | None],
    positions: Sequence[np.ndarray],
    settings: EncoderConfig,
    holders: Holders = None,
) -> None:
    """Give the trained embedding back what training has dropped of the expression.

    Training drops whatever does not help on the training slides, and neighbours on a new slide
    are told apart by some of it. The embedding becomes the principal components of

        [H / s_H, w * P / s_P]

    with P linear components of the expression and s^2 total variances. Both are linear in what
    the encoder ends with, so only its weights change.

    Args:
        encoder: trained; without a linear path it is left as it is.
        slides: expression of the training slides as the encoder takes it.
        positions: (n, 2) of each.
        settings: ``component_weight`` w, nothing is done where it is 0, and ``component_kind``.
        holders: of the slides, where ranks divide them; None stands for those of others.
    """
    weight = settings.component_weight
    if not weight or encoder.linear is None:
        return
    width, device = encoder.out_channels, next(encoder.parameters()).device
    if settings.component_kind == "spatial":
        given: dict[str, Any] = {"device": device, "holders": holders}
        axes, _ = spatial_axes(slides, positions, encoder.out_channels, **given)
    else:
        axes, _ = principal_axes(slides, encoder.out_channels, device, holders)
    encoder.eval()
    axes = axes.to(device)
    total = torch.zeros(width + axes.size(1), width + axes.size(1)).double()
    for number in held_here(len(slides), holders):
        slide = slides[number]
        cells = np.random.default_rng([number, 7]).permutation(slide.shape[0])[:_AXES_CELLS]
        parts, there = [], resident(slide, device)
        for rows in np.array_split(cells, len(cells) // _ROWS + 1):
            x = there.rows(torch.from_numpy(rows).to(device))
            parts.append(torch.cat([encoder(x), x @ axes], dim=1).double().cpu())
        values = torch.cat(parts)
        values = values - values.mean(0)
        total += values.T @ values / len(values) / len(slides)
    total = torch.from_numpy(added(total.numpy(), holders))
    power = total.diagonal()
    learned = 1.0 / power[:width].sum().sqrt().clamp(min=1e-8)
    appended = weight / power[width:].sum().sqrt().clamp(min=1e-8)
    factor = torch.cat([learned.expand(width), appended.expand(axes.size(1))])
    _, rotation = torch.linalg.eigh(factor[:, None] * total * factor)
    rotation = (factor[:, None] * rotation[:, -width:].flip(1)).float().to(device)
    encoder.rotate_output(rotation[:width], axes @ rotation[width:])


def _morans(expression: Expression, pos, device: torch.device) -> np.ndarray:
    place = torch.from_numpy(np.asarray(pos, dtype=np.float64)).to(device)
    neighbors = knn(place, _AROUND).index
    rows = np.random.default_rng(0).permutation(len(neighbors))[:_AXES_CELLS]
    if device.type != "cuda":
        return morans_i(expression.matrix, neighbors.numpy(), rows)
    there, genes = resident(expression, device), expression.shape[1]
    sums = torch.zeros(4, genes, dtype=torch.float64, device=device)
    for part in torch.from_numpy(rows).to(device).split(_ROWS // _AROUND):
        own = there.rows(part).double()
        near = there.rows(neighbors[part].flatten().long()).view(len(part), -1, genes)
        around = near.double().mean(1)
        sums += torch.stack([own.sum(0), around.sum(0), (own * around).sum(0), own.square().sum(0)])
    own, around, product, square = (sums / len(rows)).cpu().numpy()
    variance = square - own**2
    varies = variance > 1e-12 * max(variance.max(initial=0.0), 1e-300)
    return np.where(varies, (product - own * around) / np.where(varies, variance, 1.0), 0.0)


def _view(x: Tensor, settings: EncoderConfig, generator: torch.Generator) -> Tensor:
    """A noisy view of cells: some genes at their mean, the others shaken, and every gene as
    strong as another batch might measure it."""
    draw: dict[str, Any] = {"generator": generator, "device": x.device}
    keep = torch.rand(x.shape, **draw) >= settings.gene_dropout
    noise = torch.randn(x.shape, **draw)
    strength = torch.exp(settings.gene_log_std * torch.randn(x.size(1), **draw))
    return (x * keep + settings.noise * noise) * strength


def _infonce(anchor: Tensor, positive: Tensor, far: Tensor, settings: EncoderConfig) -> Tensor:
    similarity = F.normalize(anchor, dim=-1) @ F.normalize(positive, dim=-1).T
    similarity = similarity / settings.temperature
    own = similarity.diagonal()
    negative = similarity.masked_fill(~far, -math.inf)
    hard = min(settings.hard_negatives, negative.size(1))
    hardest = negative.topk(hard, dim=-1).values if hard else negative[:, :0]
    everything = torch.cat([own.unsqueeze(-1), negative, hardest], dim=-1)
    return (everything.logsumexp(dim=-1) - own).mean()


def _distance(z: Tensor, pos: Tensor) -> Tensor:
    """Variance of the log ratio of distances in the embedding and in the tissue."""
    tissue = F.pdist(pos).clamp(min=_NEAREST).log()
    residual = F.pdist(z).clamp(min=1e-6).log() - tissue.to(z.dtype)
    return (residual - residual.mean()).square().mean()


def _variance(z: Tensor) -> Tensor:
    return F.relu(1 - (z.var(dim=0) + 1e-4).sqrt()).mean()


def _covariance(z: Tensor) -> Tensor:
    centred = z - z.mean(dim=0)
    covariance = centred.T @ centred / max(1, len(z) - 1)
    off = covariance - covariance.diagonal().diag()
    return off.square().sum() / z.size(1)
