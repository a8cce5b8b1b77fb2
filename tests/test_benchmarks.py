"""The benchmark measures what it says, and skips what will not fit."""

import json

import pytest
import torch

from benchmarks import compare


def test_small_sizes_are_measured_and_reported(tmp_path, capsys):
    rows = compare.run(
        [60], tmp_path, "cpu", k=8, works=["step"], repeats=1,
        implementations=["pyg", "chunked"],
    )  # fmt: skip
    assert [(r["implementation"], r["work"]) for r in rows] == [
        ("pyg", "step"), ("chunked", "step"),
    ]  # fmt: skip
    assert all(r["seconds"] > 0 and r["peak_bytes"] >= 0 for r in rows)
    saved = json.loads((tmp_path / "benchmark.json").read_text())
    assert saved["rows"] == rows and saved["machine"]["device"]
    assert (tmp_path / "benchmark.png").stat().st_size > 10_000
    assert "60  step" in capsys.readouterr().out


def test_what_will_not_fit_is_skipped_beforehand(tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "free_memory", lambda device: 2**20)
    measured = []
    monkeypatch.setattr(compare, "_measure", lambda *a: measured.append(a) or {})
    rows = compare.run([50], tmp_path, "cpu", k=8, implementations=["dense"])
    assert not measured
    assert all("needs about" in row["skipped"] for row in rows)


def test_the_estimate_scales_with_pairs_or_edges():
    assert compare._estimate("dense", 200, 10, (100, 5)) == 20
    assert compare._estimate("chunked", 200, 10, (100, 5)) == 10


def test_a_problem_has_neighbours_worth_finding(tmp_path):
    compare.make_problem(300, 10, 0, tmp_path / "p.pt", "cpu")
    saved = torch.load(tmp_path / "p.pt", weights_only=True)
    near = (saved["pos"][saved["index"].long()] - saved["pos"].unsqueeze(1)).norm(dim=-1).mean()
    assert float(near) < 0.5 * float(torch.pdist(saved["pos"]).mean())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"works": ["nap"]}, "nap"),
        ({"implementations": ["x"]}, "x"),
        ({"precision": "int3"}, "int3"),
    ],
)
def test_unknown_names_are_refused(tmp_path, given, message):
    with pytest.raises(ValueError, match=message):
        compare.run([10], tmp_path, "cpu", **given)
    assert not list(tmp_path.iterdir())
