"""Several groups in one pass: what one group after the other gives, up to the rounding of larger matrix products."""

import pytest
import torch
from attrs import evolve, frozen
from support.networks import build
from support.teachers import ITERATIONS, RUNTIME, acting, idle, not_a_number, recipe, same, tiny_teacher

from spdfq.api import make_images
from spdfq.errors import ComponentError, NonFiniteError
from spdfq.losses import TeacherStudentDiscrepancyLoss
from spdfq.recipe import load_recipe
from spdfq.synth import (
    Flip,
    MultiSemanticSampler,
    Optimizer,
    RandomResizedCrop,
    StudentTraining,
    WholeImageSampler,
    loop,
)
from spdfq.synth.group_state import BALANCE_ITERATIONS
from spdfq.teacher import Teacher

# groups of 2, 2 and 1 images
FIVE = {"images": 5, "group": 2}


@frozen(kw_only=True)
class GradientDescent(Optimizer):
    """Unlike Adam, whose first step is a sign, it does not enlarge a difference in the last digit."""

    def build(self, images):
        return torch.optim.SGD([images], lr=self.lr)


def shipped(name, together, architecture="vit", iterations=BALANCE_ITERATIONS + 2, **changes):
    """The images of a shipped part of recipes, with that many groups in a pass."""
    parts = ["models/vit_fmnist", f"images/{name}", "backends/minmax"]
    loaded = load_recipe({"extends": parts}, [f"synthesis.iterations={iterations}"])
    spec = evolve(loaded.synthesis, **FIVE, groups_per_pass=together, optimizer=GradientDescent(lr=0.1), **changes)
    if spec.pruning:
        spec = evolve(spec, pruning=evolve(spec.pruning, at=(1, 4)))
    depth = {"depths": (1, 1)} if architecture == "swin" else {"depth": 1}
    teacher = Teacher(build(architecture, **depth), mean=[0.5] * 3, std=[0.5] * 3, num_classes=10)
    return make_images(evolve(loaded, synthesis=spec), teacher, RUNTIME)


def close(one, other):
    torch.testing.assert_close(one.images, other.images, rtol=0, atol=2e-6)
    torch.testing.assert_close(one.curves, other.curves, rtol=1e-5, atol=1e-6)
    assert one.owners.equal(other.owners)
    assert one.labels.equal(other.labels)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        # the narrow kernels of its entropy enlarge a difference in the last digit with each iteration
        ("psaq_vit", {"iterations": 2}),
        ("mimiq", {}),
        ("spdfq", {}),
        ("spdfq_plus", {}),
        ("smi", {}),
        ("patch_rebirth", {}),
        ("spdfq_swin", {"architecture": "swin"}),
        ("cross_entropy", {"sampler": MultiSemanticSampler(every=2, redraw=3)}),
        ("cross_entropy", {"augmentations": (RandomResizedCrop(), Flip(per_image=True))}),
    ],
    ids=str,
)
def test_images_and_losses_are_those_of_one_group_after_the_other(name, changes):
    together, apart = shipped(name, 3, **changes), shipped(name, 1, **changes)
    torch.testing.assert_close(together.curves[:, 0], apart.curves[:, 0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(together.images, apart.images, rtol=0, atol=1e-5)
    assert together.owners.equal(apart.owners)
    assert together.labels.equal(apart.labels)


@pytest.mark.parametrize(("together", "passes"), [(1, [2, 2, 1]), (2, [4, 1]), (3, [5]), (4, [5])])
def test_the_teacher_sees_the_images_of_so_many_groups_at_a_time(together, passes):
    teacher, seen = tiny_teacher(), []
    spec = recipe(**FIVE, groups_per_pass=together, sampler=WholeImageSampler(), iterations=1)
    spec.losses = {"soft_cross_entropy": spec.losses["soft_cross_entropy"]}  # has no pictures
    spec.check(teacher)
    handle = teacher.module.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    spec.synthesize(teacher, RUNTIME)
    handle.remove()
    assert seen[1:] == passes  # the first is the check


# interruptions


def interrupted(together, at, folder):
    """Stop in a call of a loss; each of three groups calls it once in each iteration."""
    with pytest.raises(KeyboardInterrupt):
        acting(stop, at, **FIVE, groups_per_pass=together).synthesize(tiny_teacher(), RUNTIME, folder)


def stop(_):
    raise KeyboardInterrupt


@pytest.fixture
def save_always(monkeypatch):
    monkeypatch.setattr(loop, "SAVE_SECONDS", 0.0)


def test_an_interrupted_run_goes_on_bit_for_bit(tmp_path, save_always):
    interrupted(3, 3 * 7 + 1, tmp_path)
    spec = idle(**FIVE, groups_per_pass=3)
    assert same(spec.synthesize(tiny_teacher(), RUNTIME, tmp_path), spec.synthesize(tiny_teacher(), RUNTIME))
    assert spec.losses["acting"].calls == 3 * (ITERATIONS - 7) + 3 * ITERATIONS


@pytest.mark.parametrize(("before", "after"), [(3, 1), (1, 3)])
def test_a_run_can_go_on_with_another_number_of_groups(tmp_path, save_always, before, after):
    """One by one, the second group stops in its eighth iteration; it catches up with the first, then all go on."""
    interrupted(before, ITERATIONS + 7 if before == 1 else 3 * 7, tmp_path)
    rest = idle(**FIVE, groups_per_pass=after)
    found = rest.synthesize(tiny_teacher(), RUNTIME, tmp_path)
    left = 2 * ITERATIONS - 7 if before == 1 else 3 * (ITERATIONS - 7)
    assert rest.losses["acting"].calls == left
    expected = idle(**FIVE).synthesize(tiny_teacher(), RUNTIME)
    torch.testing.assert_close(found.images, expected.images, rtol=0, atol=1e-4)


def test_a_nonfinite_loss_is_that_of_its_group():
    with pytest.raises(NonFiniteError, match="acting is not finite in iteration 2 of group 1"):
        acting(not_a_number, 3 * 2 + 1, **FIVE, groups_per_pass=3).synthesize(tiny_teacher(), RUNTIME)


# settings


@pytest.mark.parametrize("wrong", [0, -1, 1.5, "all", None])
def test_other_numbers_of_groups_are_refused(wrong):
    with pytest.raises(ComponentError, match="groups_per_pass"):
        recipe(groups_per_pass=wrong)


def test_groups_with_students_of_their_own_do_not_share_passes():
    losses = {"teacher_student_discrepancy": TeacherStudentDiscrepancyLoss()}
    with pytest.raises(ComponentError, match="each group trains a student of its own; leave it at 1"):
        recipe(losses=losses, student=StudentTraining(), groups_per_pass=2)
