"""The largest tensors while attention is recorded."""

import pytest
import torch
from support.attention import LARGE, images_for
from support.memory import Largest
from support.networks import build

from spdfq.attention import fused_attention, record_attention

BATCH, HEADS, SIDE = 2, 8, 28
SQUARE = BATCH * HEADS * (SIDE**2 + 1) ** 2


def largest_while(model, images, recording):
    with Largest() as largest:
        if recording:
            with record_attention(model, rows=BATCH) as record:
                loss = model(images).sum()
            loss = loss + sum(row.square().sum() for row in record.class_attention)
        else:
            loss = model(images).sum()
        torch.autograd.grad(loss, images)
    return largest.numel


def test_recording_the_class_row_allocates_no_square_tensor_forward_or_backward():
    model = build("vit", img_size=SIDE * 2, patch_size=2, num_heads=HEADS, depth=1)
    images = images_for(model, BATCH).requires_grad_()
    with fused_attention(model):
        plain = largest_while(model, images, recording=False)
    recorded = largest_while(model, images, recording=True)
    assert plain < SQUARE / 4
    assert recorded == plain, "the largest tensor must be one the model makes anyway"


@pytest.mark.parametrize("name", LARGE)
def test_without_a_class_token_only_recorded_images_have_square_tensors(name):
    shape = {"swin": {"depths": (1, 1), "num_heads": (8, 8)}, "vit": {"depth": 1, "num_heads": 8}}[name]
    model = build(name, **LARGE[name], **shape).requires_grad_(False)
    images = images_for(model, 6).requires_grad_()
    windows, tokens = (4, 100) if name == "swin" else (1, 144)
    assert largest_while(model, images, recording=True) == BATCH * windows * HEADS * tokens**2


def test_the_dispatch_mode_of_the_test_above_sees_square_tensors():
    model = build("vit", img_size=SIDE * 2, patch_size=2, num_heads=HEADS, depth=1)
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    images = images_for(model, BATCH).requires_grad_()
    assert largest_while(model, images, recording=False) >= SQUARE
