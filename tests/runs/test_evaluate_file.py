"""The accuracy of an exported file on labelled images."""

import json

import pytest
from support.commands import spdfq
from support.data import GREY, RED, names, write
from support.onnx_files import NAMES, write_file

from spdfq.errors import SpdfqError
from spdfq.runs.evaluate_file import evaluate_file
from spdfq.runs.pipeline import evaluate_run


@pytest.fixture
def val(tmp_path):
    """Three of four images in the right folder, and one that is cut off."""
    write(tmp_path / "val", {"grey": {"1.png": GREY, "2.png": RED}, "red": {"3.png": RED, "4.png": RED, "5.png": None}})
    return tmp_path / "val"


@pytest.fixture
def file(tmp_path):
    return write_file(tmp_path / "model.onnx")


def test_a_file_is_measured_in_onnxruntime_and_damaged_images_are_named(file, val):
    found = evaluate_file(file, val)
    assert (found["top1"], found["images"], names(found["damaged"])) == (75.0, 4, ("red/5.png",))
    assert found["runtime"] == "onnxruntime"
    assert found["simulated"] == {"top1": 75.0, "images": 4}
    assert "top5" not in found
    done = spdfq("evaluate", file, "--on", val, "--quiet")
    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines()[:3] == [
        f"file       {file}",
        f"top-1      75.00 % measured in onnxruntime {found['version']}, 4 images",
        "simulated  75.00 % top-1 in its run, 4 images",
    ]
    assert done.stdout.splitlines()[3].startswith("damaged    1 image cannot be read and is left out: red/5.png (")
    done = spdfq("evaluate", file, "--on", val, "--quiet", "--json")
    assert json.loads(done.stdout) == {"file": str(file), "metrics": found}


def test_images_in_another_layout_are_named_by_an_override(file, val, tmp_path):
    (tmp_path / "labels.txt").write_text("grey/1.png 0\nred/3.png 1\n")
    dataset = f"evaluation.dataset={{type='image_list', root='{val}', labels='{tmp_path}/labels.txt'}}"
    found = evaluate_file(file, overrides=[dataset])
    assert (found["top1"], found["images"]) == (100.0, 2)
    assert evaluate_file(file, val, overrides=["evaluation.dataset.limit=2", "evaluation.batch=1"])["images"] <= 2


def test_the_classes_are_compared_with_those_of_the_file(file, val, tmp_path):
    turned = write_file(tmp_path / "turned.onnx", class_names=NAMES[::-1])
    with pytest.raises(SpdfqError, match=r"class 0 is grey here and red in turned.onnx; give class_order"):
        evaluate_file(turned, val)
    order = ["evaluation.dataset.class_order=['red', 'grey']"]
    assert evaluate_file(turned, val, overrides=order)["top1"] == 25.0
    with pytest.raises(SpdfqError, match="on: expected the path of a folder, got 3"):
        evaluate_file(file, 3)
    said = []
    assert evaluate_file(file, val, overrides=order, announce=said.append)["top1"] == 25.0
    assert said == [
        "warning: evaluation.dataset: class_order: class 0 is red here and grey in model.onnx; leave class_order as it "
        "is only if the model's order is another"
    ]
    (val / "blue").mkdir()
    with pytest.raises(SpdfqError, match=r"evaluation.dataset: holds blue \(not in the model\)"):
        evaluate_file(file, val)
    unnamed = write_file(tmp_path / "unnamed.onnx", class_names=[])
    with pytest.raises(SpdfqError, match=r"evaluation.dataset: has 3 classes, unnamed.onnx knows 2"):
        evaluate_file(unnamed, val)


def test_a_slash_in_the_name_of_a_class_is_any_separator_in_a_folders_name(tmp_path, val):
    (val / "grey").rename(val / "black_white")
    file = write_file(tmp_path / "slash.onnx", class_names=["black/white", "red"])
    said = []
    assert evaluate_file(file, val, announce=said.append)["top1"] == 75.0
    assert said == []


def test_what_cannot_be_measured_is_refused_in_one_line(file, val, tmp_path):
    (tmp_path / "text.onnx").write_text("no model")
    (tmp_path / "empty").mkdir()
    nowhere = write_file(tmp_path / "nowhere.onnx", crop_pct=None)
    for arguments, message in (
        ((file,), "model.onnx: does not say which images to measure; give --on FOLDER with a subfolder per class"),
        ((tmp_path / "gone.onnx", "--on", val), "gone.onnx: no such file; give an ONNX file that spdfq export wrote"),
        ((tmp_path / "text.onnx", "--on", val), "text.onnx: not an ONNX file that onnxruntime reads"),
        ((nowhere, "--on", val), "nowhere.onnx: its metadata lack crop_pct; export the model with spdfq export"),
        ((file, "--on", tmp_path / "gone"), "gone: no such folder; give root = 'path/to/val'"),
        ((file, "--on", tmp_path / "empty"), "evaluation.dataset: has 0 classes, model.onnx knows 2"),
        ((file, "--on", val, "--device", "cuda"), "on the CPU; leave it out"),
        ((file, "--on", val, "--set", "evaluation.precision='bfloat16'"), "exported with; leave it out"),
        ((file, "--on", val, "--set", "seed=1"), "--set seed=1: a file is exported; only evaluation.* can be set"),
        ((file, "--on", val, "--set", "evaluation.bacth=1"), "evaluation.bacth: unknown key; did you mean 'batch'?"),
        (
            (file, "--on", val, "--set", "evaluation.dataset='fashion_mnist'"),
            "--set evaluation.dataset='fashion_mnist': --on",
        ),
        ((tmp_path / "nothing",), "nothing: not a run folder"),
    ):
        done = spdfq("evaluate", *arguments)
        assert done.exit_code == 2, arguments
        (line,) = done.stderr.splitlines()
        assert line.startswith("error: ")
        assert message in line


def test_a_run_is_measured_on_a_folder_in_the_same_way(finished, photos):
    assert evaluate_run(finished.folder, photos) == finished.metrics
    done = spdfq("evaluate", finished.folder, "--on", photos, "--quiet", "--json")
    assert json.loads(done.stdout)["metrics"] == finished.metrics
