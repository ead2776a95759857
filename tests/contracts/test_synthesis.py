"""Contracts of all registered components that make images: losses, samplers, sources, optimizers and more."""

import attrs
import pytest
import torch
from support.registered import RUNTIME, every, made, seeded, twice
from support.teachers import CLASSES, SIDE, recipe, tiny_teacher

from spdfq.attention import NEEDS, record_attention
from spdfq.data import LabelledImages
from spdfq.errors import SpdfqError
from spdfq.losses import Loss, Prior
from spdfq.registry import registry
from spdfq.runtime import Runtime
from spdfq.synth import Augmentation, Moment, Optimizer, Sampler, Schedule, Source, Target
from spdfq.synth.group import Group
from spdfq.synth.group_state import GroupState, LossWeights
from spdfq.synth.loop import forward

BASES = {
    "loss": Loss,
    "prior": Prior,
    "source": Source,
    "sampler": Sampler,
    "target": Target,
    "augmentation": Augmentation,
    "optimizer": Optimizer,
    "schedule": Schedule,
    "dataset": LabelledImages,
}


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind in BASES for name in registry(kind).names()])
def test_a_component_derives_from_the_base_class_of_its_kind(kind, name):
    assert issubclass(registry(kind).get(name), BASES[kind])


# losses


def loss_inputs(loss, images=None):
    """The inputs of a loss in the first iteration: two images and their crops."""
    teacher = tiny_teacher()
    with teacher.frozen():
        group = group_of(loss, teacher)
        if images is not None:
            group.state.images.data.copy_(images)
        inputs = forward([group], 0)[0].scoped("this")
        return group.state.images, with_student(inputs, loss.needs) if loss.needs_student else inputs


def group_of(loss, teacher):
    """A group with that loss alone. It is set afterwards, because some losses are refused without others."""
    spec = recipe()
    spec.losses = {"this": loss}
    return Group(spec, teacher, RUNTIME, 0, 2)


def with_student(inputs, needs):
    """The same inputs with those of a student, whose weights differ a little from the teacher's."""
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
def test_a_loss_that_needs_a_student_is_refused_in_one_line_without_one(name):
    loss = made("loss", name)
    teacher = tiny_teacher()
    with teacher.frozen():
        inputs = forward([group_of(loss, teacher)], 0)[0].scoped("this")
        if not loss.needs_student:
            assert loss(inputs).isfinite()
            return
        with pytest.raises(SpdfqError, match=f"{name}: .* there is no quantized student here") as caught:
            loss(inputs)
    assert "\n" not in str(caught.value)


@every("loss")
def test_a_loss_with_pictures_shows_maps_of_the_same_shape(name):
    loss = made("loss", name)
    _, inputs = loss_inputs(loss)
    if not loss.has_pictures:
        with pytest.raises(TypeError, match="does not define pictures"):
            loss.pictures(inputs)
        return
    shown = loss.pictures(inputs)
    assert shown.prior.shape == shown.reached.shape
    assert (shown.prior.ndim, shown.prior.dtype) == (4, torch.float32)
    assert shown.first_block >= 0


@every("loss")
def test_a_loss_needs_only_what_can_be_recorded(name):
    assert registry("loss").get(name).needs <= NEEDS


# priors, samplers, targets and augmentations


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


@every("target")
def test_a_target_that_gives_labels_is_a_distribution_that_peaks_at_them(name):
    if not registry("target").get(name).gives_labels:
        pytest.skip("gives no labels")
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
    if not registry("augmentation").get(name).followable:
        with pytest.raises(SpdfqError, match="cannot follow"):
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
    teacher, small = tiny_teacher(), {"images": 3, "iterations": 3, "group": 2}
    fields = attrs.fields_dict(registry("source").get(name))
    source = made("source", name, **{key: value for key, value in small.items() if key in fields})
    first, again = twice(lambda: source.synthesize(teacher, RUNTIME).images)
    assert first.shape == (3, 3, SIDE, SIDE)
    assert first.dtype == torch.float32
    assert first.isfinite().all()
    assert not first.requires_grad
    assert torch.equal(first, again)
    assert not torch.equal(first, source.synthesize(teacher, Runtime(seed=4)).images)


# optimizers and schedules


def optimised(optimizer, path=None):
    """Images optimised towards 1; with a path, the state is stored and restored half way."""

    def fresh():
        images = torch.zeros(2, 1, 4, 4, requires_grad=True)
        return GroupState(images, optimizer.build(images), LossWeights({}), torch.zeros(1, 1))

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
def test_an_optimizer_stored_and_taken_up_continues_bit_for_bit(name, tmp_path):
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
