"""``ipar-sparse predict``."""

from __future__ import annotations

from typing import Any

from . import options
from .folders import check_folder
from .inputs import load_predictor, read_files, reading_settings, tell_notes
from .results import empty_cells, graphs_of, provenance, tell_written


def predict(
    run: options.Run,
    cells: options.Cells,
    out: options.OutFile,
    noise_samples: options.NoiseSamples = None,
    layer: options.Layer = None,
    normalized: options.Normalized = None,
    slide_key: options.SlideKey = None,
    embedding: options.Embedding = None,
    device: options.Device = None,
    overwrite: options.Overwrite = False,
) -> None:
    """Place cells: positions go to obsm['X_ipar'] of a copy of the file."""
    from ..data.keys import Keys
    from ..data.writers import check_output, in_file_order, write_predictions
    from ..progress import Progress

    check_folder(out.parent)
    predictor = load_predictor(run, device)
    data = reading_settings(predictor, layer, normalized, slide_key, embedding)
    samples = noise_samples or predictor.config.eval.noise_samples
    obsm = (Keys.PREDICTION, Keys.EMBEDDING)
    columns = (Keys.UNCERTAINTY,) if samples > 1 or predictor.atlas is not None else ()
    check_output(cells, out, overwrite=overwrite, obsm=obsm, obs=(*columns, Keys.EMPTY))
    slides = read_files([cells], data, require_pos=False)
    tell_notes(slides)
    with Progress() as progress:
        predictions = [
            predictor.predict(slide, noise_samples=samples)
            for slide in progress.track(slides, "Placing cells")
        ]
    obs: dict[str, Any] = empty_cells(slides)
    for column in columns:
        known = [one.uncertainty for one in predictions if one.uncertainty is not None]
        obs[column] = in_file_order(slides, known)
    write_predictions(
        cells,
        out,
        pos=in_file_order(slides, [one.pos for one in predictions]),
        embedding=in_file_order(slides, [one.embedding for one in predictions]),
        obs=obs,
        uns=provenance(predictor, graphs_of(slides, predictions)),
        overwrite=overwrite,
    )
    tell_written(slides, out, obsm, columns)
