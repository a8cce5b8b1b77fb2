"""Maps of cells that one works with: Bokeh draws them, a compressed table colours them."""

from __future__ import annotations

import base64
import json
import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.colors import to_hex
from scipy import sparse

from .. import pl
from ..geometry.neighborhoods import as_layout
from ..pl import style
from ..pl.colors import as_labels, label_palette, value_range
from ..pl.layouts import CONTINUOUS
from .cells import CellTable

MAX_CELLS = 100_000
"""Cells that a page draws; of more it draws a random sample, and says so."""

_BUDGET = 6_300_000  # letters of packed cells, so that a page with its figures stays under 10 MB
_MAX_LABELS = 250  # of a column; more cannot be told apart by colour
_NUMBERS = {"u1": 254, "u2": 65_534}  # kind of integer -> largest code of a value; one more: none
_PLACES = 16  # steps of the colours of places along each axis
_RAMP = [to_hex(CONTINUOUS(step / 255)) for step in range(256)]


@dataclass(frozen=True)
class CellMap:
    """One map of a page.

    Args:
        title: above it.
        pos: positions (n, 2); all maps of a page lie in one frame.
    """

    title: str
    pos: np.ndarray


def build_explorer(
    maps: Sequence[CellMap], cells: CellTable, colors: Sequence[str], places: str
) -> dict[str, Any]:
    """What the template needs for maps that can be explored.

    Args:
        maps: one or two maps of the same n cells; those of one title are the same map.
        cells: what they can be coloured by.
        colors: of each choice of a colour, the column it begins with. One choice rules all maps,
            two choices one each.
        places: what the colouring by place on the first map is called.

    Returns:
        ``scripts`` of Bokeh, ``data`` as JSON, ``maps`` of title and id, ``choices``, ``ramp`` of
        colours, and ``shown``: sentences on what is in the page and what is not.
    """
    from bokeh.resources import Resources

    n = len(cells.names)
    rows = _drawn(n)
    document, roots = _document(maps, len(rows))
    layouts = {one.title: as_layout(one.pos)[rows].astype("<f4").T for one in maps}
    fixed = {
        "names": _pack(json.dumps([str(name) for name in cells.names[rows]]).encode()),
        "layouts": {title: _pack(pos) for title, pos in layouts.items()},
    }
    room = _BUDGET - len(json.dumps(fixed))
    columns, left_out = _fitting(_columns(maps[0].pos, cells, rows, places), cells.asked, room)
    data = {
        "document": document,
        "roots": roots,
        "count": len(rows),
        "stride": _stride(len(rows)),
        "ramp": _RAMP,
        **fixed,
        "columns": columns,
    }
    return {
        "scripts": Resources("inline", components=["bokeh", "bokeh-gl"], log_level="warn").js_raw,
        "data": json.dumps(data).replace("<", "\\u003c"),
        "maps": [
            {"title": one.title, "id": id} for one, id in zip(maps, roots.values(), strict=True)
        ],
        "ramp": _RAMP[::15],
        "choices": _choices(columns, colors, len(maps)),
        "shown": _shown(n, len(rows), cells, columns, left_out),
    }


def _drawn(n: int) -> np.ndarray:
    """Rows to draw, in an order in which no group of cells hides another."""
    rows = np.arange(n)
    if n > MAX_CELLS:
        rows = np.sort(np.random.default_rng(0).choice(n, MAX_CELLS, replace=False))
    return rows[np.arange(len(rows)) * _stride(len(rows)) % len(rows)]


def _stride(n: int) -> int:
    """A step near the golden section that visits n rows each once; the page undoes it."""
    step = max(1, round(0.618 * n))
    while math.gcd(step, n) > 1:
        step += 1
    return step


def _document(maps: Sequence[CellMap], n: int) -> tuple[Mapping[str, Any], dict[str, str]]:
    """The Bokeh document of the maps without data, and model id to element id of each map."""
    from bokeh.document import Document
    from bokeh.models import (
        BoxSelectTool,
        ColumnDataSource,
        DataRange1d,
        HoverTool,
        LassoSelectTool,
        LinearColorMapper,
        PanTool,
        ResetTool,
        TapTool,
        WheelZoomTool,
    )
    from bokeh.plotting import figure

    low, high = np.min([one.pos.min(0) for one in maps], 0), np.max([o.pos.max(0) for o in maps], 0)
    width, height = np.maximum(high - low, 1e-9)
    ratio = float(np.clip(width / height, 0.8, 1.8))
    # two cells hold the place of all, which the page's script brings
    corners = dict(zip("xy", zip(low.tolist(), high.tolist(), strict=True), strict=True))
    blank = {"x": corners["x"], "y": corners["y"], "color": (0, 0)}
    source = ColumnDataSource(
        {f"{key}{i}": list(pair) for key, pair in blank.items() for i in range(len(maps))},
        name="cells",
    )
    shared: dict[str, Any] = {
        axis: DataRange1d(range_padding=0.05) for axis in ("x_range", "y_range")
    }
    size = float(np.clip(0.8 * math.sqrt(480 * 480 / ratio / max(n, 1)), 1.8, 9))
    document, roots = Document(), dict[str, str]()
    for number in range(len(maps)):
        zoom = WheelZoomTool()
        plot = figure(
            **shared,
            match_aspect=True,
            tools=[PanTool(), zoom, BoxSelectTool(), LassoSelectTool(), TapTool()],
            active_scroll=zoom,
            sizing_mode="stretch_width",
            aspect_ratio=ratio,
            min_height=220,
            output_backend="webgl",
            toolbar_location="above",
            background_fill_color=style.BACKGROUND,
            outline_line_color=style.FAINT,
            min_border=1,
        )
        mapper = LinearColorMapper(
            palette=_RAMP, low=0, high=1, nan_color=style.FAINT, name=f"colors{number}"
        )
        plot.scatter(
            f"x{number}",
            f"y{number}",
            source=source,
            size=size,
            line_color=None,
            fill_color={"field": f"color{number}", "transform": mapper},
            nonselection_fill_alpha=0.08,
            name=f"glyphs{number}",
        )
        plot.add_tools(HoverTool(limit=1, name=f"hover{number}"), ResetTool())
        plot.axis.visible = False
        plot.grid.visible = False
        plot.toolbar.logo = None
        document.add_root(plot)
        roots[plot.id] = f"map-{number}"
    return document.to_json(deferred=False), roots


def _columns(
    pos: np.ndarray, cells: CellTable, rows: np.ndarray, places: str
) -> Iterator[dict[str, Any]]:
    """Each column of a page, packed: the place on the map, then columns, then genes."""
    colors = pl.position_colors(pos)
    low, high = np.quantile(pos, [0.01, 0.99], axis=0)
    steps = np.clip((pos - low) / np.maximum(high - low, 1e-300), 0, 1) * (_PLACES - 1)
    codes = np.rint(steps).astype(int) @ [1, _PLACES]
    sums = np.stack([np.bincount(codes, channel, _PLACES**2) for channel in colors.T], 1)
    counts = np.bincount(codes, minlength=_PLACES**2)[:, None]
    palette = [to_hex(rgb) for rgb in np.clip(sums / np.maximum(counts, 1), 0, 1)]
    yield {
        "name": places,
        "group": "Map",
        "kind": "place",
        "type": "u1",
        "colors": palette,
        "data": _pack(codes[rows].astype("u1")),
    }
    for name, values in cells.columns.items():
        column = _labels(values, rows) if _is_labels(values) else _numbers(values[rows], "u2")
        if column is not None:
            yield {"name": name, "group": "Cells", **column}
    for number, name in enumerate(cells.genes):
        matrix: sparse.csr_matrix = cells.expression[:, [number]]
        values = matrix.toarray().ravel()[rows]
        yield {"name": str(name), "group": "Genes", **_numbers(values, "u1")}


def _is_labels(values: np.ndarray) -> bool:
    return np.asarray(values).dtype.kind not in "fiu"


def _labels(values: np.ndarray, rows: np.ndarray) -> dict[str, Any] | None:
    """A column of labels; None where there are too many."""
    factors = as_labels(np.asarray(values))
    labels = [str(label) for label in factors.categories]
    if len(labels) > _MAX_LABELS:
        return None
    codes = np.asarray(factors.codes, int)
    codes = np.where(codes < 0, 255, codes).astype("u1")
    colors = [to_hex(rgb) for rgb in label_palette(len(labels))]
    packed = _pack(codes[rows])
    return {"kind": "labels", "type": "u1", "labels": labels, "colors": colors, "data": packed}


def _numbers(values: np.ndarray, type: str) -> dict[str, Any]:
    """A column of numbers, in as many steps as the type of integer has between least and most."""
    values = np.asarray(values, float)
    known = values[np.isfinite(values)]
    low, high = (float(known.min()), float(known.max())) if len(known) else (0.0, 0.0)
    most = _NUMBERS[type]
    codes = np.full(len(values), most + 1)
    finite = np.isfinite(values)
    codes[finite] = np.rint((values[finite] - low) / ((high - low) or 1.0) * most)
    packed = _pack(codes.astype(f"<{type}"))
    return {
        "kind": "numbers",
        "type": type,
        "low": low,
        "high": high,
        "shown": value_range(values),
        "data": packed,
    }


def _fitting(
    columns: Iterator[dict[str, Any]], asked: int, room: int
) -> tuple[list[dict[str, Any]], int]:
    """Columns until the page is full, and how many genes that nobody asked for did not fit."""
    kept, size, genes, left_out = [], 0, 0, 0
    for column in columns:
        genes += column["group"] == "Genes"
        if size + len(column["data"]) > room and genes > asked:
            left_out += 1
            continue
        size += len(column["data"])
        kept.append(column)
    return kept, left_out


def _choices(columns: list[dict[str, Any]], first: Sequence[str], maps: int) -> list[dict]:
    """The choices of a colour: what each begins with, and the maps that it rules."""
    names = [column["name"] for column in columns]
    picks = [names.index(name) if name in names else 0 for name in first]
    ruled = [[number] for number in range(maps)] if len(picks) > 1 else [list(range(maps))]
    groups = {
        group: [(i, one["name"]) for i, one in enumerate(columns) if one["group"] == group]
        for group in dict.fromkeys(column["group"] for column in columns)
    }
    return [
        {"pick": pick, "maps": own, "groups": groups}
        for pick, own in zip(picks, ruled, strict=True)
    ]


def _shown(
    n: int, drawn: int, cells: CellTable, columns: list[dict[str, Any]], left_out: int
) -> list[str]:
    """What is in the page and what is not, in sentences."""
    sentences = []
    if drawn < n:
        sentences.append(
            f"{drawn:,} of {n:,} cells are drawn, chosen at random; downloads hold these too."
        )
    genes = [column["name"] for column in columns if column["group"] == "Genes"]
    if found := len(genes) - cells.asked:
        which = f"the {found} genes whose expression is most alike among neighbours on the map"
        asked = f"{', '.join(genes[: cells.asked])}, as asked for, and " if cells.asked else ""
        sentences.append(f"Genes: {asked}{which}, log-normalised, in 255 steps.")
    elif genes:
        sentences.append(f"Genes: {', '.join(genes)}, as asked for, log-normalised, in 255 steps.")
    if left_out:
        sentences.append(f"{left_out} more would have made the page too large.")
    names = {column["name"] for column in columns}
    if missing := [name for name in cells.columns if name not in names]:
        sentences.append(f"Left out, too many labels: {', '.join(missing)}.")
    return sentences


def _pack(values: np.ndarray | bytes) -> str:
    raw = values if isinstance(values, bytes) else np.ascontiguousarray(values).tobytes()
    return base64.b64encode(zlib.compress(raw)).decode()
