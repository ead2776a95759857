"""Compiled, scripted, traced, exported and unfinished modules: correct results, or one line with the remedy."""

import copy
import threading

import pytest
import torch
from support import backends
from support.teachers import CLASSES, RUNTIME, SIDE, TinyViT, recipe, tiny_teacher
from torch import nn

from spdfq.attention import record_attention
from spdfq.backends import quantize
from spdfq.errors import ModelError
from spdfq.quantized.checkpoint import load_quantized, save_quantized
from spdfq.runtime.shared_modules import uncompiled
from spdfq.teacher import Teacher

STEPS = "quantization.steps=[{type='calibrate'}, {type='blockwise', iterations=2}, {type='distill', iterations=2}]"


def images(count=4):
    return torch.randn(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))


def network():
    return tiny_teacher().module


def teacher_of(module):
    return Teacher(module, mean=(0.5,) * 3, std=(0.25,) * 3, num_classes=CLASSES, input_size=(3, SIDE, SIDE))


def stages(teacher):
    made = recipe(iterations=2).synthesize(teacher, RUNTIME).images
    return made, quantize(teacher, made, backends.back_end(STEPS), RUNTIME)


@pytest.fixture(scope="module")
def plain():
    made, model = stages(teacher_of(network()))
    return made, model


def record(module):
    with record_attention(module) as found:
        module(images())
    return found


# what gives the same results


def compiled(module):
    return torch.compile(module, backend="eager")


def in_place(module):
    module.compile(backend="eager")
    return module


def blocks_in_place(module):
    for block in module.blocks:
        block.compile(backend="eager")
    return module


class CompiledFunction(nn.Module):
    """A network that calls a compiled function."""

    def __init__(self, network):
        super().__init__()
        self.inside = network
        self.function = torch.compile(lambda x: x @ x.mT, backend="eager")

    def forward(self, x):
        self.function(x)
        return self.inside(x)


WORKING = {
    "compiled": compiled,
    "in_place": in_place,
    "blocks_in_place": blocks_in_place,
    "data_parallel": nn.DataParallel,
}


@pytest.mark.parametrize("make", WORKING.values(), ids=WORKING)
def test_a_wrapped_module_gives_the_results_of_the_plain_one(make, plain):
    module = make(network())
    module(images(2))  # compiles it
    made, model = stages(teacher_of(module))
    assert torch.equal(made, plain[0])
    assert torch.equal(model(images()), plain[1](images()))
    names = [name.removeprefix("module.") for name in record(module).names]
    assert names == ["blocks.0.attn", "blocks.1.attn"]


def test_products_of_a_compiled_function_are_seen():
    module = CompiledFunction(network()).eval()
    module(images(2))
    model = quantize(teacher_of(module), images(), backends.back_end(), RUNTIME)
    assert {"product0_left", "product0_right"} <= model.quantizers.keys()
    assert record(module).names == ["inside.blocks.0.attn", "inside.blocks.1.attn"]


def test_compiled_code_is_back_after_the_last_thread_that_runs_without_it():
    first, second = uncompiled(), uncompiled()
    seen = []

    @torch.compile(backend=lambda graph, _: seen.append(1) or graph.forward)
    def function(x):
        return x + 1

    first.__enter__()
    thread = threading.Thread(target=second.__enter__)
    thread.start()
    thread.join()
    first.__exit__(None, None, None)
    function(torch.ones(1))
    assert seen == []
    second.__exit__(None, None, None)
    function(torch.ones(1))
    assert seen == [1]


@pytest.mark.parametrize("in_place", [False, True])
def test_a_compiled_quantized_model_gives_the_logits_of_the_plain_one(in_place, plain):
    model = copy.deepcopy(plain[1])
    fast = model if in_place else compiled(model)
    if in_place:
        model.compile(backend="eager")
    for count in (4, 2, 4):
        assert torch.equal(fast(images(count)), plain[1](images(count)))
    leaf, again = images().requires_grad_(), images().requires_grad_()
    gradients = [torch.autograd.grad(f(x).sum(), x)[0] for f, x in ((fast, leaf), (plain[1], again))]
    assert torch.equal(*gradients)


def test_a_quantized_model_inside_a_compiled_function(plain):
    function = torch.compile(lambda x: plain[1](x) * 2, backend="eager")
    assert torch.equal(function(images()), plain[1](images()) * 2)


def test_a_checkpoint_is_loaded_into_a_compiled_module(plain, tmp_path):
    save_quantized(plain[1], tmp_path, teacher_of(network()))
    again = load_quantized(tmp_path, compiled(network()))
    assert torch.equal(again(images()), plain[1](images()))


# what is refused


def with_part(index, change):
    def make():
        module = network()
        module.blocks[index].mlp = change(module.blocks[index].mlp)
        return module

    return make


def exported(module, example):
    return torch.export.export(module, (example,), dynamic_shapes=({0: torch.export.Dim.AUTO},)).module()


def made_under_inference_mode():
    with torch.inference_mode(), torch.random.fork_rng():
        torch.manual_seed(0)
        return TinyViT()


TOKENS = torch.ones(2, 17, 32)
HIDDEN = {
    "scripted_part": (with_part(1, torch.jit.script), "TinyViT: blocks.1.mlp is scripted or traced, .* was made from$"),
    "traced": (lambda: torch.jit.trace(network(), images(2)), "TopLevelTracedModule: is scripted or traced, .* from$"),
    "exported": (lambda: exported(network(), images(2)), "GraphModule: is an exported graph, .* was made from$"),
    "exported_part": (with_part(0, lambda part: exported(part, TOKENS)), r"TinyViT: blocks\.0\.mlp is an exported .*"),
    "compiled_part": (
        with_part(0, compiled),
        r"TinyViT: blocks\.0\.mlp was made by torch.compile, .* give its _orig_mod, .*: blocks\.0\.mlp\.compile\(\)$",
    ),
    "dynamic_quantized": (
        lambda: torch.ao.quantization.quantize_dynamic(network(), {nn.Linear}),
        r"TinyViT: blocks\.0\.attn\.qkv is already quantized; give the float module$",
    ),
}
WITHOUT_VALUES = {
    "meta": (lambda: network().to("meta"), "TinyViT: cls_token is on the meta device, .* load the weights before$"),
    "inference": (
        made_under_inference_mode,
        r"TinyViT: cls_token was made under torch.inference_mode, .*; give copy.deepcopy",
    ),
}
REFUSED = HIDDEN | WITHOUT_VALUES


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("make", "message"), REFUSED.values(), ids=REFUSED)
def test_a_teacher_of_a_module_that_cannot_be_watched_is_refused_in_one_line(make, message):
    with pytest.raises(ModelError, match=message) as caught:
        teacher_of(make())
    assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("make", "message"), HIDDEN.values(), ids=HIDDEN)
def test_so_is_a_recording_of_it(make, message):
    with pytest.raises(ModelError, match=message):
        record(make())


def test_a_copy_of_a_module_made_under_inference_mode_is_accepted():
    assert all(image.isfinite().all() for image in stages(teacher_of(copy.deepcopy(made_under_inference_mode())))[0])


def test_a_replica_of_a_quantized_model_is_refused_in_one_line(plain):
    with pytest.raises(ModelError, match=r"^nn\.DataParallel cannot run a quantized model; .*deepcopy of it$"):
        plain[1]._replicate_for_data_parallel()(images())
