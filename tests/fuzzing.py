"""Odd AnnData files, damage to good ones, and what a command line makes of them."""

import contextlib
import io
import json
import os
import signal
import time
from pathlib import Path

import anndata
import h5py
import numpy as np
import pandas as pd
from hypothesis import strategies as st
from scipy import sparse

HANG = 60  # seconds after which a command is taken to hang
SLACK = 64 << 20  # bytes that allocators keep

ODD_NAMES = [
    "",
    " ",
    "a/b",
    "..",
    "../../x",
    "<b>x</b>",
    "β-actin",
    "名",
    "x" * 300,
    "nan",
    "\x1b[2J",
]


class Hang(BaseException):
    """A command took too long."""


def _alarm(number, frame):
    raise Hang


def _memory(name: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith(name))


def measured(argv) -> tuple[int | str, str, int]:
    """Exit code of a command line, or how else it ended, what it said, and bytes it took."""
    from ipar_sparse.cli import run_command

    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak is counted from here
    before, said = _memory("VmRSS"), io.StringIO()
    handler = signal.signal(signal.SIGALRM, _alarm)
    signal.alarm(HANG)
    code: int | str
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            code = run_command([str(word) for word in argv])
    except Hang:
        code = "hangs"
    except BaseException as error:
        code = f"raises {type(error).__name__}: {error}"
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
    return code, said.getvalue(), _memory("VmHWM") - before


def wrong_with(argv, allowed: int) -> str | None:
    """What is wrong with how a command line ends; None if nothing.

    Args:
        argv: its words.
        allowed: bytes that it may honestly take.
    """
    code, text, used = measured(argv)
    if isinstance(code, str):
        return code
    errors = [line for line in text.splitlines() if line.startswith("error: ")]
    if code not in (0, 2) or "Traceback" in text:
        return f"exit {code}: {text.strip()[-300:]}"
    if code == 2 and len(errors) != 1:
        return f"exit 2 with {len(errors)} lines: {text[-200:]}"
    if used > 2 * allowed + SLACK:
        return f"takes {used >> 20} MiB, {allowed >> 20} MiB would be honest"
    return None


def _values(draw, rng, n, g):
    kind = draw(st.sampled_from(["counts"] * 4 + ["zeros", "nan", "inf", "minus", "huge", "tiny"]))
    values = rng.poisson(2.0, (n, g)).astype(np.float64)
    if kind == "zeros":
        values[:] = 0
    elif kind == "huge":
        values *= 10.0 ** draw(st.sampled_from([30, 38, 300]))
    elif kind == "tiny":
        values *= 1e-40
    elif kind != "counts" and values.size:
        values.flat[rng.integers(values.size)] = {"nan": np.nan, "inf": np.inf, "minus": -3}[kind]
    if draw(st.booleans()):
        values = np.log1p(np.abs(values))
    dtype = draw(st.sampled_from("f4 f4 f8 i8 u1 i2 f2 ? c8".split()))
    with np.errstate(all="ignore"):
        values = values.astype(dtype)
    form = draw(st.sampled_from(["dense", "csr", "csc"]))
    if form != "dense" and dtype not in ("f2", "c8"):
        values = (sparse.csr_matrix if form == "csr" else sparse.csc_matrix)(values)
    return values


def _names(draw, base, n):
    names = [str(base[i % len(base)]) if i < len(base) else f"more{i}" for i in range(n)]
    for odd in draw(st.lists(st.sampled_from(ODD_NAMES), max_size=3)):
        if n:
            names[draw(st.integers(0, n - 1))] = odd
    if n > 1 and draw(st.integers(0, 5)) == 0:
        names[1] = names[0]
    return np.array(names, dtype=object)


def _column(draw, rng, n):
    labels = draw(st.lists(st.sampled_from([*ODD_NAMES, "a", "b"]), min_size=1, max_size=4))
    text = np.array([labels[i % len(labels)] for i in range(n)], dtype=object)
    kind = draw(st.sampled_from(["text", "category", "float", "int", "bool", "nullable", "hole"]))
    if kind == "category":
        return pd.Categorical(text)
    if kind == "nullable":
        return pd.array([None if i % 3 == 0 else i for i in range(n)], dtype="Int64")
    if kind == "hole":
        return pd.Categorical([None if i % 4 == 0 else value for i, value in enumerate(text)])
    numbers = {"float": np.where(rng.random(n) < 0.2, np.nan, 1e300), "int": rng.integers(0, 3, n)}
    return {**numbers, "bool": rng.random(n) < 0.5, "text": text}[kind]


def _positions(draw, rng, n):
    columns = draw(st.sampled_from([2, 2, 2, 3, 0, 1, 5]))
    pos = rng.normal(size=(n, columns)) * 10.0 ** draw(st.sampled_from([0, 0, -30, 30, 300]))
    kind = draw(st.sampled_from(["fine", "fine", "nan", "same", "line", "int", "frame", "sparse"]))
    if kind == "nan" and pos.size:
        pos.flat[0] = np.nan
    elif kind == "same":
        pos[:] = 3.0
    elif kind == "line":
        pos[:, :1] = 0.0
    elif kind == "int":
        pos = np.clip(pos, -1e6, 1e6).astype(np.int32)
    elif kind == "sparse":
        return sparse.csr_matrix(pos)
    return pos


@st.composite
def odd_anndata(draw, genes):
    """An AnnData object of odd values, names, types and shapes, and a command for it."""
    rng = np.random.default_rng(draw(st.integers(0, 2**31)))
    n = draw(st.sampled_from([0, 1, 2, 3, 14, 15, 16, 40, 40, 40, 60, 60]))
    g = draw(st.sampled_from([0, 1, 2, 10, len(genes), len(genes), len(genes), len(genes) + 20]))
    cells, columns = _names(draw, [f"c{i}" for i in range(n)] or [""], n), _names(draw, genes, g)
    obs = pd.DataFrame(index=pd.Index(cells, dtype=object))
    for key in draw(st.lists(st.sampled_from(["slide", "layer", "µm", "a b"]), max_size=3)):
        obs[key] = _column(draw, rng, n)
    adata = anndata.AnnData(
        X=None if draw(st.integers(0, 15)) == 0 else _values(draw, rng, n, g),
        obs=obs,
        var=pd.DataFrame(index=pd.Index(columns, dtype=object)),
    )
    if draw(st.integers(0, 3)):
        pos = _positions(draw, rng, n)
        if isinstance(pos, np.ndarray) and draw(st.integers(0, 9)) == 0:
            pos = pd.DataFrame(pos, index=adata.obs_names).rename(columns=str)
        adata.obsm["spatial"] = pos
    if draw(st.integers(0, 4)) == 0 and adata.X is not None:
        adata.layers["counts"] = _values(draw, rng, n, g)
    if draw(st.integers(0, 6)) == 0:
        adata.uns["ipar"] = {"odd": np.array([1.0]), "text": "x"}
        adata.obsm["X_ipar"] = np.zeros((n, 2))
    command = draw(st.sampled_from(["predict"] * 6 + ["evaluate", "train", "embed", "check"]))
    key = draw(st.sampled_from([None, None, None, "slide"]))
    layer = draw(st.sampled_from([None, None, None, None, "counts", "raw"]))
    return adata, command, key, layer, draw(st.sampled_from(["h5ad", "h5ad", "h5ad", "zarr"]))


def flip_bytes(path: Path, rng) -> None:
    """Some bytes of a file become others, or are lost at its end or in its middle."""
    data = bytearray(path.read_bytes())
    kind = rng.integers(4)
    if kind == 0:
        del data[int(rng.integers(len(data))) :]
    elif kind == 1:
        begin = int(rng.integers(len(data)))
        end = min(len(data), begin + int(rng.integers(1, 4096)))
        data[begin:end] = bytes(end - begin)
    else:
        # half of the flips hit the first pages, where the structure of a file is
        reach = len(data) if kind == 2 else min(len(data), 8192)
        for place in rng.integers(reach, size=int(rng.integers(1, 60))):
            data[place] = int(rng.integers(256))
    path.write_bytes(bytes(data))


def mangle_hdf5(path: Path, rng) -> None:
    """A sound HDF5 file, some of whose elements are missing or are others than they should be."""
    with h5py.File(path, "r+") as file:
        names: list[str] = []
        file.visit(names.append)
        for _ in range(int(rng.integers(1, 3))):
            name = names[int(rng.integers(len(names)))]
            if name not in file:
                continue
            kind = rng.integers(6)
            attrs = list(file[name].attrs)
            if kind == 0:
                del file[name]
            elif kind == 1 and attrs:
                del file[name].attrs[attrs[int(rng.integers(len(attrs)))]]
            elif kind == 2 and attrs:
                odd = [-1, 2**62, "odd", np.array([3, 4, 5]), np.nan][int(rng.integers(5))]
                file[name].attrs[attrs[int(rng.integers(len(attrs)))]] = odd
            else:
                data = [
                    np.array([], dtype="f4"),
                    np.full(7, -9, dtype="i8"),
                    np.zeros((2, 2, 2)),
                    np.array(["x", "ü"], dtype=object),
                    np.float32(np.nan),
                ][int(rng.integers(5))]
                del file[name]
                text = getattr(data, "dtype", None) is np.dtype(object)
                file.create_dataset(name, data=data, dtype=h5py.string_dtype() if text else None)


ODD_VALUES = [
    None,
    True,
    -1,
    0,
    10**9,
    10**30,
    1e308,
    float("nan"),
    "",
    "odd",
    "cuda",
    [],
    {},
    [[]],
]


def mangle_tree(values, rng):
    """Nested plain values, one of which is missing or another."""
    places: list[tuple] = []

    def walk(node):
        for key in node if isinstance(node, dict) else range(len(node)):
            places.append((node, key))
            if isinstance(node[key], dict | list):
                walk(node[key])

    walk(values)
    for _ in range(int(rng.integers(1, 3))):
        node, key = places[int(rng.integers(len(places)))]
        if isinstance(node, dict) and rng.integers(4) == 0:
            node.pop(key, None)
        elif isinstance(node, dict) or key < len(node):
            node[key] = ODD_VALUES[int(rng.integers(len(ODD_VALUES)))]
    return values


def mangle_run(run: Path, rng) -> str:
    """Damages one file of a run; returns its name."""
    from safetensors import safe_open
    from safetensors.numpy import save_file

    files = ["model.safetensors", "config.json", "inputs.json", "requested.yaml", "selection.json"]
    name = files[int(rng.choice(5, p=[0.4, 0.25, 0.2, 0.1, 0.05]))]
    path = run / name
    kind = int(rng.integers(3))
    if kind == 0 or (kind == 1 and name == "requested.yaml"):
        flip_bytes(path, rng)
    elif name.endswith(".safetensors"):
        with safe_open(path, "np") as file:
            header, tensors = file.metadata(), {k: file.get_tensor(k) for k in file.keys()}
        if kind == 1:
            document = mangle_tree(json.loads(header["document"]), rng)
            header["document"] = json.dumps(document)
        else:
            key = list(tensors)[int(rng.integers(len(tensors)))]
            tensors[key] = [np.zeros((0,), "f4"), np.ones((3, 3), "f8")][int(rng.integers(2))]
        save_file(tensors, path, metadata=header)
    elif name.endswith(".json"):
        path.write_text(json.dumps(mangle_tree(json.loads(path.read_text()), rng)))
    else:
        text = path.read_text()
        odd = ["\nx: [", "\na: &a [*a]", "\n2001-99-99: 1", "\t", "\n!!python/object:os.x {}"]
        path.write_text(text + odd[int(rng.integers(5))])
    return name


def batch(work, number, count, log):
    """Does cases one after another in this process, and keeps their outcomes, in a file, as JSON.

    Args:
        work: seed to a description of what is wrong, or None.
        number: of the first case.
        count: of cases.
        log: the file; a line when a case begins, and one when it has ended.
    """
    with open(log, "a", buffering=1) as file:
        for seed in range(number, count):
            file.write(json.dumps({"begun": seed}) + "\n")
            begin = time.monotonic()
            wrong = work(seed)
            seconds = round(time.monotonic() - begin, 2)
            file.write(json.dumps({"done": seed, "wrong": wrong, "seconds": seconds}) + "\n")
    os._exit(0)
