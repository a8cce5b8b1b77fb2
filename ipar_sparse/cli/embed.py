"""``ipar-sparse embed``."""

from __future__ import annotations

from ..files import check_folder
from . import options
from .inputs import check_inputs, load_predictor, tell_notes
from .options import given
from .results import tell_written


def embed(
    run: options.Run,
    cells: options.Cells,
    out: options.OutFile,
    layer: options.Layer = None,
    normalized: options.Normalized = None,
    slide_key: options.SlideKey = None,
    ignore_case: options.IgnoreCase = None,
    device: options.Device = None,
    overwrite: options.Overwrite = False,
) -> None:
    """Embed cells with the trained encoder alone, to obsm['X_ipar_embedding'] of a copy."""
    from ..data.headers import check_output
    from ..data.keys import Keys
    from ..inference.run_folder import check_encoder

    check_folder(out.parent)
    reading = given(layer=layer, normalized=normalized, slide_key=slide_key)
    reading |= given(ignore_case=ignore_case)
    check_encoder(run)
    obsm = (Keys.EMBEDDING,)
    check_output(cells, out, overwrite=overwrite, obsm=obsm, obs=(Keys.EMPTY,))
    data = check_inputs(run, [cells], require_pos=False, device=device, **reading)
    predictor = load_predictor(run, device)  # what is refused above does not wait for torch

    from ..data.writers import write_predictions
    from ..inference.placing import embed_cells, read_cells
    from ..progress import stage

    slides = read_cells(predictor, cells, data, slide_key_optional=slide_key is None)
    tell_notes(slides)
    added = vars(embed_cells(predictor, slides))
    with stage(f"Writing {out.name}"):
        write_predictions(cells, out, **added, slide_key=data.slide_key, overwrite=overwrite)
    tell_written(slides, out, obsm)
