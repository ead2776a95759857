"""Accuracy on labelled images, and agreement with the teacher."""

from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from attrs import evolve
from torch import Tensor, nn

from spdfq.data.classes import shortened
from spdfq.errors import DataError, NonFiniteError, RecipeError
from spdfq.evaluation.correctness import images_digest, packed
from spdfq.evaluation.predictions import FinishedBatches, Predictions
from spdfq.runtime import Runtime
from spdfq.teacher import Teacher, evaluation_mode

ENOUGH_PER_CLASS = 5
_GAIN, _OWN = 30, 0.9


def logits_over(
    model: nn.Module, teacher: Teacher, spec: Any, runtime: Runtime, label: str, folder: Path | None = None
) -> Predictions:
    """Run a model on every image of an evaluation spec's dataset. The model is in evaluation mode while it runs.

    Args:
        model: takes the same images as the teacher.
        teacher: defines how images are prepared and which classes there are.
        spec: the recipe's evaluation section.
        runtime: the device, the progress bar, and the ranks that share the batches.
        label: the model's name on the progress bar and in errors.
        folder: where finished batches are stored, so that an interrupted call can be resumed.

    Raises:
        DataError: there are no images, no image can be read, or the dataset's classes are not the model's.
        NonFiniteError: a logit is NaN or infinite.
    """
    if not teacher.headless:
        spec.dataset.check_classes(teacher)
    if not (count := len(spec.dataset)):
        raise DataError("evaluation.dataset: holds no images")
    ranks = runtime.ranks
    batches = {start: range(start, min(start + spec.batch, count)) for start in range(0, count, spec.batch)}
    finished = FinishedBatches.found(folder) if ranks.leads else FinishedBatches(folder)
    known = ranks.first(lambda: list(finished.batches))
    own = {start: batches[start] for start in ranks.share([start for start in batches if start not in known])}
    resumed = sum(len(batches[start]) for start in finished.batches)
    progress = runtime.progress(label, resumed + sum(map(len, own.values())))
    at_precision = evolve(runtime, precision=spec.precision).autocast()
    with runtime.own_modes(), torch.no_grad(), at_precision, evaluation_mode(model), progress as advance:
        if resumed:
            advance(resumed)
        for start, found in _batch_by_batch(model, teacher, spec, runtime.device, own):
            finished.add(start, found)
            advance(len(batches[start]))
    if ranks.count > 1:
        finished.save()  # this process may be killed while it waits for slower ranks
    everything = {start: part for share in ranks.gathered(finished.batches) for start, part in share.items()}
    return _checked(Predictions.joined(everything[start] for start in batches), label)


def _batch_by_batch(
    model: nn.Module, teacher: Teacher, spec: Any, device: torch.device, own: dict[int, range]
) -> Iterator[tuple[int, Predictions]]:
    """Predictions for this process's batches, each with the position of its first image.

    An accelerator computes the logits of a batch while the next one is read from the disk and copied.
    """
    indices = [index for batch in own.values() for index in batch]
    found = spec.dataset.batches(teacher, spec.batch, indices) if indices else ()
    ahead = 0 if device.type == "cpu" else 1
    queued: deque[tuple[int, Predictions]] = deque()
    for start, (images, labels, damaged) in zip(own, found, strict=True):
        # some models fail on an empty batch
        logits = model(_moved(images, device)).float() if len(images) else images.new_zeros(0, teacher.num_classes)
        queued.append((start, Predictions(logits, labels, damaged)))
        if len(queued) > ahead:
            yield _finished(*queued.popleft())
    yield from (_finished(*each) for each in queued)


def _moved(images: Tensor, device: torch.device) -> Tensor:
    """The images on a device; from pinned memory the copy is made without waiting for it."""
    if device.type != "cuda":
        return images.to(device)
    return images.pin_memory().to(device, non_blocking=True)


def _finished(start: int, found: Predictions) -> tuple[int, Predictions]:
    return start, evolve(found, logits=found.logits.cpu())


def _checked(found: Predictions, label: str) -> Predictions:
    if not len(found.labels):
        raise DataError(none_readable(found.damaged))
    if wrong := int((~found.logits.isfinite()).any(1).sum()):
        raise NonFiniteError(f"{label}: the logits of {wrong} of {len(found.labels)} images are NaN or infinite")
    return found


def accuracy(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Top-1 and top-5 accuracy in percent. Top-5 is left out for five classes or fewer, where it is always 100.

    Args:
        logits: ``[n, K]``.
        labels: int64 ``[n]``.
    """
    hits = {"top1": _percent(logits.argmax(1) == labels)}
    if logits.shape[1] > 5:
        hits["top5"] = _percent((logits.topk(5).indices == labels[:, None]).any(1))
    return hits


def renamed(logits: Tensor, labels: Tensor) -> tuple[float, float]:
    """How well predictions would fit if each class had the index that the model predicts most often for it.

    Returns:
        Top-1 in percent, and the share of the classes that would have an index of their own.
    """
    classes = logits.shape[1]
    pairs, counts = (labels * classes + logits.argmax(1)).unique(return_counts=True)
    most = counts.new_zeros(classes).scatter_reduce(0, pairs // classes, counts, "amax")
    top = pairs[counts == most[pairs // classes]]
    indices = dict(zip((top // classes).tolist(), (top % classes).tolist(), strict=True))  # one for each class
    return 100 * int(most.sum()) / len(labels), len(set(indices.values())) / len(indices)


def another_order(logits: Tensor, labels: Tensor) -> str | None:
    """A line if the predictions show that the labels have another order than the model's classes.

    Top-1 would rise by more than 30 points with each class at the index that the model predicts most often for it, and
    9 of 10 classes would have an index of their own. Nothing is said for fewer than 5 images for each class on average.

    Args:
        logits: ``[n, K]``.
        labels: int64 ``[n]``.
    """
    if len(labels) < ENOUGH_PER_CLASS * logits.shape[1]:
        return None
    here, (there, own) = accuracy(logits, labels)["top1"], renamed(logits, labels)
    if there - here <= _GAIN or own < _OWN:
        return None
    return (
        f"evaluation.dataset: top-1 is {here:.2f} %, but would be {there:.2f} % if each class had the index that the "
        "model predicts most often for it; the classes are in a different order than the model's"
    )


def agreement(logits: Tensor, reference: Tensor) -> float:
    """Percentage of images for which two models predict the same class; both logits are ``[n, K]``."""
    return _percent(logits.argmax(1) == reference.argmax(1))


def _percent(hits: Tensor) -> float:
    return 100 * int(hits.sum()) / len(hits)


class LogitsEvaluator:
    """Evaluates a model with a classification head: top-1, top-5 and agreement with the teacher."""

    def check(self, spec: Any, teacher: Teacher) -> None:
        """Check that an evaluation spec fits the teacher.

        Raises:
            RecipeError: the spec has a bank, which only a model without a head uses.
        """
        if spec.bank is not None:
            raise RecipeError([f"evaluation.bank: is for models without a head, {teacher.name} has one; leave it out"])

    def reference(self, teacher: Teacher, spec: Any, runtime: Runtime, folder: Path | None = None) -> Predictions:
        """The full-precision model's predictions; ``folder`` and errors as in `logits_over`."""
        return logits_over(teacher.module, teacher, spec, runtime, "full precision", folder)

    def load_reference(self, path: Path) -> Predictions:
        """Read a reference that was written with its ``save`` method."""
        return Predictions.load(path)

    def measure(
        self, model: nn.Module, teacher: Teacher, spec: Any, runtime: Runtime, fp: Any, folder: Path | None = None
    ) -> dict[str, Any]:
        """Accuracy of a quantized model and of the teacher, in percent, on the images that can be read.

        ``simulated`` is true because the quantized model computes in float. ``correct`` has one bit for each image and
        model (see `spdfq.evaluation.correctness`), ``test_images`` is a hash of the images, and ``precision`` that of
        the forward passes.

        Args:
            model: the quantized model.
            teacher: as in `logits_over`.
            spec: as in `logits_over`.
            runtime: as in `logits_over`.
            fp: the teacher's predictions, from `reference`.
            folder: as in `logits_over`.

        Raises:
            DataError: the images that can be read have changed since the teacher was measured.
        """
        found = logits_over(model, teacher, spec, runtime, "quantized", folder)
        check_same_images(found.damaged, fp.damaged)
        return {
            "images": len(found.labels),
            "test_images": images_digest(spec.dataset, found.labels, found.damaged),
            "damaged": list(found.damaged),
            "fp": accuracy(fp.logits, fp.labels),
            "quantized": accuracy(found.logits, found.labels),
            "agreement": agreement(found.logits, fp.logits),
            "simulated": True,
            "precision": spec.precision,
            "correct": {
                "fp": packed(fp.logits, fp.labels),
                "quantized": packed(found.logits, found.labels),
            },
        }


def check_same_images(damaged: tuple[str, ...], before: tuple[str, ...], key: str = "evaluation.dataset") -> None:
    """Check that two models were measured on the same images.

    Args:
        damaged: the images that could not be read for one model.
        before: the same for the other model.
        key: of the images in a recipe.

    Raises:
        DataError: an image could be read for only one of the two models, so their accuracies cannot be compared.
    """
    if changed := sorted(set(damaged) ^ set(before)):
        raise DataError(
            f"{key}: {shortened(changed)} could be read for only one of the two models; check the disk, "
            "then measure both models again (spdfq run with --fresh)"
        )


def none_readable(damaged: Sequence[str]) -> str:
    """One line about evaluation images of which none can be read."""
    return f"evaluation.dataset: none of the {len(damaged)} images can be read, the first is {damaged[0]}"


def left_out(damaged: tuple[str, ...]) -> str:
    """One line about images that cannot be read."""
    images, are = ("1 image", "is") if len(damaged) == 1 else (f"{len(damaged):,} images", "are")
    return f"{images} cannot be read and {are} left out: {shortened(damaged)}"
