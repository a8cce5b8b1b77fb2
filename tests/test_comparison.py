"""The statistics of a study: means, deviations, paired differences, and what is said of them."""

import math

import numpy as np
import pytest

from ipar_sparse.evaluation.comparison import Record, compare
from ipar_sparse.report.study_tables import findings


def records(values, method, role="variant", metric="distance_spearman"):
    """Records of one method from a table of slides x seeds."""
    return [
        Record(method, role, f"s{i}", j, metric, float(v))
        for i, line in enumerate(values)
        for j, v in enumerate(line)
    ]


def test_means_and_paired_differences_are_those_by_hand():
    ours = np.array([[0.5, 0.6], [0.3, 0.3], [0.7, 0.9]])
    theirs = np.array([[0.4, 0.4], [0.3, 0.2], [0.5, 0.8]])
    weak = np.zeros((3, 2))
    found = compare(
        [
            *records(theirs, "ridge", "baseline"),
            *records(weak, "random", "baseline"),
            *records(ours, "v1"),
            *records(ours - 0.5, "v2"),
        ],
        "v1",
    )
    own = found.of("distance_spearman", "v1")
    assert own.mean == pytest.approx(0.55)
    assert own.sd == pytest.approx(np.std([0.5, 0.6], ddof=1))  # of the means of each seed
    assert own.se == pytest.approx(np.std([0.55, 0.3, 0.8], ddof=1) / math.sqrt(3))
    gap = own.vs_baseline
    per_slide = [0.15, 0.05, 0.15]
    assert gap.other == "ridge" and (gap.over, gap.count) == ("slides", 3)
    assert gap.mean == pytest.approx(np.mean(per_slide))
    assert gap.se == pytest.approx(np.std(per_slide, ddof=1) / math.sqrt(3))
    assert gap.verdict == "better"
    assert own.vs_reference is None
    assert found.of("distance_spearman", "v2").vs_reference.mean == pytest.approx(-0.5)
    assert found.of("distance_spearman", "v2").vs_reference.verdict == "worse"
    assert list(found.roles) == ["v1", "v2", "ridge", "random"]


def test_lower_is_better_where_it_is():
    low, high = np.full((3, 1), 0.2) + [[0], [0.01], [0.02]], np.full((3, 1), 0.6)
    found = compare(
        [
            *records(low, "v1", metric="procrustes"),
            *records(high, "a", "baseline", "procrustes"),
            *records(high + 0.1, "b", "baseline", "procrustes"),
        ],
        "v1",
    )
    assert found.best_baseline["procrustes"] == "a"
    assert found.of("procrustes", "v1").vs_baseline.verdict == "better"


def test_a_difference_within_the_noise_has_no_verdict():
    values = np.array([[0.5], [0.3], [0.7]])
    noisy = values + [[0.2], [-0.2], [0.1]]
    found = compare([*records(values, "v1"), *records(noisy, "v2")], "v1")
    assert found.of("distance_spearman", "v2").vs_reference.verdict == ""
    two = compare([*records(values[:2], "v1"), *records(values[:2] + 0.1, "v2")], "v1")
    gap = two.of("distance_spearman", "v2").vs_reference
    assert gap.se == pytest.approx(0, abs=1e-12) and gap.verdict == ""


def test_a_metric_without_a_direction_is_different_at_most():
    values = np.array([[0.1], [0.11], [0.12]])
    shape = {"metric": "lambda_ratio"}
    found = compare([*records(values, "v1", **shape), *records(values + 0.5, "v2", **shape)], "v1")
    assert found.of("lambda_ratio", "v2").vs_reference.verdict == "different"
    assert not found.best_baseline


def test_one_slide_is_compared_over_seeds_and_missing_runs_are_left_out_in_pairs():
    ours, theirs = np.array([[0.5, 0.6, 0.8]]), np.array([[0.4, 0.4, 0.5]])
    found = compare([*records(theirs, "v1"), *records(ours, "v2")], "v1")
    gap = found.of("distance_spearman", "v2").vs_reference
    assert (gap.over, gap.count) == ("seeds", 3)
    assert gap.se == pytest.approx(np.std([0.1, 0.2, 0.3], ddof=1) / math.sqrt(3))
    some = [r for r in records(ours, "v2") if r.seed != 2]
    gap = compare([*records(theirs, "v1"), *some], "v1").of("distance_spearman", "v2").vs_reference
    assert gap.count == 2 and gap.mean == pytest.approx(0.15)
    lost = [*some, Record("v2", "variant", "s0", 2, "distance_spearman", math.nan)]
    again = compare([*records(theirs, "v1"), *lost], "v1")
    assert again.of("distance_spearman", "v2").vs_reference == gap


def test_findings_name_the_best_baseline():
    ours = np.array([[0.5], [0.3], [0.7]])
    found = compare(
        [
            *records(ours, "v1"),
            *records(ours - 0.2, "ridge", "baseline"),
            *records(ours - 0.1, "v2"),
        ],
        "v1",
    )
    first, second = findings(found)
    assert "0.500, better than the best baseline, ridge (0.300" in first
    assert second == "v2 against v1: worse on Distance correlation (Spearman)."


def test_findings_of_two_slides_claim_nothing():
    ours = np.array([[0.5], [0.3]])
    found = compare([*records(ours, "v1"), *records(ours - 0.2, "ridge", "baseline")], "v1")
    assert "on too few slides to tell from the best baseline" in findings(found)[0]
