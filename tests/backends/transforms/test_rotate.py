"""The step `rotate`: the network computes the same, its streams and heads are rotated, and what stays is reported."""

import json
import warnings

import attrs
import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from support.backends import FUSED, RUNTIME, back_end, images, network, quantized, taken, teacher, teacher_of
from torch import nn

from spdfq.backends import Rotate, quantize
from spdfq.backends.quantize import check_quantization
from spdfq.backends.quantized_student import student_factory
from spdfq.errors import DataError, ModelError, RecipeError, SpdfqError
from spdfq.quantized import place
from spdfq.quantized.checkpoint import load_quantized, save_quantized
from spdfq.recipe import digest, load_recipe
from spdfq.runtime import Runtime

ROTATE = "quantization.steps=[{type='rotate'}, {type='calibrate', observer='minmax', weight_observer='minmax'}]"
SMALL = {"img_size": 32, "num_classes": 10, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}


def perturbed(module):
    """No weight is zero, and norms and LayerScales have channels of very different size."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return module.eval()


def of_timm(name, **changes):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return teacher_of(perturbed(timm.create_model(name, **{**SMALL, **changes})))


def rotated(chosen, **options):
    """A placed model of the teacher after the step."""
    model = place(chosen, back_end())
    return taken(Rotate(**options), model, chosen, images=images(2))


@torch.no_grad()
def change(model, chosen):
    """The largest change of the output, relative to its maximum."""
    wanted = chosen.module(images(3))
    return float((model.network(images(3)) - wanted).abs().max() / wanted.abs().max())


def notes(model):
    return [note.removeprefix("rotate: ") for note in model.notes if note.startswith("rotate: ")]


def changed(model, chosen):
    """Names of the weights and biases that the step changed."""
    before, after = dict(chosen.module.named_parameters()), dict(model.network.named_parameters())
    return {name for name in before.keys() & after.keys() if not torch.equal(before[name], after[name])}


# models that are rotated throughout

FULL = {
    "class token": ("vit_tiny_patch16_224", {}),
    "mean of tokens": ("vit_tiny_patch16_224", {"global_pool": "avg", "class_token": False}),
    "norm after pooling": ("vit_tiny_patch16_224", {"global_pool": "avg", "fc_norm": True}),
    "LayerScale": ("vit_tiny_patch16_224", {"init_values": 0.1}),
    "registers": ("vit_small_patch14_reg4_dinov2", {}),
    "two class tokens": ("deit_tiny_distilled_patch16_224", {}),
    "parallel blocks": ("vit_small_patch16_18x2_224", {}),
    "no bias": ("vit_tiny_patch16_224", {"qkv_bias": False}),
    "width without a Hadamard matrix": ("vit_tiny_patch16_224", {"embed_dim": 36}),
    "bias made of parameters": ("beit_base_patch16_224", {"init_values": 0.1}),
    "image of another size": ("vit_tiny_patch16_224", {"dynamic_img_size": True, "img_size": 64}),
}


@pytest.mark.parametrize(("name", "options"), FULL.values(), ids=FULL)
def test_a_plain_vit_is_rotated_throughout_and_computes_the_same(name, options):
    chosen = of_timm(name, **options)
    model = rotated(chosen)
    assert change(model, chosen) < 1e-5
    assert notes(model) == []
    assert not any(isinstance(part, nn.LayerNorm) for part in model.network.modules())


class Encoder(nn.Module):
    """torch's own encoder, which has a fast path that reads the weights of its norms."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 2, 64, batch_first=True, norm_first=True)
        self.patch, self.position = nn.Conv2d(3, 32, 8, 8), nn.Parameter(torch.zeros(1, 16, 32))
        self.body = nn.TransformerEncoder(layer, 2, nn.LayerNorm(32), enable_nested_tensor=False)
        self.head = nn.Linear(32, 10)

    def forward(self, pixels):
        return self.head(self.body(self.patch(pixels).flatten(2).mT + self.position).mean(1))


def _torchvision():
    return torchvision.models.VisionTransformer(32, 8, 2, 2, 32, 64, num_classes=10)


@pytest.mark.parametrize("build", [Encoder, _torchvision])
def test_torchs_own_attention_is_rotated(build):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        chosen = teacher_of(perturbed(build()))
    model = rotated(chosen)
    assert change(model, chosen) < 1e-5
    assert notes(model) == []
    assert len(model.norms) == 5


def test_the_norms_have_no_parameters_and_the_same_names():
    chosen = teacher("vit")
    model = rotated(chosen)
    assert model.norms == {
        f"{name}": (32, 1e-6)
        for name in ("blocks.0.norm1", "blocks.0.norm2", "blocks.1.norm1", "blocks.1.norm2", "norm")
    }
    for name in model.norms:
        norm = model.network.get_submodule(name)
        assert isinstance(norm, nn.RMSNorm)
        assert list(norm.parameters()) == []


@torch.no_grad()
def test_the_stream_is_that_of_the_teacher_centred_and_turned():
    chosen = teacher("vit")
    model = rotated(chosen, heads=False)
    streams = []
    for module in (chosen.module, model.network):
        handle = module.blocks[0].register_forward_hook(lambda *args: streams.append(args[-1].flatten(0, 1)))
        module(images(3))
        handle.remove()
    ours, theirs = streams[1], streams[0] - streams[0].mean(-1, keepdim=True)
    torch.testing.assert_close(ours @ ours.T, theirs @ theirs.T, atol=1e-3, rtol=1e-4)
    assert (ours - theirs).abs().max() > 0.1


def test_an_outlier_channel_is_spread():
    chosen = teacher("vit")
    with torch.no_grad():
        chosen.module.pos_embed[..., 5] += 100.0
    seen = []
    for module in (chosen.module, rotated(chosen).network):
        handle = module.blocks[0].norm1.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        with torch.no_grad():
            module(images(3))
        handle.remove()
    before, after = (x.abs().amax((0, 1)) / x.square().mean((0, 1)).sqrt().mean() for x in seen)
    assert before.max() > 5
    assert after.max() < 3


# models that are rotated in part


def test_swin_keeps_the_streams_under_patch_merging():
    chosen = teacher("swin")
    model = rotated(chosen)
    assert change(model, chosen) < 1e-5
    assert {name.partition(".blocks")[0] for name in model.norms} == {"layers.1", "norm"}
    assert {f"layers.{i}.blocks.{j}.attn.qkv.weight" for i in (0, 1) for j in (0, 1)} <= changed(model, chosen)
    assert notes(model) == [
        "the stream of patch_embed.norm, layers.0.blocks.0.norm1: not rotated, the output of a norm is normalised "
        "again",
        "the stream of layers.0.blocks.0.norm2, layers.0.blocks.1.norm1, layers.0.blocks.1.norm2: not rotated, the "
        "output of a norm is added",
        "the stream of layers.1.downsample.norm: not rotated, it is no sum of layers and parameters alone",
    ]


def test_repq_still_finds_swins_norms_after_it():
    steps = "quantization.steps=[{type='rotate'}, {type='calibrate', observer='minmax', weight_observer='minmax'}, "
    model = quantized("swin", steps + "{type='repq', observer='minmax', weight_observer='minmax'}]")
    assert [note for note in model.notes if note.startswith("repq")] == [
        "repq: patch_embed.norm does not change: its output also goes to layer_norm, add",
    ]
    assert "layers.1.downsample.reduction.bias" in model.biases


ROPE = (
    "queries and keys of blocks.0.attn, blocks.1.attn: not rotated, something (a rotary embedding, a norm) is between"
)
PARTLY = {
    "rotary embedding": ("vit_small_patch16_dinov3", {}, [f"{ROPE} a layer and the product"]),
    "norm of queries and keys": ("vit_tiny_patch16_224", {"qk_norm": True}, [f"{ROPE} a layer and the product"]),
    "attention pooling": (
        "vit_base_patch16_siglip_224",
        {},
        ["the stream of attn_pool.norm: not rotated, head.weight takes it without a LayerNorm"],
    ),
    "norm before the blocks": (
        "vit_base_patch32_clip_224",
        {},
        [
            "the stream of norm_pre, blocks.0.norm1: not rotated, the output of a norm is normalised again",
            "the stream of blocks.0.norm2, blocks.1.norm1, blocks.1.norm2 and 1 more: not rotated, the output of a "
            "norm is added",
        ],
    ),
    "no head": (
        "vit_tiny_patch16_224",
        {"num_classes": 0},
        [
            "the stream of blocks.0.norm1, blocks.0.norm2, blocks.1.norm1 and 2 more: not rotated, it is what the "
            "network returns"
        ],
    ),
}


@pytest.mark.parametrize(("name", "options", "lines"), PARTLY.values(), ids=PARTLY)
def test_what_a_model_does_not_allow_stays_and_is_noted(name, options, lines):
    chosen = of_timm(name, **options)
    model = rotated(chosen)
    assert change(model, chosen) < 1e-5
    assert notes(model) == lines
    assert changed(model, chosen)


def test_swin_v2_computes_its_own_attention_and_normalises_afterwards():
    chosen = teacher("swinv2")
    model = rotated(chosen)
    assert changed(model, chosen) == set()
    assert notes(model)[0] == "no head is rotated: no attention by scaled_dot_product_attention"
    assert notes(model)[1].endswith("the output of a norm is added")


@pytest.mark.parametrize("name", FUSED)
def test_every_kind_of_model_computes_the_same(name):
    chosen = teacher(name)
    assert change(rotated(chosen), chosen) < 1e-5


# networks with one unusual part


class Odd(nn.Module):
    """One block of pre-norm layers; a child changes one thing."""

    def __init__(self):
        super().__init__()
        self.patch, self.norm, self.last = nn.Conv2d(3, 8, 8, 8), nn.LayerNorm(8), nn.LayerNorm(8)
        self.up, self.down, self.head = nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 10)

    def embed(self, pixels):
        return self.patch(pixels).flatten(2).mT

    def branch(self, x):
        return self.down(F.gelu(self.up(self.norm(x))))

    def forward(self, pixels):
        x = self.embed(pixels)
        return self.head(self.last(x + self.branch(x)).mean(1))


class Maximum(Odd):
    def forward(self, pixels):
        x = self.embed(pixels)
        return self.head(self.last((x + self.branch(x)).amax(1)))


class TwoNorms(Odd):
    def branch(self, x):
        return self.down(F.gelu(self.up(self.norm(x)) + self.up(self.last(x))))


class Rms(Odd):
    def __init__(self):
        super().__init__()
        self.norm, self.last = nn.RMSNorm(8, 1e-6), nn.RMSNorm(8, 1e-6)


class Mixed(Odd):
    def __init__(self):
        super().__init__()
        self.norm = nn.RMSNorm(8, 1e-6)


class Padded(Odd):
    def branch(self, x):
        return self.down(F.gelu(self.up(F.pad(self.norm(x), (0, 0, 0, 2)))))[:, :-2]


class Buffer(Odd):
    def __init__(self):
        super().__init__()
        self.register_buffer("position", torch.randn(16, 8, generator=torch.Generator().manual_seed(0)))

    def embed(self, pixels):
        return super().embed(pixels) + self.position


class InPlace(Odd):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.full((8,), 0.3))

    def forward(self, pixels):
        x = self.embed(pixels)
        x += self.branch(x).mul_(self.scale) * 0.5
        return self.head(self.last(x).mean(1))


class Twice(Odd):
    def forward(self, pixels):
        x = self.embed(pixels)
        for _ in range(2):
            x = x + self.branch(x)
        return self.head(self.last(x).mean(1))


class ScaledTwice(Odd):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.full((8,), 0.3))

    def forward(self, pixels):
        x = self.embed(pixels)
        branch = self.branch(x)
        return self.head(self.last(x + branch * self.scale + branch).mean(1))


class Assigned(Odd):
    def forward(self, pixels):
        x = self.embed(pixels)
        x[:, 0] = x[:, 0] ** 2
        return self.head(self.last(x + self.branch(x)).mean(1))


class PostNorm(Odd):
    def forward(self, pixels):
        x = self.embed(pixels)
        return self.head(self.last(x + self.norm(self.down(self.up(x)))).mean(1))


class ScaledNorm(Odd):
    def branch(self, x):
        return self.down(F.gelu(self.up(self.norm(x) * 0.3)))


class SummedNorm(Odd):
    def forward(self, pixels):
        x = self.embed(pixels)
        return self.head(self.last(x + self.branch(x)).sum(1))


class SummedStream(Odd):
    def forward(self, pixels):
        x = self.embed(pixels)
        return self.head(self.last((x + self.branch(x)).sum(1)))


class ReadWithoutNorm(Odd):
    def forward(self, pixels):
        x = self.embed(pixels)
        return self.head((x + self.branch(x)).mean(1))


class RmsReadWithoutNorm(Rms, ReadWithoutNorm):
    pass


class Grouped(Odd):
    def __init__(self):
        super().__init__()
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)

    def embed(self, pixels):
        return self.depthwise(self.patch(pixels)).flatten(2).mT


class NormWithoutWeight(Odd):
    def __init__(self):
        super().__init__()
        self.norm, self.last = nn.LayerNorm(8, elementwise_affine=False), nn.LayerNorm(8, bias=False)


class NormOfChannelsFirst(Odd):
    class Norm(nn.LayerNorm):
        def forward(self, x):
            return super().forward(x.mT).mT

    def __init__(self):
        super().__init__()
        self.norm = self.Norm(8)

    def branch(self, x):
        return self.down(F.gelu(self.up(self.norm(x.mT).mT)))


ODD = dict.fromkeys((Odd, Rms, InPlace, Twice, SummedStream, RmsReadWithoutNorm, NormWithoutWeight), "") | {
    ScaledNorm: "its features go through mul",
    SummedNorm: "its features go through sum",
    ReadWithoutNorm: "head.weight takes it without a LayerNorm",
    Grouped: "depthwise.weight writes it, which is grouped or only a part of a weight",
    NormOfChannelsFirst: "its norms are not over the last axis of a module's input",
    Maximum: "its features go through amax",
    TwoNorms: "up.weight also takes other inputs",
    Mixed: "it has LayerNorms and RMSNorms",
    Padded: "its features go through pad",
    Buffer: "a tensor that no layer computes is added",
    ScaledTwice: "scale or down.weight is used twice",
    Assigned: "its features go through pow",
    PostNorm: "the output of a norm is added",
}


@pytest.mark.parametrize(("build", "reason"), ODD.items(), ids=lambda value: getattr(value, "__name__", ""))
def test_an_unusual_network_is_rotated_or_left_alone_but_never_changed(build, reason):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        chosen = teacher_of(perturbed(build()))
    model = rotated(chosen, heads=False)
    assert change(model, chosen) < 1e-5
    assert bool(model.norms) == (not reason)
    assert not reason or any(note.endswith(f"not rotated, {reason}") for note in notes(model))


# attention with one unusual part


class Attending(nn.Module):
    """Attention of two heads over the tokens; a child changes one thing."""

    keys = 2

    def __init__(self):
        super().__init__()
        self.patch, self.head = nn.Conv2d(3, 8, 8, 8), nn.Linear(8, 10)
        self.q, self.k, self.v, self.proj = (
            nn.Linear(8, 8),
            *(nn.Linear(8, 4 * self.keys) for _ in "kv"),
            nn.Linear(8, 8),
        )

    def heads(self, x):
        return x.unflatten(-1, (-1, 4)).transpose(1, 2)

    def product(self, query, key, value):
        return F.scaled_dot_product_attention(query, key, value)

    def forward(self, pixels):
        x = self.patch(pixels).flatten(2).mT
        query, key, value = (self.heads(layer(x)) for layer in (self.q, self.k, self.v))
        return self.head(self.proj(self.product(query, key, value).transpose(1, 2).flatten(2)).mean(1))


class Scaled(Attending):
    def product(self, query, key, value):
        return F.scaled_dot_product_attention(query * 0.3, key / 2, value, scale=1.0)


class OneKey(Attending):
    keys = 1

    def product(self, query, key, value):
        return F.scaled_dot_product_attention(query, key, value, enable_gqa=True)


class Shifted(Attending):
    def product(self, query, key, value):
        return F.scaled_dot_product_attention(query, key + 1.0, value)


class ValueAdded(Attending):
    def product(self, query, key, value):
        return F.scaled_dot_product_attention(query, key, value) + value


class ScoresAdded(Attending):
    def product(self, query, key, value):
        return F.scaled_dot_product_attention(query, key, value, attn_mask=query.mean(-1, keepdim=True))


class AttendsTwice(Attending):
    def product(self, query, key, value):
        return F.scaled_dot_product_attention(query, key, value) + F.scaled_dot_product_attention(key, query, value)


class GroupedHeads(Attending):
    def heads(self, x):
        return x.unflatten(-1, (4, -1)).mT.transpose(1, 2)  # channels of a head are not next to each other


class Computed(Attending):
    def product(self, query, key, value):
        return (query @ key.mT).softmax(-1) @ value


BOTH, SCORES, VALUES = {"q", "k", "v", "proj"}, {"q", "k"}, {"v", "proj"}
HEADS = {
    Attending: BOTH,
    Scaled: BOTH,
    OneKey: BOTH,
    Shifted: VALUES,
    ValueAdded: SCORES,
    ScoresAdded: VALUES,
    AttendsTwice: set(),
    GroupedHeads: BOTH,
    Computed: set(),
}


@pytest.mark.parametrize(("build", "wanted"), HEADS.items(), ids=lambda value: getattr(value, "__name__", ""))
def test_unusual_attention_is_rotated_where_it_can_be(build, wanted):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        chosen = teacher_of(perturbed(build()))
    model = rotated(chosen, stream=False)
    assert change(model, chosen) < 1e-5
    assert {name.partition(".")[0] for name in changed(model, chosen)} == wanted
    assert bool(notes(model)) == (wanted != BOTH)


def test_a_change_of_the_output_is_an_error(monkeypatch):
    monkeypatch.setattr("spdfq.backends.transforms.rotate._TOLERANCE", 0.0)
    with pytest.raises(ModelError, match=r"rotate: the float output changed by .* leave the step out"):
        rotated(teacher("vit"))


# options, order, notes


def test_the_seed_decides_and_options_switch_parts_off():
    chosen = teacher("vit")
    first, again, other = (rotated(chosen, seed=seed).tensors() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["blocks.0.attn.qkv.weight"], other["blocks.0.attn.qkv.weight"])
    heads, stream = rotated(chosen, stream=False), rotated(chosen, heads=False)
    assert heads.norms == {}
    assert changed(heads, chosen) == {
        f"blocks.{b}.attn.{leaf}" for b in (0, 1) for leaf in ("qkv.weight", "qkv.bias", "proj.weight")
    }
    assert len(stream.norms) == 5
    assert changed(rotated(chosen, stream=False, heads=False), chosen) == set()


def test_it_must_come_before_ranges_are_chosen():
    steps = "quantization.steps=[{type='calibrate'}, {type='rotate'}]"
    spec = back_end(steps)
    with pytest.raises(SpdfqError, match=r"rotate: .* put it before 'calibrate'"):
        Rotate().check(place(teacher("vit"), spec), spec.steps[:1])
    with pytest.raises(SpdfqError, match=r"rotate: .* put it before 'calibrate'"):
        quantize(teacher("vit"), images(2), spec, RUNTIME)
    with pytest.raises(RecipeError, match=r"quantization.steps.1: rotate: .* put it before 'calibrate'"):
        check_quantization(teacher("vit"), spec)


def test_the_teacher_does_not_change():
    chosen = teacher("vit")
    before = chosen.fingerprint()
    quantized(chosen, ROTATE)
    assert chosen.fingerprint() == before


# steps after it


def test_later_steps_compare_with_the_rotated_network():
    """The error of a block is that of rounding, not the distance between two coordinate systems."""
    steps = "{type='calibrate', observer='minmax', weight_observer='minmax'}, {type='blockwise', iterations=3, batch=4}"
    lines = [f"quantization.{what}.bits=8" for what in ("weights", "activations", "softmax")]
    chosen = teacher("vit")
    model = quantized(chosen, f"quantization.steps=[{{type='rotate'}}, {steps}]", *lines)
    with torch.no_grad():
        wanted = chosen.module(images())
        assert (model(images()) - wanted).norm() < 0.2 * wanted.norm()


BACKENDS = [
    *("adalog", "adaround", "blockwise", "distill", "minmax", "plus", "ptf", "repq", "ridge", "three_stage"),
]


def small(step):
    """A step with few iterations."""
    fields = {field.name for field in attrs.fields(type(step))}
    return attrs.evolve(step, **{key: value for key, value in (("iterations", 2), ("batch", 4)) if key in fields})


@pytest.mark.parametrize("name", BACKENDS)
def test_it_combines_with_every_shipped_back_end(name, tmp_path):
    recipe = {"extends": ["models/vit_fmnist", "images/gaussian_noise", f"backends/{name}"]}
    spec = load_recipe(recipe, ["quantization.overrides=[]"]).quantization
    spec = attrs.evolve(spec, steps=(Rotate(), *map(small, spec.steps)))
    (tmp_path / "state").mkdir()
    chosen = teacher("vit")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = quantize(chosen, images(4), spec, RUNTIME, tmp_path / "state")
        again = quantize(chosen, images(4), spec, RUNTIME, tmp_path / "state")  # from the finished parts
    with torch.no_grad():
        logits = model(images())
        assert logits.isfinite().all()
        assert torch.equal(again(images()), logits)
    save_quantized(model, tmp_path / "saved", chosen)
    with torch.no_grad():
        assert torch.equal(load_quantized(tmp_path / "saved", network("vit"))(images()), logits)


def test_a_budget_measures_the_rotated_network():
    budget = "quantization.budget={weights=4.0, choices=[2, 4, 6]}"
    lines = {
        tuple(sorted((name, quantizer.bits) for name, quantizer in model.quantizers.items()))
        for model in (quantized("vit", budget, steps) for steps in (ROTATE, "quantization.overrides=[]"))
    }
    assert len(lines) == 2


def test_a_student_is_not_rotated_again_with_each_calibration():
    student = student_factory(teacher("vit"), back_end(ROTATE), Runtime(seed=0))(images())
    before = student.network.blocks[0].attn.qkv.weight.clone()
    student.calibrate(images(seed=1))
    assert torch.equal(student.network.blocks[0].attn.qkv.weight, before)


# checkpoints


@pytest.fixture
def saved(tmp_path):
    chosen = teacher("vit")
    model = quantized(chosen, ROTATE)
    save_quantized(model, tmp_path, chosen)
    return model, tmp_path


def edited(folder, change):
    config = json.loads((folder / "config.json").read_text())
    config.pop("config_digest")
    change(config)
    (folder / "config.json").write_text(json.dumps({**config, "config_digest": digest(config)}))
    return folder


def test_the_norms_are_saved_and_come_back(saved):
    model, folder = saved
    assert json.loads((folder / "config.json").read_text())["norms"]["norm"] == [32, 1e-06]
    again = load_quantized(folder, network("vit"))
    assert again.norms == model.norms
    with torch.no_grad():
        assert torch.equal(again(images()), model(images()))


def test_a_file_without_norms_is_one_of_a_model_without_the_step(tmp_path):
    chosen = teacher("vit")
    model = quantized(chosen)
    save_quantized(model, tmp_path, chosen)
    edited(tmp_path, lambda config: config.pop("norms"))
    with torch.no_grad():
        assert torch.equal(load_quantized(tmp_path, network("vit"))(images()), model(images()))


@pytest.mark.parametrize("entry", [7, [32], ["32", 1e-6], [0, 1e-6], [32, "small"], [32, -1.0], [True, 1e-6]])
def test_a_damaged_norm_is_one_clear_error(saved, entry):
    with pytest.raises(DataError, match=r"config.json: norms: norm: not \[features, eps\]; save the model again"):
        load_quantized(edited(saved[1], lambda config: config["norms"].update(norm=entry)), network("vit"))


def test_norms_of_another_architecture_are_refused(saved):
    folder = edited(saved[1], lambda config: config["norms"].update({"blocks.7.norm1": [32, 1e-6]}))
    with pytest.raises(ModelError, match=r"blocks.7.norm1 does not fit this architecture"):
        load_quantized(folder, network("vit"))
