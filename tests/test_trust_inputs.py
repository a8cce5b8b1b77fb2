"""Inputs that a user may get wrong are undone and told, warned of, or refused in one line."""

import re

import pytest
from trust_rows import ROWS, Bench, summary

pytestmark = pytest.mark.trust


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return Bench(tmp_path_factory.mktemp("inputs"))


@pytest.mark.parametrize("text", ROWS)
def test_what_comes_of_an_input(bench, text, trust_row):
    row = ROWS[text]
    told = row.act(bench)
    trust_row(text, summary(told).replace(str(bench.folder), ""))
    said = re.sub(r"\s+", " ", told.text)
    assert row.says in said, said
    if row.rho is None:
        assert told.code == 2 and said.count("error: ") == 1, said
    else:
        assert told.code == 0 and told.rho >= row.rho, said
    assert told.empty == row.empty
