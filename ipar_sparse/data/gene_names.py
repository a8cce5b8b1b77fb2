"""Names of genes on different slides: which of them mean the same gene."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from scipy import sparse

from ..errors import UserError
from .slide import Slide

FEW_GENES = 20
"""Fewer shared genes place nothing, unless a slide has no more."""

_ENSEMBL = re.compile(r"^(ENS[A-Z]*[GT]\d{6,})(\.\d+)?(_PAR_Y)?$")
_GENOME = re.compile(r"^(?:GRC[a-z]\d+|hg\d+|mm\d+|rn\d+|dm\d+|danRer\d+)[_-]+(?=\S)")
_SHARE = 10  # at least one in ten of the shorter list must be shared


def kind_of_names(names: Sequence[str]) -> str:
    """What identifies genes: ``"Ensembl ids"``, with or without version, or ``"symbols"``."""
    some = [str(name) for name in names[:2000]]
    found = [match for match in map(_ENSEMBL.match, some) if match]
    if len(found) <= len(some) / 2:
        return "symbols"
    versions = sum(match[2] is not None for match in found)
    return "Ensembl ids with version" if versions > len(found) / 2 else "Ensembl ids"


def stem(name: str) -> str:
    """A gene name without version, genome prefix, and what R makes of a dash."""
    name = _GENOME.sub("", name.strip())
    if match := _ENSEMBL.match(name):
        return match[1]
    return name.replace("_", "-").replace(".", "-")


def _folded(name: str) -> str:
    return stem(name).casefold()


def rename_genes(
    slide: Slide, wanted: Sequence[str], partner: str, ignore_case: bool = False
) -> tuple[Slide, list[str]]:
    """A slide whose genes have the names of a partner's, wherever that is certain.

    Names are certain where one name of each side is left once versions, genome prefixes and dashes
    are disregarded. Another column of var is used where it names more of the wanted genes.

    Args:
        slide: n cells with expression.
        wanted: genes of the partner.
        partner: what messages call it.
        ignore_case: disregard letter case, too.

    Returns:
        The slide, and a line on what was done, if anything was.

    Raises:
        UserError: the two share too few genes; the line tells how to mend it.
    """
    wanted = [str(name) for name in wanted]
    own, said = [str(name) for name in slide.genes], []
    best = _matched(own, wanted, ignore_case)
    if len(best) < len(wanted):
        for column, names in slide.gene_columns.items():
            found = _matched([str(name) for name in names], wanted, ignore_case)
            if len(found) > 2 * len(best):
                best = found
                own = _without_gaps(names, own)
                said = [f"its genes are named by var[{column!r}], as those of {partner}"]
    check_shared(slide, own, wanted, len(best), partner)
    changed = {i: name for i, name in best.items() if own[i] != name}
    if changed:
        i, name = next(iter(changed.items()))
        said.append(
            f"{len(changed)} gene names were matched to those of {partner} ({own[i]}: {name})"
        )
    if not said:
        return slide, []
    names = [best.get(i, one) for i, one in enumerate(own)]
    return merge_duplicates(slide.with_genes(slide.expression, np.array(names, dtype=str))), said


def _without_gaps(names: Iterable[object], other: Sequence[str]) -> list[str]:
    empty = {"", "nan", "None", "<NA>"}
    pairs = zip(map(str, names), other, strict=True)
    return [other if name in empty else name for name, other in pairs]


def _matched(own: Sequence[str], wanted: Sequence[str], ignore_case: bool) -> dict[int, str]:
    """Number of a gene to its name on the other side."""
    known = set(wanted)
    found = {i: name for i, name in enumerate(own) if name in known}
    taken = set(found.values())
    for key in (stem, _folded) if ignore_case else (stem,):
        left = [name for name in wanted if name not in taken]
        if not left or len(found) == len(own):
            break
        target = _unique(left, key)
        mine = [(i, key(name)) for i, name in enumerate(own) if i not in found]
        several = Counter(one for _, one in mine)
        for i, one in mine:
            # several versions of an Ensembl id are one gene, other names may not be
            if one in target and (several[one] == 1 or _ENSEMBL.match(stem(own[i]))):
                found[i] = target[one]
        taken = set(found.values())
    return found


def _unique(names: Iterable[str], key: Callable[[str], str]) -> dict[str, str]:
    """Key to name, where one name alone has it."""
    keys = {name: key(name) for name in dict.fromkeys(names)}
    count = Counter(keys.values())
    return {one: name for name, one in keys.items() if count[one] == 1}


def said_of_case(own: Iterable[str], missing: Sequence[str]) -> str:
    """The end of a message about missing genes, of those that a slide has in other letter case."""
    known = set(map(_folded, map(str, own)))
    folded = sum(_folded(name) in known for name in missing)
    same = f"; {folded} of them differ in letter case alone"
    return f"{same}: pass --ignore-case if they are the same genes" if folded else ""


def check_shared(
    slide: Slide, own: Sequence[str], wanted: Sequence[str], shared: int, partner: str
) -> None:
    """Refuses a slide that shares too few genes with a partner.

    Args:
        slide: named in the message.
        own: its genes.
        wanted: genes of the partner.
        shared: how many they share.
        partner: what the message calls it.

    Raises:
        UserError: fewer than 20, or a tenth of the shorter list; the line says what may be wrong.
    """
    shorter = min(len(set(own)), len(set(wanted)))
    if shared >= min(FEW_GENES, shorter) and shared * _SHARE >= shorter and shared:
        return
    mine = ", ".join(sorted(set(own) - set(wanted))[:3]) or "none"
    others = ", ".join(sorted(set(wanted) - set(own))[:3]) or "none"
    message = (
        f"{slide.name}: shares {shared or 'no'} gene{'s' * (shared > 1)} with {partner} "
        f"(genes such as {mine} against {others})"
    )
    if len(set(wanted) & set(map(str, slide.cell_names))) > max(shared, len(set(wanted)) // _SHARE):
        raise UserError(f"{message}; its cells are named as genes: give it transposed, as adata.T")
    folded = len(_matched(own, wanted, ignore_case=True))
    if folded > 2 * shared and folded * _SHARE >= shorter:
        raise UserError(
            f"{message}; {folded} differ in letter case alone, as between species: pass "
            "--ignore-case if they are the same genes"
        )
    kinds = kind_of_names(own), kind_of_names(wanted)
    if kinds[0].split()[0] != kinds[1].split()[0]:
        raise UserError(f"{message}; put {kinds[1]} in place of {kinds[0]} into var_names")
    if shared:
        raise UserError(
            f"{message}, too few to place cells by ({FEW_GENES}, and one in {_SHARE} of the "
            f"{shorter} of the shorter list, are needed); give a slide of the same panel"
        )
    raise UserError(
        f"{message}; put the same kind of gene name (symbols or Ensembl ids) into var_names"
    )


def merge_duplicates(slide: Slide) -> Slide:
    """A slide whose gene names are unique: counts of one name are added up, logarithms left out.

    Logarithms of two features say nothing of their sum, and which one is the gene is not known.
    Lines on what was done are added to the notes of the slide.
    """
    names, column = np.unique(slide.genes, return_inverse=True)
    if len(names) == len(slide.genes):
        return slide
    count = np.bincount(column)
    twice = names[count > 1]
    listed = ", ".join(twice[:3]) + (", ..." if len(twice) > 3 else "")
    said = f"{len(twice)} gene names occur more than once ({listed}): "
    if slide.normalized:
        keep = np.flatnonzero(count[column] == 1)
        matrix, genes = slide.expression[:, keep], slide.genes[keep]
        said += "left out, since logarithms cannot be added up"
    else:
        first = np.full(len(names), len(column))
        np.minimum.at(first, column, np.arange(len(column)))
        order = np.argsort(first)  # of first appearance
        place = np.empty(len(names), dtype=np.int64)
        place[order] = np.arange(len(names))
        merge = sparse.csr_matrix(
            (np.ones(len(column), np.float32), (np.arange(len(column)), place[column])),
            shape=(len(column), len(names)),
        )
        matrix, genes = slide.expression @ merge, names[order]
        matrix.sort_indices()
        said += "their counts were added up"
    merged = slide.with_genes(matrix.tocsr(), genes)
    merged.notes = [*slide.notes, said]
    return merged
