"""The classes of the calibration images that the report shows, and real images of the same classes."""

import json
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spdfq.errors import reading
from spdfq.evaluation.predictions import Predictions
from spdfq.report.images import CLASSES_FILE, REAL_FILE
from spdfq.report.pictures import SHOWN, write_real_images
from spdfq.runtime import Runtime
from spdfq.synth import SyntheticImages
from spdfq.teacher import Teacher


def image_classes(images: SyntheticImages, teacher: Teacher, runtime: Runtime) -> list[dict[str, Any]]:
    """The class of each calibration image that is shown.

    Args:
        images: the calibration images.
        teacher: with a head, on the runtime's device.
        runtime: device and modes.

    Returns:
        For each image the ``class`` that the teacher predicts, its probability in ``percent``, and the classes
        ``drawn`` for the image, one for each of its crops; without any if the source draws none.
    """
    shown = images.images[:SHOWN].to(runtime.device, torch.float32)
    with runtime.own_modes(), torch.no_grad(), teacher.frozen() as network:
        best = network(shown).float().softmax(-1).max(-1)
    drawn = defaultdict(list)
    for owner, label in zip(images.owners.tolist(), images.labels.tolist(), strict=True):
        drawn[owner].append(label)
    return [
        {"class": found, "percent": round(100 * share, 1), "drawn": drawn[index]}
        for index, (found, share) in enumerate(zip(best.indices.tolist(), best.values.tolist(), strict=True))
    ]


def show_real_images(folder: Path, teacher: Teacher, evaluation: Any, predictions: Predictions) -> None:
    """Write ``real.png``: a test image for each calibration image shown, of the class that the teacher predicts.

    They are read after the model is finished, and nothing but the report uses them. Without the classes of the images
    nothing is written; a class without a readable image leaves its places empty.

    Args:
        folder: of the run.
        teacher: gives the mean and standard deviation of the images.
        evaluation: the recipe's section.
        predictions: of the teacher on the section's dataset, with the labels.

    Raises:
        DataError: the file of the classes is damaged.
    """
    if not (folder / CLASSES_FILE).is_file():
        return
    with reading(folder / CLASSES_FILE):
        classes = [int(each["class"]) for each in json.loads((folder / CLASSES_FILE).read_text(encoding="utf-8"))]
    places = _places(classes, predictions.labels)
    wanted = {place: each for place, each in zip(places, classes, strict=True) if place is not None}
    found: dict[int, Tensor] = {}
    batches = evaluation.dataset.batches(teacher, 1, list(wanted))
    for (place, each), (images, labels, _) in zip(wanted.items(), batches, strict=True):
        if labels.tolist() == [each]:  # damaged images before it have no label, so the position may be another one
            found[place] = teacher.denormalise(images.float())[0]
    pixels = [None if place is None else found.get(place) for place in places]
    if any(each is not None for each in pixels):
        write_real_images(folder / REAL_FILE, pixels)


def _places(classes: list[int], labels: Tensor) -> list[int | None]:
    """For each class the position of an image with that label, another one for each repetition as far as there are."""
    known = {each: (labels == each).nonzero().flatten().tolist() for each in set(classes)}
    seen: Counter[int] = Counter()
    places: list[int | None] = []
    for each in classes:
        places.append(known[each][seen[each] % len(known[each])] if known[each] else None)
        seen[each] += 1
    return places
