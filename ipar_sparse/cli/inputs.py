"""How commands read slides and trained runs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any

from ..distributed import is_rank
from ..errors import UserError
from ..usage import has_gpu_driver, load_ahead
from .messages import note
from .watched import loading

if TYPE_CHECKING:
    import torch

    from ..config import DataConfig, RunConfig
    from ..data.slide import Slide
    from ..inference.predictor import Predictor


def tell_notes(slides: Iterable[Slide]) -> None:
    """Prints what was recognised in the slides, and what may be wrong."""
    from ..data.notes import Warned

    for slide in slides:
        for text in slide.notes:
            warns = isinstance(text, Warned)
            note(text if text.startswith(slide.name) else f"{slide.name}: {text}", warns)


def check_no_leak(slides: Sequence[Path], val: Sequence[Path], cells: Sequence[Path] = ()) -> None:
    """Refuses a slide that is given twice, or in two roles."""
    from ..data.paths import Source

    members, held = ([Source.parse(path) for path in paths] for paths in (slides, val))
    for number, one in enumerate(members):
        if any(one.shares(other) for other in members[:number]):
            raise UserError("a slide is given twice to train on; give each once")
    for path, one in zip(val, held, strict=True):
        if any(one.shares(other) for other in members):
            raise UserError(
                f"{path} is given both to train on and as --val, so its score would mean nothing; "
                "leave it out of one"
            )
    for path in cells:
        if any(Source.parse(path).shares(other) for other in members):
            raise UserError(
                f"{path} is given both to train on and as --cells; give the cells that are to be "
                "placed"
            )


def computes_on_gpu(device: str | None) -> bool:
    """Whether a device is a GPU, told without torch: ``auto`` is one where a driver is."""
    if device in (None, "auto"):
        return has_gpu_driver()
    return not device.startswith("cpu")


def begin_loading(device: str | None) -> bool:
    """Loads in threads what torch needs and is not Python; returns whether that has a GPU."""
    number = (device or "").partition(":")[2]
    on_gpu = computes_on_gpu(device) and not is_rank()
    load_ahead(int(number if number.isdigit() else 0) if on_gpu else None)
    return on_gpu


def check_device(device: str) -> None:
    """Begins to load torch; waits for it, and refuses the device, only where one is named."""
    from ..config import resolve_device

    begin_loading(device)
    if device != "auto":
        with loading():
            resolve_device(device)


def check_backends(config: RunConfig, device: str | None) -> None:
    """Refuses a backend whose library or device is not there, told without torch."""
    libraries = {"triton": "triton", "partitioned": "triton"}
    libraries |= {name: name for name in ("faiss", "torch_cluster")}
    for key in ("graph.backend", "model.backend"):
        name = config.get(key)
        library = libraries.get(name)
        if library == "triton" and not computes_on_gpu(device):
            raise UserError(f"{key}={name} needs a GPU; use one, or train with {key}=auto")
        if library is not None and find_spec(library) is None:
            raise UserError(
                f"{key}={name} needs {library}, which is not installed; install it, or train with "
                f"{key}=auto"
            )


def check_inputs(
    run: Path,
    sources: Sequence[Path],
    *,
    require_pos: bool,
    device: str | None = None,
    **reading: Any,
) -> DataConfig:
    """Refuses what headers can refuse, before anything slow is loaded.

    Args:
        run: folder of a run.
        sources: files to read with it.
        require_pos: refuse files without positions.
        device: where to compute.
        **reading: what the user says of the files.

    Returns:
        How the files are to be read.
    """
    from ..config import RunConfig
    from ..data.headers import check_headers
    from ..inference.costs import check_prediction
    from ..inference.run_folder import find_checkpoint, read_meta, reading_settings

    config = RunConfig.load(run)
    read_meta(find_checkpoint(run))
    check_backends(config, device)
    data = reading_settings(run, config, **reading)
    optional = "slide_key" not in reading
    for source in sources:
        sizes = check_headers([source], data, require_pos=require_pos, slide_key_optional=optional)
        check_prediction(sizes, config, computes_on_gpu(device), str(source))
    return data


def load_predictor(run: Path, device: str | None) -> Predictor:
    """The trained model of a run."""
    from ..config import resolve_device

    with loading():
        on_gpu = begin_loading(device)
        import scipy.sparse  # noqa: F401  # needed as well, and does not wait for torch

        target = resolve_device(device or "auto")
        if on_gpu:
            Thread(target=_first_calls, args=(target,), daemon=True).start()
        from ..inference.placing import Predictor  # with what reads and writes files

        return Predictor.load(run, target)


def _first_calls(device: torch.device) -> None:
    """Loads what a GPU multiplies, solves and sorts by, while other libraries are loaded."""
    import torch

    with suppress(RuntimeError):  # whoever needs it tells what is wrong
        x = torch.eye(8, device=device)
        torch.linalg.eigh(x @ x)
        torch.linalg.qr(x)
        x.sort()
        x.topk(2)
