"""Components from other packages: the same checks, advice and pictures as for the built-in ones."""

from typing import ClassVar

import pytest
import torch
from attrs import define, frozen
from support.teachers import HEADS, RUNTIME, recipe, tiny_teacher

from spdfq.attention import CLASS_ATTENTION
from spdfq.errors import RecipeError
from spdfq.losses import CrossEntropyLoss, Loss, MapPictures, TotalVariationLoss
from spdfq.losses.attention_maps import map_pictures
from spdfq.synth import (
    Augmentation,
    Change,
    CropPlan,
    Optimizer,
    Sampler,
    Schedule,
    SoftLabelTarget,
    Target,
    WholeImageSampler,
)
from spdfq.synth.pruning import TokenPruning


@frozen
class NoLabels(Target):
    """Gives no labels, and does not define `sample`."""

    gives_labels: ClassVar[bool] = False


@frozen
class Smoothed(Target):
    """A label smoothed over all classes."""

    soft: ClassVar[bool] = True

    def sample(self, labels, num_classes, generator):
        one_hot = torch.zeros(len(labels), num_classes)
        for row, shown in enumerate(labels):
            one_hot[row, shown] = 1 / len(shown)
        return 0.9 * one_hot + 0.1 / num_classes


@frozen
class Halves(Sampler):
    """The left and the right half, each with its own class."""

    several_classes: ClassVar[bool] = True

    def sample(self, count, size, num_classes, generator):
        height, half = size[0], size[1] // 2
        return CropPlan(
            boxes=torch.tensor([[0, 0, height, half], [0, half, height, size[1] - half]]).repeat(count, 1),
            owners=torch.arange(count).repeat_interleave(2),
            labels=torch.randint(num_classes, (2 * count,), generator=generator),
            redraw=1,
        )


@frozen
class Zoom(Augmentation):
    """An augmentation that maps cannot follow."""

    followable: ClassVar[bool] = False

    def draw(self, generator, moment):
        return Change()


@define(kw_only=True)
class UniformAttention(Loss):
    """Pulls the class token's attention towards the same value everywhere."""

    needs: ClassVar[frozenset[str]] = frozenset({CLASS_ATTENTION})
    has_pictures: ClassVar[bool] = True

    @property
    def follows_images(self):
        return True

    def __call__(self, inputs):
        rows = inputs.attention.class_attention
        return torch.stack([(row - 1 / row.shape[-1]).square().mean() for row in rows]).sum()

    def pictures(self, inputs):
        rows, grids = inputs.attention.class_attention, inputs.attention.grids
        aims = [torch.full_like(row, 1 / row.shape[-1]) for row in rows]
        shown = [map_pictures(maps, grids, inputs.images) for maps in (aims, rows)]
        return MapPictures(prior=shown[0], reached=shown[1], first_block=0)


LABEL_FREE = {"total_variation": TotalVariationLoss()}


def test_a_label_loss_is_refused_without_labels():
    with pytest.raises(ValueError, match=r"losses\.ce: needs labels, but the target gives none"):
        recipe(losses={"ce": CrossEntropyLoss()}, target=NoLabels())


def test_a_target_without_labels_is_never_asked_for_them():
    spec = recipe(losses=LABEL_FREE, target=NoLabels(), sampler=WholeImageSampler(), iterations=2)
    assert spec.synthesize(tiny_teacher(), RUNTIME).labels.numel() == 0


def test_crops_without_labels_or_without_soft_labels_are_advised_against():
    assert (
        "Halves crops have no use without labels"
        in recipe(losses=LABEL_FREE, target=NoLabels(), sampler=Halves()).advice()[0]
    )
    assert "Halves without soft labels is known to lose" in recipe(sampler=Halves(), target=OneLabel()).advice()[0]
    assert recipe(sampler=Halves(), target=Smoothed()).advice() == []
    assert recipe(sampler=Halves(), target=SoftLabelTarget()).advice() == []
    assert recipe(sampler=WholeImageSampler(), target=OneLabel()).advice() == []


@frozen
class OneLabel(Smoothed):
    """Declares that it is not soft."""

    soft: ClassVar[bool] = False


def test_a_sampler_that_redraws_without_saying_how_is_named():
    with pytest.raises(TypeError, match="Halves does not define redrawn"):
        recipe(sampler=Halves(), target=Smoothed(), iterations=2).synthesize(tiny_teacher(), RUNTIME)


@pytest.mark.parametrize(
    "changes",
    [{"losses": {"uniform": UniformAttention(), "ce": CrossEntropyLoss()}}, {"pruning": TokenPruning(at=(1,))}],
    ids=["a loss that follows", "token pruning"],
)
def test_an_augmentation_that_maps_cannot_follow_is_refused_by_name(changes):
    spec = recipe(augmentations=(Zoom(), Zoom()), **{"losses": {"ce": CrossEntropyLoss()}, **changes})
    with pytest.raises(RecipeError) as raised:
        spec.check(tiny_teacher())
    assert [problem.partition(";")[0] for problem in raised.value.problems] == [
        "synthesis.augmentations: neither attention priors nor token pruning can follow Zoom"
    ]
    recipe(augmentations=(Zoom(),), losses={"ce": CrossEntropyLoss()}).check(tiny_teacher())


def test_a_loss_with_pictures_has_them_in_the_result():
    losses = {"ce": CrossEntropyLoss(), "uniform": UniformAttention()}
    result = recipe(losses=losses, iterations=2).synthesize(tiny_teacher(), RUNTIME)
    assert result.prior.shape == result.reached.shape == (2, 2, 4, 4)
    assert torch.equal(result.prior, torch.full_like(result.prior, 1 / 16))
    assert not torch.equal(result.reached, result.prior)
    assert HEADS == 2  # only the first head is shown


class Descent(Optimizer):
    def build(self, images):
        return torch.optim.SGD([images], lr=self.lr)


class Falling(Schedule):
    def factor(self, iteration, iterations):
        return 1 - iteration / iterations


def test_an_optimizer_and_a_schedule_need_nothing_but_their_method():
    spec = recipe(losses=LABEL_FREE, optimizer=Descent(), schedule=Falling(), iterations=2)
    assert spec.synthesize(tiny_teacher(), RUNTIME).images.isfinite().all()
