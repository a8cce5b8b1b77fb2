"""What all HTML pages share: figures inside the page, numbers as text, templates."""

from __future__ import annotations

import base64
import hashlib
import io
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from PIL import Image

from ..files import atomic_write

PAGE = "report.html"
_DPI = 170


def draw_figure(
    name: str,
    size: tuple[float, float],
    draw: Callable[[Figure], Any],
    alt: str,
    dense: bool = False,
) -> dict:
    """A drawn figure for a page, as PNG, and as WebP in the text of a data URL.

    Args:
        name: of its file.
        size: in inches.
        draw: called with the empty figure.
        alt: what it shows, for readers who cannot see it.
        dense: whether a phone scrolls it, since it cannot be read when shrunk.
    """
    # no pyplot: it keeps figures after the report, and needs a display on some systems
    figure = Figure(figsize=size, layout=ConstrainedLayoutEngine(wspace=0.04, hspace=0.04))
    FigureCanvasAgg(figure)
    draw(figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI, facecolor="white")
    return {
        "name": name,
        "png": buffer.getvalue(),
        "data": f"data:image/webp;base64,{base64.b64encode(_webp(buffer)).decode()}",
        "alt": alt,
        "width": round(size[0] * 96),
        "dense": dense,
    }


def _webp(png: io.BytesIO) -> bytes:
    """A sixth of the size of PNG on maps of many cells."""
    small = io.BytesIO()
    Image.open(png).convert("RGB").save(small, "webp", quality=85)
    return small.getvalue()


def axes_grid(figure: Figure, count: int, columns: int) -> np.ndarray:
    """``count`` axes in rows of so many columns; the rest of the last row is hidden."""
    columns = min(count, columns)
    axes = np.ravel(figure.subplots(math.ceil(count / columns), columns, squeeze=False))
    for ax in axes[count:]:
        ax.set_visible(False)
    return axes[:count]


def number_text(value: float) -> str:
    """A number for a table: three decimals, fewer digits where it is tiny or large."""
    if 1e-9 < abs(value) < 5e-4:
        return f"{value:.0e}".replace("e-0", "e-")
    return f"{value:.3f}" if abs(value) < 100 else f"{value:,.0f}"


def write_page(
    out: Path, template: str, figures: list[dict], scripts: Sequence[str] = (), **values: Any
) -> Path:
    """Writes ``report.html``, self-contained, and its figures under ``figures/``.

    The page forbids the browser all network, and every script but those given here.

    Args:
        out: folder, made if missing.
        template: file name of the template.
        figures: of :func:`draw_figure`; they lose their PNG.
        scripts: what the page runs.
        **values: what the template shows.

    Returns:
        The path of the page.
    """
    (out / "figures").mkdir(parents=True, exist_ok=True)
    for figure in figures:
        atomic_write(out / "figures" / f"{figure['name']}.png", figure.pop("png"))
    scripts = [re.sub("</(?=script)", r"<\\/", script, flags=re.I) for script in scripts]
    page = environment().get_template(template)
    text = page.render(scripts=scripts, policy=_policy(scripts), **values)
    atomic_write(out / PAGE, text)
    return out / PAGE


def script_text(name: str) -> str:
    """A script that lies beside the templates."""
    return (Path(__file__).parent / "templates" / name).read_text()


def _policy(scripts: Sequence[str]) -> str:
    digests = [base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in scripts]
    # Bokeh compiles its WebGL programs from text
    allowed = [f"'sha256-{digest}'" for digest in digests]
    sources = " ".join([*allowed, "'unsafe-eval'"]) if allowed else "'none'"
    return (
        f"default-src 'none'; script-src {sources}; style-src 'unsafe-inline'; "
        "img-src data: blob:; base-uri 'none'; form-action 'none'"
    )


def environment() -> jinja2.Environment:
    """The jinja2 environment of all pages."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("ipar_sparse.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["slug"] = lambda text: re.sub(r"[^a-z]+", "-", text.lower()).strip("-")
    return environment
