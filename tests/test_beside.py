"""A process beside that of a prediction reads its cells and writes the results."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
from anndata import read_h5ad
from scipy import sparse

from ipar_sparse.cli import run_command
from ipar_sparse.cli.beside import put, take
from ipar_sparse.data.notes import Warned
from ipar_sparse.data.slide import Slide
from ipar_sparse.data.values import Values
from ipar_sparse.data.writers import write_slide

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or len(os.sched_getaffinity(0)) < 2, reason="needs Linux and two cores"
)


@pytest.fixture
def command(small_run, small_slides, tmp_path):
    """The words of a prediction that a fresh process runs, and the file that it writes."""
    write_slide(small_slides[2], tmp_path / "cells.h5ad")
    out = tmp_path / "placed.h5ad"
    words = ["predict", str(small_run), str(tmp_path / "cells.h5ad"), "--out", str(out)]
    return [*words, "--device", "cpu", "--quiet"], out


def started(words):
    path = os.pathsep.join(sys.path)
    return subprocess.Popen(
        [sys.executable, "-m", "ipar_sparse", *words],
        env=os.environ | {"PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def children(pid):
    found = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(one) for one in found.read_text().split()] if found.exists() else []


def wait_for(found, seconds=60):
    until = time.monotonic() + seconds
    while not (value := found()) and time.monotonic() < until:
        time.sleep(0.02)
    return value


def ended(pid):
    stat = Path(f"/proc/{pid}/stat")
    try:
        return stat.read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def test_the_file_is_that_of_one_process(command, tmp_path):
    words, out = command
    process = started(words)
    said, errors = process.communicate()
    assert process.returncode == 0, errors
    alone = tmp_path / "alone.h5ad"
    assert run_command([str(alone) if word == str(out) else word for word in words]) == 0
    with h5py.File(out) as one, h5py.File(alone) as other:
        names: list[str] = []
        other.visit(names.append)
        assert "obsm/X_ipar" in names
        for name in names:
            assert dict(one[name].attrs).keys() == dict(other[name].attrs).keys()
            if isinstance(other[name], h5py.Dataset):
                assert one[name].dtype == other[name].dtype
                np.testing.assert_array_equal(one[name][()], other[name][()])
    assert "cells in" in said and list(tmp_path.glob(".*")) == []


def test_what_it_refuses_is_one_line(command, tmp_path):
    words, out = command
    adata = read_h5ad(tmp_path / "cells.h5ad")
    adata.X.data[3] = -1.0
    adata.write_h5ad(tmp_path / "cells.h5ad")
    process = started(words)
    said, errors = process.communicate()
    assert process.returncode == 2 and said == ""
    assert errors.count("\n") == 1 and "values are negative" in errors and not out.exists()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_it_ends_with_the_command(command, tmp_path, how):
    words, _ = command
    process = started(words)
    (other,) = wait_for(lambda: children(process.pid))
    process.send_signal(how)
    _, errors = process.communicate()
    if how == signal.SIGTERM:
        assert process.returncode == 130 and errors.count("\n") == 1
        assert ended(other)
    assert wait_for(lambda: ended(other)), "a process was left behind"
    assert {path.name for path in tmp_path.iterdir()} == {"cells.h5ad"}


def test_the_command_does_without_it(command):
    words, out = command
    process = started(words)
    (other,) = wait_for(lambda: children(process.pid))
    os.kill(other, signal.SIGKILL)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    assert np.isfinite(read_h5ad(out).obsm["X_ipar"]).all()


def test_slides_and_results_arrive_as_they_were_sent():
    matrix = sparse.random(5, 3, 0.5, format="csr", dtype=np.float32, random_state=0)
    names = np.array(["a", "bb", "ç", "d", "e"])
    slide = Slide("s", matrix, np.array(["x", "y", "z"]), names, pos=np.ones((5, 2)), path="p")
    slide.values, slide.notes = Values("log1p", "total", 1e4), ["plain", Warned("grave")]
    slide.gene_columns = {"symbol": np.array(["X", "Y", "Z"])}
    results = {"obs": {"f": np.array([True, False])}, "pos": None, "uns": {"a": np.float32(0.1)}}
    own, other = (end.makefile("rwb") for end in socket.socketpair())
    put(own, [slide])
    put(own, results)
    (found,), back = take(other), take(other)
    for name in ("genes", "cell_names", "pos", "empty", "rows"):
        np.testing.assert_array_equal(getattr(found, name), getattr(slide, name))
        assert getattr(found, name).dtype == getattr(slide, name).dtype
    assert (found.expression != matrix).nnz == 0 and found.expression.dtype == np.float32
    assert (found.name, found.path, found.values) == ("s", "p", slide.values)
    assert found.notes == slide.notes and [type(x) for x in found.notes] == [str, Warned]
    assert list(found.gene_columns["symbol"]) == ["X", "Y", "Z"]
    found.pos[0] = 2.0  # what is received can be written to
    assert back["pos"] is None and back["obs"]["f"].tolist() == [True, False]
    assert type(back["uns"]["a"]) is np.float32 and back["uns"]["a"] == np.float32(0.1)
    with pytest.raises(TypeError):
        put(own, {"names": np.array(["a"], dtype=object)})
    own.close()
    with pytest.raises(EOFError):
        take(other)
