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

HANG = 300  # seconds after which a command is taken to hang, on a machine that is busy, too
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


class _Odd:
    """Parts of odd AnnData files: texts and numbers of hypothesis, put in places by chance.

    Chance is not hypothesis's, which draws the least likely things as often as the likely.
    """

    def __init__(self, seed: int, texts: list[str], numbers: list[float]):
        self.rng = np.random.default_rng(seed)
        self.texts, self.numbers = [*ODD_NAMES, *texts], [-3.0, np.nan, np.inf, *numbers]

    def pick(self, options):
        return options[int(self.rng.integers(len(options)))]

    def chance(self, one_in: int) -> bool:
        return int(self.rng.integers(one_in)) == 0

    def values(self, n: int, g: int):
        """A matrix (n, g) of counts or what stands for them, in some type and format."""
        values = self.rng.poisson(2.0, (n, g)).astype(np.float64)
        kind = self.pick(["counts"] * 12 + ["zeros", "odd", "odd", "huge", "tiny", "empty"])
        if kind == "zeros":
            values[:] = 0
        elif kind == "huge":
            values *= 10.0 ** self.pick([30, 38, 300])
        elif kind == "tiny":
            values *= 1e-40
        elif kind == "empty":
            values[: n // 2] = 0
        elif kind == "odd" and values.size:
            values.flat[self.rng.integers(values.size)] = self.pick(self.numbers)
        if self.chance(3):
            values = np.log1p(np.abs(values))
        dtype = self.pick(["f4"] * 6 + ["f8"] * 3 + ["i8", "u1", "i2", "f2", "?", "c8"])
        with np.errstate(all="ignore"):
            values = values.astype(dtype)
        form = self.pick([np.asarray, sparse.csr_matrix, sparse.csc_matrix])
        return values if dtype in ("f2", "c8") else form(values)

    def names(self, known: list[str], n: int) -> np.ndarray:
        """``n`` names, most of them known, some odd, perhaps one twice."""
        names = np.array([*known[:n], *(f"more{i}" for i in range(len(known), n))], dtype=object)
        if n and self.chance(3):
            for _ in range(int(self.rng.integers(1, 4))):
                names[self.rng.integers(n)] = self.pick(self.texts)
        if n > 1 and self.chance(10):
            names[1] = names[0]
        return names

    def column(self, n: int):
        """A column of obs."""
        labels = [self.pick(self.texts) for _ in range(int(self.rng.integers(1, 4)))]
        text = np.array([labels[i % len(labels)] for i in range(n)], dtype=object)
        kind = self.pick(["text", "category", "float", "int", "bool", "nullable", "hole", "time"])
        if kind == "category":
            return pd.Categorical(text)
        if kind == "nullable":
            return pd.array([None if i % 3 == 0 else i for i in range(n)], dtype="Int64")
        if kind == "hole":
            return pd.Categorical([None if i % 4 == 0 else value for i, value in enumerate(text)])
        numbers = np.where(self.rng.random(n) < 0.2, np.nan, self.pick(self.numbers))
        return {
            "float": numbers,
            "int": self.rng.integers(0, 3, n),
            "bool": self.rng.random(n) < 0.5,
            "text": text,
            "time": pd.Categorical(pd.to_datetime(self.rng.integers(0, 2, n)).astype(str)),
        }[kind]

    def positions(self, n: int, names: pd.Index):
        """What stands where positions are expected."""
        pos = self.rng.normal(size=(n, self.pick([2] * 8 + [3, 3, 0, 1, 5])))
        pos *= 10.0 ** self.pick([0] * 6 + [-30, 30, 300])
        kind = self.pick(["fine"] * 5 + ["odd", "same", "line", "int", "frame", "sparse", "copies"])
        if kind == "odd" and pos.size:
            pos.flat[self.rng.integers(pos.size)] = self.pick(self.numbers)
        elif kind == "same":
            pos[:] = 3.0
        elif kind == "line":
            pos[:, :1] = 0.0
        elif kind == "copies":
            pos[: n // 2] = 0.0
        elif kind == "int":
            pos = np.clip(pos, -1e6, 1e6).astype(np.int32)
        elif kind == "frame":
            return pd.DataFrame(pos, index=names).rename(columns=str)
        return sparse.csr_matrix(pos) if kind == "sparse" else pos


@st.composite
def odd_anndata(draw, genes: list[str]):
    """An AnnData object of odd values, names, types and shapes, and a command for it.

    Args:
        genes: of the run that is to place it.

    Returns:
        The object, the command, its slide key and layer if any, and the suffix of the file.
    """
    text = st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), max_size=8)
    numbers = st.lists(st.floats(), max_size=3)
    odd = _Odd(draw(st.integers(0, 2**32 - 1)), draw(st.lists(text, max_size=4)), draw(numbers))
    n = odd.pick([0, 1, 2, 3, 14, 15, 16, *range(17, 61)])
    g = odd.pick([len(genes)] * 8 + [len(genes) + 20, 50, 25, 10, 1, 0])
    cells = pd.Index(odd.names([f"c{i}" for i in range(n)], n), dtype=object)
    obs = pd.DataFrame(index=cells)
    for key in ("slide", "layer", "µm", odd.pick(odd.texts).replace("/", "|") or "empty"):
        if odd.chance(2):
            obs[key] = odd.column(n)
    var = pd.DataFrame(index=pd.Index(odd.names(genes, g), dtype=object))
    adata = anndata.AnnData(X=None if odd.chance(20) else odd.values(n, g), obs=obs, var=var)
    if not odd.chance(4):
        adata.obsm["spatial"] = odd.positions(n, adata.obs_names)
    layer = None
    if odd.chance(8):
        layer = odd.pick(["counts", "raw", "odd"])
        if adata.X is not None and not odd.chance(4):
            adata.layers[layer] = odd.values(n, g)
    if odd.chance(12):
        adata.uns["ipar"] = {"odd": np.array([1.0]), "text": "x"}
        adata.obsm["X_ipar"] = np.zeros((n, 2))
    if odd.chance(8) and adata.X is not None:
        adata.raw = adata.copy()
    command = odd.pick(["predict"] * 6 + ["evaluate", "train", "embed", "check"])
    key = "slide" if "slide" in obs and odd.chance(3) else None
    return adata, command, key, layer, odd.pick(["h5ad", "h5ad", "h5ad", "zarr"])


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
