"""Evaluation of models without a head: k-NN accuracy of their features, and similarity to the teacher's features."""

import json
from pathlib import Path
from typing import Any

import attrs
import torch
import torch.nn.functional as F
from attrs import field, frozen
from torch import Tensor, nn

from spdfq.errors import DataError, RecipeError
from spdfq.evaluation.accuracy import accuracy, agreement, check_same_images, logits_over
from spdfq.evaluation.correctness import images_digest, packed
from spdfq.evaluation.predictions import REMEDY, Predictions
from spdfq.runtime import Runtime
from spdfq.runtime.files import read_tensors, write_tensors
from spdfq.teacher import Teacher

NEIGHBOURS = 20
_TEMPERATURE = 0.07
# similarities held in memory at once
_CHUNK = 2**24


def nearest_neighbours(queries: Tensor, bank: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Class votes of the 20 nearest bank features, as in DINO (arXiv 2104.14294); each weighs ``exp(cosine / 0.07)``.

    Args:
        queries: features ``[n, D]``.
        bank: features ``[m, D]`` with m at least 20.
        labels: int64 ``[m]``, the class of each bank feature.
        classes: number of classes.

    Returns:
        Sums of weights ``[n, classes]``, used like logits.
    """
    bank, votes = F.normalize(bank, dim=-1), []
    for part in F.normalize(queries, dim=-1).split(max(1, _CHUNK // len(bank))):
        cosine, nearest = (part @ bank.mT).topk(NEIGHBOURS)
        empty = torch.zeros(len(part), classes, dtype=part.dtype, device=part.device)
        votes.append(empty.scatter_add_(1, labels[nearest], (cosine / _TEMPERATURE).exp()))
    return torch.cat(votes)


def similarity(features: Tensor, reference: Tensor) -> float:
    """Mean cosine similarity of two models' features ``[n, D]`` for the same images."""
    return float(F.cosine_similarity(features, reference).mean())


@frozen(eq=False)
class FeaturePredictions(Predictions):
    """A headless model's features, and the votes of their nearest neighbours in ``logits``.

    Args:
        features: float32 ``[n, D]``, on the CPU.
        bank_labels: int64 ``[m]``, of the images of the bank that could be read.
        bank_damaged: the images of the bank that cannot be read, with reasons; they are not among the ``m``.
    """

    features: Tensor = field(kw_only=True)
    bank_labels: Tensor = field(kw_only=True)
    bank_damaged: tuple[str, ...] = field(kw_only=True)

    def save(self, path: Path) -> None:
        """Write one safetensors file."""
        tensors = {
            "features": self.features,
            "logits": self.logits,
            "labels": self.labels,
            "bank_labels": self.bank_labels,
        }
        names = {"damaged": self.damaged, "bank_damaged": self.bank_damaged}
        write_tensors(path, tensors, {key: json.dumps(value) for key, value in names.items()})

    @classmethod
    def load(cls, path: Path) -> "FeaturePredictions":
        """Read what `save` wrote.

        Raises:
            DataError: the file is damaged or missing.
        """
        tensors, metadata = read_tensors(path, REMEDY)
        return cls(
            **tensors,
            damaged=tuple(json.loads(metadata["damaged"])),
            bank_damaged=tuple(json.loads(metadata["bank_damaged"])),
        )


class NeighboursEvaluator:
    """Evaluates a model without a head: k-NN top-1, agreement with the teacher, and feature similarity."""

    def check(self, spec: Any, teacher: Teacher) -> None:
        """Check that an evaluation spec has a bank of labelled images for the nearest neighbours.

        Raises:
            RecipeError: the bank is missing, or is the evaluation dataset itself.
        """
        if spec.bank is None:
            raise RecipeError(
                [
                    f"evaluation.bank: is required, because {teacher.name} has no head and is measured by nearest "
                    "neighbours; give other labelled images, for example bank = { type = 'image_folder', root = "
                    "'path/to/train' }"
                ]
            )
        if spec.bank == spec.dataset:
            raise RecipeError(
                ["evaluation.bank: is the same as evaluation.dataset, so each image would be its own nearest neighbour"]
            )

    def reference(
        self, teacher: Teacher, spec: Any, runtime: Runtime, folder: Path | None = None
    ) -> FeaturePredictions:
        """The full-precision model's features on an evaluation spec's dataset, and their neighbours in its bank.

        Finished batches are stored in ``folder``, so that an interrupted call can be resumed.

        Raises:
            DataError: the bank and the dataset share images, or have different classes.
        """
        _check_bank(spec)
        return _predictions(teacher.module, teacher, spec, runtime, "full precision", folder)

    def load_reference(self, path: Path) -> FeaturePredictions:
        """Read a reference that was written with its ``save`` method."""
        return FeaturePredictions.load(path)

    def measure(
        self, model: nn.Module, teacher: Teacher, spec: Any, runtime: Runtime, fp: Any, folder: Path | None = None
    ) -> dict[str, Any]:
        """k-NN accuracy of a quantized model and of the teacher, in percent; each uses its own features of the bank.

        ``similarity`` is the mean cosine similarity of the quantized model's features to the teacher's. ``simulated``
        is true because the quantized model computes in float. ``bank`` is the number of images of the bank that could
        be read, and ``bank_images`` a hash of them. The others are as in `LogitsEvaluator.measure`.

        Raises:
            DataError: the images that can be read have changed since the teacher was measured.
        """
        found = _predictions(model, teacher, spec, runtime, "quantized", folder)
        check_same_images(found.damaged, fp.damaged)
        check_same_images(found.bank_damaged, fp.bank_damaged, "evaluation.bank")
        return {
            "measure": "k-NN top-1",
            "images": len(found.labels),
            "test_images": images_digest(spec.dataset, found.labels, found.damaged),
            "damaged": list(found.damaged),
            "bank": len(found.bank_labels),
            "bank_images": images_digest(spec.bank, found.bank_labels, found.bank_damaged),
            "bank_damaged": list(found.bank_damaged),
            "precision": spec.precision,
            "fp": {"top1": accuracy(fp.logits, fp.labels)["top1"]},
            "quantized": {"top1": accuracy(found.logits, found.labels)["top1"]},
            "agreement": agreement(found.logits, fp.logits),
            "similarity": similarity(found.features, fp.features),
            "simulated": True,
            "correct": {
                "fp": packed(fp.logits, fp.labels),
                "quantized": packed(found.logits, found.labels),
            },
        }


def _check_bank(spec: Any) -> None:
    """Raise a DataError if the bank and the dataset have different classes or share images."""
    if None not in (spec.bank.classes, spec.dataset.classes) and spec.bank.classes != spec.dataset.classes:
        raise DataError(
            f"evaluation.bank: has {spec.bank.classes} classes, evaluation.dataset {spec.dataset.classes}; labels are "
            "positions in the list of classes, so both must have the same classes"
        )
    for index, (ours, theirs) in enumerate(zip(spec.bank.class_names, spec.dataset.class_names, strict=False)):
        if ours != theirs:
            raise DataError(
                f"evaluation.bank: class {index} is {ours}, in evaluation.dataset {theirs}; labels are positions in "
                "the list of classes, so both must have the same classes; add an empty folder for a class without "
                "images"
            )
    if shared := set(spec.bank.identities()) & set(spec.dataset.identities()):
        raise DataError(
            f"evaluation.bank: shares {len(shared):,} images with evaluation.dataset, the first of them {min(shared)}; "
            "each would be its own nearest neighbour, so give other images"
        )


def _predictions(
    model: nn.Module, teacher: Teacher, spec: Any, runtime: Runtime, label: str, folder: Path | None
) -> FeaturePredictions:
    banked = attrs.evolve(spec, dataset=spec.bank)
    bank = logits_over(model, teacher, banked, runtime, f"{label}, bank", folder and folder / "bank")
    if len(bank.labels) < NEIGHBOURS:
        raise DataError(
            f"evaluation.bank: has {len(bank.labels)} readable images; at least {NEIGHBOURS} are needed, one for each "
            "neighbour"
        )
    found = logits_over(model, teacher, spec, runtime, label, folder and folder / "images")
    classes = spec.dataset.classes or spec.bank.classes or 1 + int(torch.cat([bank.labels, found.labels]).max())
    _check_labels(classes, bank.labels, found.labels)
    votes = nearest_neighbours(found.logits, bank.logits, bank.labels, classes)
    return FeaturePredictions(
        votes,
        found.labels,
        found.damaged,
        features=found.logits,
        bank_labels=bank.labels,
        bank_damaged=bank.damaged,
    )


def _check_labels(classes: int, bank: Tensor, labels: Tensor) -> None:
    """Raise a DataError if a label is not a position in the list of classes."""
    for name, found in (("bank", bank), ("dataset", labels)):
        if len(found) and int(found.max()) >= classes:
            raise DataError(
                f"evaluation.{name}: has label {int(found.max())}, but the other one's classes are 0 to {classes - 1}; "
                "labels are positions in the list of classes, so both must have the same classes"
            )
