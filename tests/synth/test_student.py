"""The quantized student of an adversarial synthesis: calibration, training, effect on the images, and resuming."""

import pytest
import torch
from attrs import define, evolve
from support.backends import CALIBRATE, NO_OVERRIDES, back_end, teacher
from support.teachers import Acting, same

from spdfq.backends import Step, quantize
from spdfq.backends.quantized_student import student_factory, student_section
from spdfq.errors import DataError, NonFiniteError, SpdfqError
from spdfq.losses import (
    CrossEntropyLoss,
    MaskedAttentionAlignmentLoss,
    TeacherStudentDiscrepancyLoss,
    TotalVariationLoss,
)
from spdfq.losses.functional import teacher_student_discrepancy
from spdfq.recipe import load_recipe
from spdfq.recipe.structure import structure
from spdfq.runs.stages import ImagesStage, Work
from spdfq.runtime import Runtime
from spdfq.synth import Adam, Constant, Flip, Jitter, OptimizedImages, StudentTraining
from spdfq.synth.group import Group
from spdfq.synth.loop import forward, prune, step
from spdfq.synth.pruning import TokenPruning
from spdfq.synth.student_training import StudentTrainer
from spdfq.teacher import load_teacher

RUNTIME = Runtime(seed=3)
ITERATIONS = 8


def spec(**changes):
    losses = {"discrepancy": TeacherStudentDiscrepancyLoss(), "total_variation": TotalVariationLoss(weight=0.001)}
    whole = OptimizedImages(
        images=2,
        group=2,
        iterations=ITERATIONS,
        losses=losses,
        target=structured("target", "none"),
        augmentations=(Jitter(pixels=3), Flip()),
        student=StudentTraining(lr=1e-3, recalibrate=3),
    )
    return evolve(whole, **changes)


def structured(kind, name):
    from spdfq.registry import registry

    return structure(registry(kind).get(name), {}, kind, [])


def acting(act, at, **changes):
    return spec(losses={**spec().losses, "acting": Acting(act=act, at=at)}, **changes)


def factory(own=None, *overrides):
    return student_factory(own or teacher("vit"), back_end(*overrides), RUNTIME)


def images_of(group):
    return group.state.images.detach().clone()


def stepped(recipe, own, steps, make=None):
    """A group after some iterations, and its losses by name."""
    with own.frozen():
        group = Group(evolve(recipe, iterations=steps), own, RUNTIME, 0, 2, make or factory(own))
        for iteration in range(steps):
            step([group], iteration)
    return group, dict(zip(group.columns, group.state.curve[:steps].T, strict=True))


# how it is made


def test_the_student_is_quantized_by_the_recipe_and_calibrated_on_the_images_of_the_group():
    own = teacher("vit")
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    student = factory(own, "quantization.weights.bits=3")(images)
    expected = quantize(own, images, back_end("quantization.weights.bits=3"), RUNTIME)
    assert torch.equal(student.module(images), expected(images))
    assert set(student.weights()) == set(expected.weight_names())
    assert student.module.quantizers["blocks.0.attn.qkv.weight"].bits == 3


@define(kw_only=True)
class Never(Step):
    def run(self, model, calibration):
        raise AssertionError("a step after calibration was run")


def test_steps_after_calibration_are_left_for_the_real_model():
    own = teacher("vit")
    section = back_end()
    make = student_factory(own, evolve(section, steps=(*section.steps, Never())), RUNTIME)
    assert make(torch.zeros(1, 3, 32, 32)).module(torch.zeros(1, 3, 32, 32)).shape == (1, 10)


def test_a_student_with_nothing_to_learn_is_refused():
    class Float:
        def weights(self):
            return {}

    with pytest.raises(SpdfqError, match=r"^synthesis.student: \[quantization\] leaves all weights in float"):
        StudentTrainer(StudentTraining(), lambda images: Float()).ready(torch.zeros(1, 3, 32, 32), 0)


def test_steps_that_no_student_runs_do_not_change_the_images():
    section = back_end()
    kept = section.steps
    assert student_section(evolve(section, steps=(*kept, Never()))).steps == kept
    halves = (evolve(kept[0], sites="weights"), Never(), evolve(kept[0], sites="activations"))
    assert student_section(evolve(section, steps=(*halves, Never()))).steps == halves
    assert student_section(evolve(section, steps=(halves[0], Never()))).steps == (halves[0], Never())


def test_a_section_that_calibrates_nothing_is_refused():
    @define(kw_only=True)
    class Idle(Step):
        def run(self, model, calibration):
            pass

    make = student_factory(teacher("vit"), evolve(back_end(), steps=(Idle(),)), RUNTIME)
    with pytest.raises(SpdfqError, match=r"no step of quantization.steps calibrates it; put 'calibrate' first"):
        make(torch.zeros(1, 3, 32, 32))


def test_a_synthesis_without_a_student_factory_is_refused():
    with pytest.raises(SpdfqError, match="nothing here makes a student; run the whole recipe"):
        spec().synthesize(teacher("vit"), RUNTIME)


def test_a_loss_that_needs_a_student_and_the_student_section_need_each_other():
    with pytest.raises(ValueError, match=r"losses.discrepancy: compares with a student; add an empty \[synthesis.stu"):
        spec(student=None)
    with pytest.raises(ValueError, match="no loss compares with it; add teacher_student_discrepancy"):
        spec(losses={"tv": TotalVariationLoss()})


# how it learns


def test_the_loss_of_the_first_iteration_is_the_distance_to_the_calibrated_student():
    own = teacher("vit")
    _, curves = stepped(spec(augmentations=()), own, 1)
    images = torch.randn(2, 3, 32, 32, generator=RUNTIME.generator("group", 0, "noise"))
    with torch.no_grad():
        expected = teacher_student_discrepancy(own.module(images), factory(own)(images).module(images))
    assert curves["discrepancy"][0].item() == pytest.approx(-expected.item(), rel=1e-5)


def test_the_student_gets_closer_to_the_teacher_on_images_that_do_not_change():
    still = {"optimizer": Adam(lr=1e-12), "schedule": Constant(), "augmentations": ()}
    _, curves = stepped(spec(student=StudentTraining(lr=1e-3, recalibrate=999), **still), teacher("vit"), 30)
    distance = -curves["discrepancy"]
    assert distance[-5:].mean() < 0.8 * distance[:5].mean()


def test_the_images_move_away_from_a_student_that_does_not_learn():
    moving = {"optimizer": Adam(lr=0.1), "schedule": Constant(), "augmentations": ()}
    _, curves = stepped(spec(student=StudentTraining(every=999, recalibrate=999), **moving), teacher("vit"), 30)
    distance = -curves["discrepancy"]
    assert distance[-5:].mean() > 1.2 * distance[:5].mean()


def test_the_student_is_trained_once_in_so_many_iterations():
    own = teacher("vit")
    recipe = spec(student=StudentTraining(lr=1e-3, every=3, recalibrate=999))
    with own.frozen():
        group = Group(recipe, own, RUNTIME, 0, 2, factory(own))
        changed = []
        for iteration in range(7):
            weights = group.trainer.ready(group.state.images, 0).weights()
            before = {name: weight.detach().clone() for name, weight in weights.items()}
            step([group], iteration)
            after = group.trainer.student.weights()
            changed.append(any(not torch.equal(before[name], after[name]) for name in before))
    assert changed == [False, False, True, False, False, True, False]


def test_one_step_of_the_student_is_one_step_of_adam_against_the_distance_of_the_logits():
    own = teacher("vit")
    group, _ = stepped(spec(augmentations=(), student=StudentTraining(lr=1e-3)), own, 1)
    images = torch.randn(2, 3, 32, 32, generator=RUNTIME.generator("group", 0, "noise"))
    expected = factory(own)(images)
    weights = expected.weights()
    for weight in weights.values():
        weight.requires_grad_(True)
    with torch.no_grad():
        target = own.module(images_of(group))
    gap = (target - expected.module(images_of(group))).abs().mean()
    gradients = torch.autograd.grad(gap, list(weights.values()))
    learned = group.trainer.student.weights()
    for (name, weight), gradient in zip(weights.items(), gradients, strict=True):
        moved = learned[name].detach() - weight.detach()
        # Adam's first step is the learning rate against the sign, up to its epsilon
        clear = gradient.abs() > 1e-5
        assert torch.allclose(moved[clear], -1e-3 * gradient[clear].sign(), rtol=2e-2)
        assert learned[name].grad is None


def test_ranges_are_chosen_again_on_the_images_as_they_are():
    own, seen = teacher("vit"), []

    def watched(images):
        student = factory(own)(images)
        student.steps = [(index, Watched(step, seen)) for index, step in student.steps]
        return student

    with own.frozen():
        group, before = Group(spec(student=StudentTraining(recalibrate=3)), own, RUNTIME, 0, 2, watched), []
        for iteration in range(ITERATIONS):
            before.append(images_of(group))
            step([group], iteration)
    assert len(seen) == 2
    assert torch.equal(seen[0], before[3])
    assert torch.equal(seen[1], before[6])
    assert not torch.equal(before[3], before[4])


@define
class Watched:
    step: Step
    seen: list

    def run(self, model, calibration):
        self.seen.append(calibration.images.clone())
        self.step.run(model, calibration)


def test_the_teacher_is_not_changed():
    own = teacher("vit")
    before = {name: value.clone() for name, value in own.module.state_dict().items()}
    spec().synthesize(own, RUNTIME, student=factory(own))
    assert all(torch.equal(value, before[name]) for name, value in own.module.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in own.module.parameters())


# attention of the student


@pytest.mark.parametrize("name", ["vit", "swin"])
def test_attention_of_teacher_and_student_is_compared_for_the_images_alone(name):
    own = teacher(name)
    losses = {
        "alignment": MaskedAttentionAlignmentLoss(weight=0.1),
        "ce": CrossEntropyLoss(),
        "spy": Acting(act=None, at=-1),
    }
    recipe = spec(losses=losses, target=structured("target", "soft_label"))
    with own.frozen():
        group = Group(recipe, own, RUNTIME, 0, 2, factory(own))
        inputs = forward([group], 0)[0]
        for ours, theirs in zip(inputs.attention.queries, inputs.student_attention.queries, strict=True):
            assert ours.shape == theirs.shape
            assert not torch.equal(ours, theirs)
        assert inputs.student_logits.shape == (2, 10)
        value = losses["alignment"](inputs.scoped("alignment"))
        (gradient,) = torch.autograd.grad(value, group.state.images)
    assert value > 0
    assert (gradient.flatten(1).norm(dim=1) > 0).all()


def test_patches_that_are_left_out_are_left_out_of_the_student_too():
    own = teacher("vit")
    losses = {"alignment": MaskedAttentionAlignmentLoss(), "ce": CrossEntropyLoss()}
    pruned = spec(losses=losses, target=structured("target", "one_hot"), pruning=TokenPruning(at=(2,), share=0.5))
    with own.frozen():
        group = Group(pruned, own, RUNTIME, 0, 2, factory(own))
        prune([group], 2)
        inputs = forward([group], 2)[0]
        assert inputs.student_attention.keys[0].shape == inputs.attention.keys[0].shape
        assert inputs.attention.keys[0].shape[-2] == 1 + 8
        step([group], 2)
    assert group.state.images.isfinite().all()


# resuming, and what depends on what


@pytest.mark.parametrize("iteration", [3])
def test_an_adversarial_run_resumes_bit_for_bit(tmp_path, monkeypatch, iteration):
    monkeypatch.setattr("spdfq.synth.loop.SAVE_SECONDS_STUDENT", 0.0)
    own = teacher("vit")
    broken = acting(lambda inputs: inputs.images.sum() * float("nan"), iteration)
    whole = acting(None, -1)
    with pytest.raises(NonFiniteError):
        broken.synthesize(own, RUNTIME, tmp_path, student=factory(own))
    resumed = whole.synthesize(own, RUNTIME, tmp_path, student=factory(own))
    assert same(resumed, whole.synthesize(own, RUNTIME, student=factory(own)))


def test_a_finished_group_is_read_back_without_making_a_student(tmp_path):
    own = teacher("vit")
    first = spec().synthesize(own, RUNTIME, tmp_path, student=factory(own))

    def never(images):
        raise AssertionError("a student was made")

    assert same(spec().synthesize(own, RUNTIME, tmp_path, student=never), first)


def test_a_student_of_another_back_end_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("spdfq.synth.loop.SAVE_SECONDS_STUDENT", 0.0)
    own = teacher("vit")
    with pytest.raises(NonFiniteError):
        acting(lambda inputs: inputs.images.sum() * float("nan"), 4).synthesize(
            own, RUNTIME, tmp_path, student=factory(own)
        )
    other = factory(own, "quantization.overrides=[{sites=['head.*'], bits=0}]")
    with pytest.raises(DataError, match=r"another head.*; use --fresh"):
        acting(None, -1).synthesize(own, RUNTIME, tmp_path, student=other)


def test_images_depend_on_the_back_end_only_with_a_student():
    own = load_teacher("bundled:vit_fmnist")

    def key(images, bits):
        data = {"extends": ["models/vit_fmnist", images, "backends/blockwise"]}
        recipe = load_recipe(data, [f"quantization.weights.bits={bits}", CALIBRATE, NO_OVERRIDES])
        return ImagesStage().key(Work(recipe, own, RUNTIME, own.fingerprint()))

    assert key("images/psaq_vit", 4) == key("images/psaq_vit", 3)
    assert key("images/psaq_vit_v2", 4) != key("images/psaq_vit_v2", 3)
    assert key("images/psaq_vit_v2", 4) == key("images/psaq_vit_v2", 4)
