"""Optimizers and schedules: learning rates, restarts and weight decay."""

import pytest
import torch
from attrs import define, evolve
from support.teachers import RUNTIME, Acting, not_a_number, recipe, same, tiny_teacher

from spdfq.errors import NonFiniteError
from spdfq.synth import Adam, AdamW, WarmupCosine
from spdfq.synth.group import Group
from spdfq.synth.loop import step


def test_the_schedule_sets_the_learning_rate_of_the_optimiser():
    factors = [WarmupCosine(rounds=2, warmup=0.25).factor(iteration, 16) for iteration in range(16)]
    rates = []

    @define(kw_only=True)
    class Watched(Adam):
        def build(self, images):
            optimizer = super().build(images)
            optimizer.register_step_pre_hook(lambda own, *_: rates.append(own.param_groups[0]["lr"]))
            return optimizer

    schedule = WarmupCosine(rounds=2, warmup=0.25)
    recipe(images=1, iterations=16, optimizer=Watched(lr=0.5), schedule=schedule).synthesize(tiny_teacher(), RUNTIME)
    assert rates == pytest.approx([0.5 * factor for factor in factors])


def test_warm_up_is_linear_and_the_rest_half_a_cosine_in_every_round():
    schedule = WarmupCosine(rounds=2, warmup=0.2)
    factors = [schedule.factor(iteration, 200) for iteration in range(200)]
    assert factors[:100] == pytest.approx(factors[100:])
    assert factors[:20] == pytest.approx([(iteration + 0.5) / 20 for iteration in range(20)])
    assert factors[59] + factors[60] == pytest.approx(1, abs=1e-3)  # half way down
    assert factors[99] == pytest.approx(0, abs=1e-3)


def test_the_cosine_ends_at_its_floor():
    schedule = WarmupCosine(warmup=0.0, floor=0.01)  # of a learning rate of 0.1: MimiQ's 1e-3
    factors = [schedule.factor(iteration, 2000) for iteration in range(2000)]
    assert factors[0] == pytest.approx(1, abs=1e-5)
    assert factors[-1] == pytest.approx(0.01, abs=1e-5)
    assert factors[999] + factors[1000] == pytest.approx(1.01, abs=1e-5)
    assert factors == sorted(factors, reverse=True)


# a round begins with the iteration whose middle lies in it
ROUNDS = [(1, 9, []), (2, 1000, [500]), (5, 10, [2, 4, 6, 8]), (2, 9, [4]), (3, 3, [1, 2]), (3, 10, [3, 7])]


@pytest.mark.parametrize(("rounds", "iterations", "begins"), ROUNDS)
def test_the_optimiser_starts_without_moments_in_each_round(rounds, iterations, begins):
    schedule = WarmupCosine(rounds=rounds)
    assert [i for i in range(iterations) if schedule.restarts(i, iterations)] == begins
    assert all(schedule.factor(i, iterations) < 1 / 20 for i in begins) or iterations < 100


@pytest.mark.parametrize("at", [4, 5, 6])
def test_a_restarted_optimiser_makes_the_steps_of_a_new_one_and_resumes_bit_for_bit(tmp_path, monkeypatch, at):
    monkeypatch.setattr("spdfq.synth.loop.SAVE_SECONDS", 0.0)
    spec = recipe(images=2, iterations=10, schedule=WarmupCosine(rounds=2, warmup=0.0), augmentations=())
    teacher = tiny_teacher()
    with teacher.frozen():
        group, late = (Group(spec, teacher, RUNTIME, 0, 2) for _ in range(2))
        for iteration in range(5):
            step([group], iteration)
        late.state.images.data.copy_(group.state.images.detach())
        late.state.loss_weights.norms.copy_(group.state.loss_weights.norms)
        for one in (group, late):
            step([one], 5)
    assert torch.equal(group.state.images, late.state.images)
    broken = evolve(spec, losses={**spec.losses, "acting": Acting(act=not_a_number, at=at)})
    whole = evolve(spec, losses={**spec.losses, "acting": Acting(act=None, at=-1)})
    with pytest.raises(NonFiniteError):
        broken.synthesize(teacher, RUNTIME, tmp_path)
    assert list(tmp_path.iterdir())
    assert same(whole.synthesize(teacher, RUNTIME, tmp_path), whole.synthesize(teacher, RUNTIME))


def test_weight_decay_shrinks_pixels_beside_the_gradient():
    # a gradient that changes sign in every step leaves Adam's first moment near zero; the decay is lr * weight_decay
    images = torch.full((1, 1, 2, 2), 0.5, requires_grad=True)
    optimizer = AdamW(lr=0.1, weight_decay=0.2).build(images)
    images.grad = torch.zeros_like(images)
    optimizer.step()
    assert images.detach().unique().tolist() == pytest.approx([0.5 * (1 - 0.1 * 0.2)])
