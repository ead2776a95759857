"""Sphinx configuration. The pages are plain Markdown, so that they also read well on a code forge."""

import re
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Any

from pygments.lexers.special import TextLexer

ROOT = Path(__file__).parents[1]
# pages that only link to a file outside this folder; Sphinx shows the file itself
OUTSIDE = {"contributing": "CONTRIBUTING.md", "changelog": "CHANGELOG.md"}

project = "spdfq"
author = "The spdfq authors"
copyright = "The spdfq authors, Apache-2.0"
version = release = installed_version("spdfq")

extensions = ["myst_nb"]
nb_execution_mode = "off"  # `python docs/run_notebooks.py` stores the outputs
exclude_patterns = ["_build"]
html_extra_path = ["leaderboard.html"]
smartquotes = False  # TOML needs straight quotes
myst_heading_anchors = 3

html_theme = "furo"
html_title = f"spdfq {release}"


def contents(index: str) -> str:
    """Hidden tables of contents: one for each section of the index page, with the pages it links to, in order."""
    trees = []
    for section in re.split(r"^## ", index, flags=re.MULTILINE)[1:]:
        pages = re.findall(r"^\* \[.*?\]\(([\w/-]+)\.(?:md|ipynb)\)", section, re.MULTILINE)
        lines = [":hidden:", f":caption: {section.splitlines()[0]}", "", *pages]
        trees += ["```{toctree}", *lines, "```", ""] if pages else []
    return "\n".join(trees)


def read(app: Any, page: str, source: list[str]) -> None:
    """Completes the source of a page before Sphinx parses it."""
    if page == "index":
        source[0] += "\n" + contents(source[0])
    if page in OUTSIDE:
        source[0] = (ROOT / OUTSIDE[page]).read_text(encoding="utf-8").replace("](docs/", "](")
    # files outside this folder, such as the README, are no part of the built documentation
    if "/" not in page:
        source[0] = re.sub(r"\[([^\]]+)\]\((?:\.\.|examples)/[^)]*\)", r"\1", source[0])


def setup(app: Any) -> None:
    """Sphinx calls this once."""
    app.connect("source-read", read)
    app.add_lexer("mermaid", TextLexer)  # a code forge draws these diagrams; here their text is shown
