"""What every test may ask for: devices, compiled extensions, a small run, real slides."""

import importlib.util
import logging
import os
from pathlib import Path

import pytest
import torch

REAL_SLIDES = Path(__file__).resolve().parents[2] / "shared" / "data"


def pytest_collection_modifyitems(items):
    missing = [m for m in ("torch_scatter", "torch_cluster") if not importlib.util.find_spec(m)]
    need_ext = bool(os.environ.get("IPAR_SPARSE_REQUIRE_EXT"))
    if missing and need_ext:
        raise pytest.UsageError(f"make test EXT=1 needs {' and '.join(missing)}, not installed")
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
        if "ext" in item.keywords and missing:
            item.add_marker(pytest.mark.skip(reason=f"{' and '.join(missing)} not installed"))


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
def real_slides() -> Path:
    """Folder of real slides that lies beside the repository on development machines."""
    if not REAL_SLIDES.is_dir():
        pytest.skip("no real slides in ../shared/data")
    return REAL_SLIDES
