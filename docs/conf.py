"""How the documentation is built: `make docs`."""

import os
from importlib.metadata import version as version_of
from pathlib import Path

# pages run in folders of their own, and find demo_run.py here
os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
)
os.environ.setdefault("OMP_NUM_THREADS", "1")

project = "ipar_sparse"
author = "the ipar_sparse authors"
copyright = author
release = version = version_of("ipar_sparse")

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]
exclude_patterns = ["_build", "description.md"]  # the latter is shown by package indexes
html_theme = "sphinx_book_theme"
html_title = "ipar_sparse"
html_context = {"default_mode": "light"}
html_theme_options = {"show_toc_level": 2, "home_page_in_toc": True}

myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3
# Links to files outside of this folder work in a checkout; tests/test_docs.py checks them.
suppress_warnings = ["myst.xref_missing"]

nb_execution_mode = "force"
nb_execution_in_temp = True
nb_execution_raise_on_error = True
nb_execution_timeout = 600
nb_merge_streams = True
nb_execution_show_tb = True

autodoc_typehints = "none"
autodoc_member_order = "bysource"
napoleon_numpy_docstring = False
