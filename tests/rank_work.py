"""What the tests of several ranks compute on each: ``python -m tests.rank_work NAME OUT``."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ipar_sparse import distributed as ranks
from ipar_sparse.errors import UserError


def exchange() -> dict[str, Any]:
    """What every exchange gives."""
    number, layer = ranks.rank(), torch.nn.Linear(2, 1)
    layer.weight.data.fill_(float(number))
    ranks.alike({"layer": layer})
    errors = []
    for compute in (lambda: ranks.agree("slides", f"file{number}"), lambda: _fail_on_last()):
        try:
            compute()
        except UserError as error:
            errors.append(str(error))
    return {
        "gathered": ranks.gathered(number),
        "first": ranks.from_first(number + 7),
        "largest": ranks.largest(number, -number),
        "summed": ranks.summed(torch.tensor([1.0, number])).tolist(),
        "alike": layer.weight.flatten().tolist(),
        "shared_out": ranks.shared_out([10, 11, 12], lambda one: (one, ranks.rank())),
        "shares": ranks.gathered([*ranks.share_of(3)]),
        "errors": errors,
        "told_by": sum(ranks.gathered(ranks.tells())),
    }


def _fail_on_last() -> None:
    def compute(one: int) -> int:
        if ranks.rank():
            raise UserError(f"item {one} failed")
        return one

    ranks.shared_out([1, 2], compute)


WORK: dict[str, Callable[[], Any]] = {"exchange": exchange}


if __name__ == "__main__":
    name, out = sys.argv[1:]
    with ranks.joined("cpu"):
        found = ranks.gathered(WORK[name]())
    if ranks.leads():
        Path(out).write_text(json.dumps(found))
