"""The export of a finished run, its check, and what the report shows of it."""

import json

import pytest
import torch
from attrs import evolve
from support import exports  # noqa: F401  exporting is faster then
from support.commands import spdfq

from spdfq.data import FashionMnist, ImageFolder
from spdfq.data.classes import class_names
from spdfq.errors import DataError, SpdfqError
from spdfq.runs import exporting
from spdfq.runs.exporting import export_run
from spdfq.teacher import load_teacher


@pytest.fixture(scope="module")
def checked(finished):
    return export_run(finished.folder, check=True)


def test_a_check_measures_the_file_on_the_images_of_the_run(finished, checked):
    row = checked["measured"][0]
    assert row["runtime"] == "onnxruntime"
    assert row["images"] == finished.metrics["images"]
    assert row["simulated_top1"] == row["run_top1"] == finished.metrics["quantized"]["top1"]
    assert row["agreement"] >= 80
    assert row["products"] == 38
    assert row["integer_products"] == 32  # the softmax is logarithmic
    assert 0 < row["milliseconds"] < 1000
    assert 0 < row["float_milliseconds"] < 1000
    assert row["threads"] == torch.get_num_threads()
    assert row["float_products"] == [f"blocks.{block}.attn_2" for block in range(6)]


def test_the_file_has_the_names_of_the_classes_and_the_simulated_accuracy(finished, checked):
    import onnx

    found = {entry.key: json.loads(entry.value) for entry in onnx.load(checked["file"]).metadata_props}
    record = json.loads((finished.folder / "run.json").read_text())
    assert found["class_names"] == record["model"]["class_names"] == [str(label) for label in range(10)]
    assert found["recipe_digest"] == record["recipe_digest"]
    assert found["simulated"] == {"top1": finished.metrics["quantized"]["top1"], "images": 10}


def test_the_report_shows_what_was_measured_where(finished, checked):
    page = (finished.folder / "report.html").read_text()
    row = checked["measured"][0]
    assert f"measured in onnxruntime {row['version']}" in page
    assert f"{row['top1']:.2f} %, {row['milliseconds']:.2f} ms/image measured in" in page
    assert "32 of 38" in page
    assert "blocks.0.attn.softmax: " in page
    assert json.loads((finished.folder / "exports.json").read_text())["model.onnx"] == checked


def test_the_command_prints_the_numbers_and_the_notes(finished, checked, tmp_path, monkeypatch):
    recipe = exporting.finished_recipe(finished.folder)
    rough = evolve(recipe, evaluation=evolve(recipe.evaluation, precision="bfloat16"))
    monkeypatch.setattr(exporting, "finished_recipe", lambda folder: rough)
    new = tmp_path / "new/a.pt2"
    options = ("--format", "pt2", "--softmax", "uniform8", "--check", "--quiet", "--out", new)
    done = spdfq("export", finished.folder, *options)
    assert done.exit_code == 0, done.output
    assert "note: blocks.0.attn.softmax: log2 of 4 bits is now uniform of 8 bits" in done.stderr
    assert "note: checked in float32, as the file computes; the run used bfloat16" in done.stderr
    assert " % measured in torch " in done.stdout
    assert " ms for one image, " in done.stdout
    assert "agreement  100.00 % of the images" in done.stdout
    assert new.is_file()
    done = spdfq("export", finished.folder, "--format", "safetensors", "--json")
    assert json.loads(done.stdout)["format"] == "safetensors"
    files = json.loads((finished.folder / "exports.json").read_text())
    assert set(files) == {"model.onnx", "model.safetensors", str(new)}


def test_a_run_that_cannot_be_exported_or_checked(finished, tmp_path):
    for arguments, line in (
        (("--format", "onx"), "error: unknown exporter 'onx'; did you mean 'onnx'?"),
        (("--format", "safetensors", "--check"), "error: --check: a file of format 'safetensors' is not run by itself"),
    ):
        done = spdfq("export", finished.folder, *arguments)
        assert done.exit_code == 2
        assert done.stderr.startswith(line)
    done = spdfq("export", tmp_path)
    assert done.exit_code == 2
    assert "not a run folder" in done.stderr
    (tmp_path / "recipe.toml").write_bytes((finished.folder / "recipe.toml").read_bytes())
    with pytest.raises(DataError, match=r"has no run.json; export a finished run"):
        export_run(tmp_path)
    (finished.folder / "exports.json").write_text("{")
    with pytest.raises(SpdfqError, match=r"exports.json: damaged \(JSONDecodeError: .*\); remove it and export again"):
        export_run(finished.folder, format="safetensors")
    (finished.folder / "exports.json").unlink()


def test_names_of_classes_are_the_users_then_timms_then_those_of_the_images(tmp_path):
    bundled = load_teacher("bundled:vit_fmnist")
    assert class_names(bundled) == []
    assert class_names(bundled, FashionMnist())[:2] == ["T-shirt/top", "Trouser"]
    for label in range(10):
        (tmp_path / f"c{label}").mkdir()
    assert class_names(bundled, ImageFolder(root=str(tmp_path)))[3] == "c3"
    bundled.module.pretrained_cfg = {**bundled.module.pretrained_cfg, "label_names": [f"C{n}" for n in range(10)]}
    assert class_names(bundled)[3] == class_names(bundled, ImageFolder(root=str(tmp_path)))[3] == "C3"
    order = tuple(f"c{label}" for label in reversed(range(10)))
    assert class_names(bundled, ImageFolder(root=str(tmp_path), class_order=order))[3] == "c6"
