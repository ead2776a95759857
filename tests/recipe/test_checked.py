"""Components built in Python: the same checks as for the values of a recipe, each mistake on one line."""

import pytest
from attrs import define, evolve, field, frozen

from spdfq.backends import Blockwise, Calibrate
from spdfq.errors import ComponentError, DataError, SpdfqError
from spdfq.losses import AttentionPriorLoss, GaussianMixturePrior, LaplacePrior, TotalVariationLoss
from spdfq.quantizers import GridMseObserver, UniformQuantizer
from spdfq.recipe.structure import Checked
from spdfq.synth import (
    Adam,
    Flip,
    GaussianNoise,
    Jitter,
    MultiSemanticSampler,
    OptimizedImages,
    RealImages,
    SoftLabelTarget,
    TokenPruning,
    WarmupCosine,
)

LOSSES = {"tv": TotalVariationLoss()}
MISTAKES = [
    (AttentionPriorLoss, {"prior": 3}, "prior: expected a prior such as GaussianMixturePrior(), got 3"),
    (AttentionPriorLoss, {"prior": LaplacePrior}, "prior: expected a prior such as .*, got the class LaplacePrior"),
    (AttentionPriorLoss, {"prior": "laplace"}, "prior: expected a prior such as .*, got 'laplace'"),
    (AttentionPriorLoss, {"prior": None}, "prior: expected a prior such as .*, got None"),
    (AttentionPriorLoss, {"weight": "x"}, "weight: expected a number or 'auto', got 'x'"),
    (AttentionPriorLoss, {"weight": True}, "weight: expected a number or 'auto', got True"),
    (AttentionPriorLoss, {"wieght": 1}, "wieght: unknown key; did you mean 'weight'?"),
    (AttentionPriorLoss, {"follow": 1}, "follow: expected true or false, got 1"),
    (AttentionPriorLoss, {"scale": "mean"}, "scale: expected one of 'mass', 'sum', 'max', got 'mean'"),
    (TotalVariationLoss, {"weight": None}, "weight: expected a number or 'auto', got None"),
    (TotalVariationLoss, {"target": 3}, "target: expected an array, got 3"),
    (TotalVariationLoss, {"target": ("a", 2)}, "target.0: expected a number, got 'a'"),
    (GaussianMixturePrior, {"max_components": 2.5}, "max_components: expected a whole number, got 2.5"),
    (MultiSemanticSampler, {"every": 0.5}, "every: expected a whole number, got 0.5"),
    (SoftLabelTarget, {"low": "5"}, "low: expected a number, got '5'"),
    (Jitter, {"shared_axes": "yes"}, "shared_axes: expected true or false, got 'yes'"),
    (Flip, {"probability": 2}, "probability: 'probability' must be <= 1.0"),
    (Adam, {"betas": 0.9}, "betas: expected an array, got 0.9"),
    (WarmupCosine, {"rounds": 1.5}, "rounds: expected a whole number, got 1.5"),
    (GridMseObserver, {"steps": "x"}, "steps: expected a whole number, got 'x'"),
    (UniformQuantizer, {"bits": "4"}, "bits: expected a whole number, got '4'"),
    (TokenPruning, {"share": 1.5}, "share: 'share' must be < 1.0"),
    (GaussianNoise, {"images": 2.5}, "images: expected a whole number, got 2.5"),
    (RealImages, {}, "dataset: is required"),
    (RealImages, {"dataset": 3}, "dataset: expected a dataset such as .*, got 3"),
    (OptimizedImages, {"losses": LOSSES, "sampler": 3}, "sampler: expected a sampler such as .*, got 3"),
    (OptimizedImages, {"losses": {"tv": 3}}, "losses.tv: expected a loss such as .*, got 3"),
    (OptimizedImages, {"losses": [LOSSES["tv"]]}, "losses: expected a dict of loss objects by name, got an array"),
    (
        OptimizedImages,
        {"losses": LOSSES, "augmentations": Jitter()},
        "augmentations: expected a list of aug.* a Jitter",
    ),
    (OptimizedImages, {"losses": LOSSES, "augmentations": [Jitter(), 3]}, "augmentations.1: expected an augmentation"),
    (OptimizedImages, {"losses": LOSSES, "pruning": {"share": 0.3}}, "pruning: expected a TokenPruning, got a table"),
    (Calibrate, {"observer": 3}, "observer: expected an observer such as .*, got 3"),
    (Blockwise, {"fisher": "x"}, "fisher: expected true or false, got 'x'"),
]


@pytest.mark.parametrize(("cls", "values", "message"), MISTAKES, ids=lambda value: str(value)[:40])
def test_a_wrong_value_is_one_line_that_names_the_class_and_the_key(cls, values, message):
    with pytest.raises(SpdfqError, match=message.replace("(", r"\(").replace(")", r"\)").replace("?", r"\?")) as caught:
        cls(**values)
    assert str(caught.value).startswith(f"{cls.__name__}.")
    assert "\n" not in str(caught.value)


def test_two_mistakes_are_two_lines():
    with pytest.raises(SpdfqError) as caught:
        Jitter(pixels="2", shared_axes=3)
    assert [line.partition(":")[0] for line in str(caught.value).splitlines()] == [
        "Jitter.pixels",
        "Jitter.shared_axes",
    ]


def test_numbers_and_arrays_are_stored_as_a_recipe_stores_them():
    loss = TotalVariationLoss(weight=1, target=[1, 2])
    assert (type(loss.weight), loss.target) == (float, (1.0, 2.0))
    spec = OptimizedImages(losses=LOSSES, augmentations=[Jitter(pixels=[2, 3])], pruning=TokenPruning(), student=None)
    assert spec.augmentations == (Jitter(pixels=(2, 3)),)
    assert spec.losses["tv"] is LOSSES["tv"]
    assert evolve(spec, images=5).pruning == TokenPruning()


def test_values_without_a_name_are_taken_in_order_where_the_class_allows_it():
    assert GaussianMixturePrior(2) == GaussianMixturePrior(max_components=2)
    with pytest.raises(SpdfqError, match=r"^AttentionPriorLoss: takes its values by name \(weight, prior, "):
        AttentionPriorLoss(LaplacePrior())
    with pytest.raises(SpdfqError, match=r"^GaussianMixturePrior: max_components is given twice"):
        GaussianMixturePrior(2, max_components=3)


def test_the_error_is_also_a_value_error_and_a_type_error():
    for error in (SpdfqError, ValueError, TypeError, ComponentError):
        with pytest.raises(error):
            Jitter(pixels="2")


@frozen
class Range(Checked):
    """A class of one's own: a rule between two fields, and an error of its own kind."""

    low: int = 0
    high: int = field(default=1, kw_only=True)

    def __attrs_post_init__(self):
        if self.high < self.low:
            raise ValueError("high must be at least low")
        if self.high > 9:
            raise DataError("no file has so many")


class Wider(Range):
    """Not decorated: it inherits the checks."""


@define
class Named(Range):
    """Inherits fields and checks, and takes anything as its name."""

    name: object = None


def test_classes_that_inherit_are_checked_once_under_their_own_name():
    assert (Wider(1).low, Named(1, "x").name) == (1, "x")
    for cls in (Range, Wider, Named):
        with pytest.raises(ComponentError, match=f"^{cls.__name__}: high must be at least low$"):
            cls(3)
        with pytest.raises(ComponentError, match=f"^{cls.__name__}.low: expected a whole number, got None$"):
            cls(None)
        with pytest.raises(DataError, match=r"^no file has so many$"):
            cls(high=10)
