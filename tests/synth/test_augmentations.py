"""Augmentations: shifts, flips, colours, filters and crops; maps that follow the images."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from support.teachers import RUNTIME, SIDE, recipe, tiny_teacher

from spdfq.errors import RecipeError
from spdfq.losses import AttentionPriorLoss, CrossEntropyLoss
from spdfq.synth import ChannelOffset, ColorJitter, Flip, HighPass, Jitter, LowPass, Moment, Move, RandomResizedCrop
from spdfq.synth.changes import follow_all

MANY = 200


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def at(iteration=0, iterations=1, count=4, side=224, channels=3):
    return Moment(iteration=iteration, iterations=iterations, count=count, size=(channels, side, side))


def shifts(jitter, moment):
    generator = seeded()
    return [jitter.draw(generator, moment).shift for _ in range(MANY)]


# jitter


def test_shared_axes_move_as_far_down_as_right_and_others_do_not():
    assert all(down == right for down, right in shifts(Jitter(pixels=15, shared_axes=True), at()))
    assert any(down != right for down, right in shifts(Jitter(pixels=15), at()))


def test_offsets_reach_the_largest_shift_both_ways_and_no_further():
    steps = {step for shift in shifts(Jitter(pixels=3), at()) for step in shift}
    assert steps == set(range(-3, 4))


def test_the_largest_shift_changes_by_equal_stages_of_the_run():
    jitter = Jitter(pixels=(6, 13, 20, 26, 33))  # int(33.6 * stage / 5), as FDD has it
    assert [jitter.largest_shift(at(iteration, 1000)) for iteration in (0, 199, 200, 599, 600, 800, 999)] == [
        *(6, 6, 13, 20, 26, 33, 33)
    ]


@pytest.mark.parametrize(("side", "widths"), [(224, [15, 30]), (112, [8, 15]), (28, [2, 4]), (4, [1, 1])])
def test_a_shift_meant_for_224_pixels_is_scaled_to_the_side_of_the_images(side, widths):
    jitter = Jitter(pixels=(15, 30), for_side=224)
    assert [jitter.largest_shift(at(iteration, 2, side=side)) for iteration in (0, 1)] == widths


@pytest.mark.parametrize("pixels", [0, -1, (), (2, 0), 10**6])
def test_shifts_that_move_nothing_are_refused(pixels):
    with pytest.raises(ValueError, match="1 to 100000 pixels"):
        Jitter(pixels=pixels)


# flips


def test_a_flip_is_drawn_for_the_whole_group_or_for_each_image():
    assert {type(Flip().draw(seeded(seed), at()).flip) for seed in range(9)} == {bool}
    drawn = [Flip(per_image=True).draw(seeded(seed), at(count=3)).flip for seed in range(99)]
    assert set(drawn) == {(a, b, c) for a in (True, False) for b in (True, False) for c in (True, False)}


flips = st.booleans() | st.tuples(st.booleans(), st.booleans())
moves = st.builds(Move, flip=flips, shift=st.tuples(st.integers(-9, 9), st.integers(-9, 9)))


@settings(deadline=None, max_examples=30)
@given(chain=st.lists(moves, max_size=3).map(tuple))
def test_maps_with_a_token_for_each_pixel_go_exactly_where_the_images_go(chain):
    images = torch.arange(2 * 5 * 6.0).view(2, 1, 5, 6)
    moved = images
    for move in chain:
        moved = move.apply(moved)
    assert torch.equal(follow_all(chain, images, (5, 6)), moved)
    assert torch.equal(follow_all(chain, images, (5, 6), nearest=True), moved)


@settings(deadline=None, max_examples=25)
@given(move=moves)
def test_maps_between_tokens_are_interpolated_or_go_to_the_nearest_token(move):
    patch = 4
    maps = torch.rand(2, 1, 3, 5, generator=seeded())
    pixels = maps.repeat_interleave(patch, -2).repeat_interleave(patch, -1)
    followed_maps = move.follow(maps, (3 * patch, 5 * patch))
    assert torch.allclose(followed_maps, F.avg_pool2d(move.apply(pixels), patch), atol=1e-6)
    nearest = Move(flip=move.flip, shift=tuple(patch * round(step / patch) for step in move.shift))
    whole = move.follow(maps, (3 * patch, 5 * patch), nearest=True)
    assert torch.equal(whole, nearest.follow(maps, (3 * patch, 5 * patch)))


# pixel values


def test_a_channel_offset_decays_linearly_from_its_standard_deviation_to_nothing():
    images = torch.zeros(500, 3, 2, 2)
    for iteration, expected in ((0, 0.5), (50, 0.25), (99, 0.005)):
        moved = ChannelOffset(std=0.5).draw(seeded(), at(iteration, 100, count=500)).apply(images)
        assert moved[:, :, 0, 0].std().item() == pytest.approx(expected, rel=0.05)
        assert torch.equal(moved, moved[:, :, :1, :1].expand_as(moved))  # the same for all pixels of a channel


def test_color_jitter_draws_mean_and_scale_within_their_limits():
    change = ColorJitter(mean=0.5, std=2.0).draw(seeded(), at(count=500))
    zero, one = (change.apply(torch.full((500, 3, 1, 1), value)) for value in (0.0, 1.0))
    slope = (one - zero).squeeze()  # 1 / exp(s)
    mean = -zero.squeeze() / slope
    assert math.exp(-2) - 1e-5 <= slope.min() < math.exp(-1.9)
    assert math.exp(1.9) < slope.max() <= math.exp(2) + 1e-5
    assert -0.5001 < mean.min() < -0.49
    assert 0.49 < mean.max() < 0.5001


def wave(frequency, side=32):
    return torch.cos(2 * math.pi * frequency * torch.arange(side) / side).repeat(side, 1)[None, None]


@pytest.mark.parametrize(("frequency", "low"), [(0, True), (4, True), (8, True), (9, False), (16, False)])
def test_filters_keep_the_frequencies_on_their_side_of_the_radius(frequency, low):
    # the highest frequency of 32 pixels is 16 cycles, half of it 8
    moment, images = at(side=32, channels=1, count=1), wave(frequency)
    for augmentation, kept in ((LowPass(probability=1.0), low), (HighPass(probability=1.0), not low or not frequency)):
        for oriented in (images, images.mT):
            expected = oriented if kept else torch.zeros_like(oriented)
            assert torch.allclose(augmentation.draw(seeded(), moment).apply(oriented), expected, atol=1e-5)


def test_a_filter_acts_in_its_share_of_iterations():
    images = wave(16)
    generator, moment = seeded(), at(side=32, channels=1, count=1)
    acted = [
        not torch.equal(LowPass(probability=0.25).draw(generator, moment).apply(images), images) for _ in range(MANY)
    ]
    assert sum(acted) / MANY == pytest.approx(0.25, abs=0.08)


# crops


def test_a_crop_shows_one_box_of_each_image_inside_it_and_large_enough():
    drawn = RandomResizedCrop(smallest=0.3, stretch=1.5).draw(seeded(), at(count=500, side=40))
    top, left, height, width = drawn.boxes.T
    assert min(top.min(), left.min()) == 0
    assert max((top + height).max(), (left + width).max()) == 40
    assert 0.27 < (height * width / 1600).min() < 0.35
    assert 1.3 < (height / width).max() < 1.6
    images = torch.rand(500, 1, 40, 40)
    box = images[7:8, :, top[7] : top[7] + height[7], left[7] : left[7] + width[7]]
    expected = F.interpolate(box, (40, 40), mode="bilinear", align_corners=False)
    assert torch.allclose(drawn.apply(images)[7:8], expected, atol=1e-5)


@pytest.mark.parametrize("smallest", [0.5, 0.9])
def test_shares_of_the_area_are_uniform_however_large_the_boxes(smallest):
    boxes = RandomResizedCrop(smallest=smallest).draw(seeded(), at(count=4000, side=1000)).boxes
    shares = (boxes[:, 2] * boxes[:, 3] / 1e6).sort().values
    uniform = torch.linspace(smallest, 1, 4000)
    assert (shares - uniform).abs().max() < 0.03 * (1 - smallest) + 0.002


def test_a_prior_that_follows_refuses_a_crop_and_one_that_does_not_accepts_it():
    def run(follow):
        losses = {"attention_prior": AttentionPriorLoss(follow=follow), "cross_entropy": CrossEntropyLoss()}
        spec = recipe(losses=losses, augmentations=(RandomResizedCrop(),), iterations=2)
        return spec.synthesize(tiny_teacher(), RUNTIME)

    with pytest.raises(RecipeError, match="random_resized_crop; leave it out, or set follow = false"):
        run(True)
    assert run(False).images.shape == (3, 3, SIDE, SIDE)


# in the loop


def test_every_augmentation_together_is_decided_by_the_seed():
    augmentations = (
        *(Jitter(pixels=(1, 3), for_side=16), Flip(per_image=True), ChannelOffset(), ColorJitter()),
        *(LowPass(), HighPass(radius=0.1)),
    )
    spec = recipe(augmentations=augmentations, iterations=4)
    first, again = (spec.synthesize(tiny_teacher(), RUNTIME) for _ in range(2))
    assert torch.equal(first.images, again.images)
    assert not torch.equal(
        first.images, recipe(augmentations=(), iterations=4).synthesize(tiny_teacher(), RUNTIME).images
    )
