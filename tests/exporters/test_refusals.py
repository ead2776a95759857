"""Everything that cannot be exported is one line that names the place and the remedy, and leaves no file."""

import pytest
import torch
from support import backends as tiny
from support.exports import W8A8, exported
from torch import nn

import spdfq
from spdfq import extras
from spdfq.errors import DataError, ModelError, SpdfqError
from spdfq.quantized import place
from spdfq.teacher import Teacher


@pytest.fixture(scope="module")
def model():
    chosen = tiny.teacher("vit")
    return tiny.quantized(chosen, *W8A8), chosen


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"format": "onx"}, "unknown exporter 'onx'; did you mean 'onnx'?"),
        ({"format": 3}, "format: expected the name of a format or an exporter, got 3"),
        ({"softmax": "int8"}, "softmax: must be one of float, uniform8, got 'int8'"),
        ({"class_names": ["a", "b"]}, "class_names: 2 names for 10 logits; give one for each, in their order"),
    ],
)
def test_wrong_arguments(model, options, line, tmp_path):
    with pytest.raises(SpdfqError) as raised:
        spdfq.export(*model, tmp_path / "model.onnx", **options)
    assert str(raised.value).startswith(line)
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_is_not_quantized_or_not_calibrated(model, tmp_path):
    with pytest.raises(ModelError, match=r"export: model must be a quantized model .*, got VisionTransformer"):
        exported(model[1].module, model[1], tmp_path)
    with pytest.raises(SpdfqError, match=r"patch_embed.proj.input was not calibrated"):
        exported(place(model[1], tiny.back_end()), model[1], tmp_path)
    with pytest.raises(ModelError, match=r"teacher: VisionTransformer is a module"):
        exported(model[0], model[1].module, tmp_path)


def test_a_folder_and_a_place_that_cannot_be_written(model, tmp_path):
    with pytest.raises(SpdfqError, match=r"is a folder; give the name of a file, such as .*model.onnx"):
        spdfq.export(*model, tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"file: cannot be written \(it is a file\)"):
        spdfq.export(*model, tmp_path / "file/model.safetensors", format="safetensors")
    with pytest.raises(DataError, match=r"path: expected the path of a file, got 3"):
        spdfq.export(*model, 3)


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnx_ir", "onnxruntime"])
def test_a_missing_package_is_one_line_with_the_command(model, package, tmp_path, monkeypatch):
    found = extras.find_spec
    monkeypatch.setattr(extras, "find_spec", lambda name: None if name == package else found(name))
    with pytest.raises(SpdfqError) as raised:
        exported(*model, tmp_path)
    assert str(raised.value) == f"format 'onnx': needs {package}, which is not installed: pip install 'spdfq[onnx]'"


pytestmark = pytest.mark.filterwarnings("ignore:no attention was seen")


class Odd(nn.Module):
    """Its middle layer does something that no format holds."""

    def __init__(self, act):
        super().__init__()
        self.inner = nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, 16), Acting(act), nn.Linear(16, 4))

    def forward(self, images):
        return self.inner(images)


class Acting(nn.Module):
    def __init__(self, act):
        super().__init__()
        self.act = act

    def forward(self, x):
        return self.act(x)


def odd(act):
    """A quantized model and its teacher."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        chosen = Teacher(Odd(act), mean=(0.5,) * 3, std=(0.5,) * 3, num_classes=4, input_size=(3, 8, 8))
    images = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return spdfq.quantize(chosen, images, tiny.back_end(*W8A8)), chosen


def test_a_module_that_cannot_be_traced_is_named(tmp_path):
    model, chosen = odd(lambda x: x * 2 if float(x.sum()) > 0 else x)
    with pytest.raises(ModelError, match=r"^Odd: torch.export cannot trace inner.2 \(.*; change that module, or"):
        exported(model, chosen, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_module_without_onnx_operators_is_named(tmp_path):
    model, chosen = odd(lambda x: torch.special.airy_ai(x))
    with pytest.raises(
        ModelError, match=r"^Odd: inner.2 has no ONNX operators \(.*; change that module, or export with"
    ):
        exported(model, chosen, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_module_that_fixes_the_number_of_images_is_refused(tmp_path):
    model, chosen = odd(lambda x: x + torch.zeros(len(x), 1))
    with pytest.raises(ModelError, match=r"^Odd: its code fixes the number of images; write images.shape\[0\] instead"):
        exported(model, chosen, tmp_path)
    assert list(tmp_path.iterdir()) == []
