"""The documentation leads somewhere, and what is shown of a package elsewhere does too."""

import ast
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("docs", "data", "experiments")
PAGES = sorted(page for name in FOLDERS for page in (ROOT / name).rglob("*.md"))
PAGES = [page for page in PAGES if "_build" not in page.parts]
PAGES += [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
    for link in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
        if not link.startswith(("http:", "https:")):
            assert (page.parent / link).exists(), link


def test_every_page_is_in_the_table_of_contents():
    index = (ROOT / "docs" / "index.md").read_text()
    listed = re.findall(r"^([a-zA-Z_/]+)$", index, flags=re.M)
    folders = {
        page.relative_to(ROOT / "docs").with_suffix("") for page in PAGES if "docs" in page.parts
    }
    deeper = {str(page) for page in folders if page.parts[0] != "api" and len(page.parts) > 1}
    assert deeper <= set(listed)
    assert all((ROOT / "docs" / f"{name}.md").is_file() for name in listed if name != "hidden")


def test_the_description_of_a_wheel_needs_no_other_file():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    text = (ROOT / project["readme"]).read_text()
    assert not re.findall(r"\]\((?!https?:)", text) and "<img" not in text


@pytest.mark.parametrize("page", sorted((ROOT / "docs").rglob("*.md")), ids=lambda page: page.stem)
def test_code_that_pages_execute_is_python(page):
    for code in re.findall(r"```\{code-cell\} python\n(.*?)```", page.read_text(), flags=re.S):
        ast.parse(re.sub(r"^:tags:.*", "", code))
