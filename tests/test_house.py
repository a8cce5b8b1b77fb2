"""The form of the code: how long its parts are, what they import, and how settings are told."""

import ast
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import lint_words
import pytest

ROOT = Path(__file__).resolve().parents[1]
MODULES = sorted([*(ROOT / "ipar_sparse").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")])
MODULE_LINES = 500
FUNCTION_LINES = 80
SENTENCE_WORDS = 25


def _name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def _fresh(code: str) -> str:
    """What a new interpreter prints."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_modules_are_short():
    lengths = {
        _name(path): len(path.read_text().splitlines())
        for path in MODULES
        if "triton" not in path.name
    }
    assert {name: lines for name, lines in lengths.items() if lines > MODULE_LINES} == {}


def test_functions_are_short():
    long = {}
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = node.end_lineno - node.lineno + 1
                if lines > FUNCTION_LINES and "triton" not in path.name:
                    long[f"{_name(path)}:{node.lineno} {node.name}"] = lines
    assert long == {}


def test_nothing_is_kept_from_the_formatter():
    sign = "fmt: " + "skip"
    assert [_name(path) for path in MODULES if sign in path.read_text()] == []


def test_rooms_import_only_rooms_below_them():
    pytest.importorskip("importlinter.cli")
    # in a process of its own: the linter switches the loggers of this one off
    code = (
        "from importlinter.cli import lint_imports; raise SystemExit(lint_imports(no_cache=True))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_package_is_installed():
    with open(ROOT / "pyproject.toml", "rb") as file:
        setuptools = tomllib.load(file)["tool"]["setuptools"]
    found = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for path in (ROOT / "ipar_sparse").rglob("__init__.py")
    }
    mapped = {
        "ipar_sparse." + ".".join(path.parent.relative_to(ROOT).parts)
        for path in (ROOT / "benchmarks").rglob("__init__.py")
    }
    assert sorted(setuptools["packages"]) == sorted(found | mapped)
    for package, patterns in setuptools["package-data"].items():
        folder = ROOT / setuptools["package-dir"].get(package, package.replace(".", "/"))
        for pattern in patterns:
            assert list(folder.glob(pattern)), f"{package} has no {pattern}"


def test_importing_the_package_loads_no_torch():
    code = "import sys, ipar_sparse; print(sorted({'torch', 'numpy'} & set(sys.modules)))"
    assert _fresh(code).strip() == "[]"


def test_the_help_loads_no_torch():
    pytest.importorskip("typer")
    code = (
        "import sys\n"
        "from ipar_sparse.cli import main\n"
        "sys.argv = ['ipar-sparse', '--help']\n"
        "try:\n    main()\nexcept SystemExit as stop:\n    assert not stop.code\n"
        "print(sorted({'torch', 'anndata', 'matplotlib', 'sklearn'} & set(sys.modules)))"
    )
    assert _fresh(code).splitlines()[-1] == "[]"


def test_layers_load_what_torch_and_pyg_load():
    code = (
        "import sys, torch, torch_geometric.nn\n"
        "before = set(sys.modules)\n"
        "import ipar_sparse.nn\n"
        "new = set(sys.modules) - before\n"
        "own = {name for name in new if name.startswith('ipar_sparse')}\n"
        "print(sorted({name.split('.')[1] for name in own if '.' in name}))\n"
        "print(sorted({n.split('.')[0] for n in new - own} - set(sys.stdlib_module_names)))"
    )
    rooms, others = (ast.literal_eval(line) for line in _fresh(code).splitlines()[-2:])
    allowed = {"nn", "ops", "graph", "geometry", "ticks", "distributed", "errors"}
    assert set(rooms) <= allowed
    assert set(others) <= {"torch", "torch_geometric"}


def test_every_setting_is_told_in_short_sentences():
    pytest.importorskip("pydantic")
    from pydantic import BaseModel

    from ipar_sparse.config import RunConfig

    texts = {}
    for name, field in RunConfig.model_fields.items():
        if isinstance(field.default, BaseModel):
            texts[name] = type(field.default).__doc__
            for key, leaf in type(field.default).model_fields.items():
                texts[f"{name}.{key}"] = leaf.description
        else:
            texts[name] = field.description
    assert [key for key, text in texts.items() if not text] == []
    long = {
        key: sentence
        for key, text in texts.items()
        for sentence in re.split(r"[.;](?:\s|$)", text)
        if len(re.findall(r"[^\W_][\w.'-]*", sentence)) > SENTENCE_WORDS
    }
    assert long == {}


@pytest.mark.parametrize(
    "line",
    [
        "# scores on donors left\n# out decide",
        "def test_crew_stops(): ...",
        "from .oracle import optimise",
        "config.model.start",
        "load_config(model={'init': 'pca', 'start': 'pca'})",
        'PRESET = {"train": {"edges": "target"}}',
        "from .fit import (\n    fit,\n    settle,\n)",
        "atlas.moments(h)",
        "class Unit: ...",
        "'''See `settle`.'''",
        "rows = [('not expected', 0.3)]",
        "# ipar-sparse predict RUN CELLS --seeds 3",
        "load_config(preset='later')",
    ],
)
def test_words_given_up_are_found(line):
    assert lint_words.find(line, python=True)


@pytest.mark.parametrize(
    "line",
    [
        "start, edges, keep, unit = 0, [], None, 1.0",
        "for start in range(begin, end): spread = values.std()",
        "config.get('model.init'), config.train.edge_drop, model.starts",
        "load_config(model={'init': 'pca'}, graph={'candidate_pool': 0})",
        "'''It forms a graph, settles, and measures the spread; not expected to transfer.'''",
        "encoder.keep_probability, refine.anchor_weight, preset='spec-later'",
        "frame = left.merge(right)",
        "encoder.smooth(x)",
        "def add():\n    def finish(layout): return layout\n    return finish(found.measures)",
        "# ipar-sparse experiment v1 --seeds 0-2",
    ],
)
def test_ordinary_words_are_not(line):
    assert not lint_words.find(line, python=True)


def test_settings_given_up_are_found_in_yaml():
    text = "model:\n  recycles: 3\n  start: pca\nencoder: {steps: 3, keep: 0}\n"
    assert [line for line, *_ in lint_words.find(text, python=False)] == [3, 4]
