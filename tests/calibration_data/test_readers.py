"""What other tools get from the readers, checked against those tools where they are installed."""

import shutil
import sys

import numpy as np
import pytest
import torch
from support.docs import DOCS, blocks
from support.teachers import tiny_teacher

from spdfq.calibration_data import CalibrationImages
from spdfq.errors import SpdfqError


def sample(count=5):
    images = np.arange(count, dtype=np.float32)[:, None, None, None] * np.ones((1, 2, 3, 3), np.float32)
    return CalibrationImages(images=images, mean=(0.5, 0.5), std=(0.5, 0.5))


def numbers(items):
    """The images of each item; each image holds its own number."""
    return [list(item[:, 0, 0, 0]) for item in items]


def test_the_reader_is_one_of_onnxruntime_and_gives_none_at_the_end():
    from onnxruntime.quantization import CalibrationDataReader

    reader = sample().onnxruntime_reader("x", batch=2)
    assert isinstance(reader, CalibrationDataReader)
    assert len(reader) == 3
    given = [reader.get_next() for _ in range(4)]
    assert given[3] is None
    assert all(list(item) == ["x"] for item in given[:3])
    assert numbers(item["x"] for item in given[:3]) == [[0, 1], [2, 3], [4]]
    assert reader.get_next() is None
    reader.rewind()
    assert numbers(item["x"] for item in reader) == [[0, 1], [2, 3], [4]]


def test_the_reader_gives_a_range_of_runs():
    reader = sample().onnxruntime_reader("x")
    reader.set_range(1, 3)
    assert numbers(item["x"] for item in reader) == [[1], [2]]
    reader.set_range(start_index=3, end_index=9)
    assert numbers(item["x"] for item in reader) == [[3], [4]]


@pytest.fixture(scope="module")
def float_file(tmp_path_factory):
    """A small network as a float ONNX file."""
    path = tmp_path_factory.mktemp("onnx") / "float.onnx"
    torch.manual_seed(0)
    network = torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(18, 4), torch.nn.GELU(), torch.nn.Linear(4, 3)
    ).eval()
    batch = {0: torch.export.Dim("batch", min=1)}
    torch.onnx.export(
        network,
        (torch.zeros(2, 2, 3, 3),),
        path,
        dynamo=True,
        input_names=["x"],
        dynamic_shapes=(batch,),
        external_data=False,
        verbose=False,
    )
    return path


@pytest.mark.parametrize("options", [{}, {"CalibStridedMinMax": 1}], ids=["all", "strided"])
def test_onnxruntime_quantizes_a_model_with_the_reader(float_file, tmp_path, options):
    from onnxruntime.quantization import quantize_static

    quantize_static(float_file, tmp_path / "int8.onnx", sample().onnxruntime_reader("x"), extra_options=options)
    import onnxruntime

    session = onnxruntime.InferenceSession(tmp_path / "int8.onnx", providers=["CPUExecutionProvider"])
    assert session.run(None, {"x": sample().images})[0].shape == (5, 3)


def test_the_example_of_the_page_for_onnxruntime_runs(float_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(float_file, "float.onnx")
    sample().save("calibration.npz")
    (code,) = (found for found in blocks(DOCS / "other-tools.md", "python") if "quantize_static" in found)
    exec(code, {})
    assert (tmp_path / "int8.onnx").is_file()


def test_batches_are_tensors_and_can_be_asked_for_again():
    batches = sample().torch_batches(2)
    assert len(batches) == 3
    for _ in range(2):
        assert numbers(batches) == [[0, 1], [2, 3], [4]]
    assert all(batch.dtype == torch.float32 for batch in batches)
    teacher = tiny_teacher()
    images = torch.randn(3, *teacher.input_size)
    given = CalibrationImages(images=images, mean=teacher.mean, std=teacher.std)
    assert torch.equal(torch.cat(list(given.torch_batches())), images)


def test_nncf_gets_arrays_or_dictionaries_and_the_positions_that_it_asks_for():
    nncf = pytest.importorskip("nncf", reason="NNCF is not installed")
    dataset = sample().nncf_dataset(batch=2)
    assert isinstance(dataset, nncf.Dataset)
    assert dataset.get_length() == 3
    assert dataset.get_batch_size() is None
    assert numbers(dataset.get_inference_data()) == [[0, 1], [2, 3], [4]]
    named = sample().nncf_dataset("x").get_inference_data([0, 3])
    assert numbers(item["x"] for item in named) == [[0], [3]]


def test_without_nncf_one_line_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "nncf", None)
    with pytest.raises(
        SpdfqError, match=r"^nncf_dataset: needs nncf, which is not installed: pip install 'spdfq\[nncf\]'$"
    ):
        sample().nncf_dataset()
