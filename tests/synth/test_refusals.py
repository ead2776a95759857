"""Errors before and during a synthesis, and advice."""

import pytest
import torch
from attrs import evolve
from support.networks import build
from support.teachers import CLASSES, RUNTIME, SIDE, acting, not_a_number, recipe, tiny_teacher
from torch import nn

from spdfq.errors import ModelError, NonFiniteError, RecipeError, SpdfqError
from spdfq.losses import (
    AttentionPriorLoss,
    CrossEntropyLoss,
    HeadSimilarityLoss,
    PatchContrastLoss,
    SoftCrossEntropyLoss,
    TotalVariationLoss,
)
from spdfq.synth import NoTarget, OptimizedImages, WholeImageSampler
from spdfq.synth.pruning import TokenPruning
from spdfq.teacher import Teacher

# during the run


def a_gradient_that_is_none(inputs):
    return (inputs.images.sum() * 0).abs().sqrt()


@pytest.mark.parametrize(
    ("act", "column"), [(not_a_number, "acting"), (a_gradient_that_is_none, "gradient")], ids=["loss", "gradient"]
)
def test_a_loss_or_gradient_that_is_not_finite_stops_the_run_and_nothing_is_written(tmp_path, act, column):
    with pytest.raises(NonFiniteError, match=rf"{column} is not finite in iteration 7 of group 0; try a lower"):
        acting(act, 7).synthesize(tiny_teacher(), RUNTIME, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("act", "found"),
    [
        (lambda inputs: inputs.images.mean(0), r"a tensor \[3, 16, 16\]"),
        (lambda inputs: torch.zeros(()), r"a tensor \[\]"),
        (lambda inputs: 0.0, "float"),
    ],
    ids=["no scalar", "no gradient", "no tensor"],
)
def test_a_loss_that_returns_no_scalar_with_a_gradient_is_named(act, found):
    with pytest.raises(SpdfqError, match=f"synthesis.losses.acting: must return a scalar with a gradient.*{found}"):
        acting(act, 0).synthesize(tiny_teacher(), RUNTIME)


# before anything runs


@pytest.mark.parametrize(
    ("losses", "message"),
    [
        ({}, "has no losses"),
        ({"total": TotalVariationLoss()}, "losses.total: .*choose another"),
        ({"prior": AttentionPriorLoss(weight="auto")}, "add soft_cross_entropy or cross_entropy"),
        (
            {"prior": AttentionPriorLoss(weight="auto"), "sl": SoftCrossEntropyLoss(weight=0.0)},
            "add soft_cross_entropy",
        ),
        (
            {"sl": SoftCrossEntropyLoss(weight="auto")},
            "losses.sl: a label loss cannot have weight 'auto'; give it a number",
        ),
    ],
    ids=str,
)
def test_losses_that_cannot_work_together_are_refused(losses, message):
    with pytest.raises(ValueError, match=message):
        OptimizedImages(losses=losses)


def test_a_model_whose_attention_cannot_be_recorded_is_refused_before_anything_runs():
    spec = recipe(losses={"prior": AttentionPriorLoss(), "ce": CrossEntropyLoss()})
    nothing = evolve(tiny_teacher(), module=nn.Sequential(nn.Flatten(), nn.Linear(3 * SIDE * SIDE, CLASSES)))
    with pytest.raises(ModelError, match="leave out the losses that need it"):
        spec.check(nothing)
    recipe(losses={"ce": CrossEntropyLoss()}).check(nothing)
    spec.check(tiny_teacher())


def test_a_label_loss_without_labels_is_refused():
    with pytest.raises(
        ValueError, match=r"losses\.ce: needs labels, but the target gives none; set target = 'one_hot'"
    ):
        OptimizedImages(losses={"ce": CrossEntropyLoss()}, target=NoTarget())


@pytest.mark.parametrize(
    ("loss", "changes", "model", "said"),
    [
        (HeadSimilarityLoss(), {}, {"num_heads": 1}, "no attention of this model has two heads or more"),
        (PatchContrastLoss(), {}, {"img_size": 16}, "no patch of a 2x2 grid has more than 4 neighbours"),
        (PatchContrastLoss(), {"pruning": TokenPruning(at=(1,))}, {}, "which token pruning leaves out"),
    ],
    ids=["one head", "no negatives", "pruned"],
)
def test_a_model_that_a_loss_cannot_be_computed_on_is_refused_before_anything_runs(loss, changes, model, said):
    side = model.get("img_size", 32)
    module = build("vit", **model)
    spec = recipe(losses={"own": loss}, target=NoTarget(), sampler=WholeImageSampler(), **changes)
    with pytest.raises(RecipeError) as raised:
        spec.check(Teacher(module, mean=(0.5,) * 3, std=(0.5,) * 3, num_classes=10, input_size=(3, side, side)))
    assert len(raised.value.problems) == 1
    assert raised.value.problems[0].startswith("synthesis.losses.own: ")
    assert said in raised.value.problems[0]


# advice


def test_crops_without_soft_labels_are_advised_against():
    assert "soft_label" in recipe(target=OptimizedImages(losses=recipe().losses).target).advice()[0]
    assert recipe().advice() == []


def test_crops_without_labels_are_advised_against():
    spec = recipe(losses={"total_variation": TotalVariationLoss()}, target=NoTarget())
    assert "no use without labels" in spec.advice()[0]


def test_pruning_after_the_last_iteration_is_advised_against():
    pruned = {"losses": {"ce": CrossEntropyLoss()}, "sampler": WholeImageSampler()}
    late = OptimizedImages(**pruned, iterations=5, pruning=TokenPruning(at=(3, 5, 9)))
    assert late.advice() == ["pruning.at: [5, 9] is never reached in 5 iterations; lower it"]
    assert OptimizedImages(**pruned, iterations=10, pruning=TokenPruning(at=(3, 5, 9))).advice() == []
