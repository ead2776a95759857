"""Targets: the distributions drawn for given labels."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spdfq.errors import SpdfqError
from spdfq.synth import OneHotTarget, SoftLabelTarget

few = settings(deadline=None, max_examples=30)
TARGETS = [SoftLabelTarget(), OneHotTarget()]
every_target = pytest.mark.parametrize("target", TARGETS, ids=["soft_label", "one_hot"])


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(("z", "share"), [(5.0, 0.129), (7.5, 0.644), (10.0, 0.957)])
def test_a_logit_of_z_over_zeros_puts_the_known_share_on_the_class(z, share):
    (target,) = SoftLabelTarget(z, z, elsewhere="zero").sample([3], 1000, seeded())
    assert target[3].item() == pytest.approx(math.exp(z) / (math.exp(z) + 999), rel=1e-5)
    assert target[3].item() == pytest.approx(share, abs=1e-3)


@few
@given(
    labels=st.lists(st.sets(st.integers(0, 8), min_size=1, max_size=4).map(sorted), min_size=1, max_size=6),
    elsewhere=st.sampled_from(["zero", "uniform"]),
    low=st.floats(2, 6),
    extra=st.floats(0, 6),
    seed=st.integers(0, 2**32),
)
def test_relevant_logits_lie_between_low_and_high(labels, elsewhere, low, extra, seed):
    targets = SoftLabelTarget(low, low + extra, elsewhere=elsewhere).sample(labels, 10, seeded(seed))
    top = 1.0 if elsewhere == "uniform" else 0.0
    for row, shown in zip(targets.double().log(), labels, strict=True):
        other = row[[index for index in range(10) if index not in shown]]
        assert other.max() - other.min() <= top + 1e-5
        assert row[shown].min() - other.max() >= low - top - 1e-5
        assert row[shown].max() - other.min() <= low + extra + 1e-5


def test_relevant_logits_are_uniform_from_low_to_high():
    targets = SoftLabelTarget(elsewhere="zero").sample([0] * 2000, 5, seeded())
    z = (targets[:, 0] / targets[:, 1]).log()
    assert z.min() == pytest.approx(5, abs=0.02)
    assert z.max() == pytest.approx(10, abs=0.02)
    assert z.mean() == pytest.approx(7.5, abs=0.1)


@pytest.mark.parametrize(("elsewhere", "deviation"), [("normal", 1.0), ("uniform", 12**-0.5), ("zero", 0.0)])
def test_the_other_logits_are_drawn_as_asked(elsewhere, deviation):
    targets = SoftLabelTarget(elsewhere=elsewhere).sample([0] * 200, 101, seeded())
    z = targets[:, 1:].log()
    assert (z - z.mean(1, keepdim=True)).std().item() == pytest.approx(deviation, abs=0.02)


@every_target
def test_labels_may_be_indices_lists_tensors_or_a_mixture(target):
    views = [[1, 1], [4, 2], [4, 2], [0, 0]]
    expected = target.sample(views, 6, seeded())
    mixed = [1, [2, 4], torch.tensor([4, 2]), torch.tensor(0)]
    assert torch.equal(target.sample(mixed, 6, seeded()), expected)
    singles = target.sample(torch.tensor([1, 3]), 6, seeded())
    assert torch.equal(singles, target.sample([[1], [3]], 6, seeded()))


@every_target
def test_targets_are_probabilities_highest_at_the_labels(target):
    targets = target.sample([0, [1, 2], (3,)], 6, seeded())
    assert targets.shape == (3, 6)
    assert targets.dtype == torch.float32
    assert torch.allclose(targets.sum(-1), torch.ones(3))
    assert targets.argmax(-1)[0] == 0
    assert set(targets[1].topk(2).indices.tolist()) == {1, 2}


def test_the_generator_alone_decides():
    torch.manual_seed(1)
    first = SoftLabelTarget().sample([0, 1], 6, seeded(5))
    torch.manual_seed(2)
    assert torch.equal(first, SoftLabelTarget().sample([0, 1], 6, seeded(5)))
    assert not torch.equal(first, SoftLabelTarget().sample([0, 1], 6, seeded(6)))


def test_one_hot_shares_the_probability_evenly():
    assert OneHotTarget().sample([2, [0, 3]], 4, seeded()).tolist() == [[0, 0, 1, 0], [0.5, 0, 0, 0.5]]


@every_target
@pytest.mark.parametrize("labels", [[0, 6], [-1], [[0, 9]], [[]], [1.5]], ids=str)
def test_labels_that_are_no_classes_are_refused(target, labels):
    with pytest.raises(SpdfqError, match="expected classes of 0 to 5"):
        target.sample(labels, 6, seeded())


@pytest.mark.parametrize(
    "wrong",
    [{"low": 6.0, "high": 5.0}, {"high": math.inf}, {"high": 1e39}, {"low": math.nan}, {"elsewhere": "one"}],
    ids=str,
)
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(ValueError, match=r"must be|expected|is too large"):
        SoftLabelTarget(**wrong)
