"""The trained parts of a run, built as its configuration describes them."""

from __future__ import annotations

from collections.abc import Mapping

from ..config import RunConfig
from ..estimators import Typicality
from ..nn import EdgeGateSoft, IPALiteModel, SharedEncoder


def build_encoder(config: RunConfig, num_genes: int) -> SharedEncoder:
    """The untrained encoder that a configuration describes, for ``num_genes`` genes."""
    settings = config.encoder
    plain = (config.data.target_sum, settings.scale_power, settings.morans_i_power)
    return SharedEncoder(
        num_genes,
        tuple(settings.hidden),
        settings.out,
        settings.dropout,
        skip=settings.skip,
        smooth=settings.knn_smoothing,
        prepare=plain != (1e4, 0.0, 0.0),
    )


def build_typicality(config: RunConfig, sizes: Mapping[str, int]) -> Typicality:
    """The unfitted typicality that a configuration describes.

    Args:
        config: ``typicality``.
        sizes: of its buffers, see :attr:`~ipar_sparse.estimators.typicality.Typicality.sizes`.
    """
    settings = config.typicality
    return Typicality(
        **sizes,
        components=settings.components,
        neighbors=settings.neighbors,
        contrast=settings.contrast,
        tolerance=settings.tolerance,
    )


def build_gate_and_model(config: RunConfig, dim: int) -> tuple[EdgeGateSoft, IPALiteModel]:
    """The untrained gate and model that a configuration describes, on embeddings of width ``dim``.

    Without recycling the model has no recycle and returns the layout it is given.
    """
    settings = config.model
    gate = EdgeGateSoft(dim, heads=settings.gate_heads, backend=settings.backend)
    recycling = settings.recycling is not False
    terms: dict[str, dict] = {}
    if recycling and settings.geometry is not None:
        terms[settings.geometry] = {}
    if "rbf" in terms:
        terms["rbf"] = {"b_max": settings.rbf_max}
    schedule = settings.geo_schedule
    if isinstance(schedule, str):
        schedule = {"all": None, "last": (settings.recycles,)}[schedule]
    model = IPALiteModel(
        dim,
        channels=settings.channels,
        heads=settings.heads,
        head_channels=settings.head_channels,
        num_recycles=settings.recycles if recycling else 0,
        shared=settings.shared,
        terms=terms,
        geo_schedule=schedule if recycling else None,
        qk=settings.qk,
        qk_norm=settings.qk_norm,
        qk_scale=settings.qk_scale,
        qk_range=settings.qk_range,
        pair_hidden=settings.pair_hidden if recycling and "pair" in settings.terms else None,
        learned_betas=settings.learned_betas if recycling else None,
        init_step_size=settings.init_step_size if recycling else None,
        init_std=settings.init_std,
        checkpoint_recycles=settings.checkpoint_recycles,
        backend=settings.backend,
    )
    return gate, model
