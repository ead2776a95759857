"""The step global_local: what is learned, by which error, and the block guard."""

from contextlib import contextmanager
from functools import partial

import pytest
import timm
import torch
from attrs import evolve
from support.backends import RUNTIME, Interrupted, images, quantized, state_of, taken, teacher, teacher_of
from support.multihead import multihead_network

from spdfq.backends import GlobalLocal
from spdfq.backends.blocks import BlockCall
from spdfq.backends.learning import global_local, reconstruction
from spdfq.backends.learning.batches import batch_rows
from spdfq.backends.learning.global_local import Decayed, GlobalLocalBlock
from spdfq.backends.learning.reconstruction import BlockReconstruction
from spdfq.backends.learning.shares import Share
from spdfq.errors import ComponentError, NonFiniteError, SpdfqError
from spdfq.runtime.shared_modules import own_hooks

COUNT, BATCH = 6, 4
STEP = GlobalLocal(iterations=6, lr=1e-3, scale_lr=1e-3, batch=BATCH)
UNIFORM = "quantization.softmax={type='uniform', bits=4}"
TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 10}
NAMES = ["vit", "swin", "cait", "dinov2_registers", "eva02", "torchvision", "siglip", "hybrid", "headless"]
reconstruct = partial(taken, images=images(COUNT))


def chosen_of(name):
    if name == "torchvision":
        return teacher_of(multihead_network(name))
    if name in ("siglip", "hybrid"):
        patch, entrypoint = {"siglip": (8, "vit_base_patch16_siglip_224"), "hybrid": (1, "vit_tiny_r_s16_p8_224")}[name]
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return teacher_of(timm.create_model(entrypoint, **{**TINY, "patch_size": patch}).eval())
    return teacher("vit", num_classes=0) if name == "headless" else teacher(name)


def changed(model, before):
    return {name for name, value in state_of(model).items() if not torch.equal(value, before[name])}


def same(first, second):
    return not changed(first, state_of(second)) and first.notes == second.notes


def reverted(model):
    """The blocks that were reverted."""
    end = " was reverted: its local or global error on the images left out did not fall"
    return [note.removeprefix("global_local: ").removesuffix(end) for note in model.notes if note.endswith(end)]


@pytest.fixture
def watched(monkeypatch):
    """For each block: the job, and its global and local error on all images before and after."""
    seen, train = {}, BlockReconstruction.train

    def watch(job, data):
        rows = torch.arange(len(job.calibration.images))
        before = job.errors(data, rows)
        train(job, data)
        seen[job.call.name] = job, before, job.errors(data, rows)

    monkeypatch.setattr(BlockReconstruction, "train", watch)
    return seen


# what is learned


@pytest.mark.parametrize("name", NAMES)
def test_both_errors_go_down_in_every_block(name, watched):
    chosen = chosen_of(name)
    model = quantized(chosen, UNIFORM, count=COUNT)
    reconstruct(evolve(STEP, iterations=16), model, chosen)
    assert len(watched) == (4 if name in ("swin", "cait") else 2)
    for _, before, after in watched.values():
        assert after.sum() / before.sum() < 1
        assert (after / before).sum() < 1.95
    assert not any(parameter.requires_grad for parameter in model.network.parameters())


def test_weights_biases_and_scales_of_the_blocks_change_and_nothing_else():
    model = quantized("vit", UNIFORM)
    before = state_of(model)
    reconstruct(STEP, model, teacher("vit"))
    layers = [
        f"blocks.{block}.{layer}" for block in (0, 1) for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    ]
    scales = {f"{layer}.input_quantizer.scale" for layer in layers}
    scales |= {
        f"blocks.{block}.attn.{kind}_quantizer.scale"
        for block in (0, 1)
        for kind in ("query", "key", "value", "softmax")
    }
    assert changed(model, before) == {f"{layer}.{leaf}" for layer in layers for leaf in ("weight", "bias")} | scales
    model = quantized("vit", UNIFORM)
    reconstruct(evolve(STEP, scale_lr=0.0), model, teacher("vit"))
    assert not scales & changed(model, before)


@pytest.mark.parametrize("name", ["vit", "swin", "cait"])
def test_the_gradient_is_that_of_the_whole_network_quantized_up_to_the_block(name, monkeypatch):
    chosen, model = teacher(name), quantized(name, UNIFORM, count=COUNT)
    seen = []

    def compare(job, data):
        parameters = job.learner.parameters
        rows = torch.arange(COUNT)
        with reconstruction.trainable(parameters), torch.enable_grad():
            with model.visiting(job.visit):
                ours = job.global_error(job.call.run(model.network, data.inputs), Share.whole(rows))
            found = torch.autograd.grad(ours, parameters)
            whole = of_whole_network(job)
            wanted = torch.autograd.grad(whole, parameters)
        torch.testing.assert_close(ours, whole, rtol=1e-3, atol=0)
        for gradient, expected in zip(found, wanted, strict=True):
            assert (gradient - expected).norm() < 1e-3 * expected.norm() + 1e-7
        seen.append(job.call.name)

    def of_whole_network(job):
        """The error of the feature, with a forward pass of the quantized model that is float after the block."""
        done, features = [], []

        def visit(site, kind, tensor):
            return tensor if done else model.quantized(site, kind, tensor)

        block = model.network.get_submodule(job.call.name)
        head = model.network.get_submodule(job.suffix.classifiers[0])
        hooks = [
            (block.register_forward_hook, lambda *_: done.append(None)),
            (head.register_forward_pre_hook, lambda _, args: features.append(args[0])),
        ]
        with own_hooks(hooks), model.visiting(visit):
            model.network(images(COUNT))
        return (features[0] - job.feature[0]).square().mean()

    monkeypatch.setattr(GlobalLocalBlock, "train", compare)
    reconstruct(STEP, model, chosen)
    assert len(seen) == (2 if name == "vit" else 4)


# the error


def errors_of(step, **changes):
    """The reported error of each block, from one iteration."""
    seen = []

    @contextmanager
    def progress(label, total):
        yield lambda steps=1, **values: seen.append(values["error"])

    reconstruct(step, quantized("vit"), teacher("vit"), runtime=evolve(RUNTIME, progress=progress), **changes)
    return seen


@pytest.mark.parametrize("weight", [0.0, 2.0, 5.0])
def test_both_errors_are_divided_by_their_first_values(weight):
    assert errors_of(evolve(STEP, iterations=1, local_weight=weight)) == pytest.approx([1 + weight] * 2)


def test_the_local_error_is_the_mean_over_all_tensors():
    one, two = torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 12.0, 1.0, 1.0]])
    target = (torch.zeros(1, 2), torch.tensor([[4.0, 12.0, 1.0, 1.0]]))
    assert STEP.distance((one, two), target, None).item() == pytest.approx((9 + 16) / 6)


def test_the_global_error_can_be_computed_in_some_iterations_only(monkeypatch):
    seen, error = [], GlobalLocalBlock.global_error
    monkeypatch.setattr(GlobalLocalBlock, "global_error", lambda job, *args: (seen.append(None), error(job, *args))[1])
    reconstruct(evolve(STEP, suffix_every=4), quantized("vit"), teacher("vit"))
    assert len(seen) == 2 * 2  # iterations 0 and 4 of two blocks
    assert errors_of(evolve(STEP, iterations=1, suffix_every=4)) == pytest.approx([4 + 2] * 2)


def test_the_global_error_can_be_measured_some_blocks_later(watched):
    chosen = teacher("vit", depth=4)
    reconstruct(evolve(STEP, suffix_blocks=2), quantized(chosen), chosen)
    shapes = {name: job.feature[0].shape for name, (job, *_) in watched.items()}
    tokens, row = torch.Size([COUNT, 17, 32]), torch.Size([COUNT, 32])
    assert shapes == {"blocks.0": tokens, "blocks.1": tokens, "blocks.2": row, "blocks.3": row}
    with torch.no_grad():
        expected = chosen.module.blocks[2](chosen.module.blocks[1](chosen.module.blocks[0](tokens_of(chosen.module))))
    torch.testing.assert_close(watched["blocks.0"][0].feature[0], expected)


def tokens_of(module):
    return module._pos_embed(module.patch_embed(images(COUNT)))


def test_the_penalty_is_the_relative_distance_from_the_first_weights():
    weight, bias = torch.tensor([[3.0, 4.0]]), torch.tensor([1.0])
    learner = Decayed(lambda *args: args[2], {"fc.weight": weight, "fc.bias": bias}, 10.0)
    assert float(learner.penalty(0.5)) == 0.0
    weight += 1.0
    bias += 1.0
    assert float(learner.penalty(0.5)) == pytest.approx(10 * 2 / 25)
    assert Decayed(lambda *args: args[2], {"fc.weight": weight}, 0.0).penalty(0.5) == 0.0


def test_a_strong_penalty_keeps_the_weights():
    moved = {}
    for decay in (0.0, 1e6):
        model = quantized("vit")
        before = state_of(model)
        reconstruct(evolve(STEP, iterations=10, decay=decay), model, teacher("vit"))
        name = "blocks.0.mlp.fc1.weight"
        moved[decay] = float((state_of(model)[name] - before[name]).norm())
    assert moved[1e6] < 0.5 * moved[0.0]


def test_small_scales_have_a_small_learning_rate():
    step = GlobalLocal(iterations=100, scale_lr=1e-3)
    assert step.scale_rate(torch.tensor(0.5)) == 1e-3
    assert step.scale_rate(torch.tensor(0.02)) == pytest.approx(2e-4)


@pytest.mark.parametrize(
    "changes",
    [{"drop": 0.5}, {"fisher": True}, {"inputs": "teacher"}, {"drop": 0.5, "guard": True, "suffix_blocks": 1}],
    ids=["drop", "fisher", "teacher inputs", "together"],
)
def test_the_common_options_change_what_is_learned(changes):
    plain, other = (
        reconstruct(step, quantized("cait", UNIFORM), teacher("cait")) for step in (STEP, evolve(STEP, **changes))
    )
    assert not same(plain, other)


def test_it_runs_in_bfloat16():
    model = quantized("vit")
    before = state_of(model)
    reconstruct(evolve(STEP, iterations=2), model, teacher("vit"), runtime=evolve(RUNTIME, precision="bfloat16"))
    assert changed(model, before)


def test_an_unknown_classifier_is_noted():
    class Twice(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.body = teacher("vit").module

        def forward(self, pixels):
            return 2 * self.body(pixels)

    chosen = teacher_of(Twice())
    model = reconstruct(STEP, quantized(chosen), chosen)
    assert model.notes[-1] == "global_local: the classifier is unknown, so the global error is that of the logits"


def test_images_that_are_not_finite_are_told_as_such():
    given = images(COUNT)
    given[0] = torch.nan
    with pytest.raises(NonFiniteError, match=r"^global_local: the error of blocks.0 is not finite in iteration 5; try"):
        reconstruct(STEP, quantized("vit", UNIFORM), teacher("vit"), images=given)


# the guard


def test_a_tenth_of_the_images_is_left_out_of_training(monkeypatch):
    given, held, run = [], set(), BlockCall.run

    def watch(call, module, hidden):
        if torch.is_grad_enabled() and call.name == "blocks.0":
            given.append(hidden[0])
        return run(call, module, hidden)

    monkeypatch.setattr(BlockCall, "run", watch)
    monkeypatch.setattr(
        GlobalLocalBlock, "errors", lambda job, data, rows: held.add(tuple(rows.tolist())) or torch.zeros(2)
    )
    chosen, model = teacher("vit"), quantized("vit")
    reconstruct(evolve(STEP, guard=True, iterations=12), model, chosen, images=images(20))
    ((first, second),) = held
    entered = model.network._pos_embed(model.network.patch_embed(images(20)))
    trained = {int(row) for part in given for row in nearest(part, entered)}
    assert trained == set(range(20)) - {first, second}


def nearest(part, rows):
    return torch.cdist(part.flatten(1), rows.flatten(1)).argmin(1)


@pytest.mark.parametrize(("after", "kept"), [((0.9, 0.9), True), ((0.9, 1.0), False), ((1.1, 0.5), False)])
def test_a_block_is_reverted_unless_both_errors_fell(monkeypatch, after, kept):
    measured = iter([(1.0, 1.0), after] * 2)
    monkeypatch.setattr(GlobalLocalBlock, "errors", lambda *_: torch.tensor(next(measured)))
    model = quantized("vit", UNIFORM)
    before = state_of(model)
    reconstruct(evolve(STEP, guard=True), model, teacher("vit"))
    assert bool(changed(model, before)) == kept
    assert reverted(model) == ([] if kept else ["blocks.0", "blocks.1"])


def test_too_large_steps_are_reverted_and_the_model_stays_as_it_was():
    model, chosen = quantized("vit", UNIFORM), teacher("vit")
    before = state_of(model)
    reconstruct(evolve(STEP, lr=0.5, guard=True), model, chosen)
    assert not changed(model, before)
    assert reverted(model) == ["blocks.0", "blocks.1"]


def test_errors_are_measured_without_drops(watched):
    chosen = teacher("vit")
    reconstruct(evolve(STEP, drop=0.5, iterations=1), quantized("vit"), chosen)
    job, _, after = watched["blocks.1"]
    with torch.no_grad():
        features = job.feature[0]
        output = job.model.network.norm  # the model's own pass, with the last block quantized and what follows in float
        seen = []
        with own_hooks([(output.register_forward_pre_hook, lambda _, args: seen.append(args[0]))]):
            job.model(images(COUNT))
        expected = (chosen.module.norm(seen[0])[:, 0] - features).square().mean()
    torch.testing.assert_close(after[0], expected, rtol=1e-3, atol=0)


def test_the_guard_needs_two_images():
    guarded = evolve(STEP, guard=True)
    with pytest.raises(
        SpdfqError, match=r"^global_local: guard leaves out a tenth of the images, so it needs at least 2$"
    ):
        reconstruct(guarded, quantized("vit"), teacher("vit"), images=images(1))
    reconstruct(guarded, quantized("vit"), teacher("vit"), images=images(2))
    reconstruct(STEP, quantized("vit"), teacher("vit"), images=images(1))
    reconstruct(evolve(STEP, batch=1), quantized("swin"), teacher("swin"), images=images(3))


def test_the_rows_of_a_batch_can_be_chosen_among_some():
    calibration = global_local.Calibration(teacher=None, images=images(7), runtime=RUNTIME)
    among = torch.tensor([6, 1, 4])
    assert batch_rows(calibration, 3, 0, "test", among=among).tolist() == [6, 1, 4]
    rows = [batch_rows(calibration, 2, iteration, "test", among=among).tolist() for iteration in range(2)]
    assert sorted(rows[0] + rows[1]) == [1, 4, 6]


# resuming


def test_it_is_deterministic():
    first, second = (reconstruct(STEP, quantized("swin", UNIFORM), teacher("swin")) for _ in range(2))
    assert same(first, second)


@pytest.mark.parametrize("within", [False, True])
@pytest.mark.parametrize(("name", "lr"), [("vit", 1e-3), ("cait", 0.5)])
def test_a_killed_step_goes_on_bit_for_bit(tmp_path, monkeypatch, name, lr, within):
    chosen, total = teacher(name), 12
    step = evolve(STEP, iterations=total, lr=lr, drop=0.5, guard=True, decay=1.0, suffix_every=3)
    expected = reconstruct(step, quantized(chosen, UNIFORM), chosen)
    monkeypatch.setattr(reconstruction, "SAVE_SECONDS", 0.0)
    done, take_step = [], reconstruction.take_step

    def interrupt(*args):
        if len(done) == total + (11 if within else 0):
            raise Interrupted
        done.append(None)
        take_step(*args)

    with monkeypatch.context() as patch:
        patch.setattr(reconstruction, "take_step", interrupt)
        with pytest.raises(Interrupted):
            reconstruct(step, quantized(chosen, UNIFORM), chosen, folder=tmp_path)
    again = []
    monkeypatch.setattr(reconstruction, "take_step", lambda *args: (again.append(None), take_step(*args)))
    model = reconstruct(step, quantized(chosen, UNIFORM), chosen, folder=tmp_path)
    assert len(again) == total * (1 if name == "vit" else 3) - (10 if within else 0)
    assert same(model, expected)
    assert name == "vit" or len(reverted(model)) == 4


# wrong values


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"local_weight": -1.0}, "local_weight: 'local_weight' must be >= 0.0"),
        ({"suffix_blocks": 0}, "suffix_blocks: 'suffix_blocks' must be >= 1"),
        ({"suffix_blocks": 1.5}, "suffix_blocks: expected a whole number"),
        ({"suffix_every": 0}, "suffix_every: 'suffix_every' must be >= 1"),
        ({"decay": -0.1}, "decay: 'decay' must be >= 0.0"),
        ({"guard": 1}, "guard: expected true or false, got 1"),
        ({"lamda": 1}, "lamda: unknown key"),
    ],
)
def test_wrong_values_are_refused(wrong, message):
    with pytest.raises(ComponentError, match=message):
        GlobalLocal(**wrong)


def test_the_defaults_are_the_papers():
    assert (GlobalLocal().lr, GlobalLocal().scale_lr, GlobalLocal().local_weight) == (2e-5, 2e-4, 2.0)
