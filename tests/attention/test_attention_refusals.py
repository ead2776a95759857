"""Attention that cannot be recorded, and tests that recording leaves nothing behind."""

import pytest
import timm
import torch
import torch.nn.functional as F
from support.attention import BOTH, NAMES, images_for
from support.networks import build
from torch import nn

from spdfq.attention import (
    ATTENTION_OUTPUTS,
    CLASS_ATTENTION,
    module_names,
    record_attention,
)
from spdfq.errors import ModelError

# refusals


class Plain(nn.Module):
    """A custom transformer block: no class token, no stated grid, tokens of any shape."""

    def __init__(self, shape):
        super().__init__()
        self.shape = shape
        self.mixer = nn.Sequential(nn.Identity())

    def forward(self, images):
        x = self.mixer(images).mean((1, 2, 3)).view(-1, *[1] * (len(self.shape) - 1)) * torch.ones(self.shape)
        return F.scaled_dot_product_attention(x, x, x).flatten(1)


UNRECORDABLE = [
    pytest.param(
        lambda: timm.create_model("xcit_nano_12_p16_224", img_size=32, embed_dim=32, depth=2, num_heads=2),
        r"^blocks\.0\.attn: attends over 16 keys, not over a square token grid and 1 prefix token; it cannot be",
        id="xcit",
    ),
    pytest.param(
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten()),
        "^Sequential: no attention went through scaled_dot_product_attention",
        id="cnn",
    ),
    pytest.param(
        lambda: Plain((2, 3, 15, 4)), "^Plain: attends over 15 keys, not over a square token grid", id="not_square"
    ),
    pytest.param(lambda: Plain((2, 5, 3, 16, 4)), r"^Plain: its attention runs on \[2, 5, 3, 16, 4\]", id="five_axes"),
]


@pytest.mark.parametrize(("make", "message"), UNRECORDABLE)
@pytest.mark.parametrize("needs", [{CLASS_ATTENTION}, {ATTENTION_OUTPUTS}], ids=["rows", "outputs"])
def test_what_cannot_be_recorded_is_refused_by_name_in_one_line(make, message, needs):
    model = make().eval()
    before = state(model)
    with record_attention(model, needs), pytest.raises(ModelError, match=message) as caught:
        model(torch.randn(2, 3, 32, 32))
    assert "\n" not in str(caught.value)
    assert "leave out the losses that need" in str(caught.value)
    assert state(model) == before


def test_a_square_grid_is_taken_from_a_model_that_names_none():
    model = Plain((2, 3, 16, 4))
    with record_attention(model) as record:
        model(torch.randn(2, 3, 32, 32))
    assert record.grids == [(4, 4)]


def test_tokens_that_are_not_the_patch_grid_are_refused():
    model = timm.create_model("pit_ti_224", pretrained=False).eval()
    with (
        record_attention(model),
        pytest.raises(ModelError, match=r"attends over 197 keys, not over the 27x27 token grid and 1 prefix token;"),
    ):
        model(torch.randn(1, 3, 224, 224))


def test_an_unknown_need_is_refused_with_the_known_ones():
    with (
        pytest.raises(
            ModelError, match="cannot record scores; known: attention_outputs, class_attention, queries_and_keys"
        ),
        record_attention(build("vit"), {"scores", CLASS_ATTENTION}),
    ):
        pass


def test_dropout_in_attention_is_refused():
    model = build("vit", attn_drop_rate=0.5).train()
    with record_attention(model), pytest.raises(ModelError, match="put the model into evaluation mode"):
        model(images_for(model))


def test_without_needs_the_model_is_not_touched():
    model = build("vit")
    before = state(model)
    with record_attention(model, frozenset()) as record:
        assert state(model) == before
        model(images_for(model))
    assert record.names == []


# nothing is left behind


def state(model):
    """Everything that recording may change: flags, modes, hooks, and the stack of function modes."""
    parts = [
        (
            getattr(module, "fused_attn", None),
            module.training,
            len(module._forward_hooks),
            len(module._forward_pre_hooks),
            len(module._forward_hooks_always_called),
        )
        for module in model.modules()
    ]
    return parts, torch._C._len_torch_function_stack()


def mixed(name):
    """A model whose modules have different flags and modes."""
    model = build(name)
    flagged = [module for module in model.modules() if hasattr(module, "fused_attn")]
    flagged[0].fused_attn, flagged[1].fused_attn = True, False
    flagged[0].train()
    return model


@pytest.mark.parametrize("needs", [{CLASS_ATTENTION}, {ATTENTION_OUTPUTS}], ids=str)
def test_windows_padded_beyond_the_image_are_refused_and_say_which_sizes_are_not(needs):
    model = build("swin", img_size=48)  # 12x12 tokens are whole windows of 4x4, the second stage's 6x6 are not
    expected = r"^layers\.1\.blocks\.0\.attn: its windows reach beyond the 6x6 tokens; choose a model\.img"
    with pytest.raises(ModelError, match=expected), record_attention(model, needs):
        model(torch.randn(2, 3, 48, 48))


def test_a_model_of_any_size_is_judged_by_the_images_it_is_given():
    model = build("swin", strict_img_size=False)
    with record_attention(model, {CLASS_ATTENTION}) as record:
        model(torch.randn(2, 3, 64, 64))
    assert record.grids == [(4, 4)] * 4


@pytest.mark.parametrize(("inside", "outside", "grid"), [((32, 32), (24, 32), (4, 4)), ((32, 64), (32, 32), (4, 8))])
def test_the_model_inside_a_wrapper_that_resizes_is_found(inside, outside, grid):
    class Resized(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = build("vit", img_size=inside)

        def forward(self, images):
            return self.model(F.interpolate(images, inside))

    model = Resized()
    with record_attention(model, {CLASS_ATTENTION}) as record:
        model(torch.randn(2, 3, *outside))
    assert record.grids == [grid] * 2


WINDOWED = {
    "swinv2_tiny_window8_256": {"window_size": 4, "embed_dim": 16, "depths": (1, 1), "num_heads": (2, 2)},
    "tiny_vit_5m_224": {
        "embed_dims": (16, 16, 16),
        "depths": (1, 1, 1),
        "num_heads": (2, 2, 2),
        "window_sizes": (4, 4, 4),
    },
    "sam2_hiera_tiny": {
        "q_pool": 1,
        "embed_dim": 16,
        "num_heads": 1,
        "stages": (1, 2),
        "window_spec": (4, 4),
        "global_att_blocks": (),
    },
}


@pytest.mark.parametrize(
    ("name", "padded", "whole", "said"),
    [
        ("swinv2_tiny_window8_256", 40, 64, r"layers\.0\.blocks\.0\.attn: its windows reach beyond the 10x10 tokens"),
        ("tiny_vit_5m_224", 80, 64, r"stages\.1\.blocks\.0\.attn: its windows reach beyond the 10x10 tokens"),
        ("sam2_hiera_tiny", 48, 64, r"blocks\.2\.attn: its windows reach beyond the 6x6 tokens"),
    ],
)
def test_padded_windows_are_refused_even_if_the_model_states_another_size(name, padded, whole, said):
    def run(side):
        sized = {"img_size": side} if name.startswith("swin") else {}
        model = timm.create_model(name, **sized, **WINDOWED[name]).eval()
        with record_attention(model) as record:
            model(torch.randn(2, 3, side, side))
        return record

    with pytest.raises(ModelError, match=said):
        run(padded)
    assert len(run(whole).names) >= 2


@pytest.mark.parametrize("name", ["vit", "swin"])
def test_flags_hooks_and_modes_are_restored_after_use(name):
    model = mixed(name)
    before = state(model)
    with record_attention(model, BOTH):
        assert state(model) != before
        model(images_for(model))
    assert state(model) == before


@pytest.mark.parametrize("name", ["vit", "swin"])
def test_flags_hooks_and_modes_are_restored_after_a_bad_argument(name):
    model = mixed(name)
    before = state(model)
    with pytest.raises(ModelError), record_attention(model, {"nothing"}):
        pass
    assert state(model) == before


@pytest.mark.parametrize("name", ["vit", "swin"])
def test_flags_hooks_and_modes_are_restored_after_the_model_raised(name):
    model = mixed(name)
    before = state(model)
    with pytest.raises(AssertionError), record_attention(model, BOTH):
        model(torch.randn(2, 3, 20, 20))
    assert state(model) == before


def test_flags_hooks_and_modes_are_restored_after_the_block_raised():
    model = mixed("vit")
    before = state(model)
    with pytest.raises(KeyboardInterrupt), record_attention(model, BOTH):
        raise KeyboardInterrupt
    assert state(model) == before


def test_a_call_that_raised_does_not_spoil_the_next_one():
    model = build("vit")
    images = images_for(model)

    def fail(*_):
        raise RuntimeError("in the middle")

    with record_attention(model) as record:
        hook = model.blocks[1].mlp.fc1.register_forward_hook(fail)
        with pytest.raises(RuntimeError, match="in the middle"):
            model(images)
        hook.remove()
        model(images)
    assert record.names == NAMES["vit"]


def test_module_names_are_those_of_the_modules_that_run():
    model = build("vit")
    seen = []
    hooks = [model.blocks[1].attn.proj.register_forward_hook(lambda *_: seen.append(list(names)))]
    with module_names(model) as names:
        model(images_for(model))
        with pytest.raises(AssertionError):
            model(torch.zeros(1, 3, 5, 5))
        assert names == [], "a module that raised is no longer running"
    for hook in hooks:
        hook.remove()
    assert seen == [["", "blocks", "blocks.1", "blocks.1.attn"]]
    assert names == []
