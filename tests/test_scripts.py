"""The scripts of the benchmarks and tools can be imported, so that none breaks unnoticed when the library changes."""

import importlib

import pytest
from support.docs import ROOT

SCRIPTS = [path for folder in ("benchmarks", "tools") for path in sorted((ROOT / folder).glob("*.py"))]


def test_there_are_scripts():
    assert len(SCRIPTS) > 8


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_can_be_imported(script, monkeypatch):
    monkeypatch.syspath_prepend(script.parent)
    assert importlib.import_module(script.stem).__doc__
