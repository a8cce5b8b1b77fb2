"""What the README shows must run."""

import re
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_python_of_the_readme_runs():
    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.S)
    names: dict = {}
    exec(compile(code.replace("5000", "150"), "README.md", "exec"), names)
    assert names["pos"].shape == (150, 2) and bool(torch.isfinite(names["pos"]).all())
    assert names["s"].shape == (150, 96)


def test_its_commands_and_options_exist():
    import pytest

    pytest.importorskip("typer")
    import typer

    from ipar_sparse.cli import app

    commands = typer.main.get_command(app).commands
    lines = re.findall(r"^\s*ipar-sparse (\S+)(.*)$", README, flags=re.M)
    assert len(lines) >= 8
    for name, rest in lines:
        options = {o for p in commands[name].params for o in (*p.opts, *p.secondary_opts)}
        for option in re.findall(r"(?<=\s)--[a-z-]+", rest.split("#")[0]):
            assert option in options, f"ipar-sparse {name} has no {option}"


def test_its_files_exist():
    for path in re.findall(r"`((?:docs|data|experiments|benchmarks|ipar_sparse)/[^`]*)`", README):
        assert (ROOT / path).exists(), path
    for picture in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", README):
        assert (ROOT / picture).is_file(), picture
