"""Accuracy on labelled images, and agreement with the teacher."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spdfq.data.base import shortened
from spdfq.errors import DataError, NonFiniteError
from spdfq.evaluation.predictions import Finished, Predictions
from spdfq.runtime import Runtime
from spdfq.teacher import Teacher, evaluation_mode

Reference = Predictions


@torch.no_grad()
def logits_over(
    model: nn.Module, teacher: Teacher, spec: Any, runtime: Runtime, label: str, folder: Path | None = None
) -> Predictions:
    """What a model says about the whole dataset of an evaluation spec; it is in evaluation mode meanwhile.

    Args:
        model: takes what the teacher takes.
        teacher: says how images are prepared, and which classes there are.
        spec: the recipe's evaluation section.
        runtime: the device, the progress bar, and the ranks that share the batches.
        label: what the progress bar and errors call the model.
        folder: where finished batches are kept, so that a killed call can be taken up again.

    Raises:
        DataError: there are no images, none can be read, or their classes are not the model's.
        NonFiniteError: a logit is NaN or infinite.
    """
    if not teacher.headless:
        spec.dataset.check_classes(teacher)
    if not (count := len(spec.dataset)):
        raise DataError("evaluation.dataset: holds no images")
    ranks = runtime.ranks
    batches = {start: range(start, min(start + spec.batch, count)) for start in range(0, count, spec.batch)}
    finished = Finished.found(folder) if ranks.leads else Finished(folder)
    known = ranks.first(lambda: list(finished.batches))
    own = {start: batches[start] for start in ranks.share([start for start in batches if start not in known])}
    taken_up = sum(len(batches[start]) for start in finished.batches)
    with evaluation_mode(model), runtime.progress(label, taken_up + sum(map(len, own.values()))) as advance:
        if taken_up:
            advance(taken_up)
        for start, found in _batch_by_batch(model, teacher, spec, runtime.device, own):
            finished.add(start, found)
            advance(len(batches[start]))
    if ranks.count > 1:
        finished.save()  # the others may take long, and this process may be killed while it waits for them
    everything = {start: part for share in ranks.gathered(finished.batches) for start, part in share.items()}
    return _checked(Predictions.joined(everything[start] for start in batches), label, count)


def _batch_by_batch(
    model: nn.Module, teacher: Teacher, spec: Any, device: torch.device, own: dict[int, range]
) -> Iterator[tuple[int, Predictions]]:
    """The batches of this process, each with the position of its first image."""
    indices = [index for batch in own.values() for index in batch]
    found = spec.dataset.batches(teacher, spec.batch, indices) if indices else ()
    for start, (images, labels, damaged) in zip(own, found, strict=True):
        # not every model takes a batch of none
        logits = model(images.to(device)).float().cpu() if len(images) else torch.zeros(0, teacher.num_classes)
        yield start, Predictions(logits, labels, damaged)


def _checked(found: Predictions, label: str, count: int) -> Predictions:
    if not len(found.labels):
        raise DataError(f"evaluation.dataset: none of the {count} images can be read, the first is {found.damaged[0]}")
    if wrong := int((~found.logits.isfinite()).any(1).sum()):
        raise NonFiniteError(f"{label}: the logits of {wrong} of {len(found.labels)} images are NaN or infinite")
    return found


def accuracy(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Top-1 and top-5 in percent (top-5 is left out below six classes, where it says nothing)."""
    hits = {"top1": _percent(logits.argmax(1) == labels)}
    if logits.shape[1] > 5:
        hits["top5"] = _percent((logits.topk(5).indices == labels[:, None]).any(1))
    return hits


def agreement(logits: Tensor, reference: Tensor) -> float:
    """Share of images, in percent, on which both models name the same class first."""
    return _percent(logits.argmax(1) == reference.argmax(1))


def _percent(hits: Tensor) -> float:
    return 100 * int(hits.sum()) / len(hits)


def reference(teacher: Teacher, spec: Any, runtime: Runtime, folder: Path | None = None) -> Predictions:
    """What the full-precision model says about an evaluation spec's dataset; ``folder`` as in `logits_over`."""
    return logits_over(teacher.module, teacher, spec, runtime, "full precision", folder)


def measure(
    model: nn.Module, teacher: Teacher, spec: Any, runtime: Runtime, fp: Predictions, folder: Path | None = None
) -> dict[str, Any]:
    """Accuracy of a quantized model beside the teacher's, in percent; simulated, since it was computed in float.

    Both are measured on the same images: those that can be read.

    Raises:
        DataError: other images can be read now than when the teacher was measured.
    """
    found = logits_over(model, teacher, spec, runtime, "quantized", folder)
    refuse_changed(found.damaged, fp.damaged)
    return {
        "images": len(found.labels),
        "damaged": list(found.damaged),
        "fp": accuracy(fp.logits, fp.labels),
        "quantized": accuracy(found.logits, found.labels),
        "agreement": agreement(found.logits, fp.logits),
        "simulated": True,
    }


def refuse_changed(damaged: tuple[str, ...], before: tuple[str, ...]) -> None:
    """Raise a `DataError` where other images can be read now than before: the two could not be compared."""
    if changed := sorted(set(damaged) ^ set(before)):
        raise DataError(
            f"evaluation.dataset: {shortened(changed)} could be read for one of the two models and not for the other; "
            "look after the disk and measure both again, a run with --fresh"
        )


def left_out(damaged: tuple[str, ...]) -> str:
    """One line on images that cannot be read."""
    images, are = ("1 image", "is") if len(damaged) == 1 else (f"{len(damaged):,} images", "are")
    return f"{images} cannot be read and {are} left out: {shortened(damaged)}"
