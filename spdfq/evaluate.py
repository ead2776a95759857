"""Accuracy on labelled images, and agreement with the teacher."""

from pathlib import Path
from typing import Any

import torch
from attrs import frozen
from safetensors.torch import load_file
from torch import Tensor, nn

from spdfq.errors import DataError, NonFiniteError
from spdfq.files import write_tensors
from spdfq.models import Teacher, evaluation_mode
from spdfq.runtime import Runtime


@torch.no_grad()
def logits_over(model: nn.Module, teacher: Teacher, spec: Any, runtime: Runtime, label: str) -> tuple[Tensor, Tensor]:
    """Logits ``[n, K]`` and labels ``[n]`` on the CPU, in float32, over the whole dataset of an evaluation spec.

    The model is in evaluation mode meanwhile.

    Raises:
        DataError: there are no images, or their classes are not the model's.
        NonFiniteError: a logit is NaN or infinite.
    """
    _check_classes(spec.dataset.classes, teacher)
    if not (count := len(spec.dataset)):
        raise DataError("evaluation.dataset: holds no images")
    own = runtime.ranks.share([range(start, min(start + spec.batch, count)) for start in range(0, count, spec.batch)])
    indices = [index for batch in own for index in batch]
    found = []
    with evaluation_mode(model), runtime.progress(label, len(indices)) as advance:
        for images, target in spec.dataset.batches(teacher, spec.batch, indices) if indices else ():
            found.append((model(images.to(runtime.device)).float().cpu(), target))
            advance(len(target))
    logits, labels = _in_order(runtime.ranks.gathered((indices, found)))
    if wrong := int((~logits.isfinite()).any(1).sum()):
        raise NonFiniteError(f"{label}: the logits of {wrong} of {len(logits)} images are NaN or infinite")
    return logits, labels


def _in_order(shares: list[tuple[list[int], list[tuple[Tensor, Tensor]]]]) -> tuple[Tensor, Tensor]:
    """The ranks' logits and labels, in the dataset's order."""
    order = torch.tensor([index for indices, _ in shares for index in indices]).argsort()
    pairs = [pair for _, found in shares for pair in found]
    return torch.cat([logits for logits, _ in pairs])[order], torch.cat([labels for _, labels in pairs])[order]


def _check_classes(classes: int, teacher: Teacher) -> None:
    if not teacher.headless and classes != teacher.num_classes:
        raise DataError(
            f"evaluation.dataset: has {classes} classes, {teacher.name} knows {teacher.num_classes}; labels are "
            "positions in the list of classes, so both must have the same ones"
        )


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


@frozen(eq=False)
class Reference:
    """What the teacher says about the evaluation images.

    Args:
        logits: float32 ``[n, K]``.
        labels: ``[n]``.
    """

    logits: Tensor
    labels: Tensor

    def save(self, path: Path) -> None:
        """Write one safetensors file."""
        write_tensors(path, {"logits": self.logits, "labels": self.labels})

    @classmethod
    def load(cls, path: Path) -> "Reference":
        """Read what `save` wrote."""
        return cls(**load_file(path))


def reference(teacher: Teacher, spec: Any, runtime: Runtime) -> Reference:
    """The full-precision model's answers over an evaluation spec's dataset."""
    return Reference(*logits_over(teacher.module, teacher, spec, runtime, "full precision"))


def measure(model: nn.Module, teacher: Teacher, spec: Any, runtime: Runtime, fp: Reference) -> dict[str, Any]:
    """Accuracy of a quantized model beside the teacher's, in percent; simulated, since it was computed in float."""
    logits, labels = logits_over(model, teacher, spec, runtime, "quantized")
    return {
        "images": len(labels),
        "fp": accuracy(fp.logits, fp.labels),
        "quantized": accuracy(logits, labels),
        "agreement": agreement(logits, fp.logits),
        "simulated": True,
    }
