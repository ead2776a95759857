"""The scripts of the benchmarks and tools can be imported, so that none breaks unnoticed when the library changes."""

import importlib
import json
import time

import pytest
from support.docs import ROOT

SCRIPTS = [path for folder in ("benchmarks", "tools") for path in sorted((ROOT / folder).glob("*.py"))]


def test_there_are_scripts():
    assert len(SCRIPTS) > 8


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_can_be_imported(script, monkeypatch):
    monkeypatch.syspath_prepend(script.parent)
    assert importlib.import_module(script.stem).__doc__


def test_the_benchmark_of_a_gpu_runs_at_toy_size(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    gpu = importlib.import_module("gpu")
    monkeypatch.setattr(gpu, "ROUNDS", 2)
    gpu.main(["--dry", "--out", str(tmp_path / "gpu.json")])
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert found["machine"]["device"]
    recipes = found["synthesis"]["recipes"]
    assert list(recipes) == list(gpu.CASES)
    assert all(each["complete"] and each["seconds"] > 0 and each["operations"] > 100 for each in recipes.values())
    assert found["reconstruction"]["ridge"]["ridge"]["complete"]
    assert found["reconstruction"]["blockwise"]["ratio"] > 0
    assert found["evaluation"]["quantized_images_per_second"] > 0


def test_a_part_that_takes_too_long_is_extrapolated(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    limited = importlib.import_module("gpu").Limited(0.0)

    def work():
        with limited("synthesising", 4) as advance:
            for _ in range(4):
                time.sleep(0.01)
                advance()

    found = limited.timed(work)
    assert not found["complete"]
    assert 0.04 <= found["seconds"] < 1
