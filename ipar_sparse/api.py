"""A trained model as a person holds it: AnnData in, AnnData out."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import pandas as pd
from anndata import AnnData

from .config import RunConfig, load_config, resolve_device
from .data.dissociated import read_dissociated
from .data.readers import read_files, tell_apart
from .data.records import recorded_slides
from .data.slide import Slide, log_notes
from .data.sources import Cells, load_source, named_sources
from .data.splits import named_donors
from .data.writers import add_predictions, write_anndata
from .errors import UserError
from .evaluation.results import score_table
from .evaluation.scoring import score_slide
from .files import check_output_folder, folder_name
from .inference.mapping import map_to_spots
from .inference.on_devices import place_on_devices
from .inference.placing import (
    Additions,
    embed_cells,
    place_cells,
    read_cells,
    refuse_cells,
    role_in_training,
)
from .inference.predictor import Predictor
from .inference.reference import check_mapping, find_reference, frame_options
from .inference.run_folder import reading_settings
from .inference.summary import RunSummary, summarize_run
from .progress import quiet_stages, setup_logging
from .report import check_genes, write_evaluation, write_prediction_report
from .train.fit import fit
from .train.launched import on_devices
from .train.pretrained import Pretrained
from .train.run_folder import (
    check_resumable,
    check_run_folder,
    copy_run,
    extend_run,
    run_folder,
)

logger = logging.getLogger(__name__)


class IPAR(Pretrained):
    """A trained model that places cells by their expression.

    Made by :meth:`train` or :meth:`load`. Its run folder is what ``ipar-sparse train`` writes, so
    the command line and this class read each other's models.

    Args:
        predictor: the trained run.

    Example::

        model = IPAR.train([slide_a, slide_b], val=slide_c)
        model.predict(cells)  # fills obsm["X_ipar"] and obs["ipar_uncertainty"]
        model.save("run")
    """

    def __init__(self, predictor: Predictor):
        self.predictor = predictor

    @classmethod
    @on_devices
    def train(
        cls,
        slides: Cells | Sequence[Cells] | Mapping[str, Cells],
        val: Cells | Sequence[Cells] | Mapping[str, Cells] | None = None,
        donors: Mapping[str, str] | Sequence[str] | str | None = None,
        config: RunConfig | Mapping[str, Any] | str | os.PathLike | None = None,
        out: str | os.PathLike | None = None,
        *,
        cells: Cells | Sequence[Cells] | Mapping[str, Cells] | None = None,
        preset: str | None = None,
        select: Literal["quick", "full", "none"] | None = None,
        embedding: str | None = None,
        layer: str | None = None,
        normalized: bool | None = None,
        slide_key: str | None = None,
        spatial_key: str | None = None,
        ignore_case: bool | None = None,
        drop_outliers: bool | None = None,
        seed: int | None = None,
        device: str | None = None,
        devices: int | None = None,
        resume: bool = False,
        overwrite: bool = False,
        max_minutes: float | None = None,
        quiet: bool = False,
    ) -> IPAR:
        """Train on slides whose positions are known, as ``ipar-sparse train`` does.

        Args:
            slides: slides with positions (n, 2) in obsm["spatial"], as objects, or as files and
                folders of any known format. A mapping names them; objects without a name are
                called ``slide1``, ``slide2``, ...
            val: slides that decide when training stops. None keeps one of more than three slides
                for this; an empty list keeps none.
            donors: slide name to donor, one donor for each slide of ``slides``, or the obs column
                that names the donor. Every slide is its own donor if left out.
            config: settings by key, e.g. ``{"train.epochs": 10}``, a YAML file, or a RunConfig.
            out: folder of the run; a temporary one if left out, whose path is told.
            cells: that the model is to place. Genes are chosen among those that they have.
            preset: named variant to start from, e.g. ``"v1-rbf"``.
            select: how thoroughly settings are selected by cross-validation over donors.
            embedding: an embedding to use instead of a trained encoder, e.g. ``"obsm:X_pca"``.
            layer, normalized, slide_key: where expression is and what it is, and the obs column
                of slides where an object holds several; recognised if left out.
            spatial_key, ignore_case, drop_outliers: as in :meth:`evaluate`.
            seed: of everything random.
            device, devices: ``"cpu"``, ``"cuda"``, ..., and in a script how many share the work.
            resume: go on with the run in ``out`` and its settings. Of ``config``, only
                ``train.epochs`` and ``train.patience`` may be given, which extend it.
            overwrite: replace an earlier run in ``out``.
            max_minutes: after about so many the best model so far is kept; ``resume`` goes on.
            quiet: show warnings alone.

        Raises:
            UserError: on slides that cannot be trained on, unknown settings, or a folder in use.
            KeyboardInterrupt: after an interrupt, once the state is saved; ``resume`` goes on.
        """
        _show_messages()
        data = _given(embedding=embedding, layer=layer, normalized=normalized, slide_key=slide_key)
        data |= _given(spatial_key=spatial_key, ignore_case=ignore_case)
        data |= _given(drop_outliers=drop_outliers)
        asked = {"data": data, "train": _given(seed=seed), "selection": _given(mode=select)}
        if resume:
            if out is None or preset or overwrite or cells is not None or any(asked.values()):
                raise UserError("resume takes out, and its settings; leave the others out")
            _go_on(out, [slides, val], config, device=device, max_minutes=max_minutes, quiet=quiet)
            return cls.load(out, device or "auto")
        settings = _settings(config, preset=preset, **asked)
        resolve_device(device or settings.train.device)
        out = _folder(out)
        check_run_folder(out, overwrite)
        with quiet_stages(quiet):
            members, held = _read_members(slides, val, settings)
            names, sources = named_sources(cells, kind="cells")
            others = read_dissociated(sources, settings.data, names)
        donors = named_donors(members, donors)
        with run_folder(out, resume=False):
            more: dict[str, Any] = {"max_minutes": max_minutes, "quiet": quiet}
            fit(members, held, settings, out, donors=donors, cells=others, device=device, **more)
        return cls.load(out, device or "auto")

    @classmethod
    def load(cls, folder: str | os.PathLike, device: str = "auto") -> Self:
        """The model of a run folder, from :meth:`save` or ``ipar-sparse train``.

        Args:
            folder: of the run.
            device: where to compute; ``"auto"`` is a GPU where there is one.

        Raises:
            UserError: the folder is no run or is damaged, or there is no such device.
        """
        _show_messages()
        return cls(Predictor.load(Path(folder), resolve_device(device)))

    def save(self, folder: str | os.PathLike, overwrite: bool = False) -> None:
        """Copies the run to a folder that :meth:`load` reads; it appears complete or not at all.

        From then on the model belongs to this folder.

        Args:
            folder: made if missing.
            overwrite: replace an earlier run there.

        Raises:
            UserError: the folder is in use.
            OSError: the disk is full.
        """
        folder = Path(folder)
        if folder.exists() and folder.resolve() == self.run.resolve():
            return
        check_run_folder(folder, overwrite)
        copy_run(self.run, folder)
        self.predictor.run = folder

    def predict(
        self,
        cells: Cells,
        copy: bool = False,
        noise_samples: int | None = None,
        *,
        reference: Cells | None = None,
        top: int | None = None,
        mapping: str | os.PathLike | None = None,
        keep_foreign: bool = False,
        adapt: bool | None = None,
        strict: bool = False,
        layer: str | None = None,
        normalized: bool | None = None,
        slide_key: str | None = None,
        embedding: str | None = None,
        ignore_case: bool | None = None,
        keep_empty: bool = False,
        report: str | os.PathLike | None = None,
        genes: Sequence[str] = (),
        overwrite: bool = False,
        devices: int | None = None,
    ) -> AnnData | None:
        """Places n cells from their expression; measured positions are not looked at.

        Fills obsm["X_ipar"] (n, 2), centred, in units of the tissue's root-mean-square radius,
        turned and mirrored at will. obsm["X_ipar_embedding"] (n, d) is what they come from.
        obs["ipar_uncertainty"] (n,) is the expected error in the same units.
        obs["ipar_typicality"] (n,) is a p-value, small for cells unlike the training cells.
        uns["ipar"] holds the verdict on each slide. An earlier prediction is replaced. Cells
        without counts in the genes of the run get NaN; obs["ipar_empty"] flags them.

        Args:
            cells: AnnData, filled in place; or a file, which is read and left as it is.
            copy: fill and return a copy instead.
            noise_samples: predictions under training noise; the run's setting if left out.
            reference: training slide, as AnnData, a file or its name in the run. Fills
                obsm["X_ipar_reference"] (n, 2) in its coordinates and units, NaN for cells that
                obs["ipar_foreign"] flags, and their error obs["ipar_uncertainty_reference"] (n,).
            top: number m of most probable places. Fills obsm["X_ipar_top"] (n, m, 2), in the frame
                of the reference or else the gauge of X_ipar, and obsm["ipar_top_weight"] (n, m).
            mapping: file for an AnnData of cells x spots of the reference, sparse.
            keep_foreign: give foreign cells a position in the frame of the reference, too.
            adapt: whether the adapter for other assays takes part; as the cells ask for if None.
            strict: refuse a slide that is unlike the training slides.
            layer: layer that holds the expression; that of the run if left out.
            normalized: whether expression is log-normalised; recognised if left out.
            slide_key: obs column of slides, which are placed apart; the run's if None, "" for none.
            embedding: of a run that was trained on one, e.g. ``"obsm:X_pca"``.
            ignore_case: whether letter case of gene names is disregarded; the run's if left out.
            keep_empty: give cells without counts the average place, in place of NaN.
            report: folder for a page on which to explore the map; none is written if left out.
            genes: genes by which the page can colour cells, beside the most informative.
            overwrite: replace an earlier report or mapping.
            devices: GPUs to share the work, by ``ipar-sparse predict --devices``; in scripts.

        Returns:
            The cells if they are a copy or come from a file, else None.

        Raises:
            UserError: the cells, an output or the reference cannot be used, or are refused.
        """
        if devices is not None and devices > 1:
            return _on_devices(**locals())
        _check_written(report, mapping, reference, cells, overwrite)
        wanted = frame_options(self.run, reference, top, keep_foreign, bool(mapping), bool(report))
        reading: dict[str, Any] = {"layer": layer, "normalized": normalized, "slide_key": slide_key}
        reading |= {"embedding": embedding, "ignore_case": ignore_case}
        slides = self._read(cells, **reading)
        check_genes(slides, genes)
        refuse_cells(self.predictor, slides, strict, wanted["reference"])
        wanted |= {"noise_samples": noise_samples, "keep_empty": keep_empty, "adapt": adapt}
        added = place_cells(self.predictor, slides, **wanted)
        found, within = (self.predictor, slides, added), wanted["reference"]
        if mapping is not None:
            write_anndata(map_to_spots(*found, within), mapping, overwrite=overwrite)
        if report is not None:
            page = {"genes": genes, "reference": within, "command": "IPAR.predict()"}
            write_prediction_report(*found, Path(report), **page)
        return _filled(cells, copy, added, slide_key or self.config.data.slide_key)

    def embed(
        self,
        cells: Cells,
        copy: bool = False,
        *,
        layer: str | None = None,
        normalized: bool | None = None,
        slide_key: str | None = None,
        ignore_case: bool | None = None,
    ) -> AnnData | None:
        """Fills obsm["X_ipar_embedding"] (n, d) by the encoder alone.

        Arguments and result are those of :meth:`predict`.

        Raises:
            UserError: the run has no encoder, or the cells share no gene with it.
        """
        slides = self._read(
            cells,
            layer=layer,
            normalized=normalized,
            slide_key=slide_key,
            ignore_case=ignore_case,
        )
        added = embed_cells(self.predictor, slides)
        return _filled(cells, copy, added, slide_key or self.config.data.slide_key)

    def evaluate(
        self,
        slide: Cells,
        out: str | os.PathLike | None = None,
        *,
        noise_samples: int | None = None,
        baselines: bool | None = None,
        class_key: str | None = None,
        reference: Cells | None = None,
        layer: str | None = None,
        normalized: bool | None = None,
        slide_key: str | None = None,
        spatial_key: str | None = None,
        embedding: str | None = None,
        ignore_case: bool | None = None,
        drop_outliers: bool | None = None,
        genes: Sequence[str] = (),
        overwrite: bool = False,
    ) -> pd.DataFrame:
        """Scores a prediction, and simple methods beside it, against measured positions.

        Args:
            slide: AnnData or file with positions in obsm["spatial"], not trained on.
            out: folder for the report of ``ipar-sparse evaluate``; none is written if left out.
            noise_samples: predictions under training noise; the run's setting if left out.
            baselines: whether to score simple methods; the run's setting if left out.
            class_key: obs column of cell classes, for the RSSD by class in the report.
            reference: training slide in whose frame positions were measured; adds that error.
            layer, normalized, slide_key, embedding, ignore_case, genes: as in :meth:`predict`.
            spatial_key: obsm key of the positions, or two obs columns; the run's if left out.
            drop_outliers: leave out cells whose positions lie far outside the tissue.
            overwrite: replace an earlier report in ``out``.

        Returns:
            One row a method: the model, simple methods, and the measured positions. Columns:
            distance Spearman and neighbour hit (higher is better), Procrustes error and E_geo
            (lower is better). Several slides add an index level.

        Raises:
            UserError: the slide has no positions, too few cells, or shares no gene with the run;
                or ``out`` is in use.
        """
        if out is not None:
            check_output_folder(Path(out), overwrite)
        within = None if reference is None else find_reference(self.run, reference)
        slides = self._read(
            slide,
            require_pos=True,
            layer=layer,
            normalized=normalized,
            slide_key=slide_key,
            spatial_key=spatial_key,
            embedding=embedding,
            ignore_case=ignore_case,
            drop_outliers=drop_outliers,
        )
        check_genes(slides, genes)
        tables = {}
        for one in slides:
            if role := role_in_training(self.predictor, one):
                logger.warning(
                    "%s %s: these scores say nothing about unseen slides", one.name, role
                )
            scored = score_slide(
                self.predictor,
                one,
                noise_samples=noise_samples,
                baselines=baselines,
                class_key=class_key,
                reference=within,
            )
            if out is not None:
                folder = Path(out) if len(slides) == 1 else Path(out) / folder_name(one.name)
                write_evaluation(
                    self.predictor, one, scored, folder, genes=genes, command="IPAR.evaluate()"
                )
            tables[one.name] = score_table(scored, max(self.config.eval.ks))
        if len(tables) == 1:
            return next(iter(tables.values()))
        return pd.concat(tables, names=["slide", "method"])

    def info(self) -> RunSummary:
        """What the model was trained on, how far it got, and which settings it selected.

        Raises:
            UserError: a file of the run is missing or damaged.
        """
        return summarize_run(self.run)

    @property
    def run(self) -> Path:
        """The run folder that the model was read from or saved to."""
        return self.predictor.run

    @property
    def config(self) -> RunConfig:
        """The settings that the run was computed with."""
        return self.predictor.config

    def __repr__(self) -> str:
        meta = self.predictor.meta
        kind = "an embedding" if meta["genes"] is None else f"{len(meta['genes']):,} genes"
        slides = [one["name"] for one in meta["metadata"]["slides"] if one["role"] == "train"]
        trained = f"{', '.join(slides[:3])}{', ...' if len(slides) > 3 else ''}"
        return f"IPAR({kind}, trained on {trained}, {str(self.run)!r})"

    def _read(self, cells: Cells, *, require_pos: bool = False, **reading: Any) -> list[Slide]:
        """The slides of an object or file."""
        _show_messages()
        given = {key: value for key, value in reading.items() if value is not None}
        data = reading_settings(self.run, self.config, **given)
        name = "cells" if isinstance(cells, AnnData) else None
        slides = read_cells(
            self.predictor,
            cells,
            data,
            require_pos=require_pos,
            name=name,
            slide_key_optional="slide_key" not in given,
        )
        for slide in slides:
            log_notes(slide, logger)
        return slides


def _filled(cells: Cells, copy: bool, added: Additions, slide_key: str | None) -> AnnData | None:
    """Adds what was computed to the object, its copy, or what its file holds."""
    if isinstance(cells, AnnData):
        adata = cells.copy() if copy else cells
    else:
        adata, copy = load_source(cells, slide_key), True
    add_predictions(adata, **vars(added))
    return adata if copy else None


def _check_written(report, mapping, reference, cells: Cells, overwrite: bool) -> None:
    if report is not None:
        check_output_folder(Path(report), overwrite, "report")
    if mapping is not None:
        check_mapping(mapping, reference, [cells], overwrite)


def _on_devices(
    self: IPAR, cells: Cells, copy: bool, slide_key: str | None, devices: int, **options: Any
) -> AnnData | None:
    """:meth:`IPAR.predict` by processes of their own."""
    options |= {"slide_key": slide_key, "device": self.predictor.device.type}
    added = place_on_devices(self.run, cells, devices, **options)
    return _filled(cells, copy, added, slide_key or self.config.data.slide_key)


def _read_members(slides, val, settings: RunConfig) -> tuple[list[Slide], list[Slide] | None]:
    """Slides to train on and to validate on; None where training is to choose."""
    reading: dict[str, Any] = {"require_pos": True, "min_cells": settings.train.miniset_min}
    reading["divided"] = True
    names, sources = named_sources(slides)
    members = read_files(sources, settings.data, names=names, **reading)
    names, sources = named_sources(val, start=len(sources))
    held = read_files(sources, settings.data, names=names, **reading)
    tell_apart([*members, *held])
    return members, None if val is None else held


def _folder(out: str | os.PathLike | None) -> Path:
    """The folder of a run; a temporary one, which is told, if none is given."""
    if out is None:
        out = Path(tempfile.mkdtemp(prefix="ipar_sparse-")) / "run"
        logger.warning("the run goes to the temporary folder %s; save() keeps it", out)
    return Path(out)


def _go_on(out: str | os.PathLike, members: Sequence[Any], config: Any, **running: Any) -> None:
    """Resumes a run, extended by settings if there are any."""
    out, sources = Path(out), [one for some in members for one in named_sources(some)[1]]
    check_resumable(out)
    if not isinstance(config, Mapping | None):
        raise UserError("resume takes config as a dict of train.epochs and train.patience only")
    train, held = recorded_slides(out, sources, RunConfig.load_request(out))
    with run_folder(out, resume=True):
        extend_run(out, config or {})
        fit(train, held, out=out, resume=True, **running)


def _settings(config, *, preset: str | None, **sections: Mapping[str, Any]) -> RunConfig:
    if not isinstance(config, RunConfig):
        return load_config(config, preset=preset, **sections)
    if preset is not None:
        raise UserError("a RunConfig has its preset already; leave out preset, or give a dict")
    return config.replace(**sections)


def _given(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _show_messages() -> None:
    """Shows the package's messages, unless the program has set up logging of its own."""
    if not logging.getLogger("ipar_sparse").handlers and not logging.getLogger().handlers:
        setup_logging()
