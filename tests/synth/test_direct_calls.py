"""Samplers, targets, augmentations, optimizers and schedules called without a recipe."""

import pytest
import torch

from spdfq.errors import SpdfqError
from spdfq.runtime import generator
from spdfq.synth import (
    Adam,
    Augmentation,
    ChannelOffset,
    ColorJitter,
    Constant,
    CropPlan,
    Flip,
    Jitter,
    Moment,
    Move,
    MultiSemanticSampler,
    NoTarget,
    OneHotTarget,
    RandomResizedCrop,
    SoftLabelTarget,
    SpectralAdam,
    WarmupCosine,
    WholeImageSampler,
    label_mask,
)

SIZE = (32, 32)


def images(count=2, side=32):
    return torch.randn(count, 3, side, side, generator=generator(1))


def plan(**changes):
    """Two crops of the first image and one of the second."""
    boxes = torch.tensor([[0, 0, 8, 8], [8, 8, 8, 8], [0, 0, 4, 32]])
    return CropPlan(**{"boxes": boxes, "owners": torch.tensor([0, 0, 1]), "labels": torch.tensor([7, 3, 7]), **changes})


# what a loop of one's own needs of a plan


def test_views_show_the_classes_of_their_crops():
    assert plan().view_classes(2) == [[3, 7], [7], [7], [3], [7]]
    assert label_mask(plan().view_classes(2), 9).long().sum(1).tolist() == [2, 1, 1, 1, 1]
    assert plan(labels=torch.tensor([7, 7, 1])).view_classes(2) == [[7], [1], [7], [7], [1]]


def test_a_view_weighs_as_the_mean_over_images_of_the_whole_and_the_mean_of_its_crops():
    assert plan().view_weights(2).tolist() == [0.5, 0.5, 0.25, 0.25, 0.5]
    empty = WholeImageSampler().sample(3, SIZE, 0, generator(0))
    assert torch.allclose(empty.view_weights(3), torch.full((3,), 1 / 3))
    assert empty.view_classes(3) == [[], [], []]


def test_a_plan_gives_targets_for_all_its_views():
    drawn = MultiSemanticSampler().sample(4, SIZE, 10, generator(0))
    targets = SoftLabelTarget().sample(drawn.view_classes(4), 10, generator(0))
    assert targets.shape == (4 + len(drawn.labels), 10)
    assert targets[4:].argmax(-1).tolist() == drawn.labels.tolist()
    assert drawn.views(images(4), SIZE).shape == (len(drawn.labels), 3, *SIZE)


# augmentations


def test_calling_an_augmentation_draws_a_change_for_these_images_and_applies_it():
    for augmentation in (Jitter(), Flip(per_image=True), ColorJitter(), RandomResizedCrop()):
        moment = Moment(count=2, size=(3, 32, 32))
        expected = augmentation.draw(generator(3), moment).apply(images())
        assert torch.equal(augmentation(images(), generator(3)), expected)
    late, early = (ChannelOffset()(images(), generator(3), iteration, 10) - images() for iteration in (8, 3))
    assert torch.allclose(3.5 * late, early, atol=1e-5)


# mistakes


def sample(count=2, size=SIZE, num_classes=10, source=None):
    return MultiSemanticSampler().sample(count, size, num_classes, generator(0) if source is None else source)


MISTAKES = {
    "count must be a whole number from 1 up, got 2.0": lambda: sample(count=2.0),
    r"size must be \(height, width\), .*, got 32": lambda: sample(size=32),
    "num_classes must be a whole number from 1 up, got 0": lambda: sample(num_classes=0),
    "generator must be a torch.Generator, .*, got 3": lambda: sample(source=3),
    "generator must be .*, got None": lambda: WholeImageSampler().sample(1, SIZE, 5, None),
    "generator must be .* got 7": lambda: MultiSemanticSampler().redrawn(plan(), SIZE, 7),
    "there are 1 images, but the plan has a crop of image 1": lambda: plan().view_weights(1),
    "there are 1 images, but the plan has a crop": lambda: plan().views(images(1), SIZE),
    r"images must be \[B, C, H, W\], got \[3, 32, 32\]": lambda: plan().views(images()[0], SIZE),
    r"size must be \(height, width\), .* got 16": lambda: plan().views(images(), 16),
    "outside the images of 16x16": lambda: plan().views(images(side=16), SIZE),
    "a box of the plan is empty": lambda: plan(boxes=torch.zeros(3, 4, dtype=torch.long)).views(images(), SIZE),
    "owners: expected a Tensor, got an array": lambda: plan(owners=[0, 0, 1]),
    "owners and labels must be int64": lambda: plan(labels=torch.zeros(3)),
    r"got \[3, 4\], 2 owners and 3 labels": lambda: plan(owners=torch.tensor([0, 1])),
    "labels must hold the classes of each view, .* got 3": lambda: SoftLabelTarget().sample(3, 10, generator(0)),
    "labels must hold the classes of each view, .* got 'ab'": lambda: label_mask("ab", 10),
    "labels of view 0: expected classes of 0 to 9, got a": lambda: OneHotTarget().sample(["a"], 10, generator(0)),
    "labels of view 1: expected classes of 0 to 9, got True": lambda: label_mask([1, True], 10),
    "generator must be .*, got 0": lambda: SoftLabelTarget().sample([1], 10, 0),
    "NoTarget does not define sample": lambda: NoTarget().sample([1], 10, generator(0)),
    "Augmentation does not define draw": lambda: Augmentation()(images(), generator(0)),
    r"images must be \[B, C, h, w\], got \[3, 32, 32\]": lambda: Jitter()(images()[0], generator(0)),
    "generator must be .* got 5": lambda: Jitter()(images(), 5),
    r"moment must be Moment\(.*\), got int": lambda: Jitter().draw(generator(0), 3),
    "Moment: iteration is 9, but there are 9": lambda: Flip()(images(), generator(0), 9, 9),
    "Moment.size: expected an array of 3 values, got 2": lambda: Moment(size=SIZE),
    "Moment.iterations: 'iterations' must be >= 1: 0": lambda: Moment(iterations=0),
    "Move.shift: expected an array, got 3": lambda: Move(shift=3),
    "drawn for 3 images, not for 2": lambda: Flip(per_image=True).draw(generator(0), Moment(count=3)).apply(images()),
    "drawn for 1 images, not for 2": lambda: ColorJitter().draw(generator(0), Moment()).apply(images()),
    "drawn for 4 channels, not for 3": lambda: (
        ColorJitter().draw(generator(0), Moment(count=2, size=(4, 9, 9))).apply(images())
    ),
    "leaf that requires a gradient": lambda: Adam().build(images()),
    "images must be a tensor .* got list": lambda: SpectralAdam().build([images()]),
    "iteration is 0, but there are 0": lambda: WarmupCosine().factor(0, 0),
    "iteration must be a whole number from 0 up, got 0.5": lambda: Constant().factor(0.5, 2),
}


@pytest.mark.parametrize("message", MISTAKES)
def test_a_mistake_is_one_line(message):
    with pytest.raises(SpdfqError, match=message) as caught:
        MISTAKES[message]()
    assert "\n" not in str(caught.value)
