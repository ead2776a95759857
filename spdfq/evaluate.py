"""Accuracy on labelled images, and agreement with the teacher."""

from typing import Any

import torch
from torch import Tensor, nn

from spdfq.errors import DataError
from spdfq.models import Teacher
from spdfq.runtime import Runtime


@torch.no_grad()
def logits_over(model: nn.Module, teacher: Teacher, spec: Any, runtime: Runtime, label: str) -> tuple[Tensor, Tensor]:
    """Logits ``[n, K]`` and labels ``[n]`` on the CPU, in float32, over the whole dataset of an evaluation spec.

    Raises:
        DataError: there are no images.
    """
    outputs, labels = [], []
    with runtime.progress(label, len(spec.dataset)) as advance:
        for images, target in spec.dataset.batches(teacher, spec.batch):
            outputs.append(model(images.to(runtime.device)).float().cpu())
            labels.append(target)
            advance(len(target))
    if not outputs:
        raise DataError("evaluation.dataset: holds no images")
    return torch.cat(outputs), torch.cat(labels)


def accuracy(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Top-1 and top-5 in percent (top-5 is left out below six classes, where it says nothing)."""
    hits = {"top1": 100 * (logits.argmax(1) == labels).float().mean().item()}
    if logits.shape[1] > 5:
        hits["top5"] = 100 * (logits.topk(5).indices == labels[:, None]).any(1).float().mean().item()
    return hits


def agreement(logits: Tensor, reference: Tensor) -> float:
    """Share of images, in percent, on which both models name the same class first."""
    return 100 * (logits.argmax(1) == reference.argmax(1)).float().mean().item()
