"""Sphinx configuration; the components page is written from the registry at each build."""

import sys
from importlib.metadata import version as installed_version
from pathlib import Path

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS))

import generate  # noqa: E402  (found beside this file)

generate.write_components(DOCS / "generated" / "components.md")

project = "spdfq"
author = "The spdfq authors"
copyright = "The spdfq authors, Apache-2.0"
version = release = installed_version("spdfq")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_click"]
exclude_patterns = ["_build", "generated"]
default_role = "py:obj"
smartquotes = False  # the quotes of TOML are meant as they are
myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
napoleon_use_rtype = False

html_theme = "furo"
html_title = f"spdfq {release}"
