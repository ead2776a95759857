"""Runs with images that cannot be read: these are left out and named, or refused."""

import json
import shutil

import pytest
from support.data import names
from support.runs import STEPS, again

from spdfq.errors import DataError


@pytest.fixture
def damaged(photos, tmp_path):
    """The folder of photos with one that is cut off, as a recipe's dataset."""
    copied = shutil.copytree(photos, tmp_path / "photos")
    photo = copied / "3" / "0.png"
    photo.write_bytes(photo.read_bytes()[:200])
    return {"type": "image_folder", "root": str(copied)}


def test_damaged_images_are_left_out_and_named_in_the_record_and_in_a_warning(finished, recipe, damaged):
    said = []
    changed = {**recipe, "evaluation": {"dataset": damaged}}
    result = again(finished, changed, "damaged", announce=said.append)
    assert (result.metrics["images"], names(result.metrics["damaged"])) == (9, ("3/0.png",))
    record = json.loads((result.folder / "run.json").read_text())
    assert record["metrics"] == result.metrics
    line = f"evaluation.dataset: 1 image cannot be read and is left out: {result.metrics['damaged'][0]}"
    assert record["warnings"] == [line]
    assert f"warning: {line}" in said
    assert line in (result.folder / "report.html").read_text()
    assert again(finished, changed, "damaged", announce=said.append).metrics == result.metrics
    assert said.count(f"warning: {line}") == 2, "also where the stage is reused"


def test_damaged_images_stop_a_run_that_refuses_them(finished, recipe, damaged):
    refusing = {**recipe, "evaluation": {"dataset": {**damaged, "damaged": "refuse"}}}
    with pytest.raises(
        DataError, match=r"^image_folder: 3/0.png: not a readable image \(.*; replace it, or set damaged"
    ):
        again(finished, refusing, "refused")


def test_damaged_images_among_real_ones_for_calibration_are_named(finished, recipe, damaged):
    real = {"synthesis": {"type": "real", "images": 9, "dataset": damaged}}
    base = {**recipe, "extends": [name for name in recipe["extends"] if not name.startswith("images/")]}
    result = again(finished, {**base, **real, "quantization": {"steps": STEPS[:1]}}, "real")
    record = json.loads((result.folder / "run.json").read_text())
    assert record["images"].pop("digest")
    assert record["images"] | {"damaged": names(record["images"]["damaged"])} == {
        **{"type": "real", "count": 9, "damaged": ("3/0.png",)}
    }
    (line,) = record["warnings"]
    assert line.startswith("synthesis.dataset: 1 image cannot be read and is left out: 3/0.png (")
