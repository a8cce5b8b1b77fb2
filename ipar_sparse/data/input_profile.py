"""What a run knows of its input, and how other slides are put into its terms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np

from ..config.schema import INPUTS, DataConfig
from ..errors import UserError
from .anndata_store import some_names
from .copies import identified
from .differences import GIVE_COUNTS, compare_training, differences
from .expression import (
    in_memory,
    log_normalize,
    match_genes,
    mean_and_variance,
    median_total,
    select_genes,
)
from .gene_names import FEW_GENES, check_shared, kind_of_names, rename_genes, said_of_case
from .held import changed, of_slides
from .notes import Warned
from .on_disk import row_blocks, row_sums
from .slide import Slide
from .values import Values, inverted, rescaled

_SAME_TOTAL = 1.02  # totals of slides that were scaled alike
_OTHER_TOTAL = 1.5  # and of slides that were not
_MUCH = 0.2  # of the variance; a run that lost more should be trained for the cells


Scaling = Literal["total", "logs", "unscaled", "as given"]


@dataclass(frozen=True)
class InputProfile:
    """What the training slides of a run hold.

    Args:
        scaling: ``"total"``, counts that the run scales to ``total`` before log1p; ``"logs"``,
            logarithms as they were given; ``"unscaled"``, logarithms of counts that nobody scaled;
            ``"as given"``, anything else.
        values: the kind of values, in words.
        transform: which logarithm, by its name in :data:`~ipar_sparse.data.values.INVERSES`.
        total: counts per cell after scaling.
        exact: whether all cells have this total, so that counts can be scaled to it.
        counts: whether the user said that the values are counts.
        genes: of the encoder.
        mean, variance: of these genes on the training slides, as the encoder is given them.
        shared: genes by which the total of a cell is counted, all that the training slides share;
            none if those of the slide.
        identifiers: the kind of gene names, in words.
        extent: largest width of each training slide, in the units of its file.
        slide_key: obs column by which slides were told apart.
        ignore_case: whether letter case of gene names is disregarded.
    """

    scaling: Scaling
    values: str
    genes: Sequence[str]
    transform: str = "log1p"
    total: float = 1e4
    exact: bool = True
    counts: bool = False
    mean: Sequence[float] = ()
    variance: Sequence[float] = ()
    shared: Sequence[str] = ()
    identifiers: str = "symbols"
    extent: Sequence[float] = ()
    slide_key: str | None = None
    ignore_case: bool = False

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any] | None) -> InputProfile | None:
        """What :meth:`as_dict` gave; None of a run that recorded none.

        Raises:
            UserError: values that :meth:`as_dict` cannot have given.
        """
        if values is None:
            return None
        from pydantic import TypeAdapter

        try:
            found = TypeAdapter(cls).validate_python(values)
        except ValueError:
            found = None
        if found is None or any(
            len(moments) not in (0, len(found.genes)) for moments in (found.mean, found.variance)
        ):
            raise UserError(f"{INPUTS} of the run is damaged (profile); train the run again")
        return found


def profile_inputs(
    slides: Sequence[Slide], data: DataConfig, cell_genes: Sequence[str] | None = None
) -> tuple[list[Slide], InputProfile, list[str]]:
    """Training slides in common terms, and what a run is to know of them.

    Cells without information are left out, and lines on what was done are added to the notes.

    Args:
        slides: training slides with expression.
        data: as it was asked for.
        cell_genes: genes of the cells that are to be placed, to choose among; see
            :func:`~ipar_sparse.data.dissociated.record_cells`. All if left out.

    Returns:
        The slides, the profile, and genes of the first slide that another lacks.

    Raises:
        UserError: two slides share too few genes, or one holds nothing.
    """
    first, *others = map(identified, slides)

    def renamed(slide: Slide) -> Slide:
        return _with_notes(*rename_genes(slide, wanted, first.name, data.ignore_case))

    def counted(slide: Slide) -> Slide:
        if scaling == "total":
            slide = _as_counts(slide, "the other slides")
        return informative(_counted(slide, shared if scaling == "total" else ()))

    wanted = list(first.genes)
    known = [first, *changed(others, renamed)]
    shared, missing = match_genes(known)
    check_shared(known[-1], list(known[-1].genes), wanted, len(shared), "all other slides")
    if cell_genes is not None:
        shared = _among(shared, cell_genes)
    scaling, exact = _scaling(known, shared, data)
    whole = known = changed(known, counted)
    genes = shared
    if data.max_genes is not None and len(genes) > data.max_genes:
        genes = select_genes(known, genes, data.max_genes)
    known = changed(known, lambda one: informative(_emptied(in_memory(one, genes), genes)))
    if len(genes) < FEW_GENES:
        said = Warned(f"{len(genes)} genes hardly place cells; {FEW_GENES} or more are usual")
        known[0] = _with_notes(known[0], [said])
    total = data.target_sum or median_total(known)
    values = first.values or Values("none", "counts")
    profile = InputProfile(
        scaling=scaling,
        values=", ".join(dict.fromkeys(str(slide.values or "counts") for slide in known)),
        transform=values.transform if scaling != "total" and values.logged else "log1p",
        total=float(total),
        exact=exact,
        counts=data.normalized is False,
        genes=genes,
        shared=shared if scaling == "total" else (),
        identifiers=kind_of_names(genes),
        extent=[float(np.ptp(s.pos, axis=0).max()) for s in known if s.pos is not None],
        slide_key=data.slide_key,
        ignore_case=data.ignore_case,
    )
    moments = of_slides(known, lambda slide: mean_and_variance(slide, genes, profile.total))
    mean, variance = np.mean(moments, axis=0)
    if scaling != "as given" and len(whole) > 1:
        # over all genes, since those that vary most are others on each slide
        told = compare_training(whole, shared, profile.total)
        known = [_with_notes(*pair) for pair in zip(known, told, strict=True)]
    return known, replace(profile, mean=mean.tolist(), variance=variance.tolist()), missing


def _among(shared: Sequence[str], cell_genes: Sequence[str]) -> list[str]:
    """Those of the genes that all training slides share that the cells have, too."""
    inside = set(cell_genes)
    found = [gene for gene in shared if gene in inside]
    if len(found) < min(FEW_GENES, len(shared)):
        raise UserError(
            f"the cells share {len(found)} genes with all training slides, too few to place them "
            f"by ({FEW_GENES} are needed); leave out the slide of another panel"
        )
    return found


def _scaling(
    slides: Sequence[Slide], shared: Sequence[str], data: DataConfig
) -> tuple[Scaling, bool]:
    """How a run is to scale the values of its slides, and whether their total is known."""
    values = [slide.values or Values("none", "counts") for slide in slides]
    transforms = {one.transform for one in values}
    logs = all(one.logged for one in values) and len(transforms) == 1
    if data.normalized is True and not logs:
        kinds = dict.fromkeys(str(one) for one in values)
        if len({one.split(" scaled")[0] for one in kinds}) > 1:
            said = Warned(f"slides hold different values, used as they are: {'; '.join(kinds)}")
            slides[0].notes = [*slides[0].notes, said]
        return "as given", False
    if data.normalized is True and all(one.scale == "counts" for one in values):
        return "unscaled", True
    if not all(slide.normalized for slide in slides) or not logs:
        return "total", True
    totals = [one.total for one in values]
    apart = max(totals) / max(min(totals), 1e-300)
    if all(one.scale == "total" for one in values):
        alike = all(len(slide.genes) == len(shared) for slide in slides)
        if data.target_sum is not None:
            apart = max(apart, *(max(t / data.target_sum, data.target_sum / t) for t in totals))
        return ("logs", True) if alike and apart < _SAME_TOTAL else ("total", True)
    for slide in slides:
        if apart > _OTHER_TOTAL:
            slide.notes = [
                *slide.notes,
                Warned(
                    f"cells hold {slide.values.total:,.0f} in total behind the logarithm, "
                    f"{apart:.1f} times more or less on another slide: give counts, or scale all "
                    "alike"
                ),
            ]
    return "logs", False


def conform(slide: Slide, profile: InputProfile, ignore_case: bool | None = None) -> Slide:
    """A slide in the terms of a run; what was done, and what may be wrong, is noted.

    Genes are matched by name, values scaled as the run's are, totals counted over the same genes,
    and cells flagged as empty that have no counts in the genes of the run.

    Args:
        slide: n cells with expression.
        profile: of the run.
        ignore_case: whether letter case of gene names is disregarded; as the run did if left out.

    Raises:
        UserError: the slide cannot be used with the run; the line says why.
    """
    slide = identified(slide)
    wanted = list(profile.shared) or list(profile.genes)
    ignore_case = profile.ignore_case if ignore_case is None else ignore_case
    slide, said = rename_genes(slide, wanted, "the trained model", ignore_case)
    _, missing = match_genes([slide], profile.genes)
    if (found := len(profile.genes) - len(missing)) < min(FEW_GENES, len(profile.genes)):
        check_shared(
            slide, list(slide.genes), profile.genes, found, "the genes that the model reads"
        )
    slide = _with_notes(slide, said)
    if missing:
        listed = some_names(missing)
        case = "" if ignore_case else said_of_case(slide.genes, missing)
        lacks = f"lacks {len(missing)} of the {len(profile.genes)} genes of the run ({listed})"
        lost = _lost(slide, profile, missing)
        slide = _with_notes(slide, [Warned(f"{lacks}: taken as average{lost}{case}")])
    slide = _scaled_alike(slide, profile)
    before = int(slide.empty.sum())
    slide = _emptied(_counted(slide, profile.shared), profile.genes)
    if more := int(slide.empty.sum()) - before:
        said = f"{more} cells have counts, but none in the genes of the run: they get no place"
        slide = _with_notes(slide, [said])
    if slide.empty.all():
        raise UserError(
            f"{slide.name}: no cell has counts in the genes of the run; choose another layer"
        )
    if not len(profile.mean) or profile.scaling == "as given":
        return slide
    lost = set(missing)
    present = np.array([gene not in lost for gene in profile.genes])
    genes = [gene for gene in profile.genes if gene not in lost]
    mean, variance = (np.asarray(part)[present] for part in (profile.mean, profile.variance))
    said = differences(slide, genes, mean, variance, profile.total, bool(missing))
    return _with_notes(slide, said)


def _lost(slide: Slide, profile: InputProfile, missing: Sequence[str]) -> str:
    """What missing genes take from a map, and the command that trains without them.

    A gene counts by its variance on the training slides: genes that hardly vary place no cell.
    """
    variance = np.asarray(profile.variance)
    absent = np.isin(profile.genes, missing)
    if not variance.sum() or (share := variance[absent].sum() / variance.sum()) <= _MUCH:
        return ""
    return (
        f", though they hold {100 * share:.0f} % of the variance on the training slides; "
        f"`ipar-sparse train SLIDE... --cells {slide.path or 'CELLS.h5ad'} --out RUN` trains on "
        "genes that these cells have"
    )


def informative(slide: Slide) -> Slide:
    """The cells of a slide that are not empty.

    Raises:
        UserError: there are none.
    """
    if not slide.empty.any():
        return slide
    if slide.empty.all():
        raise UserError(
            f"{slide.name}: no cell has counts in the genes that are used; choose another layer "
            "(--layer), or leave the slide out"
        )
    return slide.take(np.flatnonzero(~slide.empty))


def _scaled_alike(slide: Slide, profile: InputProfile) -> Slide:
    """Values as a run takes them."""
    values = slide.values or Values("none", "counts")
    if slide.normalized and values.guessed and profile.counts:
        slide = replace(slide, normalized=False)
        slide = _with_notes(slide, ["taken as counts, as the run was told of its own slides"])
    if profile.scaling == "as given":
        if slide.normalized and str(values) == profile.values:
            return slide
        return _with_notes(slide, [_unlike(values, profile)])
    if values.transform == "unknown":
        return _with_notes(slide, [_unlike(values, profile)])
    if profile.scaling == "total":
        return _as_counts(slide, f"the run, {profile.total:,.5g} a cell")
    if profile.scaling == "unscaled":
        if slide.normalized and values.scale != "counts":
            return _with_notes(slide, [_unlike(values, profile)])
        matrix = slide.expression if not slide.normalized else inverted(slide.expression, values)
        matrix = rescaled(matrix.log1p(), profile.transform)
        said = (
            [] if slide.normalized else [f"values turned into {profile.values}, as the run's are"]
        )
        return _with_notes(replace(slide, expression=matrix, normalized=True), said)
    return _as_logs(slide, values, profile)


def _as_logs(slide: Slide, values: Values, profile: InputProfile) -> Slide:
    """Values as the logarithms that a run was given."""
    same_base = not values.logged or values.transform == profile.transform
    if slide.normalized and same_base:
        known = values.scale == "total" and profile.exact
        apart = max(values.total or 1.0, 1e-300) / profile.total
        if not known or 1 / _SAME_TOTAL < apart < _SAME_TOTAL:
            return slide
    if slide.normalized and values.scale != "total" and not same_base:
        matrix = rescaled(inverted(slide.expression, values).log1p(), profile.transform)
        said = f"values are {values}: turned into the logarithms of the run"
        return _with_notes(replace(slide, expression=matrix), [said])
    counts = inverted(slide.expression, values) if slide.normalized else slide.expression
    matrix = rescaled(log_normalize(counts, profile.total), profile.transform)
    said = f"cells scaled to the {profile.total:,.5g} of the run, and their logarithm taken"
    if not profile.exact:
        said = Warned(
            f"{said}; how the run's own slides were scaled is not known, so cells may be placed "
            "less well: give values that were made as theirs"
        )
    return _with_notes(replace(slide, expression=matrix, normalized=True), [said])


def _as_counts(slide: Slide, whose: str) -> Slide:
    """Logarithms turned back, since cells will be scaled to a total anyway."""
    if not slide.normalized:
        return slide
    matrix = inverted(slide.expression, slide.values or Values("log1p"))
    said = f"logarithms turned back, to scale cells as those of {whose}"
    if slide.values is not None and slide.values.guessed:
        said = Warned(f"{said}; whether they are logarithms is a guess: {GIVE_COUNTS}")
    return _with_notes(replace(slide, expression=matrix, normalized=False), [said])


def _counted(slide: Slide, shared: Sequence[str]) -> Slide:
    """With the total of each cell over some genes, of those that the slide has."""
    if not len(shared) or slide.normalized:
        return slide
    inside = np.isin(slide.genes.astype(str), np.asarray(shared, dtype=str))
    if inside.all():
        return slide
    totals = row_sums(slide.expression, inside.astype(np.float64))
    return replace(slide, totals=totals, empty=slide.empty | (totals == 0))


def _emptied(slide: Slide, genes: Sequence[str]) -> Slide:
    """With cells flagged that hold nothing in some genes."""
    inside = np.isin(slide.genes.astype(str), np.asarray(genes, dtype=str))
    stored = [block[:, inside].getnnz(axis=1) for _, block in row_blocks(slide.expression)]
    return replace(slide, empty=slide.empty | (np.concatenate(stored) == 0))


def _unlike(values: Values, profile: InputProfile) -> Warned:
    return Warned(
        f"its values are {values}, those of the run {profile.values}, and neither can be turned "
        "into the other: cells may be placed wrongly; give values made as the run's were"
    )


def _with_notes(slide: Slide, said: Sequence[str]) -> Slide:
    return replace(slide, notes=[*slide.notes, *said]) if said else slide
