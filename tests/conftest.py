"""What every test may ask for: devices, compiled extensions, small runs, real slides.

The tests marked ``trust`` show what a user may rely on. They share one run, and end with a table:
what each row gives now, beside what it gave before (``trust_before.json``).
"""

import importlib.util
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

REAL_SLIDES = Path(__file__).resolve().parents[2] / "shared" / "data"
BEFORE = Path(__file__).with_name("trust_before.json")
ROWS = pytest.StashKey[dict[str, str]]()


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="with -m trust: every row, all repeats")


def pytest_configure(config):
    # on small tensors, more threads wait for each other longer than they work
    torch.set_num_threads(int(os.environ.setdefault("OMP_NUM_THREADS", "1")))
    config.stash[ROWS] = {}


def pytest_collection_modifyitems(config, items):
    missing = [m for m in ("torch_scatter", "torch_cluster") if not importlib.util.find_spec(m)]
    need_ext = bool(os.environ.get("IPAR_SPARSE_REQUIRE_EXT"))
    if missing and need_ext:
        raise pytest.UsageError(f"make test EXT=1 needs {' and '.join(missing)}, not installed")
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
        if "ext" in item.keywords and missing:
            item.add_marker(pytest.mark.skip(reason=f"{' and '.join(missing)} not installed"))
        if "full" in item.keywords and not config.getoption("--full"):
            item.add_marker(pytest.mark.skip(reason="part of --full"))
        if "trust" in item.keywords and config.getoption("--full"):
            item.add_marker(pytest.mark.timeout(3 * 3600), append=False)


def pytest_terminal_summary(terminalreporter, config):
    rows = config.stash[ROWS]
    if not rows:
        return
    known = json.loads(BEFORE.read_text())
    terminalreporter.section(f"trust: now, beside what commit {known['commit']} gave")
    for name, now in rows.items():
        terminalreporter.write_line(
            f"{name}\n    before: {known['rows'].get(name, 'not measured')}"
        )
        terminalreporter.write_line(f"    now:    {now}")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _logger():
    """Commands send the package's messages to the terminal; the next test is to see them again."""
    logger = logging.getLogger("ipar_sparse")
    before = logger.handlers[:], logger.level, logger.propagate
    logger.handlers[:], logger.propagate = [], True
    yield
    logger.handlers[:], logger.level, logger.propagate = before


@pytest.fixture(scope="session")
def small_slides():
    """Four slides of 140 simulated cells; the fourth takes part in no run."""
    from ipar_sparse.data.simulation import simulate

    return simulate("cortex", slides=4, spots=140, genes=80, seed=3)


@pytest.fixture(scope="session")
def small_run(small_slides, tmp_path_factory) -> Path:
    """Folder of a finished run on the first two of the small slides, validated on the third."""
    from small_run import small_config

    from ipar_sparse.train.fit import fit

    out = tmp_path_factory.mktemp("run")
    fit(small_slides[:2], small_slides[2:3], small_config(), out)
    return out


@pytest.fixture(scope="session")
def trust_slides(tmp_path_factory) -> Path:
    """Folder of four files, cortex1.h5ad to cortex4.h5ad, of 300 cells and 120 genes each."""
    from ipar_sparse.data.simulation import simulate
    from ipar_sparse.data.writers import write_slide

    folder = tmp_path_factory.mktemp("trust")
    for number, slide in enumerate(simulate("cortex", slides=4, spots=300, genes=120), start=1):
        write_slide(slide, folder / f"cortex{number}.h5ad")
    return folder


@pytest.fixture(scope="session")
def trust_run(trust_slides, tmp_path_factory) -> Path:
    """Folder of a run on cortex1 and cortex2, validated on cortex3; it never saw cortex4.

    Distances on cortex4 correlate by 0.68.
    """
    from small_run import TRUST

    from ipar_sparse.cli import run_command

    out = tmp_path_factory.mktemp("trust") / "run"
    one, two, three = (str(trust_slides / f"cortex{number}.h5ad") for number in (1, 2, 3))
    settings = [word for setting in TRUST for word in ("--set", setting)]
    assert run_command(["train", one, two, "--val", three, "--out", str(out), *settings]) == 0
    return out


@pytest.fixture
def trust_row(request) -> Callable[[str, str], None]:
    """Adds a row to the table: its name, and what it gives now, in words and numbers."""
    return request.config.stash[ROWS].__setitem__


@pytest.fixture(scope="session")
def full(request) -> bool:
    """Whether ``--full`` asks for all repeats."""
    return request.config.getoption("--full")


@pytest.fixture(scope="session")
def real_slides() -> Path:
    """Folder of real slides that lies beside the repository on development machines."""
    if not REAL_SLIDES.is_dir():
        pytest.skip("no real slides in ../shared/data")
    return REAL_SLIDES
