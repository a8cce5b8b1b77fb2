"""How commands read slides and trained runs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UserError
from .messages import note

if TYPE_CHECKING:
    from ..data.slide import Slide
    from ..inference.predictor import Predictor


def tell_notes(slides: Iterable[Slide]) -> None:
    """Prints what was recognised in the slides."""
    for slide in slides:
        for text in slide.notes:
            note(text if slide.name in text else f"{slide.name}: {text}")


def check_no_leak(slides: Sequence[Path], val: Sequence[Path]) -> None:
    """Refuses a slide that is given twice, or both to train and to validate on."""
    seen = {path.resolve() for path in slides}
    if len(seen) < len(slides):
        raise UserError("a slide is given twice to train on; give each once")
    for path in val:
        if path.resolve() in seen:
            raise UserError(
                f"{path} is given both to train on and as --val, so its score would mean nothing; "
                "leave it out of one"
            )


def load_predictor(run: Path, device: str | None) -> Predictor:
    """The trained model of a run."""
    from ..config import RunConfig, resolve_device
    from ..inference.run_folder import find_checkpoint

    RunConfig.load(run)  # a folder that is no run is refused before anything slow
    find_checkpoint(run)
    target = resolve_device(device or "auto")

    from ..inference.predictor import Predictor

    return Predictor.load(run, target)
