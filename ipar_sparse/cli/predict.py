"""``ipar-sparse predict``."""

from __future__ import annotations

from ..files import check_folder
from . import options
from .inputs import load_predictor, tell_notes
from .results import tell_written


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
    from ..data.readers import read_files
    from ..data.writers import check_output, write_predictions

    check_folder(out.parent)
    obsm = (Keys.PREDICTION, Keys.EMBEDDING)
    check_output(cells, out, overwrite=overwrite, obsm=obsm)
    predictor = load_predictor(run, device)

    from ..inference.placing import place_cells, reading_settings, uncertainty_columns

    data = reading_settings(predictor, layer, normalized, slide_key, embedding)
    columns = uncertainty_columns(predictor, noise_samples)
    check_output(cells, out, overwrite=overwrite, obsm=obsm, obs=(*columns, Keys.EMPTY))
    slides = read_files([cells], data, require_pos=False)
    tell_notes(slides)
    added = place_cells(predictor, slides, noise_samples)
    write_predictions(cells, out, **vars(added), overwrite=overwrite)
    tell_written(slides, out, obsm, columns)
