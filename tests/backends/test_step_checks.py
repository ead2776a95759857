"""What is refused before images are made: orders of steps, and steps that a model has nothing for."""

import pytest
import torch
from attrs import define
from support.backends import RUNTIME, back_end, images, quantized, taken, teacher, teacher_of
from torch import nn

from spdfq.backends import Blockwise, Calibrate, Distill, RepQ, Step, quantize
from spdfq.backends.quantize import check_quantization
from spdfq.errors import RecipeError, SpdfqError
from spdfq.quantized import place

GELU = "quantization.gelu={type='adaptive_log', bits=4, shift=0.16997}"
PSAQ = "quantization.placement='psaq'"
CHANNELS = "quantization.activations={type='uniform', bits=4, granularity='channel', axis=-1}"
NO_WEIGHTS = "quantization.overrides=[{sites=['*weight'], bits=0}]"
NO_BLOCKS = "quantization.overrides=[{sites=['blocks.*'], bits=0}]"
SPLIT, FOLD = "{type='repq', part='channels'}", "{type='repq', part='fold'}"


def refused(chosen, step, *overrides):
    """The line of a recipe whose step at this position is refused, and which fails with the same line if it runs."""
    spec = back_end(*overrides)
    with pytest.raises(RecipeError) as checked:
        check_quantization(chosen, spec)
    (line,) = checked.value.problems
    assert line.startswith(f"quantization.steps.{step}: ")
    with pytest.raises(SpdfqError) as run:
        quantize(chosen, images(2), spec, RUNTIME)
    assert line == f"quantization.steps.{step}: {run.value}"
    return str(run.value)


def steps(*names):
    return f"quantization.steps=[{', '.join(name if name[0] == '{' else repr(name) for name in names)}]"


# weights that adalog has folded into biases


@pytest.mark.parametrize(
    "late",
    [
        "calibrate",
        "{type='calibrate', sites='weights'}",
        "repq",
        SPLIT,
        "ridge",
        "blockwise",
        "adaround",
        "global_local",
        "distill",
    ],
)
def test_weights_must_not_change_after_adalog(late):
    spec = back_end(GELU, steps("calibrate", "adalog", late))
    with pytest.raises(RecipeError, match=r"steps.2: (\w+): changes weights that 'adalog' .*; put 'adalog' last$"):
        check_quantization(teacher("vit"), spec)
    check_quantization(teacher("vit"), back_end(GELU, steps("calibrate", late, "adalog")))


@pytest.mark.parametrize("late", ["{type='calibrate', sites='activations'}", "adalog"])
def test_what_leaves_weights_as_they_are_may_follow_adalog(late):
    check_quantization(teacher("vit"), back_end(GELU, steps("calibrate", "adalog", late)))


def test_a_step_of_ones_own_says_whether_it_changes_weights():
    @define(kw_only=True)
    class Shrink(Step):
        calibrates = frozenset()
        changes_weights = True

    model, (calibrate, adalog) = place(teacher("vit"), back_end()), back_end(steps("calibrate", "adalog")).steps
    Shrink().check(model, [calibrate])
    with pytest.raises(SpdfqError, match=r"^Shrink: changes weights that 'adalog' before it relies on; put"):
        Shrink().check(model, [calibrate, adalog])


# changes of the float network after ranges were chosen


@pytest.mark.parametrize("late", ["rotate", "smooth"])
@pytest.mark.parametrize(("early", "placement"), [("repq", []), (SPLIT, []), ("ptf", [PSAQ])])
def test_the_float_network_must_not_change_after_single_ranges_were_chosen(early, placement, late):
    line = refused(teacher("vit"), 1, *placement, steps(early, late, "calibrate"))
    assert line == f"{late}: changes the tensors whose ranges were chosen before; put it before 'calibrate'"


# folding twice


@pytest.mark.parametrize(
    ("overrides", "names"),
    [
        ([], ["calibrate", SPLIT, FOLD, FOLD]),
        ([], ["calibrate", "repq", FOLD]),
        ([CHANNELS], ["calibrate", FOLD, FOLD]),
        ([CHANNELS], ["calibrate", "repq", FOLD]),
    ],
)
def test_ranges_of_channels_are_folded_once(overrides, names):
    line = refused(teacher("vit"), len(names) - 1, *overrides, steps(*names))
    assert line == "repq: nothing to fold; put { type = 'repq', part = 'channels' } before it"


def test_ranges_of_channels_must_be_there_to_be_folded():
    with pytest.raises(RecipeError, match=r"steps.0: repq: nothing to fold"):
        check_quantization(teacher("vit"), back_end(CHANNELS, steps(FOLD, "calibrate")))


@pytest.mark.parametrize(
    ("overrides", "names"),
    [
        ([], ["calibrate", SPLIT, FOLD, SPLIT, FOLD]),
        ([], [SPLIT, "calibrate", FOLD]),
        ([PSAQ], ["calibrate", SPLIT, "ptf", FOLD]),
        ([CHANNELS], ["calibrate", FOLD]),
    ],
)
def test_other_orders_of_the_halves_work(overrides, names):
    spec = back_end(*overrides, steps(*names))
    check_quantization(teacher("vit"), spec)
    assert quantize(teacher("vit"), images(2), spec, RUNTIME)(images(1)).isfinite().all()


# nothing to learn, and nothing to compare


class Convolutions(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv2d(3, 8, 3, 2, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))


@pytest.mark.parametrize(
    ("term", "line"),
    [
        ("features", "Convolutions: has no numbered blocks with attention to reconstruct"),
        ("structure", "distill: structure compares attention maps; this model has none; set structure = 0"),
    ],
)
def test_distill_needs_what_its_loss_compares(term, line):
    torch.manual_seed(0)
    chosen = teacher_of(Convolutions().eval())
    distill = f"{{type='distill', iterations=1, {term}=1.0}}"
    assert refused(chosen, 1, steps("calibrate", distill)) == line
    check_quantization(chosen, back_end(steps("calibrate", "distill")))
    check_quantization(teacher("vit"), back_end(steps("calibrate", distill)))


@pytest.mark.parametrize("name", ["blockwise", "adaround", "global_local"])
@pytest.mark.parametrize("in_float", [NO_WEIGHTS, NO_BLOCKS])
def test_a_step_that_learns_nothing_is_refused(name, in_float):
    step = f"{{type='{name}', iterations=1, scale_lr=0.0}}"
    line = refused(teacher("vit"), 1, in_float, steps("calibrate", step))
    assert line == f"{name}: no quantized weight in the blocks to learn; set scale_lr, or leave it out"


def test_distill_with_nothing_to_learn_is_refused():
    line = refused(teacher("vit"), 1, NO_WEIGHTS, steps("calibrate", "{type='distill', iterations=1}"))
    assert line == "distill: no quantized weight to learn; set learned = 'all' or scale_lr, or leave it out"
    for something in ("learned='all'", "scale_lr=1e-3"):
        distill = f"{{type='distill', iterations=1, {something}}}"
        check_quantization(teacher("vit"), back_end(NO_WEIGHTS, steps("calibrate", distill)))


@pytest.mark.parametrize("step", [Blockwise(iterations=1, scale_lr=1e-3), Distill(iterations=1, scale_lr=1e-3)])
def test_scales_that_a_step_before_makes_learnable_count(step):
    """A range for each channel cannot be learned; after repq there is one for the whole tensor."""
    overrides = [CHANNELS, CHANNELS.replace("activations", "softmax"), NO_WEIGHTS]
    model = place(teacher("vit"), back_end(*overrides))
    with pytest.raises(SpdfqError, match="no quantized weight"):
        step.check(model, [Calibrate()])
    step.check(model, [Calibrate(), RepQ()])
    model = quantized("vit", *overrides, steps("calibrate", "repq"))
    taken(step, model, teacher("vit"), images=images(2))
