"""What all HTML pages share: figures inside the page, numbers as text, templates."""

import base64
import io
import re
from collections.abc import Callable

import jinja2
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

_DPI = 170


def draw_figure(
    name: str, size: tuple[float, float], draw: Callable, alt: str, dense: bool = False
) -> dict:
    """A drawn figure for a page, as PNG and as text of a data URL.

    Args:
        name: of its file.
        size: in inches.
        draw: called with the empty figure.
        alt: what it shows, for those who cannot see it.
        dense: scrolled on a phone, since shrunk it could not be read.
    """
    # no pyplot: its figures live on after the report, and need a display on some systems
    figure = Figure(figsize=size, layout="constrained")
    figure.get_layout_engine().set(wspace=0.04, hspace=0.04)
    FigureCanvasAgg(figure)
    draw(figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI, facecolor="white")
    png = buffer.getvalue()
    return {
        "name": name,
        "png": png,
        "data": base64.b64encode(png).decode(),
        "alt": alt,
        "width": round(size[0] * 96),
        "dense": dense,
    }


def number_text(value: float) -> str:
    """A number for a table: three decimals, fewer digits where it is tiny or large."""
    if 1e-9 < abs(value) < 5e-4:
        return f"{value:.0e}".replace("e-0", "e-")
    return f"{value:.3f}" if abs(value) < 100 else f"{value:,.0f}"


def environment() -> jinja2.Environment:
    """The jinja2 environment of all pages."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("ipar_sparse"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["slug"] = lambda text: re.sub(r"[^a-z]+", "-", text.lower()).strip("-")
    return environment
