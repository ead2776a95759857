"""Exported files as classifiers: labels and probabilities, and what is refused."""

import math

import pytest
from PIL import Image
from support.data import GREY, RED, encoded
from support.onnx_files import NAMES, PREPROCESSING, write_file

from spdfq import inference
from spdfq.errors import DataError, MissingDataError, NonFiniteError, SpdfqError
from spdfq.inference import Classifier, Prediction


@pytest.fixture
def file(tmp_path):
    return write_file(tmp_path / "model.onnx")


@pytest.fixture
def images(tmp_path):
    for name, colour in {"grey": GREY, "red": RED}.items():
        (tmp_path / f"{name}.png").write_bytes(encoded(colour))
    (tmp_path / "red.jpg").write_bytes(jpeg := encoded(RED, "JPEG"))
    (tmp_path / "cut.jpg").write_bytes(jpeg[:-10])
    (tmp_path / "text.png").write_text("no image")
    return tmp_path


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def test_labels_and_probabilities_are_those_of_the_softmax(file, images):
    model = inference.load(str(file))
    first, second = model(images / "grey.png")  # the first channel is (0.2 - 0.5) / 0.25 = -1.2: logits 1.2 and -1.2
    assert (first.label, first.index, second.label, second.index) == ("grey", 0, "red", 1)
    assert first.probability == pytest.approx(sigmoid(2.4), abs=1e-6)
    assert first.probability + second.probability == pytest.approx(1)
    (only,) = model(str(images / "red.png"), top=1)  # (1 - 0.5) / 0.25 = 2: logits -2 and 2
    assert only == Prediction("red", pytest.approx(sigmoid(4), abs=1e-6), 1)
    assert model(images / "red.jpg", 1)[0].label == "red"
    with Image.open(images / "red.png") as opened:
        assert model(opened, top=1) == [only]
    assert model.computed.startswith("onnxruntime 1.")


def test_several_files_are_classified_in_order_and_those_that_cannot_be_read_have_a_reason(file, images):
    names = ["red.png", "cut.jpg", "grey.png", "text.png", "red.png"]
    found = list(inference.load(file).classify([images / name for name in names], top=1))
    assert [each.image.name for each in found] == names
    assert [[one.label for one in each.predictions] for each in found] == [["red"], [], ["grey"], [], ["red"]]
    assert found[0].problem == ""
    assert found[1].problem == "OSError: image file is truncated (0 bytes not processed); replace it, or leave it out"
    assert found[3].problem == "not an image format that Pillow knows; replace it, or leave it out"


def test_files_without_names_of_classes_have_numbers_as_labels(tmp_path, images):
    model = inference.load(write_file(tmp_path / "plain.onnx", class_names=[]))
    assert [each.label for each in model(images / "red.png")] == ["1", "0"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cut.jpg", r"cut.jpg: OSError: image file is truncated"),
        ("text.png", r"text.png: not an image format that Pillow knows"),
        ("gone.png", r"gone.png: FileNotFoundError"),
    ],
)
def test_what_is_no_image_is_refused_in_one_line(file, images, name, message):
    with pytest.raises(DataError, match=message) as caught:
        inference.load(file)(images / name)
    assert "\n" not in str(caught.value)


def test_an_image_without_the_channels_of_the_model_is_refused(tmp_path):
    options = {"channels": 4, "mean": [0.5] * 4, "std": [0.25] * 4}
    with pytest.raises(
        DataError, match=r"takes images \[3, 8, 8\], but its metadata say \[4, 8, 8\] \(channels, height, width\)"
    ):
        inference.load(write_file(tmp_path / "four.onnx", **options))
    with pytest.raises(DataError, match="no alpha channel, but the model takes 4 channels: RGBA"):
        type(PREPROCESSING)(
            size=(8, 8), interpolation="box", crop_pct=1.0, crop_mode="center", **{**options, "channels": 4}
        )(Image.new("RGB", (8, 8)))


@pytest.mark.parametrize(
    ("top", "message"),
    [
        (3, r"top: 3 is more than the 2 classes of .*model.onnx; lower it"),
        (0, "top: expected a whole number from 1 to 2, got 0"),
        (1.0, r"top: expected a whole number from 1 to 2, got 1\.0"),
    ],
)
def test_a_wrong_number_of_classes_is_refused(file, images, top, message):
    with pytest.raises(SpdfqError, match=message):
        inference.load(file)(images / "red.png", top=top)


def test_what_is_no_file_of_ours_is_refused(tmp_path):
    (tmp_path / "text.onnx").write_text("no model")
    (tmp_path / "empty.onnx").write_bytes(b"")
    for path, error, message in (
        (tmp_path / "gone.onnx", MissingDataError, r"gone.onnx: no such file; give an ONNX file that spdfq export"),
        (tmp_path, MissingDataError, r": is a folder; give an ONNX file that spdfq export wrote"),
        (tmp_path / "text.onnx", DataError, r"text.onnx: not an ONNX file that onnxruntime reads \(.*; give one"),
        (tmp_path / "empty.onnx", DataError, r"empty.onnx: not an ONNX file that onnxruntime reads \(.*; give one"),
        (3, DataError, "path: expected the path of an ONNX file, got 3"),
    ):
        with pytest.raises(error, match=message) as caught:
            inference.load(path)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"mean": None, "num_classes": None},
            r"its metadata lack num_classes, mean; export the model with spdfq export",
        ),
        ({"std": [1.0]}, r"metadata: std: expected a number above 0 for each of the 3 channels, got \(1.0,\); correct"),
        ({"class_names": "ab"}, "metadata: class_names: expected a list of names, got 'ab'"),
        ({"class_names": ["a"]}, "1 class names for 2 classes; give one for each"),
        ({"num_classes": "2"}, "metadata: num_classes: expected a whole number, got '2'"),
        ({"num_classes": 0, "class_names": []}, "has no head, so it gives features and no labels"),
        ({"size": [9, 8]}, r"takes images \[3, 8, 8\], but its metadata say \[3, 9, 8\]"),
    ],
)
def test_metadata_that_are_missing_or_wrong_are_named(tmp_path, changed, message):
    with pytest.raises(SpdfqError, match=rf"model.onnx: {message}"):
        inference.load(write_file(tmp_path / "model.onnx", **changed))


def test_metadata_of_other_software_need_not_be_json(tmp_path):
    import onnx

    path = write_file(tmp_path / "model.onnx")
    model = onnx.load(path)
    model.metadata_props.add(key="author", value="somebody")
    onnx.save(model, path)
    assert inference.load(path).class_names == NAMES
    for entry in model.metadata_props:
        if entry.key == "mean":
            entry.value = "half"
    onnx.save(model, path)
    with pytest.raises(DataError, match=r"model.onnx: metadata: mean is not JSON, got 'half'"):
        inference.load(path)


def test_more_logits_than_classes_and_logits_that_are_not_finite_are_refused(tmp_path, images):
    path = write_file(tmp_path / "three.onnx", class_names=list("abc"), num_classes=3)
    with pytest.raises(DataError, match=r"three.onnx: gives 2 logits, but its metadata say 3 classes"):
        inference.load(path)(images / "red.png")
    model = Classifier(
        source="x",
        computed="simulated",
        preprocessing=PREPROCESSING,
        num_classes=2,
        class_names=NAMES,
        logits=lambda pixels: pixels[:, 0, 0, :2] * float("nan"),
    )
    with pytest.raises(NonFiniteError, match="x: a logit is NaN or infinite"):
        model(Image.new("RGB", (8, 8)))
