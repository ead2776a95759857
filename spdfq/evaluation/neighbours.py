"""Models without a head: what the nearest neighbours of their features say, and how close those stay to the teacher's.

The counterpart of `spdfq.evaluation.accuracy`, with the same functions.
"""

import json
from pathlib import Path
from typing import Any

import attrs
import torch
import torch.nn.functional as F
from attrs import frozen
from torch import Tensor, nn

from spdfq.errors import DataError, ModelError, RecipeError
from spdfq.evaluation.accuracy import accuracy, agreement, logits_over, refuse_changed
from spdfq.runtime import Runtime
from spdfq.runtime.files import read_tensors, write_tensors
from spdfq.teacher import Teacher

NEIGHBOURS = 20
_TEMPERATURE = 0.07
# similarities held at a time
_CHUNK = 2**24


def nearest_neighbours(queries: Tensor, bank: Tensor, labels: Tensor, classes: int) -> Tensor:
    """How the 20 nearest features of a bank vote, as in DINO (arXiv 2104.14294): each weighs ``exp(cosine / 0.07)``.

    Args:
        queries: ``[n, D]``.
        bank: ``[m, D]``, m at least 20.
        labels: ``[m]`` classes of the bank.
        classes: how many there are.

    Returns:
        ``[n, classes]`` sums of weights, in the place of logits.
    """
    bank, votes = F.normalize(bank, dim=-1), []
    for part in F.normalize(queries, dim=-1).split(max(1, _CHUNK // len(bank))):
        cosine, nearest = (part @ bank.mT).topk(NEIGHBOURS)
        empty = torch.zeros(len(part), classes)
        votes.append(empty.scatter_add_(1, labels[nearest], (cosine / _TEMPERATURE).exp()))
    return torch.cat(votes)


def similarity(features: Tensor, reference: Tensor) -> float:
    """Mean cosine of the features ``[n, D]`` of two models for the same images."""
    return float(F.cosine_similarity(features, reference).mean())


@frozen(eq=False)
class Reference:
    """What the teacher says about the evaluation images.

    Args:
        features: float32 ``[n, D]``.
        logits: votes of their nearest neighbours, ``[n, K]``.
        labels: ``[n]``.
        damaged: names of the images that cannot be read; they are not among the ``n``.
    """

    features: Tensor
    logits: Tensor
    labels: Tensor
    damaged: tuple[str, ...] = ()

    def save(self, path: Path) -> None:
        """Write one safetensors file."""
        tensors = {"features": self.features, "logits": self.logits, "labels": self.labels}
        write_tensors(path, tensors, {"damaged": json.dumps(self.damaged)})

    @classmethod
    def load(cls, path: Path) -> "Reference":
        """Read what `save` wrote.

        Raises:
            DataError: the file is damaged or missing.
        """
        tensors, metadata = read_tensors(path, "delete it, or use --fresh")
        return cls(**tensors, damaged=tuple(json.loads(metadata["damaged"])))


def check(spec: Any, teacher: Teacher) -> None:
    """Whether an evaluation spec fits the teacher: a bank of labelled images is what a model without a head needs.

    Raises:
        RecipeError: it does not.
    """
    if not teacher.headless and spec.bank is not None:
        raise RecipeError([f"evaluation.bank: is for models without a head, {teacher.name} has one; leave it out"])
    if teacher.headless and spec.bank is None:
        raise RecipeError(
            [
                f"evaluation.bank: is required, as {teacher.name} has no head and is measured by nearest neighbours; "
                "give other labelled images, for example bank = { type = 'image_folder', root = 'path/to/train' }"
            ]
        )
    if teacher.headless and spec.bank == spec.dataset:
        raise RecipeError(
            ["evaluation.bank: is evaluation.dataset itself, so every image would be its own nearest neighbour"]
        )


def reference(teacher: Teacher, spec: Any, runtime: Runtime, folder: Path | None = None) -> Reference:
    """The full-precision model's features over an evaluation spec's dataset, and their neighbours in its bank.

    Finished batches are kept in ``folder``, so that a killed call can be taken up again.

    Raises:
        DataError: an image is in both, or their classes are not the same.
    """
    if None not in (spec.bank.classes, spec.dataset.classes) and spec.bank.classes != spec.dataset.classes:
        raise DataError(
            f"evaluation.bank: has {spec.bank.classes} classes, evaluation.dataset {spec.dataset.classes}; labels are "
            "positions in the list of classes, so both must have the same ones"
        )
    for index, (ours, theirs) in enumerate(zip(spec.bank.class_names, spec.dataset.class_names, strict=False)):
        if ours != theirs:
            raise DataError(
                f"evaluation.bank: class {index} is {ours}, in evaluation.dataset {theirs}; labels are positions "
                "in the list of classes, so both must have the same ones, a class without images as an empty folder"
            )
    if shared := set(spec.bank.identities()) & set(spec.dataset.identities()):
        raise DataError(
            f"evaluation.bank: holds {len(shared):,} images of evaluation.dataset, the first of them {min(shared)}; "
            "each would be its own nearest neighbour, so give other images"
        )
    return _answers(teacher.module, teacher, spec, runtime, "full precision", folder)


def measure(
    model: nn.Module, teacher: Teacher, spec: Any, runtime: Runtime, fp: Reference, folder: Path | None = None
) -> dict[str, Any]:
    """k-NN accuracy of a quantized model beside the teacher's, in percent, each with a bank of its own features.

    ``similarity`` is the mean cosine of its features to the teacher's. Simulated, since it was computed in float.
    """
    found = _answers(model, teacher, spec, runtime, "quantized", folder)
    refuse_changed(found.damaged, fp.damaged)
    return {
        "measure": "k-NN top-1",
        "images": len(found.labels),
        "damaged": list(found.damaged),
        "bank": len(spec.bank),
        "fp": {"top1": accuracy(fp.logits, fp.labels)["top1"]},
        "quantized": {"top1": accuracy(found.logits, found.labels)["top1"]},
        "agreement": agreement(found.logits, fp.logits),
        "similarity": similarity(found.features, fp.features),
        "simulated": True,
    }


def _answers(
    model: nn.Module, teacher: Teacher, spec: Any, runtime: Runtime, label: str, folder: Path | None
) -> Reference:
    banked = attrs.evolve(spec, dataset=spec.bank)
    bank = logits_over(model, teacher, banked, runtime, f"{label}, bank", folder and folder / "bank")
    if len(bank.labels) < NEIGHBOURS:
        raise DataError(f"evaluation.bank: holds {len(bank.labels)} images; {NEIGHBOURS} neighbours need as many")
    found = logits_over(model, teacher, spec, runtime, label, folder and folder / "images")
    if found.logits.ndim != 2:
        raise ModelError(
            f"{teacher.name}: gives features {list(found.logits.shape)} instead of [n, D]; pool them inside"
        )
    classes = spec.dataset.classes or spec.bank.classes or 1 + int(torch.cat([bank.labels, found.labels]).max())
    _refuse_beyond(classes, bank.labels, found.labels)
    votes = nearest_neighbours(found.logits, bank.logits, bank.labels, classes)
    return Reference(found.logits, votes, found.labels, found.damaged)


def _refuse_beyond(classes: int, bank: Tensor, labels: Tensor) -> None:
    """Refuse labels that are no positions in the list of classes."""
    for name, found in (("bank", bank), ("dataset", labels)):
        if len(found) and int(found.max()) >= classes:
            raise DataError(
                f"evaluation.{name}: has label {int(found.max())}, but the other one's classes are 0 to {classes - 1}; "
                "labels are positions in the list of classes, so both must have the same ones"
            )
