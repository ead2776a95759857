"""spdfq predict on a file: what it prints and what it refuses."""

import json

import pytest
from support.commands import spdfq
from support.data import GREY, RED, encoded, write
from support.onnx_files import write_file


@pytest.fixture
def file(tmp_path):
    return write_file(tmp_path / "model.onnx")


@pytest.fixture
def images(tmp_path):
    write(tmp_path / "photos", {"": {"a.png": GREY, "b.jpg": RED}})
    return tmp_path / "photos"


def test_labels_and_probabilities_are_printed(file, images):
    done = spdfq("predict", file, images)
    assert done.exit_code == 0, done.output
    assert done.stderr == ""
    model, *rows = done.stdout.splitlines()
    assert model.startswith(f"model  {file}, run in onnxruntime 1.")
    assert rows == [
        str(images / "a.png"),
        " 91.68 %  grey",  # 1 / (1 + exp(-2.4))
        "  8.32 %  red",
        str(images / "b.jpg"),
        " 98.15 %  red",  # the JPEG file has 254: 1 / (1 + exp(-3.969))
        "  1.85 %  grey",
    ]


def test_json_is_the_result_alone(file, images):
    done = spdfq("predict", file, images / "a.png", "--json", "--top", "1")
    found = json.loads(done.stdout)
    assert found["model"] == str(file)
    assert found["computed"].startswith("onnxruntime 1.")
    assert found["unreadable"] == []
    (entry,) = found["images"]
    assert entry["image"] == str(images / "a.png")
    assert entry["predictions"] == [{"label": "grey", "probability": pytest.approx(0.91683, abs=1e-5), "index": 0}]


def test_images_that_cannot_be_read_are_errors_after_the_others(file, images):
    (images / "aa.png").write_bytes(encoded(GREY)[:20])
    done = spdfq("predict", file, images, "--top", "1")
    assert done.exit_code == 2
    assert done.stdout.splitlines()[1::2] == [str(images / "a.png"), str(images / "b.jpg")]
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: {images / 'aa.png'}: ")
    assert line.endswith("; replace it, or leave it out")
    done = spdfq("predict", file, images, "--json")
    assert done.exit_code == 2
    assert [entry["image"] for entry in json.loads(done.stdout)["unreadable"]] == [str(images / "aa.png")]


def test_a_file_without_names_says_so(images, tmp_path):
    done = spdfq("predict", write_file(tmp_path / "plain.onnx", class_names=[]), images / "b.jpg", "--top", "1")
    assert done.stdout.splitlines()[2] == " 98.15 %  1"
    assert done.stderr == f"note: {tmp_path / 'plain.onnx'} has no names of classes; labels are numbers from 0\n"


def test_what_is_wrong_is_one_line(file, images, tmp_path):
    (tmp_path / "empty").mkdir()
    for arguments, message in (
        ((tmp_path / "gone.onnx", images), "gone.onnx: no such file"),
        ((images / "a.png", images), "a.png: not an ONNX file that onnxruntime reads"),
        ((tmp_path / "empty", images), "empty: not a run folder"),
        ((file, tmp_path / "gone.png"), "gone.png: no such file or folder"),
        ((file, tmp_path / "empty"), "empty: the folder holds no images"),
        ((file, file), "model.onnx: not an image format that Pillow knows"),
        ((file, images, "--top", "3"), "top: 3 is more than the 2 classes of"),
        ((file, images, "--top", "0"), "top: expected a whole number from 1 to 2, got 0"),
    ):
        done = spdfq("predict", *arguments)
        assert done.exit_code == 2, arguments
        (line,) = done.stderr.splitlines()
        assert line.startswith("error: ")
        assert message in line
