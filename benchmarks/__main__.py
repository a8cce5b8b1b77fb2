"""Times implementations and kernels: ``ipar-sparse benchmark`` with more choice.

python -m benchmarks --tasks forward,backward,step --sizes 384,1300,5000 --out DIR
python -m benchmarks --tasks knn --implementations exact,faiss --sizes 1000,10000 --out DIR
python -m benchmarks --tasks check,order,attention,gate,walk --sizes 1e6 --out DIR
"""

import argparse
from pathlib import Path

import torch

from . import kernels, run


def main(argv: list[str] | None = None) -> None:
    """See the module."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names, cuda = lambda text: text.split(","), torch.cuda.is_available()
    parser.add_argument("--tasks", type=names, default="forward,backward")
    parser.add_argument("--sizes", type=names, default="384,1300,2600,5000", help="cells")
    parser.add_argument("--out", type=Path, default=Path("benchmark"), help="folder")
    parser.add_argument("--device", type=torch.device, default="cuda" if cuda else "cpu")
    parser.add_argument("--implementations", type=names, help="default: all that run here")
    parser.add_argument("--precision", help="default: float32, of kernels bfloat16")
    parser.add_argument("--k", type=int, default=100, help="neighbours of a cell")
    parser.add_argument("--repeats", type=int, default=5, help="timed calls")
    parser.add_argument("--patience", type=float, default=60.0, help="seconds a call may take")
    parser.add_argument("--tune", action="store_true", help="time other tiles of kernels, too")
    given = parser.parse_args(argv)
    sizes = [int(float(size)) for size in given.sizes]
    common = {"k": given.k, "repeats": given.repeats}
    try:
        if set(given.tasks) & set(kernels.TASKS):
            precision = given.precision or "bfloat16"
            kernels.run(
                given.tasks, sizes, given.out, given.device, precision, given.tune, **common
            )
        else:
            what = {"implementations": given.implementations, "patience": given.patience}
            precision = given.precision or "float32"
            run(given.tasks, sizes, given.out, given.device, precision=precision, **what, **common)
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
