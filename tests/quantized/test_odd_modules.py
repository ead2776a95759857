"""Modules of other authors: extra state, hooks, taken names and odd tensors come back, or are refused by name."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from support.backends import (
    bits,
    images,
    quantized,
    teacher_of,
)
from torch import nn

from spdfq.errors import ModelError, SpdfqError
from spdfq.quantized.checkpoint import load_quantized, save_quantized


class Odd(nn.Module):
    """Buffers of both kinds, a frozen number, tied weights, a convolution and a bare parameter."""

    def __init__(self, seed=0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.conv, self.norm, self.first, self.second = (
                nn.Conv2d(3, 8, 8, 8),
                nn.BatchNorm2d(8),
                nn.Linear(8, 8),
                nn.Linear(8, 8),
            )
            self.head = nn.Linear(8, 10)
        self.second.weight = self.first.weight
        self.norm.running_mean.copy_(torch.randn(8, generator=generator))
        self.shift = nn.Parameter(torch.randn(8, generator=generator))
        self.register_buffer("kept", torch.randn(8, generator=generator))
        self.register_buffer("made", torch.arange(8.0), persistent=False)

    def forward(self, pixels):
        x = self.norm(self.conv(pixels)).mean((-1, -2)) + self.shift
        return self.head(self.second(self.first(x).relu()) * self.kept + self.made)


def test_buffers_tied_weights_and_bare_parameters_come_back(tmp_path):
    chosen = teacher_of(Odd())
    model = quantized(chosen, "quantization.overrides=[{sites=['first.weight'], bits=3}]")
    save_quantized(model, tmp_path, chosen)
    found = load_quantized(tmp_path, Odd(seed=1))
    assert torch.equal(found(images()), model(images()))
    assert found.network.second.weight is found.network.first.weight
    stored = set(load_file(tmp_path / "model.safetensors"))
    assert {"kept", "shift", "norm.running_mean", "first.weight.codes"} <= stored
    assert not {"made", "second.weight", "second.weight.codes", "first.weight"} & stored


class Renaming(Odd):
    """Names and numbers of its state dict are not those of the module."""

    def __init__(self, seed=0):
        super().__init__(seed)
        self._register_state_dict_hook(lambda _, state, *__: state.update(other=state.pop("head.bias")))
        self._register_load_state_dict_pre_hook(lambda state, *_: state.update({"kept": torch.zeros(8)}))


class Expanded(Odd):
    """All numbers of a buffer are in the same place."""

    def __init__(self, seed=0):
        super().__init__(seed)
        self.kept = torch.full((1,), 1.5 + seed).expand(8)


class Counting(Odd):
    """Extra state decides the result."""

    def __init__(self, seed=0, extra=None):
        super().__init__(seed)
        self.extra = extra or {"factor": 1.0, "names": ["a"], "nothing": None}

    def forward(self, pixels):
        return super().forward(pixels) * (self.extra if isinstance(self.extra, torch.Tensor) else self.extra["factor"])

    def get_extra_state(self):
        return self.extra

    def set_extra_state(self, state):
        self.extra = state


class Occupied(Odd):
    """Has attributes, a buffer and a child where others would put quantizers."""

    def __init__(self, seed=0):
        super().__init__(seed)
        self.first.weight_quantizer, self.second.input_quantizer = nn.Identity(), None
        self.head.register_buffer("input_quantizer", torch.ones(2))
        self.conv.input_quantizer = nn.Tanh()
        self.conv.register_forward_pre_hook(lambda conv, given: conv.input_quantizer(given[0]))


class Chained(Odd):
    """Runs whatever children it has, and multiplies by itself."""

    def __init__(self, seed=0):
        super().__init__(seed)
        self.chain = Chain(seed)

    def forward(self, pixels):
        return self.chain(super().forward(pixels))


class Chain(nn.Module):
    def __init__(self, seed):
        super().__init__()
        self.layer = nn.Linear(10, 10)
        self.mix = nn.Parameter(torch.randn(10, 10, generator=torch.Generator().manual_seed(seed)))

    def forward(self, x):
        for child in self.children():
            x = child(x)
        return F.linear(x, self.mix)


class Normed(Odd):
    """A weight that is computed from other parameters, once by a hook and once by a parametrization."""

    def __init__(self, seed=0):
        super().__init__(seed)
        nn.utils.parametrizations.weight_norm(self.head)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            nn.utils.weight_norm(self.conv)


class Mixed(Odd):
    """Tensors of other types, and parameters in containers."""

    def __init__(self, seed=0):
        super().__init__(seed)
        self.register_buffer("flags", torch.tensor([True, seed == 0]))
        self.register_buffer("numbers", torch.tensor([seed, 5], dtype=torch.int16))
        self.register_buffer("waves", torch.full((2,), complex(0, seed)))
        self.register_buffer("none", None)
        self.register_buffer("one", torch.tensor(float(seed)))
        self.register_buffer("empty", torch.zeros(0, 3))
        self.table = nn.ParameterDict({"a": torch.full((10, 10), 0.1 * seed)})
        self.rows = nn.ParameterList([torch.eye(10) + seed])

    def forward(self, pixels):
        return F.linear(F.linear(super().forward(pixels), self.table["a"]), self.rows[0]) + self.one + self.numbers[0]


@pytest.mark.parametrize("kind", [Renaming, Expanded, Counting, Occupied, Chained, Normed, Mixed])
def test_modules_with_hooks_extra_state_taken_names_and_odd_tensors_come_back(tmp_path, kind):
    chosen = teacher_of(kind(seed=1).eval())
    chosen.module(images()).sum().backward()  # leaves results with a graph in attributes of `Normed`
    with torch.no_grad():
        plain = chosen.module(images())
        model = quantized(chosen)
        save_quantized(model, tmp_path, chosen)
        found = load_quantized(tmp_path, kind().eval())
        assert torch.equal(found(images()), model(images()))
        assert torch.equal(chosen.module(images()), plain)
        eight = quantized(chosen, *bits(8))(images())
    assert 0 < (eight - plain).norm() < 0.05 * plain.norm()


@pytest.mark.parametrize("extra", [{"factor": 3.0}, torch.tensor(3.0)])
def test_extra_state_comes_back(tmp_path, extra):
    chosen = teacher_of(Counting(extra=extra))
    model = quantized(chosen)
    save_quantized(model, tmp_path, chosen)
    assert load_quantized(tmp_path, Counting(extra={"factor": 1.0})).network.extra == extra
    with pytest.raises(ModelError, match=r": _extra_state does not fit this architecture"):
        load_quantized(tmp_path, Odd())
    save_quantized(quantized(teacher_of(Odd())), tmp_path, chosen)
    with pytest.raises(ModelError, match=r": _extra_state does not fit this architecture"):
        load_quantized(tmp_path, Counting())


@pytest.mark.parametrize("extra", [{1: 2}, (1, 2), b"a", float("nan")])
def test_extra_state_that_would_need_pickle_is_refused(tmp_path, extra):
    chosen = teacher_of(Odd())
    model = quantized(chosen)
    model.network.norm.__class__ = type("Stateful", (nn.BatchNorm2d,), {"get_extra_state": lambda self: extra})
    with pytest.raises(ModelError, match=r"^norm: get_extra_state returns a \w+ that only pickle can store"):
        save_quantized(model, tmp_path / "new", chosen)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (torch.eye(3).to_sparse(), "is sparse or quantized; convert it to an ordinary tensor, or remove it"),
        (nn.UninitializedBuffer(), "has no shape yet; call the module once before you hand it over"),
        (torch.zeros(2, dtype=torch.complex128), "is torch.complex128, which safetensors does not store; convert it"),
    ],
)
def test_a_tensor_that_no_file_holds_is_refused_by_name(tmp_path, value, reason):
    chosen = teacher_of(Odd())
    model = quantized(chosen)
    model.network.norm.register_buffer("stray", value)
    with pytest.raises(SpdfqError, match=f"^norm.stray: {reason}"):
        save_quantized(model, tmp_path / "new", chosen)
    assert not (tmp_path / "new").exists()


def test_a_network_that_cannot_be_copied_is_refused(tmp_path):
    module = Odd()
    module.cache = [module.shift * 2]
    with pytest.raises(ModelError, match=r"^Odd: cannot be copied \(RuntimeError: Only Tensors created explicitly"):
        quantized(teacher_of(module))
