"""What a run survives: kills, full disks, vanished inputs, damaged files."""

import pytest

from ipar_sparse.inference.run_folder import BEST, LAST, read_meta

pytestmark = pytest.mark.trust


def test_the_shared_run_is_whole(trust_run):
    assert read_meta(trust_run / LAST)["stage"] == "model"
    assert read_meta(trust_run / BEST)["best"] is not None
