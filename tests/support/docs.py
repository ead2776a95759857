"""Where the documentation is, and the code blocks of its pages."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"


def text(path):
    return path.read_text(encoding="utf-8")


def blocks(path, language):
    """The code blocks of a page that are marked with a language."""
    return re.findall(rf"^ *```{language}\n(.*?)^ *```$", text(path), re.DOTALL | re.MULTILINE)


def built_in(registry):
    """The names of the components that come with the library, without those of installed plugins."""
    return [name for name in registry.names() if registry.entry(name).module.startswith("spdfq.")]
