"""Quality measures of calibration images: how near they come to what the model expects of real ones."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from attrs import frozen
from torch import Tensor

from spdfq.attention import QUERIES_AND_KEYS, record_attention
from spdfq.errors import DataError, ModelError, SpdfqError
from spdfq.losses.head_similarity import recorded_head_similarity
from spdfq.runtime import Runtime
from spdfq.teacher import Teacher, evaluation_mode

_FEWEST_RINGS = 3


@frozen(eq=False)
class Centroids:
    """Mean feature of each class of a labelled dataset.

    Args:
        means: float32 ``[K, D]``.
        counts: ``[K]`` images of each class.
    """

    means: Tensor
    counts: Tensor


def class_centroids(features: Tensor, labels: Tensor, classes: int) -> Centroids:
    """The mean feature of each class.

    Args:
        features: ``[n, D]``.
        labels: ``[n]`` of 0 to ``classes - 1``.
        classes: K.
    """
    sums = torch.zeros(classes, features.shape[1]).index_add(0, labels, features.float())
    counts = torch.bincount(labels, minlength=classes)
    return Centroids(sums / counts.clamp(min=1).unsqueeze(-1), counts)


def semantic_alignment(features: Tensor, labels: Tensor, centroids: Centroids) -> float:
    """Mean cosine similarity of features to the centroid of their class (arXiv 2412.16553).

    Args:
        features: ``[n, D]``.
        labels: ``[n]`` the class of each.
        centroids: of real images.

    Returns:
        A number in -1..1.

    Raises:
        DataError: a class has no real image.
    """
    missing = labels[centroids.counts[labels] == 0]
    if len(missing):
        raise DataError(f"class {int(missing[0])} has no image among the real ones; measure on a larger dataset")
    return float(F.cosine_similarity(features.float(), centroids.means[labels], dim=-1).mean())


def channel_statistics(pixels: Tensor) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel over all images.

    Args:
        pixels: ``[n, C, h, w]`` in 0..1.
    """
    return pixels.mean((0, 2, 3)).tolist(), pixels.std((0, 2, 3), correction=0).tolist()


def spectrum_slope(pixels: Tensor) -> float | None:
    """Exponent of the radial power spectrum: the slope of the logarithm of power over that of frequency.

    Power is the mean over images, channels and the frequencies of a ring; rings are as wide as one cycle along the
    shorter side, and the line is fitted over those up to the highest frequency of an axis. White noise has 0, natural
    images have about -2.

    Args:
        pixels: ``[n, C, h, w]``.

    Returns:
        The slope, or ``None`` where a ring has no power (flat images) or the images are too small for three rings.
    """
    height, width = pixels.shape[-2:]
    side = min(height, width)
    power = torch.fft.fft2(pixels.double()).abs().square().mean((0, 1))
    frequency = (torch.fft.fftfreq(height).unsqueeze(-1).square() + torch.fft.fftfreq(width).square()).sqrt()
    ring = (frequency * side).round().long().flatten()
    count = torch.bincount(ring)
    mean = torch.bincount(ring, power.flatten()) / count.clamp(min=1)
    mean = mean[1 : side // 2 + 1]
    if len(mean) < _FEWEST_RINGS or not (mean > 1e-12 * power[0, 0]).all() or not (mean > 0).all():
        return None
    x = torch.arange(1, len(mean) + 1).double().log()
    y = mean.log()
    return float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())


def prior_overlap(prior: Tensor, reached: Tensor) -> float:
    """How much of each attention prior was reached: the mass both share, 1 where they are the same.

    Args:
        prior: ``[m, blocks, h, w]``, not negative.
        reached: likewise.

    Returns:
        The mean over maps, in 0..1.
    """
    shares = [maps.flatten(-2) / maps.flatten(-2).sum(-1, keepdim=True).clamp(min=1e-12) for maps in (prior, reached)]
    return float(torch.minimum(*shares).sum(-1).mean())


@torch.no_grad()
def class_features(teacher: Teacher, batches: Iterable[Tensor], runtime: Runtime) -> Iterator[tuple[Tensor, Tensor]]:
    """What the classifier sees ``[b, D]``, and its logits ``[b, K]``, of batches of images, on the CPU.

    Raises:
        ModelError: the module has not timm's ``forward_features`` and ``forward_head``.
    """
    module: Any = teacher.module
    if not (hasattr(module, "forward_features") and hasattr(module, "forward_head")):
        raise ModelError(f"{teacher.name}: has no forward_features and forward_head, so its features are unknown")
    with evaluation_mode(module):
        for images in batches:
            tokens = module.forward_features(images.to(runtime.device))
            features = module.forward_head(tokens, pre_logits=True)
            yield features.float().cpu(), module.forward_head(tokens).float().cpu()


def dataset_centroids(teacher: Teacher, spec: Any, runtime: Runtime) -> Centroids | None:
    """Centroids of an evaluation spec's dataset, by its labels; none for a model without a head, which names no class.

    Raises:
        DataError: its classes are not the model's.
    """
    if teacher.headless:
        return None
    spec.dataset.check_classes(teacher)
    labels: list[Tensor] = []
    with runtime.progress("real images", len(spec.dataset)) as advance:

        def images() -> Iterator[Tensor]:
            for batch, found, damaged in spec.dataset.batches(teacher, spec.batch):
                if len(batch):
                    labels.append(found)
                    yield batch
                advance(len(found) + len(damaged))

        features = torch.cat([found for found, _ in class_features(teacher, images(), runtime)])
    return class_centroids(features, torch.cat(labels), teacher.num_classes)


@torch.no_grad()
def image_head_similarity(teacher: Teacher, batches: Iterable[Tensor], runtime: Runtime) -> float:
    """How alike the heads of the teacher look at the images: see `spdfq.losses.functional.head_similarity`.

    Raises:
        SpdfqError: the attention cannot be recorded, or no block has two heads.
    """
    total, count = 0.0, 0
    with evaluation_mode(teacher.module), record_attention(teacher.module, {QUERIES_AND_KEYS}) as record:
        for images in batches:
            teacher.module(images.to(runtime.device))
            total += float(recorded_head_similarity(record).mean()) * len(images)
            count += len(images)
    return total / count


def measure_images(
    images: Tensor, teacher: Teacher, runtime: Runtime, centroids: Centroids | None, batch: int = 64
) -> dict[str, Any]:
    """All measures that images alone have, as plain data; what cannot be had is ``None``, and ``notes`` say why.

    An image's class is the one that the teacher names first, whatever the image was made for: so sources without labels
    compare with those that have them.

    Args:
        images: ``[n, C, h, w]``, normalised for the teacher.
        teacher: the full-precision model.
        runtime: device and progress.
        centroids: of real images, by the same teacher; none where it has no head.
        batch: images of a forward pass.
    """
    pixels = teacher.denormalise(images.float())
    mean, std = channel_statistics(pixels)
    notes: list[str] = []
    alignment = heads = None
    if centroids is None:
        notes.append("semantic_alignment: the model has no head, so it names no class")
    else:
        features, logits = map(torch.cat, zip(*class_features(teacher, images.split(batch), runtime), strict=True))
        try:
            alignment = semantic_alignment(features, logits.argmax(1), centroids)
        except DataError as error:
            notes.append(f"semantic_alignment: {error}")
    try:
        heads = image_head_similarity(teacher, images.split(batch), runtime)
    except SpdfqError as error:
        notes.append(f"head_similarity: {error}")
    return {
        "images": len(images),
        "real_images": 0 if centroids is None else int(centroids.counts.sum()),
        "semantic_alignment": alignment,
        "head_similarity": heads,
        "channel_mean": mean,
        "channel_std": std,
        "spectrum_slope": spectrum_slope(pixels),
        "notes": notes,
    }
