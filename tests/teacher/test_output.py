"""What a teacher's module returns: a tensor, or a dict, tuple or object with one in it."""

import copy
from collections import OrderedDict, namedtuple

import pytest
import torch
from support.networks import build
from torch import nn

import spdfq
from spdfq.attention import record_attention
from spdfq.errors import ModelError
from spdfq.quantized import save_quantized
from spdfq.teacher import Teacher


class ModelOutput(OrderedDict):
    """Like that of transformers: an ordered dict whose keys are attributes too."""

    def __getattr__(self, name):
        return self[name]


Pair = namedtuple("Pair", "logits features")


class Classifier(nn.Module):
    """A ViT whose logits are packed by a function."""

    def __init__(self, pack, num_classes=10):
        super().__init__()
        self.vit, self.pack = build("vit", num_classes=num_classes), pack

    def forward(self, pixel_values, labels=None):
        return self.pack(self.vit(pixel_values))


def teacher(pack, **options):
    described = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "num_classes": 10, "input_size": (3, 32, 32)} | options
    return Teacher(Classifier(pack, described["num_classes"]), **described)


def images(count=3):
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)


PACKED = {
    "dict": (lambda y: {"loss": None, "logits": y}, None, "logits"),
    "model output": (lambda y: ModelOutput(logits=y, hidden_states=(y, y)), None, "logits"),
    "the same tensor twice": (lambda y: {"logits": y, "predictions": y}, None, "logits"),
    "tuple": (lambda y: (y, y[:, None]), None, 0),
    "tuple by position": (lambda y: [-y, y], 1, 1),
    "named tuple": (lambda y: Pair(logits=y, features=-y), "logits", "logits"),
    "by name": (lambda y: ModelOutput(cls_logits=-y, logits=y), "logits", "logits"),
}


@pytest.mark.parametrize(("pack", "output", "taken"), PACKED.values(), ids=PACKED)
def test_the_logits_are_taken_out_of_what_the_module_returns(pack, output, taken):
    found = teacher(pack, output=output)
    assert found.output == taken
    with torch.no_grad():
        assert torch.equal(found.module(images()), build("vit")(images()))


@pytest.mark.parametrize(
    ("pack", "output", "message"),
    [
        (
            lambda y: {"a": y, "b": -y},
            None,
            r"returns dict with several tensors that could be its logits .* example .*output='a'\)",
        ),
        (
            lambda y: {"a": y[:, :7]},
            None,
            r"returns dict \(a: float32 \[1, 7\]\) for one image, without logits \[1, 10\]",
        ),
        (lambda y: None, None, r"returns NoneType \(no fields\) for one image, without logits"),
        (
            lambda y: {"logits": y},
            "logit",
            r"output='logit' is no tensor of the dict it returns \(logits: float32 \[1, 10\]",
        ),
        (lambda y: (y,), 3, "output=3 is no tensor of the tuple it returns"),
        (lambda y: {"logits": y[:, :7]}, "logits", "returns 7 logits, but the teacher's num_classes is 10"),
        (lambda y: y, "logits", "returns a tensor, which has no field output='logits'; leave it out"),
        (lambda y: y[:, None].expand(-1, 5, -1), None, r"returns float32 \[1, 5, 10\] for one image instead of logits"),
        (lambda y: y[0], None, r"returns float32 \[10\] for one image instead of logits \[1, 10\]"),
        (lambda y: y.argmax(1), None, r"returns int64 \[1\] for one image instead of logits"),
    ],
)
def test_other_returned_values_are_refused_by_name(pack, output, message):
    with pytest.raises(ModelError, match=f"^Classifier: {message}") as refused:
        teacher(pack, output=output)
    assert "\n" not in str(refused.value)


def test_features_that_are_no_vectors_are_refused():
    pooled = teacher(lambda y: {"last": y[:, None], "pooled": y}, num_classes=0)
    assert pooled.output == "pooled"
    with pytest.raises(ModelError, match=r"returns float32 \[1, 1, 32\] for one image instead of features \[1, D\]"):
        teacher(lambda y: y[:, None], num_classes=0)


def test_the_module_itself_does_not_change():
    module = Classifier(lambda y: {"logits": y})
    found = Teacher(module, mean=(0.5,) * 3, std=(0.5,) * 3, num_classes=10, input_size=(3, 32, 32))
    assert set(module(images())) == {"logits"}
    assert list(found.module.state_dict()) == list(module.state_dict())
    assert found.module.vit is module.vit
    with record_attention(found.module) as record:
        found.module(images())
        assert not module._forward_hooks
    assert len(record.class_attention) == 2
    assert torch.is_tensor(copy.deepcopy(found.module)(images()))


def test_a_model_with_an_output_is_quantized_stored_and_read_back(tmp_path):
    module = Classifier(PACKED["by name"][0])
    described = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "num_classes": 10, "input_size": (3, 32, 32)}
    found = Teacher(module, **described, output="logits")
    quantized = spdfq.quantize(found, images(), "backends/minmax", overrides=["quantization.overrides=[]"])
    assert "vit.blocks.0.attn.qkv.weight" in quantized.sites
    logits = quantized(images())
    save_quantized(quantized, tmp_path, found)
    for given in (module, found.module):
        assert torch.equal(spdfq.load_quantized(tmp_path, given)(images()), logits)
    again = Teacher(found.module, **described)
    assert (again.output, again.fingerprint()) == ("logits", found.fingerprint())
    other = Teacher(module, **described, output="cls_logits")
    assert other.fingerprint() != found.fingerprint()


def test_a_module_that_changes_its_images_in_place_is_refused():
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(12, 2)

        def forward(self, images):
            return self.head(images.mul_(2).flatten(1))

    options = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "num_classes": 2, "input_size": (3, 2, 2)}
    with pytest.raises(ModelError, match=r"InPlace: changes the images that it is given, in place, .*clone\(\)"):
        Teacher(InPlace(), **options)
