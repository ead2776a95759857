"""Token pruning: which patches are left out, how they follow augmentations, and which models are refused."""

import pytest
import torch
from attrs import evolve
from support.networks import build
from support.teachers import GRID, HEADS, ITERATIONS, RUNTIME, SIDE, acting, recipe, same, tiny_teacher

from spdfq.attention import record_attention
from spdfq.errors import DataError, NonFiniteError, SpdfqError
from spdfq.losses import AttentionPriorLoss, SoftCrossEntropyLoss
from spdfq.runs.pipeline import check
from spdfq.runtime.files import read_tensors, write_tensors
from spdfq.synth import Adam, Augmentation, Flip, Move, SpectralAdam, SyntheticImages, WholeImageSampler
from spdfq.synth.group import Group
from spdfq.synth.loop import forward, prune, step
from spdfq.synth.pruning import TokenPruning, find_token_layout
from spdfq.teacher import Teacher

PATCH = SIDE // GRID[0]
PRUNING = TokenPruning(at=(2, 4, 7), share=0.3)  # of 16 patches: 12, then 9, then 7 are left


def pruned(**changes):
    return recipe(**{"pruning": PRUNING, **changes})


class PatchRoll(Augmentation):
    """One patch down and two to the right."""

    def draw(self, generator, moment):
        return Move(shift=(PATCH, 2 * PATCH))


class HalfPatchRoll(Augmentation):
    """More than half a patch down, less than half to the right."""

    def draw(self, generator, moment):
        return Move(shift=(PATCH // 2 + 1, PATCH // 2 - 1))


def tokens_in_block(teacher, run):
    """How many tokens each call of the second block saw."""
    seen = []
    handle = teacher.module.blocks[1].register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    run()
    handle.remove()
    return seen


def teacher_of(name):
    return Teacher(build(name), mean=(0.5,) * 3, std=(0.5,) * 3, num_classes=10, input_size=(3, 32, 32))


# which patches


def test_a_share_of_the_remaining_patches_is_left_out_each_time():
    counts = [TokenPruning().left(196, iteration) for iteration in (0, 49, 50, 100, 200, 300, 3999)]
    assert counts == [196, 196, 138, 97, 68, 48, 48]  # 196 - 58, 138 - 41, 97 - 29, 68 - 20


def test_patches_with_the_lowest_class_attention_in_the_last_block_are_left_out():
    teacher = tiny_teacher()
    with teacher.frozen() as module:
        group = Group(pruned(), teacher, RUNTIME, 0, 2)
        with record_attention(module) as record:
            module(group.state.images)
        order = record.class_attention[-1].mean(1).argsort(1)
        prune([group], 2)
        assert [row.nonzero().flatten().tolist() for row in group.pruner.alive] == order[:, 4:].sort().values.tolist()
        before = group.pruner.alive.clone()
        prune([group], 4)
    assert group.pruner.alive.sum(1).tolist() == [9, 9]
    assert (before | group.pruner.alive).equal(before)  # none comes back


def test_patches_with_the_highest_class_attention_can_be_left_out_instead():
    teacher = tiny_teacher()
    with teacher.frozen() as module:
        group = Group(pruned(pruning=evolve(PRUNING, leave_out="most_attended")), teacher, RUNTIME, 0, 2)
        with record_attention(module) as record:
            module(group.state.images)
        order = record.class_attention[-1].mean(1).argsort(1)
        prune([group], 2)
    left = [row.nonzero().flatten().tolist() for row in group.pruner.alive]
    assert left == order[:, :12].sort().values.tolist()


@pytest.mark.parametrize("optimizer", [Adam(), SpectralAdam()], ids=["pixels", "frequencies"])
def test_the_most_attended_patches_are_finished_when_they_are_left_out(optimizer):
    """Neither momentum nor coordinates that are shared with other patches change them any more."""
    teacher = tiny_teacher()
    spec = pruned(pruning=evolve(PRUNING, leave_out="most_attended"), optimizer=optimizer)
    with teacher.frozen():
        group = Group(spec, teacher, RUNTIME, 0, 2)
        for iteration in range(2):
            step([group], iteration)
        before = group.state.images.detach().clone()
        step([group], 2)
    changed = (before != group.state.images).any(1).unfold(1, PATCH, PATCH).unfold(2, PATCH, PATCH)
    assert changed.any(-1).any(-1).flatten(1).equal(group.pruner.alive)


def test_each_image_loses_its_own_patches():
    teacher = tiny_teacher()
    with teacher.frozen():
        group = Group(pruned(), teacher, RUNTIME, 0, 3)
        prune([group], 2)
    assert len(group.pruner.alive.unique(dim=0)) == 3


# effect on the forward passes


def test_patches_left_out_are_absent_from_every_later_pass_and_crops_are_whole():
    teacher, spec = tiny_teacher(), pruned(images=2, iterations=9)
    seen = tokens_in_block(teacher, lambda: spec.synthesize(teacher, RUNTIME))
    look = [17, *[17, 17, 16] * 2]  # whether the model allows it, checked first and where it is needed
    together, apart = [17], [[tokens, 17] for tokens in (13, 10, 8)]  # images with crops, images and then crops
    before = [[17], [13], [10]]  # a pass that ranks what is left
    assert seen[:-1] == [
        *(*look, *together * 2),
        *(*before[0], *apart[0] * 2),
        *(*before[1], *apart[1] * 3),
        *(*before[2], *apart[2] * 2),
    ]
    assert seen[-1] == 17  # what the result shows is whole


def test_the_blocks_see_the_remaining_patches_with_the_positions_they_had():
    teacher = tiny_teacher()
    images = torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    tokens = torch.tensor([[0, 3, 4, 9], [1, 2, 14, 15]])
    layout = find_token_layout(teacher)
    with torch.no_grad(), layout.only(teacher.module, tokens):
        logits = teacher.module(images)
    module = teacher.module
    with torch.no_grad():
        patches = module.patch(images).flatten(2).mT + module.position[:, 1:]
        kept = torch.stack([row[chosen] for row, chosen in zip(patches, tokens, strict=True)])
        first = (module.cls_token + module.position[:, :1]).expand(2, -1, -1)
        expected = module.head(module.blocks(torch.cat([first, kept], 1))[:, 0])
    assert torch.allclose(logits, expected, atol=1e-6)
    assert module.blocks[0]._forward_pre_hooks == {}


def test_no_loss_of_the_model_reaches_the_pixels_of_a_patch_that_is_left_out():
    spec = pruned(losses={"ce": SoftCrossEntropyLoss()}, sampler=WholeImageSampler(), augmentations=())
    teacher = tiny_teacher()
    with teacher.frozen():
        group = Group(spec, teacher, RUNTIME, 0, 2)
        prune([group], 2)
        logits = forward([group], 2)[0].logits
    (gradient,) = torch.autograd.grad(logits.square().sum(), group.state.images)
    reached = gradient.abs().amax(1).unfold(1, PATCH, PATCH).unfold(2, PATCH, PATCH).amax((-2, -1)).flatten(1) > 0
    assert torch.equal(reached, group.pruner.alive)


@pytest.mark.parametrize(
    ("augmentations", "shift"),
    [((PatchRoll(),), (1, 2)), ((HalfPatchRoll(),), (1, 0)), ((Flip(probability=1.0),), None)],
    ids=["whole patches", "parts of a patch", "mirrored"],
)
def test_the_patches_move_along_with_the_images(augmentations, shift):
    teacher = tiny_teacher()
    with teacher.frozen():
        group = Group(pruned(augmentations=augmentations), teacher, RUNTIME, 0, 2)
        prune([group], 2)
        tokens = forward([group], 2)[0].tokens
    alive = group.pruner.alive.view(2, *GRID)
    expected = alive.flip(-1) if shift is None else alive.roll(shift, (1, 2))
    assert torch.equal(torch.zeros(2, 16, dtype=torch.bool).scatter(1, tokens, True), expected.flatten(1))
    assert (tokens.diff() > 0).all()


def test_a_prior_covers_the_remaining_patches_and_sums_to_one_over_them():
    losses = {"prior": AttentionPriorLoss(blocks="all"), "ce": SoftCrossEntropyLoss()}
    teacher = tiny_teacher()
    with teacher.frozen():
        group = Group(pruned(losses=losses, augmentations=(PatchRoll(),)), teacher, RUNTIME, 0, 2)
        whole = losses["prior"].maps(forward([group], 0)[0].scoped("prior"), 0)
        prune([group], 2)
        inputs = forward([group], 2)[0].scoped("prior")
        maps = losses["prior"].maps(inputs, 0)
        assert losses["prior"](inputs).isfinite()
    assert maps.shape == inputs.attention.class_attention[0].shape == (2, HEADS, 12)
    picked = whole.gather(-1, inputs.tokens.unsqueeze(1).expand(-1, HEADS, -1))
    assert torch.allclose(maps, picked / picked.sum(-1, keepdim=True), atol=1e-6)


# resuming


@pytest.mark.parametrize("iteration", [2, 9])
def test_a_pruned_run_resumes_bit_for_bit(tmp_path, monkeypatch, iteration):
    monkeypatch.setattr("spdfq.synth.loop.SAVE_SECONDS", 0.0)
    teacher = tiny_teacher()
    with pytest.raises(NonFiniteError):
        acting(lambda inputs: inputs.images.sum() * float("nan"), iteration, pruning=PRUNING).synthesize(
            teacher, RUNTIME, tmp_path
        )
    whole = acting(None, -1, pruning=PRUNING)
    resumed = whole.synthesize(teacher, RUNTIME, tmp_path)
    assert same(resumed, whole.synthesize(teacher, RUNTIME))
    assert not same(resumed, acting(None, -1).synthesize(teacher, RUNTIME))


def test_a_state_without_the_remaining_patches_is_refused(tmp_path):
    pruned().synthesize(tiny_teacher(), RUNTIME, tmp_path)
    path = tmp_path / "group-00000.safetensors"
    tensors, metadata = read_tensors(path, "")
    del tensors["pruning.alive"]
    write_tensors(path, tensors, metadata)
    with pytest.raises(
        DataError, match=r"the remaining patches are missing, expected \[2, 16\]; delete it or use --fresh"
    ):
        pruned().synthesize(tiny_teacher(), RUNTIME, tmp_path)


def test_pruning_after_the_last_iteration_changes_nothing():
    late = evolve(PRUNING, at=(ITERATIONS,))
    assert same(pruned(pruning=late).synthesize(tiny_teacher(), RUNTIME), recipe().synthesize(tiny_teacher(), RUNTIME))


# models that cannot be pruned


@pytest.mark.parametrize("name", ["vit", "deit_distilled", "dinov2_registers"])
def test_models_with_a_class_token_and_added_positions_are_pruned(name):
    teacher = teacher_of(name)
    losses = {"ce": SoftCrossEntropyLoss()}
    result = pruned(losses=losses, iterations=6).synthesize(teacher, RUNTIME)
    assert isinstance(result, SyntheticImages)
    assert find_token_layout(teacher).grid == (4, 4)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("swin", "has no class token to rank its patches by"),
        ("beit", "depend on where in the sequence a patch stands"),  # relative positions
        ("eva02", "depend on where in the sequence a patch stands"),  # rotary ones
    ],
)
def test_other_models_are_refused_with_the_reason(name, why):
    with pytest.raises(SpdfqError, match=rf"synthesis.pruning: \w+ .*{why}; leave \[synthesis.pruning\] out"):
        find_token_layout(teacher_of(name))


def test_a_model_that_cannot_be_pruned_is_refused_before_anything_runs():
    recipe = {"extends": ["quickstart"], "model": {"name": "bundled:swin_fmnist"}, "synthesis": {"pruning": {}}}
    with pytest.raises(SpdfqError, match=r"synthesis.pruning: bundled:swin_fmnist has no class token"):
        check(recipe)


@pytest.mark.parametrize(("wrong", "why"), [((), "ascending"), ((0, 5), "from 1 up"), ((5, 5), "ascending")])
def test_iterations_out_of_order_are_refused(wrong, why):
    with pytest.raises(ValueError, match=why):
        TokenPruning(at=wrong)
