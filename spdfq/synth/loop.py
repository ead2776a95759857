"""The optimisation loop of groups that share their forward passes: passes, losses, steps and checks; resumable."""

import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from spdfq.attention import CLASS_ATTENTION, AttentionRecord
from spdfq.losses.base import LossInputs
from spdfq.runtime import Advance
from spdfq.synth.base import SyntheticImages
from spdfq.synth.group import Group, Views

# interval in iterations; reading losses back makes an accelerator wait
CHECK_EVERY = 10
# for each group of a pass
SAVE_SECONDS = 5.0
# a student is stored with its moments: three times the size of the teacher's weights
SAVE_SECONDS_STUDENT = 60.0


def run(groups: Sequence[Group], advance: Advance, folder: Path | None = None) -> list[SyntheticImages]:
    """Run the iterations that remain, and return the result of each group.

    Groups whose state files are behind the others' catch up first.

    Args:
        groups: of one synthesis.
        advance: reports progress.
        folder: where states are stored, and where earlier ones are looked for.

    Raises:
        NonFiniteError: a loss or a gradient; nothing computed from it is stored.
        DataError: a state found in ``folder`` is damaged.
    """
    paths = {group: folder / f"group-{group.index:05d}.safetensors" for group in groups} if folder else {}
    for group, path in paths.items():
        if path.exists():
            group.state.restore(path)
            advance(group.state.iteration)
    ends = sorted({group.state.iteration for group in groups} | {groups[0].spec.iterations})
    for end in ends:
        if behind := [group for group in groups if group.state.iteration < end]:
            _run_until(end, behind, advance, paths)
    return [group.result() for group in groups]


def _run_until(end: int, groups: Sequence[Group], advance: Advance, paths: dict[Group, Path]) -> None:
    """Run groups that are in the same iteration until another one; save them now and then, and at the end."""
    pause = len(groups) * (SAVE_SECONDS_STUDENT if groups[0].trainer else SAVE_SECONDS)
    start = iteration = checked = groups[0].state.iteration
    saved = time.monotonic()
    while iteration < end:
        if iteration not in groups[0].ahead:
            for group in groups:
                group.draw_ahead(range(iteration, min(_next_check(iteration, start), end)))
        step(groups, iteration)
        iteration += 1
        for group in groups:
            group.state.iteration = iteration
        to_save = iteration == end or time.monotonic() - saved >= pause
        if to_save or iteration % CHECK_EVERY == 0:
            for group in groups:
                group.check_finite(checked)
            for group in groups if to_save and paths else ():
                group.state.save(paths[group])
            advance((iteration - checked) * len(groups), **groups[0].latest())
            checked, saved = iteration, time.monotonic() if to_save else saved


def _next_check(iteration: int, start: int) -> int:
    """Until where to draw ahead: to the next check, but only after the first iteration, which shows what is drawn."""
    return iteration + 1 if iteration == start else (iteration // CHECK_EVERY + 1) * CHECK_EVERY


def step(groups: Sequence[Group], iteration: int) -> None:
    """Run one iteration of all groups. On an accelerator this queues work and does not wait for it.

    The teacher sees the images and crops of all groups together. No image sees another group's, so the gradient of the
    sum of the groups' losses is each group's own. Only the first iteration copies something to the device, and those in
    which the student's ranges are chosen.
    """
    prune(groups, iteration)
    terms = [group.terms(inputs) for group, inputs in zip(groups, forward(groups, iteration), strict=True)]
    images = [group.state.images for group in groups]
    compared = [group.state.loss_weights.compared(own, iteration) for group, own in zip(groups, terms, strict=True)]
    for index, losses in enumerate(zip(*compared, strict=True)):
        gradients = torch.autograd.grad(torch.stack(losses).sum(), images, retain_graph=True)
        for group, gradient in zip(groups, gradients, strict=True):
            group.state.loss_weights.observe(index, gradient)
    totals = [group.total(own) for group, own in zip(groups, terms, strict=True)]
    gradients = torch.autograd.grad(torch.stack(totals).sum(), images)
    for group, own, total, gradient in zip(groups, terms, totals, gradients, strict=True):
        group.update(iteration, own, total, gradient)


def forward(groups: Sequence[Group], iteration: int) -> list[LossInputs]:
    """Pass the views of all groups through the teacher; the inputs of each group's losses."""
    views = [group.views(iteration) for group in groups]
    passed = zip(groups, views, _passed(groups, views), strict=True)
    return [group.inputs(shown, logits, record, iteration) for group, shown, (logits, record) in passed]


def _passed(groups: Sequence[Group], views: Sequence[Views]) -> list[tuple[Tensor, AttentionRecord]]:
    """The logits and the record of each group."""
    images, counts = [each.images for each in views], [group.count for group in groups]
    crops = [each.crops for each in views if each.crops is not None]
    tokens = [each.tokens for each in views if each.tokens is not None]
    logits, record = groups[0].passes.recorded(images, crops, groups[0].spec.needs, tokens)
    if len(groups) == 1:
        return [(logits, record)]
    whole, parts = logits.split([sum(counts), len(logits) - sum(counts)])
    of_crops = iter(parts.split([len(each) for each in crops]) if crops else ())
    joined = [
        own if each.crops is None else torch.cat([own, next(of_crops)])
        for own, each in zip(whole.split(counts), views, strict=True)
    ]
    return list(zip(joined, record.split(counts), strict=True))


@torch.no_grad()
def prune(groups: Sequence[Group], iteration: int) -> None:
    """If pruning is due, leave out the patches that the images, without augmentations, need least."""
    pruners = [group.pruner for group in groups if group.pruner and group.pruner.due(iteration)]
    if not pruners:
        return
    left = [pruner.tokens(iteration - 1, (), groups[0].size) for pruner in pruners]
    tokens = [each for each in left if each is not None]
    images = [group.state.images for group in groups]
    _, record = groups[0].passes.recorded(images, [], frozenset({CLASS_ATTENTION}), tokens)
    for pruner, own in zip(pruners, record.split([group.count for group in groups]), strict=True):
        pruner.prune(pruner.layout.scores(own), iteration)
