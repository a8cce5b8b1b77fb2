"""``ipar-sparse predict``."""

from __future__ import annotations

from ..files import check_folder
from . import options
from .inputs import check_inputs, load_predictor, tell_notes
from .options import given
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
    from ..data.headers import check_output
    from ..data.keys import Keys

    check_folder(out.parent)
    obsm = (Keys.PREDICTION, Keys.EMBEDDING)
    check_output(cells, out, overwrite=overwrite, obsm=obsm)
    reading = given(layer=layer, normalized=normalized, slide_key=slide_key, embedding=embedding)
    data = check_inputs(run, [cells], require_pos=False, **reading)
    predictor = load_predictor(run, device)  # what is refused above does not wait for torch

    from ..data.readers import read_files
    from ..data.writers import write_predictions
    from ..inference.placing import place_cells, uncertainty_columns
    from ..progress import stage

    columns = uncertainty_columns(predictor, noise_samples)
    check_output(cells, out, overwrite=overwrite, obsm=obsm, obs=(*columns, Keys.EMPTY))
    slides = read_files([cells], data, require_pos=False)
    tell_notes(slides)
    added = place_cells(predictor, slides, noise_samples)
    with stage(f"Writing {out.name}"):
        write_predictions(cells, out, **vars(added), overwrite=overwrite)
    tell_written(slides, out, obsm, columns)
