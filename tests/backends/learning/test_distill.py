"""Distillation of the whole network."""

from contextlib import contextmanager
from itertools import count
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from attrs import evolve
from safetensors.torch import save_file
from support.backends import RUNTIME, Interrupted, flatten_tensors, images, quantized, state_of, taken, teacher

from spdfq.backends import Distill
from spdfq.backends.learning import distill
from spdfq.backends.learning.distill import ForwardResult, map_similarity, relative_error
from spdfq.errors import DataError, ModelError, NonFiniteError, SpdfqError
from spdfq.recipe import load_recipe

COUNT = 6
STEP = Distill(iterations=12, lr=2e-3, batch=4)
FULL = evolve(STEP, features=0.5, structure=0.5, learned="all", drop=0.3, scale_lr=1e-3)
UNIFORM = "quantization.softmax={type='uniform', bits=4}"
STATE = "step-0-distill.safetensors"


def train(model, chosen, step=STEP, **changes):
    return taken(step, model, chosen, **{"images": images(COUNT), **changes})


@torch.no_grad()
def divergence(model, chosen):
    ours, theirs = (module(images(COUNT)).log_softmax(-1) for module in (model, chosen.module))
    return F.kl_div(ours, theirs, log_target=True, reduction="batchmean").item()


def changed(model, before):
    return {name for name, value in state_of(model).items() if not torch.equal(value, before[name])}


def same(first, second):
    first, second = state_of(first), state_of(second)
    return all(torch.equal(first[name], second[name]) for name in first)


def seen(logits, blocks=(), maps=()):
    return ForwardResult(torch.tensor(logits), list(blocks), list(maps))


# the loss


def test_the_loss_is_the_divergence_from_the_teacher():
    ours, theirs = [[0.0, 0.0], [0.0, 0.0]], [[1.0, 0.0], [0.0, 0.0]]
    p = 1 / (1 + torch.tensor(-1.0).exp())
    expected = (p * (2 * p).log() + (1 - p) * (2 * (1 - p)).log()) / 2
    assert STEP.loss(seen(ours), seen(theirs)).item() == pytest.approx(expected.item(), abs=1e-6)


def test_features_of_a_teacher_without_a_head_are_compared_as_they_are():
    features = torch.randn(2, 5, generator=torch.Generator().manual_seed(0))
    student, seen = ForwardResult(features + 1, [], []), ForwardResult(features, [], [])
    expected = (5 / features.square().sum(1)).mean()
    torch.testing.assert_close(Distill().loss(student, seen, headless=True), expected)
    assert Distill().loss(student, seen).item() == pytest.approx(0, abs=1e-6), "a softmax sees no shift"


def test_a_model_without_attention_maps_has_no_structure_to_learn():
    with pytest.raises(ModelError, match=r"^distill: structure compares attention maps; this model has none; set"):
        FULL.loss(seen([[0.0]], [torch.ones(1)]), seen([[0.0]], [torch.ones(1)]))


def test_with_every_weight_in_float_there_is_nothing_to_learn():
    chosen = teacher("vit")
    model = quantized(chosen, "quantization.overrides=[{sites=['*weight'], bits=0}]")
    with pytest.raises(SpdfqError, match=r"^distill: no quantized weight to learn; set learned = 'all' or scale_lr"):
        train(model, chosen)


def test_features_are_compared_relative_to_the_teachers_block_by_block():
    first, second = torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, 10.0]])
    assert relative_error(first + 1, first).item() == pytest.approx(2 / 25)
    step = evolve(STEP, features=2.0)
    ours, theirs = seen([[0.0]], [first + 1, second]), seen([[0.0]], [first, second])
    assert step.loss(ours, theirs).item() == pytest.approx(2 * (2 / 25) / 2)


def test_maps_are_alike_whatever_their_scale_and_unlike_where_they_are_turned_round():
    row = torch.tensor([0.0, 0.2, 0.5, 1.0])
    assert map_similarity(row.expand(2, 3, 5, 4), 0.1 * row.expand(2, 3, 5, 4) + 3).item() == pytest.approx(1, abs=1e-5)
    # means .425 and .575, variances both .141875, covariance -.1 + ... by hand for the row and its mirror image
    mirrored = row.flip(0)
    mean, other = row.mean(), mirrored.mean()
    covariance = ((row - mean) * (mirrored - other)).mean()
    expected = (2 * mean * other + 1e-4) / (mean**2 + other**2 + 1e-4)
    expected *= (2 * covariance + 9e-4) / (2 * (row - mean).square().mean() + 9e-4)
    assert map_similarity(row, mirrored).item() == pytest.approx(expected.item(), abs=1e-5)
    assert expected < 0
    assert map_similarity(torch.ones(1, 4), torch.ones(1, 4)).isfinite()
    assert map_similarity(1e-5 * row, 1e-5 * mirrored).item() == pytest.approx(expected.item(), abs=1e-4)


def test_structure_is_one_minus_the_similarity():
    row = torch.tensor([[0.0, 0.2, 0.5, 1.0]])
    step = evolve(STEP, structure=3.0)
    ours, theirs = seen([[0.0]], maps=[row, row]), seen([[0.0]], maps=[row, row.flip(-1)])
    expected = 3 * (1 - (1 + map_similarity(row, row.flip(-1))) / 2)
    assert step.loss(ours, theirs).item() == pytest.approx(expected.item(), abs=1e-5)


# the training


@pytest.mark.parametrize("name", ["vit", "swin"])
def test_the_output_comes_nearer_to_the_teachers(name):
    chosen = teacher(name)
    model = quantized(chosen, UNIFORM)
    before = divergence(model, chosen)
    train(model, chosen, evolve(STEP, iterations=20, lr=5e-4 if name == "swin" else 2e-3))
    assert divergence(model, chosen) < 0.7 * before


def test_the_loss_is_that_of_the_quantized_model(monkeypatch):
    chosen, model, losses = teacher("vit"), quantized("vit", UNIFORM), []
    monkeypatch.setattr(distill, "take_step", lambda optimizer, loss, _: losses.append(float(loss.detach())))
    train(model, chosen, evolve(STEP, iterations=1, batch=COUNT))
    assert losses == [pytest.approx(divergence(model, chosen), rel=1e-4)]


@pytest.mark.parametrize(
    ("changes", "calls"), [({}, 2), ({"batch": COUNT, "features": 0.5}, 2), ({"features": 0.5}, 1 + STEP.iterations)]
)
def test_the_teacher_runs_once_for_each_image_where_its_outputs_can_be_kept(changes, calls):
    chosen, model, sizes = teacher("vit"), quantized("vit", UNIFORM), []
    with chosen.module.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0]))):
        train(model, chosen, evolve(STEP, **changes))
    assert len([size for size in sizes if size > 1]) == calls  # with features, one more pass finds the blocks


def test_targets_that_were_kept_are_those_of_the_chosen_images(monkeypatch):
    chosen, compared = teacher("vit"), []
    monkeypatch.setattr(Distill, "loss", lambda *results: compared.append(results[1:3]) or results[1].logits.sum())
    model = quantized("vit", UNIFORM)
    rows, drawn = [], distill.batch_rows
    monkeypatch.setattr(distill, "batch_rows", lambda *args: rows.append(drawn(*args)) or rows[-1])
    train(model, chosen)
    with torch.no_grad():
        expected = chosen.module(images(COUNT))
    for seen_rows, (_, theirs) in zip(rows, compared, strict=True):
        torch.testing.assert_close(theirs.logits, expected[seen_rows])
    assert {len(each) for each in rows} == {2, 4}


def test_every_block_and_every_attention_is_compared(monkeypatch):
    compared = []
    monkeypatch.setattr(
        Distill, "loss", lambda step, ours, theirs, headless: compared.append((ours, theirs)) or ours.logits.sum()
    )
    train(quantized("swin", UNIFORM), teacher("swin"), evolve(FULL, iterations=1, batch=COUNT))
    ((ours, theirs),) = compared
    for side in (ours, theirs):
        assert [len(block) for block in side.blocks] == [COUNT] * 4
        assert len(side.maps) == 4
    assert all(block.requires_grad for block in ours.blocks)
    assert not any(tensor.requires_grad for tensor in (theirs.logits, *theirs.blocks, *theirs.maps))


def test_nothing_is_watched_that_is_not_asked_for(monkeypatch):
    compared = []
    monkeypatch.setattr(
        Distill, "loss", lambda step, ours, theirs, headless: compared.append(ours) or ours.logits.sum()
    )
    train(quantized("vit"), teacher("vit"), evolve(STEP, iterations=1))
    assert (compared[0].blocks, compared[0].maps) == ([], [])


@pytest.mark.parametrize("learned", ["weights", "all"])
def test_what_is_learned(learned):
    model = quantized("vit")
    before = state_of(model)
    train(model, teacher("vit"), evolve(STEP, learned=learned))
    parameters = {name for name, _ in model.network.named_parameters()}
    expected = set(model.weight_names()) if learned == "weights" else parameters
    assert changed(model, before) == expected
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in model.network.parameters())


def test_scales_are_learned_where_a_rate_is_given():
    model = quantized("vit", UNIFORM)
    before = state_of(model)
    train(model, teacher("vit"), evolve(STEP, scale_lr=1e-3))
    scales = {name for name in changed(model, before) if "_quantizer" in name}
    assert scales == {f"{name}_quantizer.scale" for name in model.quantizers if not name.endswith("weight")}


def test_the_rate_follows_a_cosine(monkeypatch):
    rates, step = [], torch.optim.Adam.step

    def watch(optimizer):
        rates.append(optimizer.param_groups[0]["lr"])
        return step(optimizer)

    monkeypatch.setattr(torch.optim.Adam, "step", watch)
    train(quantized("vit"), teacher("vit"), evolve(STEP, iterations=4, lr=1.0))
    assert rates == pytest.approx([1.0, 0.5 + 0.25 * 2**0.5, 0.5, 0.5 - 0.25 * 2**0.5])


def test_it_is_deterministic_and_the_seed_decides():
    chosen = teacher("vit")
    torch.manual_seed(1)
    first = train(quantized(chosen, UNIFORM), chosen, FULL)
    torch.manual_seed(2)
    with torch.no_grad():
        assert same(first, train(quantized(chosen, UNIFORM), chosen, FULL))
    assert not same(first, train(quantized(chosen, UNIFORM), chosen, FULL, runtime=evolve(RUNTIME, seed=9)))


def test_the_teacher_is_untouched():
    chosen = teacher("vit")
    before = {name: value.clone() for name, value in chosen.module.state_dict().items()}
    train(quantized(chosen), chosen, FULL)
    assert all(torch.equal(value, before[name]) for name, value in chosen.module.state_dict().items())
    assert all(parameter.requires_grad for parameter in chosen.module.parameters())
    assert not any(block._forward_hooks for block in chosen.module.blocks)


def test_progress_counts_every_iteration():
    shown = []

    @contextmanager
    def progress(label, total):
        yield lambda steps=1, **values: shown.append((label, total, steps, *values))

    train(quantized("vit"), teacher("vit"), runtime=evolve(RUNTIME, progress=progress))
    assert shown == [("distilling", 12, 0), ("distilling", 12, 10, "loss"), ("distilling", 12, 2, "loss")]


def test_a_loss_that_is_not_finite_says_so():
    given = images(COUNT)
    given[0] = torch.nan
    with pytest.raises(NonFiniteError, match=r"distill: the loss is not finite in iteration 9; try a lower lr"):
        train(quantized("vit"), teacher("vit"), images=given)


# resuming


@pytest.fixture
def a_second_per_look(monkeypatch):
    """A clock that moves on by a second each time it is read, and a state that is saved every second."""
    ticks = count()
    monkeypatch.setattr(distill, "time", SimpleNamespace(monotonic=lambda: next(ticks)))
    monkeypatch.setattr(distill, "SAVE_SECONDS", 1.0)


def test_an_interrupted_training_goes_on_bit_for_bit(tmp_path, monkeypatch, a_second_per_look):
    chosen, step = teacher("vit"), evolve(FULL, iterations=14)
    expected = train(quantized(chosen, UNIFORM), chosen, step)
    steps, take = [], distill.take_step

    def interrupt(*args):
        if len(steps) == 12:
            raise Interrupted
        steps.append(1)
        take(*args)

    with monkeypatch.context() as patch:
        patch.setattr(distill, "take_step", interrupt)
        with pytest.raises(Interrupted):
            train(quantized(chosen, UNIFORM), chosen, step, folder=tmp_path)
    steps.clear()
    monkeypatch.setattr(distill, "take_step", lambda *args: (steps.append(1), take(*args)))
    model = train(quantized(chosen, UNIFORM), chosen, step, folder=tmp_path)
    assert len(steps) == 4  # the state of iteration 10 was the last one
    assert same(model, expected)
    steps.clear()
    assert same(train(quantized(chosen, UNIFORM), chosen, step, folder=tmp_path), expected)
    assert steps == []


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(path.read_bytes()[:-9]),
        flatten_tensors,
        lambda path: save_file({"other": torch.zeros(1)}, path, {"iteration": "3"}),
    ],
    ids=["truncated", "other shapes", "other contents"],
)
def test_a_damaged_state_is_one_clear_error(tmp_path, damage):
    chosen = teacher("vit")
    train(quantized(chosen), chosen, folder=tmp_path)
    damage(tmp_path / STATE)
    with pytest.raises(DataError, match=r"delete it, or use --fresh$"):
        train(quantized(chosen), chosen, folder=tmp_path)


def test_the_shipped_part_is_calibration_and_then_this():
    spec = load_recipe({"extends": ["models/vit_fmnist", "images/gaussian_noise", "backends/distill"]}).quantization
    assert [type(step).__name__ for step in spec.steps] == ["Calibrate", "Distill"]
