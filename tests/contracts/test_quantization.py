"""Contracts of whatever is registered for quantizing: quantizers, observers, and steps of the back-end."""

import attrs
import pytest
import torch
from support import backends as tiny_backend
from support.registered import RUNTIME, every, made, seeded

from spdfq.backends import Calibrate, Calibration
from spdfq.errors import SpdfqError
from spdfq.quantized import place
from spdfq.quantized.checkpoint import load_quantized, save_quantized
from spdfq.registry import registry

# quantizers and observers


def frozen(quantizer, x, observer=None):
    quantizer.observe(x)
    quantizer.freeze(observer)
    return quantizer


def values(quantizer):
    """One column: channels, where a quantizer has them, lie along the last axis."""
    x = torch.randn(500, 1, generator=seeded())
    return x if quantizer.signed else x.abs()


@every("quantizer")
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_quantizer_is_idempotent_monotone_and_bounded(name, bits):
    quantizer = made("quantizer", name, bits=bits)
    x = values(quantizer)
    frozen(quantizer, x)
    once = quantizer(x)
    assert torch.equal(quantizer(once), once)
    order = x.flatten().argsort()
    assert (once.flatten()[order].diff() >= 0).all()
    step = once.unique().diff().max()
    assert once.min() >= x.min() - step
    assert once.max() <= x.max() + step
    assert len(once.unique()) <= quantizer.levels == 2**bits
    assert torch.equal(quantizer.decode(quantizer.codes(x)), once)
    assert quantizer(torch.zeros(1, 1)) == 0
    assert quantizer.integers in ("yes", "with tables")


@every("quantizer")
def test_a_quantizer_passes_a_gradient(name):
    quantizer = made("quantizer", name, bits=4)
    x = values(quantizer).requires_grad_()
    frozen(quantizer, x)(x).sum().backward()
    assert x.grad.isfinite().all()
    assert (x.grad > 0).float().mean() > 0.5


@every("quantizer")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("threads", [1, 4])
def test_a_large_tensor_gives_what_its_parts_give(name, dtype, threads, monkeypatch):
    """Each value is quantized by itself, so that tables may be used (cpu_tables.py)."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    quantizer = made("quantizer", name, bits=4)
    frozen(quantizer, values(quantizer))
    x = torch.randn(600, 1000, generator=seeded(1)).to(dtype).reshape(-1, 1)
    x[:4, 0] = torch.tensor([torch.nan, torch.inf, -torch.inf, -0.0], dtype=dtype)
    for image in (x, x.clone().requires_grad_()):
        whole, parts = quantizer(image), torch.cat([quantizer(part) for part in image.split(100000)])
        assert whole.dtype == dtype
        assert torch.equal(whole.nan_to_num(nan=7.0), parts.nan_to_num(nan=7.0))
    upstream = torch.randn(600000, 1, generator=seeded(2)).to(dtype)
    gradients = [torch.autograd.grad(y, image, upstream)[0][4:] for y in (whole, parts)]
    assert torch.equal(*gradients)


LOOKED_UP = [(name, dtype) for name in ("uniform", "log2") for dtype in (torch.float32, torch.bfloat16)]


@pytest.mark.parametrize(("name", "dtype"), LOOKED_UP)
def test_a_large_tensor_may_lie_in_memory_in_any_way(name, dtype):
    quantizer = frozen(made("quantizer", name, bits=4), values(made("quantizer", name)))
    x = torch.rand(4, 512, 16, 32, generator=seeded()).to(dtype)
    upstream = torch.randn(x.shape, generator=seeded(1)).to(dtype)
    images = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    result = quantizer(images)
    assert result.stride() == images.stride()
    (gradient,) = torch.autograd.grad(result, images, upstream)
    rows = [row.clone().requires_grad_() for row in x]
    parts = [quantizer(row) for row in rows]
    assert torch.equal(result, torch.stack(parts))
    assert torch.equal(gradient, torch.stack(torch.autograd.grad(parts, rows, list(upstream))))
    gaps = torch.cat([x, x], dim=1)[:, ::2].movedim(1, -1)
    assert torch.equal(quantizer(gaps), torch.stack([quantizer(row) for row in gaps]))


@pytest.mark.parametrize(("name", "dtype"), [case for case in LOOKED_UP if case != ("log2", torch.float32)])
@pytest.mark.parametrize("permuted", [False, True])
def test_a_large_tensor_may_be_changed_afterwards(name, dtype, permuted):
    quantizer = frozen(made("quantizer", name, bits=4), values(made("quantizer", name)))
    x = torch.rand(4, 512, 512, generator=seeded()).to(dtype)
    leaf, again = (x.clone().requires_grad_() for _ in range(2))
    moved = leaf * 1
    result = quantizer(moved.mT if permuted else moved)
    moved += 1
    result.sum().backward()
    quantizer(again).sum().backward()
    assert torch.equal(leaf.grad, again.grad)


@every("quantizer")
@pytest.mark.parametrize("size", [1000, 600000])
def test_a_quantizer_can_be_exported(name, size):
    quantizer = frozen(made("quantizer", name, bits=4), values(made("quantizer", name)))
    x = values(quantizer).repeat(size // 500 + 1, 1)
    exported = torch.export.export(quantizer, (x,)).module()
    assert torch.equal(exported(x), quantizer(x))


@every("observer")
@pytest.mark.parametrize("quantizer_name", registry("quantizer").names())
def test_an_observer_chooses_a_range_within_what_was_seen(name, quantizer_name):
    observer, quantizer = made("observer", name), made("quantizer", quantizer_name, bits=4)
    x = values(quantizer).flatten()
    samples = torch.stack([x, 100 * x, torch.zeros(500)])
    low, high = samples.aminmax(dim=1)
    chosen_low, chosen_high = observer.choose(samples, low, high, quantizer)
    assert chosen_low.shape == chosen_high.shape == (3,)
    assert (chosen_low >= low.clamp(max=0)).all()  # every range is extended to contain zero
    assert (chosen_high <= high.clamp(min=0)).all()
    assert (chosen_low <= chosen_high).all()
    assert torch.allclose(chosen_high[1], 100 * chosen_high[0], rtol=1e-3)


# steps of the back-end


def accepted(step, chosen):
    """A calibrated model of the first placement that a step accepts; not calibrated if it changes the float network."""
    if step.in_float:
        return place(chosen, tiny_backend.back_end())
    for placement in ("matmul_inputs", *registry("placement").names()):
        override = f"quantization.placement='{placement}'"
        try:
            step.check(place(chosen, tiny_backend.back_end(override)), [Calibrate()])
        except SpdfqError:
            continue
        return tiny_backend.quantized(chosen, override)
    raise AssertionError(f"{step} accepts no placement of a ViT after calibrate")


def stepped(name, runtime=RUNTIME, seed=0):
    """A calibrated model after a step with its defaults, shortened where it iterates, and its teacher."""
    chosen, step = tiny_backend.teacher("vit"), made("step", name)
    model = accepted(step, chosen)
    if "iterations" in attrs.fields_dict(type(step)):
        step = attrs.evolve(step, iterations=3)
    torch.manual_seed(seed)
    given = Calibration(teacher=chosen, images=tiny_backend.images(), runtime=runtime)
    step.run(model, given)
    if step.in_float:
        Calibrate().run(model, given)
    return model, chosen


@every("step")
def test_a_step_leaves_a_model_that_works_and_comes_back_from_a_checkpoint(name, tmp_path):
    model, chosen = stepped(name)
    logits = model(tiny_backend.images(3, seed=1))
    assert logits.isfinite().all()
    assert not any(parameter.requires_grad for parameter in model.parameters())
    save_quantized(model, tmp_path, chosen)
    again = load_quantized(tmp_path, tiny_backend.network("vit"))
    assert torch.equal(again(tiny_backend.images(3, seed=1)), logits)


@every("step")
def test_a_step_leaves_the_teacher_alone_and_nothing_on_the_networks(name):
    model, chosen = stepped(name)
    fresh = tiny_backend.network("vit")
    assert all(torch.equal(value, fresh.state_dict()[key]) for key, value in chosen.module.state_dict().items())
    for module in (*chosen.module.modules(), *model.network.modules()):
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


@every("step")
def test_a_step_is_decided_by_its_inputs_and_the_recipes_seed(name):
    first, second = (stepped(name, seed=seed)[0].tensors() for seed in (1, 2))
    assert all(torch.equal(value, second[key]) for key, value in first.items())
