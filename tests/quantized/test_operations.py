"""How many operations a quantized forward pass runs on a network with the topology of a ViT-B, and how many hooks."""

import pytest
import timm
import torch
from support.backends import back_end
from support.operations import Operations
from torch import nn

from spdfq.backends import quantize
from spdfq.quantized.visiting import unchanged, visit_sites
from spdfq.runtime import Runtime
from spdfq.teacher import Teacher


@pytest.fixture(scope="module")
def teacher():
    """12 blocks of 12 heads; the number of operations depends neither on the width nor on the number of tokens."""
    network = timm.create_model("vit_base_patch16_224", img_size=64, embed_dim=48, num_classes=10)
    return Teacher(network, mean=[0.5] * 3, std=[0.5] * 3, num_classes=10, input_size=(3, 64, 64))


# the float network runs 125
@pytest.mark.parametrize("softmax", ["uniform", "log2", "adaptive_log"])
def test_a_quantized_forward_pass_runs_few_operations(teacher, softmax, monkeypatch):
    monkeypatch.setattr("spdfq.quantizers.AdaptiveLogQuantizer.choices", range(37, 38))
    images = torch.zeros(2, 3, 64, 64)
    model = quantize(teacher, images, back_end(f"quantization.softmax={{type='{softmax}', bits=4}}"), Runtime())
    with torch.no_grad():
        model(images)
        with Operations() as operations:
            model(images)
    assert operations.total <= 800, operations.counts.most_common(20)


def test_layers_that_are_known_by_their_weight_get_no_hook(teacher):
    with visit_sites(teacher.module, unchanged):
        hooked = {type(module) for module in teacher.module.modules() if module._forward_hooks}
    assert not hooked & {nn.Linear, nn.Conv2d, nn.GELU, nn.Dropout, nn.Identity}
    assert type(teacher.module.blocks[0].attn) in hooked
