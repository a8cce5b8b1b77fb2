"""Simulated tissue slides whose geometry is known.

In a tissue, the log expression of every gene is a fixed function of the place, in coordinates that
all slides share. A slide is a cut through it: an irregular outline with holes, a random rotation,
and its own density, library sizes and batch effects. The function depends on the tissue and the
number of genes alone: a model trained on slides of one seed can be tested on another.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from scipy import sparse
from scipy.spatial import cKDTree

from ..ticks import counted
from .slide import Slide

CHUNK = 1 << 19  # expression values held densely at a time
SPACING = 100.0  # micrometres between neighbouring spots at average density
CELL_TYPES = 3  # mixed in random shares, whatever the place


Curve = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


@dataclass
class Region:
    """The area of a slide: a smooth closed outline, minus smooth holes.

    Each curve is r(t) = radius * (1 + sum_k a_k cos(k t + b_k)) with k = 2, 3, ...

    Args:
        curves: the outline first, then the holes, each as (centre (2,), radii (2,),
            amplitudes a (K,), phases b (K,)).
    """

    curves: Sequence[Curve]

    def contains(self, points: np.ndarray) -> np.ndarray:
        """Whether points (n, 2) are on tissue (n,)."""
        inside = self._within(points, *self.curves[0])
        for hole in self.curves[1:]:
            inside &= ~self._within(points, *hole)
        return inside

    def bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """Lower and upper corner, (2,) each, of a box around the outline."""
        centre, radii, amplitude, _ = self.curves[0]
        reach = radii * (1 + np.abs(amplitude).sum())
        return centre - reach, centre + reach

    @staticmethod
    def _within(
        points: np.ndarray,
        centre: np.ndarray,
        radii: np.ndarray,
        amplitude: np.ndarray,
        phase: np.ndarray,
    ) -> np.ndarray:
        x = (points - centre) / radii
        angle = np.arctan2(x[:, 1], x[:, 0])
        edge = np.ones(len(points))
        for k, (a, b) in enumerate(zip(amplitude, phase, strict=True), start=2):
            edge += a * np.cos(k * angle + b)
        return np.einsum("ij,ij->i", x, x) < edge**2


@dataclass
class Tissue:
    """Log expression of every gene as a function of the place in the tissue.

        log rate_g(x) = baseline_g + features(x) @ weight[:, g]

    Args:
        features: from tissue coordinates (n, 2) and the generator of a slide to features (n, F).
        annotate: from tissue coordinates (n, 2) and features (n, F) to obs columns.
        baseline: (G,).
        weight: (F, G), mostly zeros.
        dispersion: negative-binomial dispersion (G,), variance = mean + dispersion * mean^2.
        extent: half-axes of a typical slide, in tissue units.
    """

    features: Callable[[np.ndarray, np.random.Generator], np.ndarray]
    annotate: Callable[[np.ndarray, np.ndarray], dict[str, np.ndarray]]
    baseline: np.ndarray
    weight: np.ndarray
    dispersion: np.ndarray
    extent: tuple[float, float]


def simulate(
    tissue: str, *, slides: int = 3, spots: int = 1500, genes: int = 1200, seed: int = 0
) -> list[Slide]:
    """Slides of one simulated tissue.

    Counts are negative binomial with dropout. Every slide has its own library sizes and a batch
    effect that multiplies each gene. `Slide.obs` holds the truth: "tissue_x" and "tissue_y" in the
    coordinates that all slides share, and "layer" or "zone".

    Args:
        tissue: "cortex" has layers and a lateral gradient; expression determines the position.
            "lobules" has zones around repeated veins and a weak gradient; it determines the zone.
        slides: number of slides.
        spots: spots per slide, up to 10^6, in random order.
        genes: number of genes; 1000 to 2000 are typical.
        seed: of outlines, positions and counts; the tissue is the same for every seed.

    Returns:
        Slides with raw counts and positions in micrometres.

    Raises:
        ValueError: for an unknown tissue, or a size below 1 slide, 1 spot or 50 genes.
    """
    return list(iter_slides(tissue, slides=slides, spots=spots, genes=genes, seed=seed))


def iter_slides(
    tissue: str,
    *,
    slides: int = 3,
    spots: int = 1500,
    genes: int = 1200,
    seed: int = 0,
    embedding: int | None = None,
) -> Iterator[Slide]:
    """As :func:`simulate`, one slide at a time: a slide of 10^6 spots takes about 3 GB.

    ``embedding`` asks for slides without counts, with an embedding of so many columns: mixtures
    of what expression follows, and noise.
    """
    if tissue not in TISSUES:
        raise ValueError(f"tissue is {tissue!r}, expected one of {', '.join(TISSUES)}")
    for name, value, least in (("slides", slides, 1), ("spots", spots, 1), ("genes", genes, 50)):
        if value < least:
            raise ValueError(f"{name} is {value}, expected at least {least}")
    code = list(TISSUES).index(tissue)
    definition = TISSUES[tissue](genes, np.random.default_rng([code, genes]))
    for i in range(slides):
        rng = np.random.default_rng([seed, code, i])
        yield _cut_slide(f"{tissue}{i + 1}", definition, spots, rng, embedding)


def _cut_slide(
    name: str, tissue: Tissue, spots: int, rng: np.random.Generator, embedding: int | None
) -> Slide:
    place = _place_spots(_random_region(tissue.extent, rng), spots, rng)
    features = tissue.features(place, rng)
    obs = tissue.annotate(place, features)
    obs |= {"tissue_x": place[:, 0], "tissue_y": place[:, 1]}
    own: dict[str, Any] = {"expression": None, "genes": np.empty(0, dtype=str)}
    if embedding is None:
        counts = own["expression"] = _sample_counts(tissue, features, rng)
        own["genes"] = np.array([f"Gene{g + 1:04d}" for g in range(counts.shape[1])])
        own["empty"] = np.diff(counts.indptr) == 0
    else:
        mixing = np.random.default_rng(embedding).normal(size=(features.shape[1], embedding))
        own["embedding"] = (features @ mixing).astype(np.float32)
        own["embedding"] += 0.3 * rng.standard_normal((spots, embedding), dtype=np.float32)
    return Slide(
        name=name,
        cell_names=np.array([f"{name}_{i + 1:07d}" for i in range(spots)]),
        pos=_slide_coordinates(place, rng),
        obs=obs,
        **own,
    )


def _random_region(extent: tuple[float, float], rng: np.random.Generator) -> Region:
    half_axes = np.asarray(extent)
    decay = 1 / np.arange(2, 8)

    def curve(centre: np.ndarray, radii: np.ndarray, roughness: float) -> Curve:
        amplitude = roughness * decay * rng.normal(size=len(decay))
        return centre, radii, amplitude, rng.uniform(0, 2 * np.pi, len(decay))

    outline = curve(
        half_axes * rng.uniform(-0.08, 0.08, 2), half_axes * rng.uniform(0.9, 1.1, 2), 0.2
    )
    holes: list[Curve] = []
    tries = 0
    wanted = rng.integers(1, 4)
    while len(holes) < wanted:
        radius = half_axes.min() * rng.uniform(0.11, 0.2) * 0.97**tries
        angle, reach = rng.uniform(0, 2 * np.pi), rng.uniform(0.15, 0.6)
        centre = outline[0] + reach * outline[1] * np.array([np.cos(angle), np.sin(angle)])
        tries += 1
        if all(np.linalg.norm(centre - h[0]) > 1.8 * (radius + h[1].max()) for h in holes):
            holes.append(curve(centre, np.full(2, radius), 0.3))
    return Region([outline, *holes])


def _place_spots(region: Region, spots: int, rng: np.random.Generator) -> np.ndarray:
    """Spots (n, 2) on a jittered grid, thinned by a smooth random density, in random order."""
    low, high = region.bounds()
    wave = rng.normal(size=(4, 2)) / (high - low) * 2 * np.pi
    phase = rng.uniform(0, 2 * np.pi, 4)

    def density(x: np.ndarray) -> np.ndarray:
        return np.exp(0.2 * np.cos(x @ wave.T + phase).sum(axis=1) - 0.8)

    probe = rng.uniform(low, high, (4096, 2))
    accepted = (density(probe) * region.contains(probe)).mean()
    wanted = 1.1 * spots / accepted + 64
    while True:
        step = np.sqrt(np.prod(high - low) / wanted)
        columns, rows = np.ceil((high - low) / step).astype(int)
        grid = np.stack(np.divmod(np.arange(columns * rows), rows), axis=1)
        points = low + step * (grid + rng.uniform(0.1, 0.9, grid.shape))
        points = points[region.contains(points)]
        points = points[rng.random(len(points)) < density(points)]
        if len(points) >= spots:
            return points[rng.permutation(len(points))[:spots]]
        wanted *= 1.3


def _slide_coordinates(place: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Tissue coordinates (n, 2) rotated, perhaps reflected, and scaled to micrometres."""
    angle = rng.uniform(0, 2 * np.pi)
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    rotation[:, 0] *= rng.choice([-1.0, 1.0])
    area = 4 * np.prod(place.std(axis=0)) * np.pi
    scale = SPACING * np.sqrt(len(place) / max(area, 1e-12)) * rng.uniform(0.85, 1.15)
    pos = scale * (place @ rotation.T)
    return pos - pos.min(axis=0)


def _sample_counts(
    tissue: Tissue, features: np.ndarray, rng: np.random.Generator
) -> sparse.csr_matrix:
    num_genes = len(tissue.baseline)
    n = len(features)
    batch = rng.normal(0, 0.2, num_genes) + rng.normal(0, 0.2)
    library = rng.normal(0, 0.3, n)
    dropout = 0.05 + 0.25 * rng.beta(2, 5, num_genes)
    offset = (tissue.baseline + batch).astype(np.float32)
    weight = tissue.weight.astype(np.float32)
    step = max(CHUNK // num_genes, 1)
    data, indices = np.empty(0, dtype=np.float32), np.empty(0, dtype=np.int32)
    indptr = np.zeros(n + 1, dtype=np.int64)

    def draw(start: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        part = slice(start, start + step)
        rate = features[part].astype(np.float32) @ weight
        rate += offset
        rate += library[part, None].astype(np.float32)
        np.exp(rate, out=rate)
        own = _after_floats(rng, start * num_genes)
        return zero_inflated_negative_binomial(rate, tissue.dispersion, dropout, own)

    starts = range(0, n, step)
    for start, (row, column, value) in zip(counted(starts), _ahead(draw, starts), strict=True):
        rows = min(step, n - start)
        used = indptr[start]
        _append(data, value, used)
        _append(indices, column, used)
        indptr[start + 1 : start + 1 + rows] = used + np.cumsum(np.bincount(row, minlength=rows))
    rng.bit_generator.state = _after_floats(rng, n * num_genes).bit_generator.state
    data.resize(indptr[-1], refcheck=False)
    indices.resize(indptr[-1], refcheck=False)
    if indptr[-1] < 2**31:
        indptr = indptr.astype(np.int32)
    return sparse.csr_matrix((data, indices, indptr), shape=(n, num_genes))


def _after_floats(rng: np.random.Generator, count: int) -> np.random.Generator:
    """A copy of a generator as it is once so many float32 numbers were drawn from it.

    Two of them take one step of PCG64, which can jump over steps: parts of one sequence are drawn
    side by side, and are the same numbers.
    """
    bits, state = np.random.PCG64(), cast(Any, rng.bit_generator.state)
    bits.state = state
    own = np.random.Generator(bits)
    if count and state["has_uint32"]:  # the second half of a step comes first
        own.random(dtype=np.float32)
        count -= 1
    if count:
        bits.advance(count // 2)
        own.random(count % 2, dtype=np.float32)
    return own


def _ahead(function: Callable, items: Sequence) -> Iterator:
    """``map`` on all cores, a few results ahead of the one that is asked for."""
    cores = os.cpu_count() or 1
    waiting: deque = deque()
    with ThreadPoolExecutor(cores) as pool:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > cores:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _append(array: np.ndarray, part: np.ndarray, used: int) -> None:
    # grown in place: at 10^6 spots the parts and their concatenation do not fit together
    if used + len(part) > len(array):
        array.resize(max(used + len(part), len(array) * 5 // 4), refcheck=False)
    array[used : used + len(part)] = part


def zero_inflated_negative_binomial(
    mean: np.ndarray, dispersion: np.ndarray, dropout: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Negative-binomial counts with dropout, by inversion; only those above zero.

    One uniform number decides dropout, zero and value. Most entries are zero and found so at once.
    The others climb the distribution together, with r = 1 / dispersion:

        p_{k+1} = p_k (k + r) / (k + 1) m / (m + r)

    Args:
        mean: means before dropout (n, G), float32.
        dispersion: variance = mean + dispersion * mean^2, (G,).
        dropout: probability that a count is lost (G,).
        rng: source of the draw.

    Returns:
        row, column (int32) and count (float32) of the entries above zero, row-major.
    """
    r = (1 / dispersion).astype(np.float32)
    lost = dropout.astype(np.float32)
    zero = np.exp(-r * np.log1p(mean / r))
    u = rng.random(mean.shape, dtype=np.float32)
    row, column = np.nonzero(u > lost + (1 - lost) * zero)
    lost, r = lost[column].astype(np.float64), r[column].astype(np.float64)
    m = mean[row, column].astype(np.float64)
    zero = np.exp(-r * np.log1p(m / r))
    rest = (u[row, column] - lost) / (1 - lost) - zero
    ratio = m / (m + r)
    # rounding may leave the last bit of probability out of reach
    limit = m + 12 * np.sqrt(m + m**2 / r) + 10
    count = np.zeros(len(m), dtype=np.float32)
    climbing = np.arange(len(m))
    p, k = zero, 0
    while len(climbing):
        p = p * (k + r) / (k + 1) * ratio
        rest = rest - p
        k += 1
        count[climbing] = k
        on = (rest > 0) & (k < limit)
        climbing, p, rest, r, ratio, limit = (v[on] for v in (climbing, p, rest, r, ratio, limit))
    return row, column.astype(np.int32), count


def _gene_blocks(genes: int, shares: Sequence[float], rng: np.random.Generator) -> list[np.ndarray]:
    """Random disjoint sets of genes, of these shares of all genes."""
    cuts = np.floor(np.cumsum(shares) * genes).astype(int)
    return np.split(rng.permutation(genes), cuts)[:-1]


def _baseline(genes: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Log expression (G,) and dispersion (G,) of genes."""
    return rng.normal(-0.6, 1.2, genes), rng.lognormal(-1.5, 0.4, genes)


def _either_sign(size: int, low: float, high: float, rng: np.random.Generator) -> np.ndarray:
    return rng.choice([-1.0, 1.0], size) * rng.uniform(low, high, size)


def _cell_types(n: int, rng: np.random.Generator) -> np.ndarray:
    """Shares of cell types, minus their mean (n, 3), independent of the place."""
    return rng.dirichlet(np.full(CELL_TYPES, 2.0), n) - 1 / CELL_TYPES


def _cortex(genes: int, rng: np.random.Generator) -> Tissue:
    """Layers along y, a smooth gradient and soft areas along x; x in [-1.3, 1.3], y in [-1, 1]."""
    layer_edges = np.array([-0.72, -0.42, -0.1, 0.22, 0.55])
    layer_names = np.array(["L1", "L2/3", "L4", "L5", "L6", "WM"])
    area_centres = np.linspace(-1.4, 1.4, 8)
    num_layers, num_areas = len(layer_names), len(area_centres)

    def depth(place):
        return place[:, 1] + 0.12 * np.sin(1.8 * place[:, 0])

    def features(place, slide_rng):
        x, y = place[:, 0], depth(place)
        steps = 1 / (1 + np.exp(-(y[:, None] - layer_edges) / 0.06))
        ones, zeros = np.ones((len(place), 1)), np.zeros((len(place), 1))
        layers = np.hstack([ones, steps]) - np.hstack([steps, zeros])
        areas = np.exp(-0.5 * ((x[:, None] - area_centres) / 0.35) ** 2)
        return np.hstack([layers, y[:, None], areas, x[:, None], _cell_types(len(x), slide_rng)])

    def annotate(place, _):
        return {"layer": layer_names[np.searchsorted(layer_edges, depth(place))]}

    baseline, dispersion = _baseline(genes, rng)
    weight = np.zeros((num_layers + 1 + num_areas + 1 + CELL_TYPES, genes))
    layer, deep, area, lateral, types = _gene_blocks(genes, (0.18, 0.12, 0.2, 0.15, 0.08), rng)
    first_area = num_layers + 1
    weight[rng.integers(0, num_layers, len(layer)), layer] = rng.uniform(1.0, 2.5, len(layer))
    weight[num_layers, deep] = _either_sign(len(deep), 0.7, 1.5, rng)
    weight[first_area + rng.integers(0, num_areas, len(area)), area] = _either_sign(
        len(area), 0.8, 2.0, rng
    )
    weight[first_area + num_areas, lateral] = _either_sign(len(lateral), 0.6, 1.2, rng)
    weight[-CELL_TYPES + rng.integers(0, CELL_TYPES, len(types)), types] = rng.uniform(
        1.0, 3.0, len(types)
    )
    return Tissue(features, annotate, baseline, weight, dispersion, extent=(1.3, 1.0))


def _lobules(genes: int, rng: np.random.Generator) -> Tissue:
    """Zones between central veins and portal fields on a hexagonal grid, and a weak gradient."""
    pitch = 0.5

    def veins(place, slide_rng):
        reach = np.abs(place).max() + 2 * pitch
        steps = np.arange(-np.ceil(1.2 * reach / pitch), np.ceil(1.2 * reach / pitch) + 1)
        i, j = (v.ravel() for v in np.meshgrid(steps, steps, indexing="ij"))
        centres = pitch * np.stack([i + 0.5 * (j % 2), np.sqrt(3) / 2 * j], axis=1)
        centres = centres + slide_rng.uniform(-0.5, 0.5, 2) * pitch
        return centres + slide_rng.normal(0, 0.06 * pitch, centres.shape)

    def features(place, slide_rng):
        # the border of a lobule, where portal fields are, runs between the two nearest veins
        near = cKDTree(veins(place, slide_rng)).query(place, k=2)[0]
        zone = 2 * near[:, 0] / (near[:, 0] + near[:, 1])
        band = np.exp(-0.5 * ((zone - 0.55) / 0.15) ** 2)
        trend = place[:, 0]
        return np.column_stack([zone, zone**3, band, trend, _cell_types(len(zone), slide_rng)])

    def annotate(_, features):
        names = np.array(["central", "mid", "portal"])
        zone = features[:, 0]
        return {"zone": names[np.searchsorted([0.45, 0.75], zone)], "tissue_zone": zone}

    baseline, dispersion = _baseline(genes, rng)
    weight = np.zeros((4 + CELL_TYPES, genes))
    linear, sharp, mid, trend, types = _gene_blocks(genes, (0.25, 0.1, 0.1, 0.06, 0.12), rng)
    weight[0, linear] = _either_sign(len(linear), 0.8, 2.0, rng)
    weight[1, sharp] = _either_sign(len(sharp), 0.8, 2.0, rng)
    weight[2, mid] = _either_sign(len(mid), 0.5, 1.5, rng)
    weight[3, trend] = _either_sign(len(trend), 0.25, 0.6, rng)
    weight[-CELL_TYPES + rng.integers(0, CELL_TYPES, len(types)), types] = rng.uniform(
        1.0, 3.0, len(types)
    )
    return Tissue(features, annotate, baseline, weight, dispersion, extent=(1.3, 1.1))


TISSUES: dict[str, Callable[[int, np.random.Generator], Tissue]] = {
    "cortex": _cortex,
    "lobules": _lobules,
}
