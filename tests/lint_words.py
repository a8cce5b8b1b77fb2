"""Finds words that the package has given up, and says what stands in their place.

Usage: ``python tests/lint_words.py [FILE ...]``; without files, everything under version control.
Prints ``file:line: word -> replacement`` and exits with 1 if there was any.

Ordinary words were identifiers or settings too. They are sought only as what they were: a class, a
function that is defined, called or imported, or a setting below its section.
"""

import io
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
SUFFIXES = {".py", ".md", ".yaml", ".yml", ".j2", ".toml", ".cff", ".run", ""}
EXEMPT = {"CHANGELOG.md", "LICENSE", "tests/lint_words.py", "tests/test_house.py"}

PHRASES = {
    "donors? left out": "leave-one-donor-out cross-validation",
    "leaving (?:a |one |the )?donors? out": "leave-one-donor-out cross-validation",
    "last steps?(?! to the first)": "refinement",
    "how far a cell may lie": "predictive standard deviation",
    "how far cells may lie": "predictive standard deviation",
    "(?:cell's|cells') depth|depths? of (?:a|the|each) cell": "size factor",
    "error law": "error model",
    "got to": "progress",
    "not refined": "without refinement",
    "pca, refined": "PCA + refinement",
    "nearness": "relevant components",
    "crew": "dask.distributed.LocalCluster",
    "doubts?": "predictive variance",
    "spared": "validation_candidates",
    "narrowed": "anisotropic_layout",
    "stage_a": "encoder",
    "facts": "metadata",
    "--works": "--tasks",
    "--forms": "--implementations",
    "--protocol": "ipar-sparse experiment",
    r"(?:predict|evaluate)\b[^\n|]*--seeds": "--noise-samples",
    r"preset[\"'\]]*\s*[:= ]\s*[\"']?record(?![\w.-])": "spec",
    r"preset[\"'\]]*\s*[:= ]\s*[\"']?later(?![\w.-])": "spec-later",
}
"""Sought in every text, whatever the case of letters, across the end of a line too."""

NAMES = {
    "try_transfer": "select_settings",
    "start_from": "init_linear",
    "recombine": "rotate_output",
    "draw_candidates": "subsample_edges",
    "map_edges": "apply_edges",
    "expected_layout": "correct_distances",
    "share_of_variance": "relative_variance",
    "fit_error_law": "fit_error_model",
    "expected_error": "predict_rmse",
    "compare_errors": "calibration_metrics",
    "left_out_together": "cv_groups",
    "ReportBundle": "SlideEvaluation",
    "ContrastSlide": "ContrastiveSlide",
    "EmbeddingScale": "EmbeddingScaler",
    "Progressed": "TrainState",
    "spatial_genes": "morans_i_power",
    "gene_scale": "gene_log_std",
    "init_noise": "init_std",
    "step_gate": "init_step_size",
    "mutual_share": "mutual_prob",
    "k_range": "k_fraction_range",
    "gate_walk": "gate_target_weights",
}
"""Names that mean nothing else: sought in every text, as whole words."""

CLASSES = {
    "Transfer": "SelectionResult",
    "_Left": "HeldOutSlide",
    "_Fold": "DonorFold",
    "Unit": "GraphBatch",
    "Outcome": "StudyResults",
    "Answer": "Headline",
    "FORMS": "ABLATIONS",
}
"""Sought in Python, outside strings and comments, and in `code` of any text."""

FUNCTIONS = {
    "weigh": "with_gene_weights",
    "settle": "resolve",
    "begin": "initialize_encoder",
    "finish": "append_components",
    "signed": "svd_flip",
    "energies": "e_geo_of_layouts",
    "forms": "ablations",
    "turn": "rotation",
}
"""Sought where a module defines or imports them, and in `code` of any text."""

METHODS = {
    "moments": "mean_and_variance",
    "spread": "std",
    "measures": "learned_scalars",
}
"""Sought where a class defines them or they are called, and in `code` of any text."""

MEMBERS = {
    "batches.merge": "collate",
    "predictor.start": "initial_layout",
    "predictor.expected": "correct_distances",
    "predictor.refined": "refine",
    "predictor.nearest": "refinement_graph",
    "predictor.samples": "uses_sampled_candidates",
}
"""Sought as attributes, whatever the case of letters."""

SETTINGS = {
    "encoder.standardize": "encoder.scale_power",
    "encoder.smooth": "encoder.knn_smoothing",
    "encoder.keep": "encoder.component_weight",
    "encoder.kept": "encoder.component_kind",
    "graph.pool": "graph.candidate_pool",
    "model.start": "model.init",
    "model.betas": "model.learned_betas",
    "train.unit": "train.batch_kind",
    "train.edges": "train.attention_graph",
    "refine.expected": "refine.distance_correction_steps",
    "refine.anchor": "refine.anchor_weight",
    "refine.whiten": "refine.rca_power",
    "refine.power": "refine.pc_power",
    "refine.enough": "refine.skip_if_overlap",
}
"""Sought as ``section.key`` in prose, and as a key below its section in YAML and in Python."""

MODULES = {
    "train.crew": "dask.distributed.LocalCluster",
    "train.nearness": "estimators.relevant_components",
    "train.expected": "layout.distance_correction",
    "train.refine": "layout.refinement",
    "train.calibration": "layout.uncertainty",
    "train.transfer": "train.selection",
    "train.units": "train.batches",
    "train.page": "report.html",
    "train.oracle": "direct_optimization",
    "ops.keep": "ops.selective_checkpoint",
    "ipar_sparse.points": "geometry.neighborhoods",
}
"""Sought as paths, and as what a relative import names."""

LABELS = {
    "tried": "cross-validation scores",
    "chosen": "selected",
    "not expected": "without distance correction",
}
"""Sought as first cells of rows, in Python and in Markdown."""


class Rule(NamedTuple):
    """A pattern, what stands in its place, and where it is sought: all, code, prose or yaml."""

    pattern: re.Pattern[str]
    instead: str
    where: str = "all"


def _words(phrase: str) -> str:
    """Any blank of a phrase may be the end of a line, with a comment sign on the next."""
    return phrase.replace(" ", r"\s+(?:#:?\s+|>\s+)?")


def _rules() -> Iterator[Rule]:
    for phrase, instead in PHRASES.items():
        pattern = rf"(?<![A-Za-z]){_words(phrase)}(?![A-Za-z])"
        yield Rule(re.compile(pattern, re.IGNORECASE), instead)
    for name, instead in NAMES.items():
        yield Rule(re.compile(rf"(?<!\w){name}(?!\w)"), instead)
    for name, instead in CLASSES.items():
        yield Rule(re.compile(rf"(?<!\w){name}(?!\w)"), instead, where="code")
    for name, instead in FUNCTIONS.items():
        used = rf"^def {name}\b|\bimport (?:[\w, ]*\b|\([\w,\s]*\b){name}\b|`{name}(?=[`(])"
        yield Rule(re.compile(used, re.MULTILINE), instead, where="code")
    for name, instead in METHODS.items():
        used = rf"\bdef {name}\(self|\.{name}\(|[`.]{name}(?=`)"
        yield Rule(re.compile(used), instead, where="code")
    for name, instead in MEMBERS.items():
        yield Rule(re.compile(rf"\b{re.escape(name)}(?!\w)", re.IGNORECASE), instead)
    for setting, instead in SETTINGS.items():
        yield from _setting_rules(*setting.split("."), instead)
    for module, instead in MODULES.items():
        room, name = module.split(".")
        path = rf"\b{room}[./]{name}(?!\w)|\bfrom \.+(?:{room}\.)?{name} import\b"
        yield Rule(re.compile(path), instead)
    for label, instead in LABELS.items():
        row = rf"[(\[]\s*[\"']{label}[\"'],|^\|\s*{label}\s*\|"
        yield Rule(re.compile(row, re.MULTILINE), instead)


def _setting_rules(section: str, key: str, instead: str) -> Iterator[Rule]:
    # Code may have a module of the same name, e.g. an encoder; of a configuration it is a part.
    yield Rule(re.compile(rf"(?<![\w/]){section}\.{key}(?![\w(])"), instead, where="prose")
    yield Rule(re.compile(rf"\.{section}\.{key}(?![\w(])"), instead, where="code")
    inline = rf"\b{section}[\"']?\s*[:=]\s*(?:dict\(|\{{)[^{{}}()]*?(?<!\w){key}[\"']?\s*[:=]"
    yield Rule(re.compile(inline), instead)
    block = rf"^([ ]*){section}:[ ]*\n(?:(?:\1[ ]+.*)?\n)*?\1[ ]+{key}:"
    yield Rule(re.compile(block, re.MULTILINE), instead, where="yaml")


RULES = tuple(_rules())


def _code_of(text: str, python: bool) -> str:
    """The text with prose blanked out: strings and comments, but for `code` in them."""
    kept = [" " if letter != "\n" else "\n" for letter in text]
    if python:
        kept = list(text)
        starts = [0]
        for line in text.splitlines(keepends=True):
            starts.append(starts[-1] + len(line))
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type in (tokenize.STRING, tokenize.COMMENT):
                first = starts[token.start[0] - 1] + token.start[1]
                last = starts[token.end[0] - 1] + token.end[1]
                kept[first:last] = ["\n" if c == "\n" else " " for c in text[first:last]]
    for span in re.finditer(r"`[^`\n]+`", text):
        kept[span.start() : span.end()] = span.group()
    return "".join(kept)


def find(text: str, *, python: bool) -> list[tuple[int, str, str]]:
    """Line, word and replacement of every word in a text that was given up."""
    code = _code_of(text, python)
    prose = text
    if python:
        pairs = zip(text, code, strict=True)
        prose = "".join(letter if shown.isspace() else " " for letter, shown in pairs)
    views = {"all": text, "code": code, "prose": prose, "yaml": "" if python else text}
    found = set()
    for rule in RULES:
        for match in rule.pattern.finditer(views[rule.where]):
            line = text.count("\n", 0, match.end()) + 1
            found.add((line, " ".join(match.group().split())[-60:], rule.instead))
    return sorted(found)


def find_in_path(path: str) -> list[tuple[int, str, str]]:
    """The same of a file's own name."""
    old = {name.split(".")[1]: instead for name, instead in MODULES.items()}
    stem = Path(path).stem
    if path.startswith("tests/"):
        stem = stem.removeprefix("test_") if "oracle" not in stem else stem
        old = {name: old[name] for name in ("crew", "nearness", "expected", "transfer")}
    elif not path.startswith("ipar_sparse/"):
        return []
    return [(1, path, old[stem])] if stem in old else []


def project_files() -> list[Path]:
    """Text files under version control, and new ones that are not ignored."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split("\n")
    paths = [ROOT / name for name in sorted(set(listed)) if name and name not in EXEMPT]
    return [path for path in paths if path.is_file() and path.suffix in SUFFIXES]


def main(arguments: list[str]) -> int:
    total = 0
    for path in [Path(name).resolve() for name in arguments] or project_files():
        name = path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else str(path)
        text = path.read_text(encoding="utf-8")
        for line, word, instead in find_in_path(name) + find(text, python=path.suffix == ".py"):
            print(f"{name}:{line}: {word} -> {instead}")
            total += 1
    if total:
        print(f"{total} words that the package has given up")
    return int(total > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
