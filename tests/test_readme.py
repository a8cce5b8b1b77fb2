"""What the README and the docs show must run."""

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
FOLDERS = ("docs", "data", "experiments")
PAGES = [ROOT / "README.md", *(page for name in FOLDERS for page in (ROOT / name).rglob("*.md"))]
SHOWN = r"(?:^\s*|`)ipar-sparse ([a-z][a-z-]*)((?:[^\n`]*\\\n)*[^\n`]*)"
"""A command with its options: at the start of a line, going on after backslashes, or in `code`."""


def test_the_notebook_of_the_readme_runs(small_slides, tmp_path, monkeypatch):
    pytest.importorskip("anndata")
    from small_run import small_config

    from ipar_sparse.data.writers import to_anndata

    code, _ = re.findall(r"```python\n(.*?)```", README, flags=re.S)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    slides = [to_anndata(slide) for slide in small_slides]
    names = dict(zip(("slide_a", "slide_b", "slide_c", "slide_d"), slides, strict=True))
    names |= {"cells": slides[3].copy(), "quick": small_config("train.epochs=1")}
    exec(
        compile(code.replace("val=slide_c", "val=slide_c, config=quick"), "README.md", "exec"),
        names,
    )
    assert names["cells"].obsm["X_ipar"].shape == (140, 2)
    assert names["scores"].index[0] == "model"
    assert (tmp_path / "run" / "config.json").is_file()


def test_the_layers_of_the_readme_run():
    _, code = re.findall(r"```python\n(.*?)```", README, flags=re.S)
    names: dict = {}
    exec(compile(code.replace("5000", "150"), "README.md", "exec"), names)
    assert names["pos"].shape == (150, 2) and bool(torch.isfinite(names["pos"]).all())
    assert names["s"].shape == (150, 96)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_options_and_settings_that_are_shown_exist(page):
    pytest.importorskip("typer")
    import typer

    from ipar_sparse.cli import app
    from ipar_sparse.config import describe

    settings = {setting.key for setting in describe()}
    assert set(re.findall(r"--set\s+([a-z_.]+)=", page.read_text())) <= {*settings, "section.key"}
    commands = typer.main.get_command(app).commands
    shown = re.findall(SHOWN, page.read_text(), flags=re.M)
    assert shown or page.name != "README.md"
    for name, rest in shown:
        options = {o for p in commands[name].params for o in (*p.opts, *p.secondary_opts)}
        for option in re.findall(r"(?<=\s)--[a-z-]+", re.sub("#.*", "", rest)):
            assert option in options, f"ipar-sparse {name} has no {option}"


def test_it_is_short():
    prose = re.sub(r"```.*?```|^\|.*?$|\]\([^)]*\)", "", README, flags=re.S | re.M)
    assert len(re.findall(r"\S*\w\S*", prose)) < 500


def test_its_files_exist():
    for path in re.findall(r"`((?:docs|data|experiments|benchmarks|ipar_sparse)/[^`]*)`", README):
        assert (ROOT / path).exists(), path
    for picture in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", README):
        assert (ROOT / picture).is_file(), picture
