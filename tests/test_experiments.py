"""The studies in experiments/: they can be read, and every variant differs from its reference."""

from pathlib import Path

import pytest

from ipar_sparse.config import PRESETS
from ipar_sparse.evaluation.study_plan import load_variants

STUDIES = sorted((Path(__file__).parents[1] / "experiments").glob("*.yaml"))


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_variants_differ_from_the_reference_of_their_study(path):
    variants, said = load_variants([], [path])
    reference = variants.pop(said["reference"])
    assert variants
    for name, config in variants.items():
        changed = config.model_dump(exclude={"preset"})
        assert changed != reference.model_dump(exclude={"preset"}), name


def test_every_preset_is_in_a_study():
    assert set(PRESETS) <= {name for path in STUDIES for name in load_variants([], [path])[0]}
