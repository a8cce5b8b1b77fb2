"""What importing the lower rooms costs, and that the package's lazy names are there."""

import json
import os
import subprocess
import sys

import pytest

import ipar_sparse
from ipar_sparse.data.writers import write_slide

ROOMS = {"geometry", "graph", "nn", "ops"}
PROBE = "import json, sys; print(json.dumps(sorted(sys.modules)))"


def modules_after(statement):
    """Modules that a fresh process has loaded after an import statement."""
    found = subprocess.run(
        [sys.executable, "-c", f"{statement}; {PROBE}"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    return set(json.loads(found.stdout.splitlines()[-1]))


@pytest.mark.parametrize(
    ("room", "cost"),
    [
        ("graph", "import torch"),
        ("ops", "import torch"),
        ("nn", "import torch, torch_geometric.nn"),
    ],
)
def test_importing_a_room_loads_torch_and_pyg_alone(room, cost):
    loaded = modules_after(f"import ipar_sparse.{room}") - modules_after(cost)
    packages = {name.partition(".")[0] for name in loaded}
    assert packages - sys.stdlib_module_names == {"ipar_sparse"}
    rooms = {name.split(".")[1] for name in loaded if name.startswith("ipar_sparse.")}
    assert room in rooms and rooms <= ROOMS | {"distributed", "errors", "ticks"}


def test_what_pyg_loads_without_need_loads_once_it_is_used():
    loaded = modules_after("import ipar_sparse.nn")
    heavy = {"torch._dynamo.eval_frame", "torch_geometric.datasets.planetoid"}
    assert not heavy & loaded
    used = (
        "import ipar_sparse.nn, torch; from torch_geometric.datasets import Planetoid; "
        "import torch_geometric; assert torch_geometric.datasets.Planetoid is Planetoid; "
        "compiled = torch.compile(lambda x: x + 1, backend='eager'); "
        "assert compiled(torch.ones(2)).tolist() == [2, 2]"
    )
    assert heavy <= modules_after(used)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_prediction_loads_no_more_than_it_needs(small_run, small_slides, tmp_path, device):
    write_slide(small_slides[2], tmp_path / "cells.h5ad")
    words = ["predict", str(small_run), str(tmp_path / "cells.h5ad"), "--out"]
    words += [str(tmp_path / "placed.h5ad"), "--device", device]
    loaded = modules_after(f"import ipar_sparse.cli as cli; assert not cli.run_command({words})")
    assert "ipar_sparse.layout.refinement" in loaded
    unneeded = {"sympy", "torch._dynamo", "torch_geometric.datasets", "scipy.stats", "sklearn"}
    unneeded |= {"anndata", "pandas", "dask"}  # another process reads and writes
    assert not unneeded & loaded


def test_the_compiler_of_torch_does_not_load_what_pyg_left_out():
    loaded = modules_after("import ipar_sparse.nn, torch._dynamo")
    assert "torch._dynamo.eval_frame" in loaded
    assert "torch_geometric.datasets.planetoid" not in loaded


def test_threads_may_make_optimisers_at_once():
    modules_after(
        "import ipar_sparse.nn, torch; from concurrent.futures import ThreadPoolExecutor; "
        "from threading import Barrier; barrier, linear = Barrier(4), torch.nn.Linear(2, 2); "
        "make = lambda _: (barrier.wait(), torch.optim.AdamW(linear.parameters())); "
        "assert len(list(ThreadPoolExecutor(4).map(make, range(4)))) == 4"
    )


@pytest.mark.parametrize("name", sorted(set(ipar_sparse.__all__) - {"__version__"}))
def test_names_of_the_package_resolve(name):
    assert getattr(ipar_sparse, name) is not None
