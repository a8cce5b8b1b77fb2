"""``ipar-sparse embed``."""

from __future__ import annotations

from ..files import check_folder
from . import options
from .inputs import load_predictor, tell_notes
from .results import tell_written


def embed(
    run: options.Run,
    cells: options.Cells,
    out: options.OutFile,
    layer: options.Layer = None,
    normalized: options.Normalized = None,
    slide_key: options.SlideKey = None,
    device: options.Device = None,
    overwrite: options.Overwrite = False,
) -> None:
    """Embed cells with the trained encoder alone, to obsm['X_ipar_embedding'] of a copy."""
    from ..data.keys import Keys
    from ..data.readers import read_files
    from ..data.writers import check_output, write_predictions
    from ..inference.placing import check_encoder, embed_cells, reading_settings

    check_folder(out.parent)
    predictor = load_predictor(run, device)
    check_encoder(predictor)
    data = reading_settings(predictor, layer, normalized, slide_key)
    obsm = (Keys.EMBEDDING,)
    check_output(cells, out, overwrite=overwrite, obsm=obsm, obs=(Keys.EMPTY,))
    slides = read_files([cells], data, require_pos=False)
    tell_notes(slides)
    write_predictions(cells, out, **vars(embed_cells(predictor, slides)), overwrite=overwrite)
    tell_written(slides, out, obsm)
