"""Block-wise reconstruction, and the propagation of images from block to block."""

from contextlib import contextmanager

import pytest
import torch
from attrs import evolve
from support.backends import (
    RUNTIME,
    Interrupted,
    back_end,
    flatten_tensors,
    images,
    network,
    quantized,
    taken,
    teacher,
    teacher_of,
)
from torch import nn

from spdfq.backends import Blockwise, Calibration
from spdfq.backends.blocks import BlockCall, block_calls, block_names
from spdfq.backends.learning.batches import batch_rows
from spdfq.backends.learning.reconstruction import BlockReconstruction
from spdfq.backends.propagation import Propagation, of_images
from spdfq.errors import DataError, ModelError, NonFiniteError

BATCH, COUNT = 2, 5
STEP = Blockwise(iterations=4, lr=2e-3, batch=BATCH)
BLOCKS = {
    "vit": ["blocks.0", "blocks.1"],
    "swin": ["layers.0.blocks.0", "layers.0.blocks.1", "layers.1.blocks.0", "layers.1.blocks.1"],
    "cait": ["blocks.0", "blocks.1", "blocks_token_only.0", "blocks_token_only.1"],
}


def reconstruct(model, chosen, step=STEP, **changes):
    return taken(step, model, chosen, **{"images": images(COUNT), **changes})


def weights_of(model):
    return {name: model.weight(name).detach().clone() for name in model.weight_names()}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def fed(forward, module, names):
    """What a full forward pass feeds each block."""
    seen = {}
    handles = [
        module.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: seen.update({name: [arg for arg in args if isinstance(arg, torch.Tensor)]})
        )
        for name in names
    ]
    with torch.no_grad():
        forward(images(COUNT))
    for handle in handles:
        handle.remove()
    return seen


@pytest.fixture
def watched(monkeypatch):
    """For each block: what entered it, and its error on all images before and after its reconstruction."""
    seen, optimise = {}, BlockReconstruction.optimise

    def watch(job, data):
        def error():
            with torch.no_grad():
                return float(job.spec.distance(job.call.run(job.model.network, data.inputs), data.targets, None))

        before = error()
        optimise(job, data)
        seen[job.call.name] = (data.inputs, before, error())

    monkeypatch.setattr(BlockReconstruction, "optimise", watch)
    return seen


# propagation


@pytest.mark.parametrize("name", BLOCKS)
def test_a_stream_brings_each_block_what_a_full_forward_pass_feeds_it(name):
    model = quantized(name)
    calls = block_calls(network(name), block_names(model), images(1))
    assert [call.name for call in calls] == BLOCKS[name]
    for module, forward in ((network(name), None), (model.network, model)):
        expected = fed(forward or module, module, BLOCKS[name])
        stream = Propagation(module, images(COUNT), BATCH)
        for call in calls:
            with model.quantizing() if forward else torch.no_grad():
                hidden = stream.inputs_of(call)
                stream.through(call, hidden)
            assert len(hidden) == len(expected[call.name])
            for found, wanted in zip(hidden, expected[call.name], strict=True):
                torch.testing.assert_close(found, wanted, atol=2e-5, rtol=1e-4)


def test_a_block_that_follows_another_takes_its_output_and_others_a_forward_pass_of_their_own():
    follows = {name: [call.follows for call in calls_of(name)] for name in BLOCKS}
    assert follows == {"vit": [False, True], "swin": [False, True, False, True], "cait": [False, True, False, False]}
    # patches and class token, the class token alone going on
    assert [call.streams for call in calls_of("cait")] == [{0: 0}, {0: 0}, {0: 0, 1: 0}, {0: 0, 1: 0}]


def calls_of(name):
    module = network(name)
    return block_calls(module, block_names(quantized(name)), images(1))


def test_what_is_the_same_for_every_image_is_kept_with_the_call():
    calls = calls_of("eva02")
    rope = {name: value for name, value in calls[1].given.items() if isinstance(value, torch.Tensor)}
    assert list(rope) == ["rope"]
    assert rope["rope"].shape[0] == 16
    assert calls[1].streams == {0: 0}


def test_rows_of_several_to_an_image_stay_together():
    windows = torch.arange(12).reshape(6, 2)
    (found,) = of_images((windows,), 3, torch.tensor([2, 0]))
    assert found.tolist() == [[8, 9], [10, 11], [0, 1], [2, 3]]


def test_a_numbered_module_that_holds_blocks_is_none():
    class Stage(nn.Module):
        def __init__(self):
            super().__init__()
            self.downsample, self.blocks = Attending(), nn.Sequential(Attending(), Attending())

        def forward(self, x):
            return self.blocks(self.downsample(x))

    model = quantized(teacher_of(Tokens(nn.Sequential(Attending(), Stage()))))
    assert block_names(model) == ["body.0", "body.1.downsample", "body.1.blocks.0", "body.1.blocks.1"]


class Attending(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = nn.ModuleDict({"qk": nn.Linear(8, 16), "v": nn.Linear(8, 8)})

    def forward(self, x):
        query, key = self.attn["qk"](x).chunk(2, -1)
        return x + (query @ key.mT).softmax(-1) @ self.attn["v"](x)


class Tokens(nn.Module):
    """Four tokens of dimension 8, a body, and a head."""

    def __init__(self, body):
        super().__init__()
        self.patch, self.body, self.head = nn.Conv2d(3, 8, 16, 16), body, nn.Linear(8, 10)

    def forward(self, pixels):
        return self.head(self.body(self.patch(pixels).flatten(2).mT).mean(1))


def test_a_model_without_attention_blocks_is_refused():
    chosen = teacher_of(Tokens(nn.Linear(8, 8)))
    with pytest.raises(ModelError, match="Tokens: has no numbered blocks with attention to reconstruct"):
        reconstruct(quantized(chosen), chosen)


def test_a_numbered_module_that_is_not_called_is_refused():
    class Loose(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nn.ModuleDict({"inner": Attending()})])

        def forward(self, x):
            return self.layers[0]["inner"](x)

    chosen = teacher_of(Tokens(Loose()))
    with pytest.raises(ModelError, match=r"body.layers.0: is never called itself, only its parts are"):
        reconstruct(quantized(chosen), chosen)


# the reconstruction


@pytest.mark.parametrize("name", BLOCKS)
def test_the_error_goes_down_in_every_block(name, watched):
    chosen = teacher(name)
    reconstruct(quantized(name), chosen, evolve(STEP, iterations=12))
    assert list(watched) == BLOCKS[name]
    for _, before, after in watched.values():
        assert after < 0.97 * before


@pytest.mark.parametrize("name", BLOCKS)
def test_the_quantized_prefixs_output_enters_the_blocks(name, watched):
    model = reconstruct(quantized(name), teacher(name))
    for block, tensors in fed(model, model.network, BLOCKS[name]).items():
        for found, wanted in zip(watched[block][0], tensors, strict=True):
            torch.testing.assert_close(found, wanted, atol=2e-5, rtol=1e-4)


def test_or_the_teachers(watched):
    chosen = teacher("swin")
    reconstruct(quantized("swin"), chosen, evolve(STEP, inputs="teacher"))
    for block, (wanted,) in fed(chosen.module, chosen.module, BLOCKS["swin"]).items():
        torch.testing.assert_close(watched[block][0][0], wanted, atol=2e-5, rtol=1e-4)


def test_a_block_in_float_is_passed_through_on_the_way(watched):
    chosen = teacher("vit", depth=3)
    model = quantized(chosen, "quantization.overrides=[{sites=['blocks.1.*'], bits=0}]")
    reconstruct(model, chosen)
    assert list(watched) == ["blocks.0", "blocks.2"]
    (wanted,) = fed(model, model.network, ["blocks.2"])["blocks.2"]
    torch.testing.assert_close(watched["blocks.2"][0][0], wanted, atol=2e-5, rtol=1e-4)


def test_blocks_and_weights_that_are_not_learned_are_noted():
    outside = "blockwise: {}: not learned, outside of the blocks"
    model = reconstruct(quantized("swin"), teacher("swin"), evolve(STEP, iterations=1))
    names = "patch_embed.proj.weight, layers.1.downsample.reduction.weight, head.fc.weight"
    assert model.notes == [outside.format(names)]
    in_float = "quantization.overrides=[{sites=['blocks.0.*', 'patch_embed.*', 'head.*'], bits=0}]"
    model = reconstruct(quantized("vit", in_float), teacher("vit"))
    assert model.notes == ["blockwise: blocks.0: nothing to learn, no weight is quantized"]
    assert model.site_table()["notes"] == model.notes


def test_a_block_whose_scales_are_learned_is_not_noted(watched):
    chosen = teacher("vit")
    model = quantized(chosen, "quantization.overrides=[{sites=['blocks.1.*.weight'], bits=0}]")
    reconstruct(model, chosen, evolve(STEP, scale_lr=1e-3))
    assert list(watched) == ["blocks.0", "blocks.1"]
    assert not any("nothing to learn" in note for note in model.notes)


def test_a_block_that_runs_twice_is_reconstructed_once(watched):
    chosen = teacher("vit")
    chosen.module.blocks = nn.Sequential(chosen.module.blocks[0], chosen.module.blocks[0], chosen.module.blocks[1])
    model = reconstruct(quantized(chosen), chosen)
    assert list(watched) == ["blocks.0", "blocks.2"]
    (wanted,) = fed(model, model.network, ["blocks.2"])["blocks.2"]
    torch.testing.assert_close(watched["blocks.2"][0][0], wanted, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("biases", [False, True])
def test_the_quantized_weights_of_the_blocks_are_learned_and_nothing_else(biases):
    model = quantized("vit")
    before = {name: value.clone() for name, value in model.tensors().items()}
    reconstruct(model, teacher("vit"), evolve(STEP, biases=biases))
    layers = [
        f"{block}.{layer}" for block in BLOCKS["vit"] for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    ]
    learned = {f"{layer}.{leaf}" for layer in layers for leaf in (("weight", "bias") if biases else ("weight",))}
    changed = {name for name, value in model.tensors().items() if not torch.equal(value, before[name])}
    assert changed == learned
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in model.network.parameters())


def test_adam_follows_a_cosine_and_the_loss_is_the_2_norm():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.mix, self.head = nn.Sequential(Attending()), nn.Linear(8, 10)

        def forward(self, pixels):
            return self.head(self.mix(pixels[:, :, 0, :8]).mean(1))

    chosen = teacher_of(Scaled())
    model = quantized(chosen)
    before = weights_of(model)
    reconstruct(model, chosen, Blockwise(iterations=1, lr=0.01))
    moved = (model.weight("mix.0.attn.v.weight") - before["mix.0.attn.v.weight"]).abs()
    # Adam's first step is the learning rate for every weight that has a gradient
    assert ((moved - 0.01).abs() < 1e-5).float().mean() > 0.9
    one, two = torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 12.0]])
    target = (torch.zeros(1, 2), torch.tensor([[4.0, 12.0]]))
    assert STEP.distance((one, two), target, None).item() == pytest.approx(5)
    assert STEP.distance((one, two), target, (torch.ones(1, 2), 2 * torch.ones(1, 2))).item() == pytest.approx(41**0.5)
    rates = []
    steps = torch.optim.Adam.step

    def step(optimizer):
        rates.append(optimizer.param_groups[0]["lr"])
        return steps(optimizer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.Adam, "step", step)
        reconstruct(quantized(chosen), chosen, Blockwise(iterations=4, lr=1.0))
    assert rates == pytest.approx([1.0, 0.5 + 0.25 * 2**0.5, 0.5, 0.5 - 0.25 * 2**0.5])


@pytest.mark.parametrize(("count", "sizes"), [(3, [3, 3, 3]), (4, [4, 4, 4]), (5, [4, 1, 4])])
def test_a_batch_has_all_images_where_there_are_no_more(count, sizes):
    calibration = Calibration(teacher=None, images=images(count), runtime=RUNTIME)
    rows = [batch_rows(calibration, 4, iteration, "test") for iteration in range(3)]
    assert [len(images(count)[chosen]) for chosen in rows] == sizes
    assert all(chosen == slice(None) for chosen in rows if count <= 4)


def test_every_image_takes_part_in_every_epoch_the_last_smaller_batch_too(monkeypatch, watched):
    given, run = [], BlockCall.run

    def watch(call, module, hidden):
        if torch.is_grad_enabled() and call.name == "blocks.1":
            given.append(hidden[0])
        return run(call, module, hidden)

    monkeypatch.setattr(BlockCall, "run", watch)
    reconstruct(quantized("vit"), teacher("vit"), evolve(STEP, iterations=6))
    assert [len(part) for part in given] == [2, 2, 1, 2, 2, 1]
    entered = watched["blocks.1"][0][0]
    epochs = [torch.cat(given[:3]), torch.cat(given[3:])]
    orders = [[int((entered == row).flatten(1).all(1).nonzero()) for row in epoch] for epoch in epochs]
    assert [sorted(order) for order in orders] == [[0, 1, 2, 3, 4]] * 2
    assert orders[0] != orders[1]


def test_evaluation_mode_is_kept_in_both_networks():
    plain, dropping = teacher("vit"), teacher("vit", drop_path_rate=0.5)
    dropping.module.train()
    assert any(type(module).__name__ == "DropPath" for module in dropping.module.modules())
    first, second = quantized(plain), quantized(dropping)
    seen = set()
    for block in (*second.network.blocks, *dropping.module.blocks):
        block.register_forward_hook(lambda module, *_: seen.add(module.training))
    reconstruct(first, plain)
    reconstruct(second, dropping)
    assert seen == {False}
    assert same(weights_of(first), weights_of(second))
    assert dropping.module.training


def test_it_is_deterministic_and_the_seed_orders_the_images():
    chosen = teacher("vit")
    torch.manual_seed(1)
    first = weights_of(reconstruct(quantized(chosen), chosen))
    torch.manual_seed(2)
    assert same(first, weights_of(reconstruct(quantized(chosen), chosen)))
    other = weights_of(reconstruct(quantized(chosen), chosen, runtime=evolve(RUNTIME, seed=9)))
    assert not same(first, other)


def test_it_works_without_gradients_around_it():
    chosen = teacher("vit")
    expected = weights_of(reconstruct(quantized(chosen), chosen))
    with torch.no_grad():
        assert same(expected, weights_of(reconstruct(quantized(chosen), chosen)))


def test_progress_counts_every_iteration():
    seen = []

    @contextmanager
    def progress(label, total):
        yield lambda steps=1, **values: seen.append((label, total, steps, *values))

    runtime = evolve(RUNTIME, progress=progress)
    reconstruct(quantized("vit"), teacher("vit"), evolve(STEP, iterations=13), runtime=runtime)
    assert seen == [("reconstructing", 26, steps, "error") for steps in (10, 3, 10, 3)]


def test_an_error_that_is_not_finite_names_the_block():
    given = images(COUNT)
    model = quantized("vit")
    given[0] = torch.nan
    with pytest.raises(NonFiniteError, match=r"the error of blocks.0 is not finite in iteration 3; try a lower lr"):
        reconstruct(model, teacher("vit"), images=given)
    assert not any(parameter.requires_grad for parameter in model.network.parameters())


# resuming


@pytest.mark.parametrize(("finished", "inputs"), [(1, "quantized"), (3, "quantized"), (2, "teacher")])
def test_an_interrupted_reconstruction_goes_on_bit_for_bit(tmp_path, monkeypatch, finished, inputs):
    chosen, step = teacher("swin"), evolve(STEP, inputs=inputs, biases=True)
    expected = reconstruct(quantized(chosen), chosen, step)
    done, optimise = [], BlockReconstruction.optimise

    def interrupt(job, *args):
        if len(done) == finished:
            raise Interrupted
        optimise(job, *args)
        done.append(job.call.name)

    with monkeypatch.context() as patch:
        patch.setattr(BlockReconstruction, "optimise", interrupt)
        with pytest.raises(Interrupted):
            reconstruct(quantized(chosen), chosen, step, folder=tmp_path)
        done.insert(0, "the second attempt does only the rest")
        finished = len(done) + 10
        model = reconstruct(quantized(chosen), chosen, step, folder=tmp_path)
    assert done[1:] == BLOCKS["swin"]
    assert [path.name for path in tmp_path.iterdir()] == ["step-0-blockwise.safetensors"]
    assert same(dict(model.network.named_parameters()), dict(expected.network.named_parameters()))


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(path.read_bytes()[:-9]),
        lambda path: path.write_text("{}"),
        flatten_tensors,
    ],
    ids=["truncated", "text", "other shapes"],
)
def test_a_damaged_state_is_one_clear_error(tmp_path, damage):
    chosen = teacher("vit")
    reconstruct(quantized(chosen), chosen, folder=tmp_path)
    damage(tmp_path / "step-0-blockwise.safetensors")
    with pytest.raises(
        DataError,
        match=r"^(/.*step-0-blockwise.safetensors: damaged|the state of an interr).*delete it, or use --fresh$",
    ):
        reconstruct(quantized(chosen), chosen, folder=tmp_path)


def test_steps_of_one_recipe_have_states_and_orders_of_their_own(tmp_path):
    chosen = teacher("vit")
    first = weights_of(reconstruct(quantized(chosen), chosen, folder=tmp_path, index=1))
    second = weights_of(reconstruct(quantized(chosen), chosen, folder=tmp_path, index=2))
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"step-{i}-blockwise.safetensors" for i in (1, 2)]
    assert not same(first, second)


def test_the_shipped_back_end_runs_calibration_and_then_this():
    spec = back_end("quantization.steps=['calibrate', {type='blockwise', iterations=2}]")
    assert [type(step).__name__ for step in spec.steps] == ["Calibrate", "Blockwise"]
    assert (Blockwise().iterations, Blockwise().lr, Blockwise().inputs) == (100, 4e-5, "quantized")
