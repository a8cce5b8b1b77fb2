"""What every test may ask for: devices, compiled extensions, real slides."""

import importlib.util
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


@pytest.fixture(autouse=True, scope="session")
def _private_cache(tmp_path_factory):
    """Keeps the cache of the person who runs the tests out of them."""
    os.environ["IPAR_SPARSE_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield
    del os.environ["IPAR_SPARSE_CACHE"]


@pytest.fixture(scope="session")
def real_slides() -> Path:
    """Folder of real slides that lies beside the repository on development machines."""
    if not REAL_SLIDES.is_dir():
        pytest.skip("no real slides in ../shared/data")
    return REAL_SLIDES
