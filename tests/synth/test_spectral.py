"""Adam on frequencies and colours: the linear map, its adjoint, and the step."""

import pytest
import torch
from support.teachers import RUNTIME, acting, idle, same, tiny_teacher

from spdfq.errors import NonFiniteError
from spdfq.synth import SpectralAdam, WarmupCosine
from spdfq.synth.spectral import Coordinates

SHAPES = [(2, 3, 16, 16), (2, 3, 12, 17), (2, 1, 9, 8), (1, 4, 8, 8)]


def white(shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("power", [0.0, 1.0, 1.7])
def test_the_gradient_map_is_the_adjoint_of_the_pixel_map(shape, power):
    z, g = white(shape), white(shape, 1)
    coordinates = Coordinates(z, power)
    z.requires_grad_()
    (wanted,) = torch.autograd.grad((coordinates.pixels(z) * g).sum(), z)
    torch.testing.assert_close(coordinates.gradient(g), wanted)


@pytest.mark.parametrize("shape", [(400, 3, 16, 16), (400, 1, 16, 16)])
def test_white_coordinates_make_pixels_of_variance_one(shape):
    pixels = SpectralAdam().start(white(shape))
    assert float(pixels.square().mean()) == pytest.approx(1.0, abs=0.03)


def test_power_falls_with_the_frequency_as_asked():
    pixels = SpectralAdam(power=1.0).start(white((4000, 1, 16, 16)))
    spectrum = torch.fft.fft2(pixels).abs().square().mean((0, 1))
    # amplitude 1/f is power 1/f²; the mean alone has the power of the lowest frequency
    assert float(spectrum[0, 1] / spectrum[0, 4]) == pytest.approx(16, rel=0.1)
    assert float(spectrum[0, 0] / spectrum[0, 1]) == pytest.approx(1, rel=0.1)


def test_colours_vary_together_and_single_channels_stay_apart():
    pixels = SpectralAdam().start(white((400, 3, 8, 8))).movedim(1, 0).flatten(1)
    assert bool((torch.corrcoef(pixels) > 0.75).all())
    single = SpectralAdam(power=0.0).start(white((2, 1, 8, 8)))
    torch.testing.assert_close(single, white((2, 1, 8, 8)))


@pytest.mark.parametrize("shape", SHAPES)
def test_steps_are_those_of_adam_on_the_coordinates(shape):
    spec, goal = SpectralAdam(lr=0.1, power=1.2), white(shape, 2)
    z = white(shape).requires_grad_()
    coordinates = Coordinates(z, 1.2)
    images = spec.start(z.detach()).requires_grad_()
    ours, theirs = spec.build(images), torch.optim.Adam([z], lr=0.1, betas=spec.betas)
    for _ in range(5):
        (z.grad,) = torch.autograd.grad((coordinates.pixels(z) - goal).square().sum(), z)
        (images.grad,) = torch.autograd.grad((images - goal).square().sum(), images)
        theirs.step()
        ours.step()
    torch.testing.assert_close(images.detach(), coordinates.pixels(z.detach()))


def test_an_interrupted_run_continues_bit_for_bit(tmp_path, monkeypatch):
    monkeypatch.setattr("spdfq.synth.loop.SAVE_SECONDS", 0.0)
    changes = {"optimizer": SpectralAdam(lr=0.1), "schedule": WarmupCosine(rounds=2)}
    teacher = tiny_teacher()
    with pytest.raises(NonFiniteError):
        acting(not_a_number, 4, **changes).synthesize(teacher, RUNTIME, tmp_path)
    assert list(tmp_path.iterdir())
    whole = idle(**changes)
    assert same(whole.synthesize(teacher, RUNTIME, tmp_path), whole.synthesize(teacher, RUNTIME))


def not_a_number(inputs):
    return inputs.images.sum() * float("nan")
