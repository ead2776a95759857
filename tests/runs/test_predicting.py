"""The labels that a finished run gives to images, simulated or with its exported file."""

import json
import shutil

import pytest
from support.commands import spdfq

from spdfq.errors import DataError, RecipeError
from spdfq.inference import image_files
from spdfq.runs.predicting import load_run


@pytest.fixture(scope="module")
def simulated(finished):
    return load_run(finished.folder)


def first_labels(classifier, photos):
    return [each.predictions[0].label for each in classifier.classify(image_files([photos]), top=1)]


def test_a_run_without_an_exported_file_is_simulated(finished, simulated, photos):
    assert simulated.computed == "simulated"
    assert simulated.class_names == [str(label) for label in range(10)]
    shown = [path.parent.name for path in image_files([photos])]
    right = [label == name for label, name in zip(first_labels(simulated, photos), shown, strict=True)]
    assert 100 * sum(right) / len(right) == finished.metrics["quantized"]["top1"]
    done = spdfq("predict", finished.folder, photos / "3", "--top", "2")
    assert done.exit_code == 0, done.output
    model, image, *rows = done.stdout.splitlines()
    assert model == f"model  {finished.folder}, simulated: quantized values, computed in float"
    assert image == str(photos / "3/0.png")
    best = simulated(photos / "3/0.png", top=2)
    assert rows == [f"{100 * each.probability:6.2f} %  {each.label}" for each in best]


def test_a_run_with_an_exported_file_uses_it(exported_run, simulated, photos, tmp_path):
    folder = shutil.copytree(exported_run, tmp_path / "run")
    model = load_run(folder)
    assert (model.source, model.computed.partition(" ")[0]) == (str(folder / "model.onnx"), "onnxruntime")
    same = [a == b for a, b in zip(first_labels(model, photos), first_labels(simulated, photos), strict=True)]
    assert sum(same) >= 8
    entry = json.loads((folder / "exports.json").read_text())["model.onnx"]
    elsewhere = shutil.move(folder / "model.onnx", tmp_path / "elsewhere.onnx")  # as if the command had --out
    (folder / "exports.json").write_text(json.dumps({str(elsewhere): entry}))
    assert load_run(folder).source == str(elsewhere)
    record = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**record, "recipe_digest": "another"}))
    with pytest.raises(DataError, match=r"elsewhere.onnx: is of another run; export this run again"):
        load_run(folder)
    elsewhere.unlink()
    assert load_run(folder).computed == "simulated"


def test_a_folder_that_is_no_finished_run_is_refused(finished, tmp_path):
    with pytest.raises(RecipeError, match="not a run folder"):
        load_run(tmp_path)
    (tmp_path / "recipe.toml").write_bytes((finished.folder / "recipe.toml").read_bytes())
    with pytest.raises(DataError, match=r"has no run.json; give a finished run"):
        load_run(tmp_path)
