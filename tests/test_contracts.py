"""Contracts of everything registered: a component, built-in or plugged in, is tested by being registered."""

import re

import attrs
import pytest
import tiny_backend
import torch
from tiny_teacher import CLASSES, SIDE, recipe, tiny_teacher

from spdfq.attention import NEEDS, record_attention
from spdfq.backends import Calibration
from spdfq.checkpoint import load_quantized, save_quantized
from spdfq.describe import describe
from spdfq.errors import SpdfqError
from spdfq.losses import CrossEntropyLoss
from spdfq.registry import registry
from spdfq.runtime import Runtime
from spdfq.structure import structure, unstructure
from spdfq.synth import Moment
from spdfq.synth.group import Balance, GroupState
from spdfq.synth.loop import Group

BUILT_IN = {
    "loss": {
        "attention_entropy",
        "attention_prior",
        "cross_entropy",
        "frequency_consistency",
        "head_similarity",
        "masked_attention_alignment",
        "patch_contrast",
        "patch_similarity_entropy",
        "soft_cross_entropy",
        "teacher_student_discrepancy",
        "total_variation",
    },
    "prior": {"gaussian_mixture", "laplace"},
    "sampler": {"multi_semantic", "whole_image"},
    "target": {"none", "one_hot", "soft_label"},
    "augmentation": {
        "channel_offset",
        "color_jitter",
        "flip",
        "high_pass",
        "jitter",
        "low_pass",
        "random_resized_crop",
    },
    "source": {"gaussian_noise", "optimize", "real"},
    "optimizer": {"adam", "adamw"},
    "schedule": {"constant", "warmup_cosine"},
    "quantizer": {"adaptive_log", "dual_uniform", "log2", "log_sqrt2", "power_of_two_factor", "shift_uniform_log2"}
    | {"twin_uniform", "uniform"},
    "observer": {"grid_mse", "minmax", "percentile_mse", "progressive", "running_minmax"},
    "step": {"adalog", "adaround", "blockwise", "calibrate", "distill", "ptf", "repq", "ridge"},
}
CANNOT_BE_FOLLOWED = {"random_resized_crop"}
RUNTIME = Runtime(seed=3)


def made(kind, name, **given):
    """The component with its defaults; required parts are filled in."""
    cls = registry(kind).get(name)
    for part in attrs.fields(cls):
        required = part.default is attrs.NOTHING and "kind" in part.metadata
        if part.metadata.get("many") is dict:
            given.setdefault(part.name, {"cross_entropy": CrossEntropyLoss()})
        elif required:
            given.setdefault(part.name, made(part.metadata["kind"], registry(part.metadata["kind"]).names()[0]))
    return cls(**given)


def every(kind):
    return pytest.mark.parametrize("name", registry(kind).names())


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def twice(draw):
    """The same draw under two states of the global generator."""
    results = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        results.append(draw())
    return results


# all kinds

everything = pytest.mark.parametrize(
    ("kind", "name"), [(kind, name) for kind in BUILT_IN for name in registry(kind).names()]
)


@pytest.mark.parametrize("kind", BUILT_IN)
def test_the_built_in_names_are_registered(kind):
    assert set(registry(kind).names()) >= BUILT_IN[kind]


@everything
def test_a_component_says_what_it_is_and_what_its_fields_mean(kind, name):
    entry = registry(kind).entry(name)
    assert entry.summary.endswith(".")
    assert vars(entry.component).get("__doc__"), "a docstring of its own, not its parent's"
    assert entry.paper is None or re.fullmatch(r"arXiv:\d{4}\.\d{5}|arXiv:\d{4}\.\d{4}", entry.paper)
    undocumented = [told.name for told in describe(entry.component) if not told.doc]
    assert undocumented == []


@everything
def test_a_component_written_as_a_recipe_reads_back_the_same(kind, name):
    component = made(kind, name)
    table = unstructure(component, kind)
    assert table.pop("type") == name
    problems = []
    again = structure(type(component), table, kind, problems)
    assert problems == []
    assert unstructure(again, kind) == {"type": name, **table}


# losses


def loss_inputs(loss, images=None):
    """What the loop hands to a loss in its first iteration: two images and their crops."""
    teacher = tiny_teacher()
    with teacher.frozen():
        group = group_of(loss, teacher)
        if images is not None:
            group.state.images.data.copy_(images)
        inputs = group._forward(0).scoped("this")
        return group.state.images, with_student(inputs, loss.needs) if loss.needs_student else inputs


def group_of(loss, teacher):
    """A group of that loss alone; put in afterwards, as a recipe refuses some losses that lack company."""
    spec = recipe()
    spec.losses = {"this": loss}
    return Group(spec, teacher, RUNTIME, 0, 2)


def with_student(inputs, needs):
    """The same with what an adversarial synthesis adds; the student's weights are a little off the teacher's."""
    student = tiny_teacher().module
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.mul_(1.1)
    with record_attention(student, needs) as record:
        logits = student(inputs.images)
    return attrs.evolve(inputs, student_logits=logits, student_attention=record)


@every("loss")
def test_a_loss_is_a_finite_scalar_with_a_gradient_to_the_images(name):
    loss = made("loss", name)
    images, inputs = loss_inputs(loss)
    value = loss(inputs)
    (gradient,) = torch.autograd.grad(value, images)
    assert value.shape == ()
    assert value.dtype == torch.float32
    assert value.isfinite()
    assert gradient.isfinite().all()
    assert (gradient.flatten(1).norm(dim=1) > 0).all()


@every("loss")
def test_a_loss_of_flat_images_is_finite_with_a_finite_gradient(name):
    loss = made("loss", name)
    images, inputs = loss_inputs(loss, torch.full((2, 3, SIDE, SIDE), 0.5))
    value = loss(inputs)
    assert value.isfinite()
    assert torch.autograd.grad(value, images)[0].isfinite().all()


@every("loss")
def test_a_loss_depends_on_nothing_but_its_inputs(name):
    loss = made("loss", name)
    first, second = twice(lambda: loss(loss_inputs(loss)[1]).item())
    assert first == second
    _, inputs = loss_inputs(loss)
    assert loss(inputs).item() == loss(inputs).item() == first


@every("loss")
def test_a_loss_that_needs_a_student_is_refused_in_one_line_where_there_is_none(name):
    loss = made("loss", name)
    teacher = tiny_teacher()
    with teacher.frozen():
        inputs = group_of(loss, teacher)._forward(0).scoped("this")
        if not loss.needs_student:
            assert loss(inputs).isfinite()
            return
        with pytest.raises(SpdfqError, match=f"{name}: there is no quantized student here") as caught:
            loss(inputs)
    assert "\n" not in str(caught.value)


@every("loss")
def test_a_loss_needs_only_what_can_be_recorded(name):
    assert registry("loss").get(name).needs <= NEEDS


# what is drawn


@every("prior")
@pytest.mark.parametrize("grid", [(7, 7), (3, 8), (1, 1)])
def test_a_prior_draws_maps_that_sum_to_one(name, grid):
    first, again = twice(lambda: made("prior", name).sample(6, grid, seeded()))
    assert first.shape == (6, grid[0] * grid[1])
    assert (first >= 0).all()
    assert torch.allclose(first.sum(-1), torch.ones(6), atol=1e-5)
    assert torch.equal(first, again)
    if grid != (1, 1):
        assert len(first.unique(dim=0)) == 6


@every("sampler")
@pytest.mark.parametrize("size", [(28, 28), (20, 36)])
def test_a_sampler_keeps_its_boxes_inside_and_apart(name, size):
    plan, again = twice(lambda: made("sampler", name).sample(9, size, CLASSES, seeded()))
    covered = torch.zeros(9, *size, dtype=torch.long)
    for (top, left, height, width), owner in zip(plan.boxes.tolist(), plan.owners.tolist(), strict=True):
        assert min(top, left) >= 0
        assert min(height, width) >= 1
        assert top + height <= size[0]
        assert left + width <= size[1]
        covered[owner, top : top + height, left : left + width] += 1
    assert covered.max() == 1
    assert (covered.amax((1, 2)) == 1).all()  # every image has a box
    assert len(plan.labels) == len(plan.boxes)
    assert set(plan.labels.tolist()) <= set(range(CLASSES))
    for part in ("boxes", "owners", "labels"):
        assert torch.equal(getattr(plan, part), getattr(again, part))
    assert plan.views(torch.rand(9, 3, *size), (8, 10)).shape == (len(plan.boxes), 3, 8, 10)


@pytest.mark.parametrize("name", sorted({*registry("target").names()} - {"none"}))
def test_a_target_is_a_distribution_that_peaks_at_the_labels(name):
    labels = [0, 4, [1, 2], torch.tensor([3])]
    first, again = twice(lambda: made("target", name).sample(labels, CLASSES, seeded()))
    assert first.shape == (4, CLASSES)
    assert (first >= 0).all()
    assert torch.allclose(first.sum(-1), torch.ones(4), atol=1e-5)
    assert first.argmax(-1)[[0, 1, 3]].tolist() == [0, 4, 3]
    assert first.argmax(-1)[2] in (1, 2)
    assert torch.equal(first, again)


@every("augmentation")
def test_an_augmentation_is_decided_by_its_generator_and_keeps_shape_and_gradient(name):
    images = torch.rand(4, 3, 8, 9, generator=seeded(), requires_grad=True)
    augmentation = made("augmentation", name)

    def draws():
        moments = [Moment(iteration=number, iterations=20, count=4, size=(3, 8, 9)) for number in range(20)]
        return [augmentation.draw(seeded(moment.iteration), moment).apply(images) for moment in moments]

    first, again = twice(draws)
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    assert len({tuple(drawn.flatten().tolist()) for drawn in first}) > 1
    for drawn in first:
        assert drawn.shape == images.shape
        assert torch.autograd.grad(drawn.square().sum(), images)[0].isfinite().all()


@every("augmentation")
def test_maps_go_along_with_an_augmentation_or_are_refused(name):
    marks = torch.arange(8 * 9.0).view(1, 1, 8, 9).repeat(4, 1, 1, 1)  # a token for each pixel
    change = made("augmentation", name).draw(seeded(1), Moment(count=4, size=(1, 8, 9)))
    if name in CANNOT_BE_FOLLOWED:
        with pytest.raises(SpdfqError, match=f"can follow {name}; leave it out"):
            change.follow(marks, (8, 9))
        return
    order = change.follow(marks, (8, 9)).flatten(2).long()
    assert torch.equal(order.sort().values, marks.flatten(2).long())
    moved = change.apply(marks)
    if torch.equal(moved.flatten(2).sort().values, marks.flatten(2)):  # it moves pixels
        assert torch.equal(moved.flatten(2).long(), order)
    else:
        assert torch.equal(order, marks.flatten(2).long())


# sources


@every("source")
def test_a_source_gives_as_many_images_as_asked_decided_by_the_seed(name):
    teacher, source = tiny_teacher(), made("source", name, images=3)
    if name == "optimize":
        source = attrs.evolve(source, iterations=3, group=2)
    first, again = twice(lambda: source.synthesize(teacher, RUNTIME).images)
    assert first.shape == (3, 3, SIDE, SIDE)
    assert first.dtype == torch.float32
    assert first.isfinite().all()
    assert not first.requires_grad
    assert torch.equal(first, again)
    assert not torch.equal(first, source.synthesize(teacher, Runtime(seed=4)).images)


# optimisers and schedules


def optimised(optimizer, path=None):
    """A state whose images are on their way to 1; where there is a path, stored and taken up half way."""

    def fresh():
        images = torch.zeros(2, 1, 4, 4, requires_grad=True)
        return GroupState(images, optimizer.build(images), Balance({}), torch.zeros(1, 1))

    state = fresh()
    for iteration in range(40):
        if path and iteration == 20:
            state.save(path)
            state = fresh()
            state.restore(path)
        state.images.grad = 2 * (state.images.detach() - 1)
        state.optimizer.step()
    return state.images.detach()


@every("optimizer")
def test_an_optimizer_minimises_at_its_own_learning_rate(name):
    optimizer = made("optimizer", name)
    assert optimizer.build(torch.zeros(1, 1, 4, 4, requires_grad=True)).param_groups[0]["lr"] == optimizer.lr > 0
    assert (optimised(optimizer) - 1).abs().max() < 0.5


@every("optimizer")
def test_an_optimizer_stored_and_taken_up_goes_on_to_the_bit(name, tmp_path):
    optimizer = made("optimizer", name)
    assert torch.equal(optimised(optimizer, tmp_path / "state.safetensors"), optimised(optimizer))


@every("schedule")
@pytest.mark.parametrize("iterations", [1, 2, 7, 100])
def test_a_schedule_stays_between_nothing_and_the_full_rate(name, iterations):
    schedule = made("schedule", name)
    factors = [schedule.factor(iteration, iterations) for iteration in range(iterations)]
    assert all(0 <= factor <= 1 for factor in factors)
    assert max(factors) > 0.5
    assert factors == [schedule.factor(iteration, iterations) for iteration in range(iterations)]


# quantizers and observers


def frozen(quantizer, x, observer=None):
    quantizer.observe(x)
    quantizer.freeze(observer)
    return quantizer


def values(quantizer):
    """One column: channels, where a quantizer has them, lie along the last axis."""
    x = torch.randn(500, 1, generator=seeded())
    return x if quantizer.signed else x.abs()


@every("quantizer")
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_quantizer_is_idempotent_monotone_and_bounded(name, bits):
    quantizer = made("quantizer", name, bits=bits)
    x = values(quantizer)
    frozen(quantizer, x)
    once = quantizer(x)
    assert torch.equal(quantizer(once), once)
    order = x.flatten().argsort()
    assert (once.flatten()[order].diff() >= 0).all()
    step = once.unique().diff().max()
    assert once.min() >= x.min() - step
    assert once.max() <= x.max() + step
    assert len(once.unique()) <= quantizer.levels == 2**bits
    assert torch.equal(quantizer.decode(quantizer.codes(x)), once)
    assert quantizer(torch.zeros(1, 1)) == 0
    assert quantizer.integers in ("yes", "with tables")


@every("quantizer")
def test_a_quantizer_passes_a_gradient(name):
    quantizer = made("quantizer", name, bits=4)
    x = values(quantizer).requires_grad_()
    frozen(quantizer, x)(x).sum().backward()
    assert x.grad.isfinite().all()
    assert (x.grad > 0).float().mean() > 0.5


@every("observer")
@pytest.mark.parametrize("quantizer_name", registry("quantizer").names())
def test_an_observer_chooses_a_range_within_what_was_seen(name, quantizer_name):
    observer, quantizer = made("observer", name), made("quantizer", quantizer_name, bits=4)
    x = values(quantizer).flatten()
    samples = torch.stack([x, 100 * x, torch.zeros(500)])
    low, high = samples.aminmax(dim=1)
    chosen_low, chosen_high = observer.choose(samples, low, high, quantizer)
    assert chosen_low.shape == chosen_high.shape == (3,)
    assert (chosen_low >= low.clamp(max=0)).all()  # every range is extended to contain zero
    assert (chosen_high <= high.clamp(min=0)).all()
    assert (chosen_low <= chosen_high).all()
    assert torch.allclose(chosen_high[1], 100 * chosen_high[0], rtol=1e-3)


# steps of the back-end


def stepped(name, runtime=RUNTIME, seed=0):
    """A calibrated model after a step with its defaults, shortened where it iterates, and its teacher."""
    chosen = tiny_backend.teacher("vit")
    placement = "quantization.placement='psaq'" if name == "ptf" else "quantization.placement='matmul_inputs'"
    model, step = tiny_backend.quantized(chosen, placement), made("step", name)
    if "iterations" in attrs.fields_dict(type(step)):
        step = attrs.evolve(step, iterations=3)
    torch.manual_seed(seed)
    step.run(model, Calibration(teacher=chosen, images=tiny_backend.images(), runtime=runtime))
    return model, chosen


@every("step")
def test_a_step_leaves_a_model_that_works_and_comes_back_from_a_checkpoint(name, tmp_path):
    model, chosen = stepped(name)
    logits = model(tiny_backend.images(3, seed=1))
    assert logits.isfinite().all()
    assert not any(parameter.requires_grad for parameter in model.parameters())
    save_quantized(model, tmp_path, chosen)
    again = load_quantized(tmp_path, tiny_backend.network("vit"))
    assert torch.equal(again(tiny_backend.images(3, seed=1)), logits)


@every("step")
def test_a_step_leaves_the_teacher_alone_and_nothing_on_the_networks(name):
    model, chosen = stepped(name)
    fresh = tiny_backend.network("vit")
    assert all(torch.equal(value, fresh.state_dict()[key]) for key, value in chosen.module.state_dict().items())
    for module in (*chosen.module.modules(), *model.network.modules()):
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


@every("step")
def test_a_step_is_decided_by_its_inputs_and_the_recipes_seed(name):
    first, second = (stepped(name, seed=seed)[0].network.state_dict() for seed in (1, 2))
    assert all(torch.equal(value, second[key]) for key, value in first.items())
