"""What is remembered of frozen tensors is computed again as soon as one of them changes."""

import copy

import pytest
import torch
from torch import nn

from spdfq.quantizers import (
    AdaptiveLogQuantizer,
    Log2Quantizer,
    ShiftUniformLog2Quantizer,
    UniformQuantizer,
    learned_scales,
)

LOGARITHMS = [Log2Quantizer, AdaptiveLogQuantizer, ShiftUniformLog2Quantizer]


@pytest.fixture
def weight():
    return nn.Parameter(torch.randn(4, 6, generator=torch.Generator().manual_seed(0)), requires_grad=False)


def frozen(quantizer, x):
    quantizer.observe(x)
    quantizer.freeze()
    return quantizer


def scaled_in_place(weight, quantizer):
    weight.mul_(2)


def rescaled_in_place(weight, quantizer):
    quantizer.tensors()["scale"].mul_(2)


def refrozen(weight, quantizer):
    frozen(quantizer, 3 * weight)


def restored(weight, quantizer):
    quantizer.restore({name: tensor.clone() // 1 + 1 for name, tensor in quantizer.tensors().items()})


def converted(weight, quantizer):
    weight.data = weight.data.double()


@pytest.mark.parametrize("change", [scaled_in_place, rescaled_in_place, refrozen, restored, converted])
def test_a_weight_is_quantized_once_until_it_or_its_quantizer_changes(weight, change):
    quantizer = frozen(UniformQuantizer(granularity="channel"), weight)
    first = quantizer.of_weight(weight)
    assert torch.equal(first, quantizer(weight))
    assert quantizer.of_weight(weight) is first
    change(weight, quantizer)
    assert torch.equal(quantizer.of_weight(weight), quantizer(weight))
    assert not torch.equal(quantizer.of_weight(weight), first) or change is converted


@pytest.mark.parametrize("kind", [UniformQuantizer, Log2Quantizer])
def test_the_range_of_an_activation_may_change_between_calls(kind, weight):
    quantizer = frozen(kind(), weight.abs())
    quantizer(weight.abs())
    with torch.no_grad():
        for tensor in quantizer.tensors().values():
            tensor += 2
    assert torch.equal(quantizer(weight.abs()), quantizer.decode(quantizer.codes(weight.abs())))


def test_a_weight_that_is_learned_has_its_gradient_after_it_was_remembered(weight):
    quantizer = frozen(UniformQuantizer(), weight)
    quantizer.of_weight(weight)
    quantizer.of_weight(weight.requires_grad_()).sum().backward()
    assert weight.grad.abs().sum() > 0


def test_what_inference_mode_remembers_can_be_used_in_training(weight):
    quantizer = frozen(UniformQuantizer(), weight)
    with torch.inference_mode():
        quantizer.of_weight(weight)
    x = torch.ones(1, 6, requires_grad=True)
    (x @ quantizer.of_weight(weight).T).sum().backward()
    assert x.grad is not None


def test_a_copy_remembers_nothing(weight):
    quantizer = frozen(UniformQuantizer(), weight)
    first = quantizer.of_weight(weight)
    assert copy.deepcopy(quantizer).of_weight(weight) is not first


# the grid of a logarithm, which does not depend on its scale


def learned(quantizer, x):
    """The values and the gradients of the values and of the scale."""
    x = x.clone().requires_grad_()
    with learned_scales([quantizer]) as (scale,):
        values = quantizer(x)
        return [values, *torch.autograd.grad(values.square().sum(), [x, scale])]


def same(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("kind", LOGARITHMS)
def test_the_grid_is_made_once_while_the_scale_is_learned(kind, weight, monkeypatch):
    quantizer, made, make = frozen(kind(), weight.abs()), [], kind.grid
    monkeypatch.setattr(kind, "grid", lambda self, parameters: made.append(None) or make(self, parameters))
    results = []
    for _ in range(3):
        quantizer.tensors()["scale"].mul_(0.9)
        results.append([*learned(quantizer, weight.abs()), quantizer(weight.abs())])
    assert len(made) <= 1
    assert same(results[-1][:3], learned(copy.deepcopy(quantizer), weight.abs()))
    assert torch.equal(results[-1][0], results[-1][3])
    assert not torch.equal(results[0][0], results[1][0])


def changed_in_place(quantizer):
    for name in {"base", "shift"} & set(quantizer.tensors()):
        quantizer.tensors()[name].mul_(2)


def replaced(quantizer):
    quantizer.restore({n: t.clone() if n == "scale" else t * 2 for n, t in quantizer.tensors().items()})


@pytest.mark.parametrize("change", [changed_in_place, replaced])
@pytest.mark.parametrize("kind", [AdaptiveLogQuantizer, ShiftUniformLog2Quantizer])
def test_the_grid_is_made_again_if_what_it_depends_on_changes(kind, weight, change):
    quantizer = frozen(kind(), weight.abs())
    first = learned(quantizer, weight.abs())
    change(quantizer)
    second = learned(quantizer, weight.abs())
    assert same(second, learned(copy.deepcopy(quantizer), weight.abs()))
    assert not torch.equal(first[0], second[0])


@pytest.mark.parametrize("kind", LOGARITHMS)
def test_a_grid_of_inference_mode_can_be_learned_with(kind, weight):
    quantizer = copy.deepcopy(frozen(kind(), weight.abs()))
    with torch.inference_mode():
        quantizer(weight.abs())
    assert same(learned(quantizer, weight.abs()), learned(copy.deepcopy(quantizer), weight.abs()))
