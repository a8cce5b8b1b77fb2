"""``ipar-sparse embed``."""

from __future__ import annotations

from ..errors import UserError
from . import options
from .folders import check_folder
from .inputs import load_predictor, read_files, reading_settings, tell_notes
from .results import empty_cells, provenance, tell_written


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
    from ..data.writers import check_output, in_file_order, write_predictions
    from ..progress import Progress

    check_folder(out.parent)
    predictor = load_predictor(run, device)
    if predictor.encoder is None:
        raise UserError(
            f"{run} was trained on the embedding {predictor.config.data.embedding}, so it has no "
            "encoder; use that embedding as it is"
        )
    data = reading_settings(predictor, layer, normalized, slide_key)
    obsm = (Keys.EMBEDDING,)
    check_output(cells, out, overwrite=overwrite, obsm=obsm, obs=(Keys.EMPTY,))
    slides = read_files([cells], data, require_pos=False)
    tell_notes(slides)
    with Progress() as progress:
        embeddings = [predictor.embed(slide) for slide in progress.track(slides, "Embedding")]
    write_predictions(
        cells,
        out,
        embedding=in_file_order(slides, embeddings),
        obs=empty_cells(slides),
        uns=provenance(predictor),
        overwrite=overwrite,
    )
    tell_written(slides, out, obsm)
