"""The synthesis loop: range of the pixels, automatic weights, augmentations, and results."""

import pytest
import torch
from attrs import evolve
from support.teachers import BLOCKS, CLASSES, GRID, HEADS, RUNTIME, SIDE, Acting, recipe, tiny_teacher
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from spdfq.attention import record_attention
from spdfq.losses import (
    AttentionPriorLoss,
    CrossEntropyLoss,
    GaussianMixturePrior,
    SoftCrossEntropyLoss,
    TotalVariationLoss,
)
from spdfq.losses.attention_maps import tile
from spdfq.losses.functional import attention_prior_loss, soft_cross_entropy
from spdfq.synth import (
    Adam,
    Augmentation,
    Constant,
    Flip,
    Jitter,
    Move,
    MultiSemanticSampler,
    NoTarget,
    OptimizedImages,
    Optimizer,
    SoftLabelTarget,
    WholeImageSampler,
)
from spdfq.synth.group import Group
from spdfq.synth.group_state import BALANCE_ITERATIONS, LossWeights
from spdfq.synth.loop import forward, step
from spdfq.teacher import Teacher

# what an iteration does


@pytest.mark.parametrize("std", [(0.2, 0.3, 0.25), (0.5, 0.5, 0.5)])
def test_pixels_end_in_the_valid_range_of_their_own_model(std):
    teacher = tiny_teacher(mean=(0.5, 0.4, 0.3), std=std)
    images = recipe(optimizer=Adam(lr=5.0), schedule=Constant()).synthesize(teacher, RUNTIME).images
    pixels = images * torch.tensor(std).view(3, 1, 1) + torch.tensor((0.5, 0.4, 0.3)).view(3, 1, 1)
    assert pixels.amin((0, 2, 3)).tolist() == pytest.approx([0, 0, 0], abs=1e-6)
    assert pixels.amax((0, 2, 3)).tolist() == pytest.approx([1, 1, 1], abs=1e-6)


def test_an_automatic_weight_without_a_gradient_is_zero():
    weights = LossWeights({"prior": AttentionPriorLoss(weight="auto"), "label": SoftCrossEntropyLoss()})
    weights.norms = torch.tensor([3.0, 0.0])
    assert weights.weight("prior") == 0.0
    weights.norms = torch.tensor([3.0, 2.0])
    assert weights.weight("prior") == 1.5


def test_an_automatic_weight_is_the_ratio_of_mean_gradient_norms_and_fixed_after_ten_iterations():
    teacher = tiny_teacher()
    losses = {"prior": AttentionPriorLoss(weight="auto", scale="sum"), "label": SoftCrossEntropyLoss(weight=2.0)}
    spec = OptimizedImages(images=3, iterations=13, losses=losses, target=SoftLabelTarget())
    drawn = [
        GaussianMixturePrior()
        .sample(3 * HEADS, GRID, RUNTIME.generator("group", 0, "prior", "prior", block))
        .view(3, HEADS, -1)
        for block in range(BLOCKS)
    ]
    label_norm, prior_norm, weights = 0.0, 0.0, []
    with teacher.frozen() as module:
        group = Group(spec, teacher, RUNTIME, 0, 3)
        for iteration in range(13):
            images = group.state.images.detach().clone().requires_grad_()
            with record_attention(module) as record:
                label = 2.0 * soft_cross_entropy(module(images), group.targets[:3])
            prior = attention_prior_loss(record.class_attention, drawn, BLOCKS // 2)
            gradients = [torch.autograd.grad(term, images, retain_graph=True)[0] for term in (label, prior)]
            if iteration < BALANCE_ITERATIONS:
                label_norm, prior_norm = (
                    label_norm + gradients[0].norm().item(),
                    prior_norm + gradients[1].norm().item(),
                )
            step([group], iteration)
            weights.append(float(group.state.loss_weights.weight("prior")))
            assert weights[-1] == pytest.approx(label_norm / prior_norm, rel=1e-4)
            combined = gradients[0] + weights[-1] * gradients[1]
            values = torch.stack([prior, label / 2, label + weights[-1] * prior, combined.norm()])
            assert torch.allclose(group.state.curve[iteration], values, rtol=1e-4)
    assert len(set(weights[BALANCE_ITERATIONS - 1 :])) == 1
    assert len(set(weights)) == BALANCE_ITERATIONS


def test_each_automatic_loss_is_balanced_by_itself_against_all_label_losses():
    losses = {
        "near": AttentionPriorLoss(weight="auto"),
        "smooth": TotalVariationLoss(weight="auto"),
        "soft": SoftCrossEntropyLoss(),
        "hard": CrossEntropyLoss(weight=0.5),
    }
    teacher = tiny_teacher()
    with teacher.frozen():
        group = Group(recipe(losses=losses), teacher, RUNTIME, 0, 2)
        inputs = forward([group], 0)[0]
        terms = {name: loss(inputs.scoped(name)) for name, loss in losses.items()}
        gradient = {
            name: torch.autograd.grad(term, group.state.images, retain_graph=True)[0] for name, term in terms.items()
        }
        step([group], 0)
    label = (gradient["soft"] + 0.5 * gradient["hard"]).norm().item()
    for name in ("near", "smooth"):
        expected = pytest.approx(label / gradient[name].norm().item(), rel=1e-4)
        assert group.state.loss_weights.weight(name) == expected


def test_losses_see_the_moved_images_and_maps_that_moved_along():
    seen = []
    spec = recipe(losses={**recipe().losses, "spy": Acting(act=seen.append, at=0)})
    teacher = tiny_teacher()
    moves = set()
    marked = torch.arange(SIDE * SIDE).view(1, 1, SIDE, SIDE).float().repeat(2, 1, 1, 1)  # a token for each pixel
    with teacher.frozen():
        group = Group(spec, teacher, RUNTIME, 0, 2)
        for iteration in range(12):
            before = group.state.images.detach().clone()
            spec.losses["spy"].calls = 0
            step([group], iteration)
            inputs = seen.pop()
            order = inputs.follow(marked).long().flatten(1)[0]
            assert torch.equal(inputs.images.flatten(2), before.flatten(2)[..., order])
            assert inputs.originals is group.state.images
            moves.add(tuple(order.tolist()))
            assert len(inputs.attention.class_attention[0]) == 2  # crops are not recorded
            with torch.no_grad():  # the crops stay as they are
                crops = teacher.module(group.plan.views(before, (SIDE, SIDE)))
            assert torch.allclose(inputs.logits, torch.cat([teacher.module(inputs.images), crops]), atol=1e-5)
    assert len(moves) > 6


def test_views_are_the_images_and_then_their_crops_each_with_its_classes_and_share():
    group = Group(recipe(), tiny_teacher(), RUNTIME, 0, 6)
    inputs, plan = forward([group], 0)[0], group.plan
    assert inputs.view_weights[:6].tolist() == pytest.approx([1 / 6] * 6)
    for image in range(6):
        crops = inputs.view_weights[6:][plan.owners == image]
        assert crops.tolist() == pytest.approx([1 / 6 / len(crops)] * len(crops))
        shown = plan.labels[plan.owners == image]
        assert inputs.labels[image].nonzero().flatten().tolist() == shown.unique().tolist()
        assert inputs.targets[image].argmax() in shown
    assert torch.equal(inputs.labels[6:].nonzero()[:, 1], plan.labels)
    assert torch.equal(inputs.targets[6:].argmax(1), plan.labels)


def test_crops_that_are_not_due_are_not_forwarded():
    group = Group(recipe(sampler=MultiSemanticSampler(every=2)), tiny_teacher(), RUNTIME, 0, 2)
    sizes = [len(forward([group], iteration)[0].targets) for iteration in range(4)]
    assert sizes == [2 + len(group.plan.boxes), 2] * 2


def test_crops_are_redrawn_every_so_many_iterations_independently_of_earlier_draws():
    spec = recipe(sampler=MultiSemanticSampler(redraw=2))
    group = Group(spec, tiny_teacher(), RUNTIME, 0, 4)
    boxes = []
    for iteration in range(6):
        forward([group], iteration)[0]
        boxes.append(group.plan.boxes)
    assert all(torch.equal(boxes[first], boxes[first + 1]) for first in (0, 2, 4))
    assert not torch.equal(boxes[0], boxes[2])
    assert not torch.equal(boxes[2], boxes[4])
    resumed = Group(spec, tiny_teacher(), RUNTIME, 0, 4)
    forward([resumed], 5)[0]
    assert torch.equal(resumed.plan.boxes, boxes[5])
    result = spec.synthesize(tiny_teacher(), RUNTIME)
    assert not torch.equal(result.boxes, group.plan.boxes), "those of the last iteration are shown"


def test_the_prior_follows_roll_and_flip():
    # with moves of whole patches, alignment to a prior that follows is alignment of the unmoved image
    class Still(nn.Module):
        """Attention that depends on a patch's own pixels alone, so that it moves with the image."""

        def __init__(self):
            super().__init__()
            self.cls_token, self.patch_embed = nn.Parameter(torch.ones(1)), nn.Identity()
            self.weight = nn.Parameter(torch.ones(CLASSES))

        def forward(self, images):
            keys = images.unfold(2, 4, 4).unfold(3, 4, 4).mean((1, 4, 5)).flatten(1)[:, None, :, None]
            keys = torch.cat([torch.zeros_like(keys[:, :, :1]), keys], 2)
            out = nn.functional.scaled_dot_product_attention(torch.ones_like(keys), keys, keys)
            return out.sum((1, 2)) * self.weight

    still = evolve(tiny_teacher(), module=Still())
    losses = {"prior": AttentionPriorLoss(blocks="all", prior=GaussianMixturePrior(1)), "label": CrossEntropyLoss()}
    spec = recipe(losses=losses, augmentations=(Jitter(pixels=3), Flip(), PatchRoll()))
    with still.frozen():
        values = []
        for augmentations in ((), (PatchRoll(), Flip(probability=1.0))):
            group = Group(evolve(spec, augmentations=augmentations), still, RUNTIME, 0, 2)
            values.append(losses["prior"](forward([group], 0)[0].scoped("prior")).item())
        unfollowed = AttentionPriorLoss(blocks="all", prior=GaussianMixturePrior(1), follow=False)
        stayed = unfollowed(forward([group], 0)[0].scoped("prior")).item()
    assert values[1] == pytest.approx(values[0], rel=1e-5)
    assert stayed != pytest.approx(values[0], rel=1e-2)


class PatchRoll(Augmentation):
    """One patch down and two to the right."""

    def draw(self, generator, moment):
        return Move(shift=(4, 8))


class Operators(TorchDispatchMode):
    """Names of the operators that run, and dtypes of the tensors whose value is read."""

    def __init__(self):
        super().__init__()
        self.names, self.read = [], set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        if self.names[-1] == "_local_scalar_dense":
            self.read.add(args[0].dtype)
        return func(*args, **(kwargs or {}))


class GradientDescent(Optimizer):
    """Unlike Adam, it has no step counter that is read in every step."""

    def build(self, images):
        return torch.optim.SGD([images], lr=self.lr, foreach=False)


def test_an_iteration_runs_as_many_operators_for_many_images_and_reads_no_value_back():
    teacher, ran = tiny_teacher(), []
    spec = recipe(augmentations=(), optimizer=GradientDescent())
    with teacher.frozen():
        for images in (2, 16):
            group = Group(spec, teacher, RUNTIME, 0, images)
            for iteration in range(BALANCE_ITERATIONS):
                step([group], iteration)
            with Operators() as operators:
                step([group], BALANCE_ITERATIONS)
            ran.append(operators.names)
            assert not operators.read  # an accelerator would have to be waited for
    assert len(ran[0]) > 100
    assert ran[0] == ran[1]


def test_a_windowed_model_has_a_prior_for_each_window():
    from timm.models.swin_transformer import SwinTransformer

    sizes = {"img_size": (16, 32), "patch_size": 2, "window_size": 4, "num_classes": CLASSES}
    module = SwinTransformer(**sizes, embed_dim=16, depths=(2, 2), num_heads=(2, 2)).eval()
    teacher = Teacher(module, mean=[0.5] * 3, std=[0.5] * 3, num_classes=CLASSES, input_size=(3, 16, 32))
    losses = {"prior": AttentionPriorLoss(blocks="all", weight="auto"), "label": SoftCrossEntropyLoss()}
    result = recipe(losses=losses, iterations=2).synthesize(teacher, RUNTIME)
    assert result.prior.shape == result.reached.shape == (2, 4, 8, 16)
    for block, window in ((0, 4), (1, 4), (2, 8), (3, 8)):  # the second stage's tokens are shown twice as large
        windows = result.prior[:, block].unfold(1, window, window).unfold(2, window, window)
        assert torch.allclose(windows.sum((-1, -2)), torch.full(windows.shape[:3], (window / 4) ** 2))
    assert len(result.prior[:, 0].unfold(1, 4, 4).unfold(2, 4, 4).reshape(-1, 16).unique(dim=0)) == 2 * 8


# without labels


def test_images_without_a_target_have_no_labels():
    seen = []
    losses = {"total_variation": TotalVariationLoss(weight=0.05), "spy": Acting(act=seen.append, at=0)}
    spec = recipe(losses=losses, target=NoTarget(), sampler=WholeImageSampler(), group=3, iterations=2)
    result = spec.synthesize(tiny_teacher(), RUNTIME)
    assert result.images.shape == (3, 3, SIDE, SIDE)
    assert result.labels.numel() == result.owners.numel() == result.boxes.numel() == 0
    assert (seen[0].targets, seen[0].labels) == (None, None)


# results


def test_the_first_loss_falls_and_attention_gets_closer_to_its_prior():
    result = recipe(iterations=60, augmentations=()).synthesize(tiny_teacher(), RUNTIME)
    named = dict(zip(result.columns, result.curves.mean(0).T, strict=True))
    for name in ("attention_prior", "soft_cross_entropy", "total_variation"):
        assert named[name][-5:].mean() < 0.9 * named[name][:5].mean()


def test_the_result_shows_the_prior_beside_the_attention_that_was_reached():
    teacher = tiny_teacher()
    result = recipe().synthesize(teacher, RUNTIME)
    assert result.first_block == BLOCKS // 2
    assert result.prior.shape == result.reached.shape == (2, BLOCKS - BLOCKS // 2, *GRID)
    assert torch.allclose(result.prior.sum((2, 3)), torch.ones(2, 1))
    with teacher.frozen() as module, record_attention(module) as record:
        module(result.images[:2])
    assert torch.allclose(result.reached[:, 0].flatten(1), record.class_attention[1][:, 0], atol=1e-5)


@pytest.mark.parametrize(("rows", "columns"), [(2, 3), (1, 1), (4, 1)])
def test_windows_are_put_side_by_side(rows, columns):
    maps = torch.arange(2 * rows * 3 * columns * 5.0).view(2, rows * 3, columns * 5)
    windows = maps.view(2, rows, 3, columns, 5).transpose(2, 3).reshape(-1, 15)
    images = torch.zeros(2, 1, rows * 3 * 4, columns * 5 * 4)
    assert torch.equal(tile(windows, (3, 5), images), maps)
