"""Quality measures of calibration images: how similar they are to real images, according to the teacher."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from attrs import evolve, frozen
from einops import rearrange, reduce
from torch import Tensor

from spdfq.attention import QUERIES_AND_KEYS, record_attention
from spdfq.errors import DataError, ModelError, SpdfqError
from spdfq.evaluation.accuracy import left_out, none_readable
from spdfq.losses.head_similarity import recorded_head_similarity
from spdfq.runtime import Runtime
from spdfq.teacher import Teacher, evaluation_mode

_FEWEST_RINGS = 3
# values of the spectra held in memory at once: 32 MiB in complex float64
_CHUNK = 2**21


@frozen(eq=False)
class Centroids:
    """The mean feature of each class of a labelled dataset.

    Args:
        means: float32 ``[K, D]``.
        counts: int64 ``[K]``, the number of images of each class.
        damaged: the images that cannot be read, with reasons; they are in no mean.
    """

    means: Tensor
    counts: Tensor
    damaged: tuple[str, ...] = ()


def class_centroids(features: Tensor, labels: Tensor, classes: int) -> Centroids:
    """The mean feature of each class; zeros for a class without images.

    Args:
        features: ``[n, D]``.
        labels: int64 ``[n]``, from 0 to ``classes - 1``.
        classes: number of classes, K.
    """
    sums = torch.zeros(classes, features.shape[1], dtype=torch.float32, device="cpu").index_add(
        0, labels, features.float()
    )
    counts = torch.bincount(labels, minlength=classes)
    return Centroids(sums / counts.clamp(min=1).unsqueeze(-1), counts)


def semantic_alignment(features: Tensor, labels: Tensor, centroids: Centroids) -> float:
    """Mean cosine similarity of features to the centroid of their class (arXiv 2412.16553).

    Args:
        features: ``[n, D]``.
        labels: int64 ``[n]``, the class of each feature.
        centroids: of real images.

    Returns:
        A number in -1..1.

    Raises:
        DataError: one of these classes has no real image.
    """
    missing = labels[centroids.counts[labels] == 0]
    if len(missing):
        raise DataError(f"class {int(missing[0])} has no real image; measure on a larger dataset")
    return float(F.cosine_similarity(features.float(), centroids.means[labels], dim=-1).mean())


def channel_statistics(pixels: Tensor) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel over all images.

    Args:
        pixels: ``[n, C, h, w]`` in 0..1.
    """
    return reduce(pixels, "n c h w -> c", "mean").tolist(), pixels.std((0, 2, 3), correction=0).tolist()


def spectrum_slope(pixels: Tensor) -> float | None:
    """Exponent of the radial power spectrum: the slope of log power over log frequency.

    Frequencies are grouped into rings, each as wide as one cycle along the shorter side. The power of a ring is the
    mean over its frequencies, images and channels. A line is fitted to the rings up to the highest frequency along
    an axis (half a cycle per pixel). White noise has slope 0, natural images about -2.

    Args:
        pixels: ``[n, C, h, w]``.

    Returns:
        The slope, or ``None`` if a ring has no power (flat images) or the images are too small for three rings.
    """
    height, width = pixels.shape[-2:]
    side = min(height, width)
    power = torch.zeros(height, width, dtype=torch.float64, device=pixels.device)
    for part in pixels.split(max(1, _CHUNK // pixels[0].numel())):
        power += reduce(torch.fft.fft2(part.double()).abs().square(), "n c h w -> h w", "sum")
    power /= pixels.shape[0] * pixels.shape[1]
    down, right = (torch.fft.fftfreq(n, dtype=torch.float32, device=power.device) for n in (height, width))
    frequency = (down.unsqueeze(-1).square() + right.square()).sqrt()
    ring = (frequency * side).round().long().flatten()
    count = torch.bincount(ring)
    mean = torch.bincount(ring, power.flatten()) / count.clamp(min=1)
    mean = mean[1 : side // 2 + 1]
    if len(mean) < _FEWEST_RINGS or not (mean > 1e-12 * power[0, 0]).all() or not (mean > 0).all():
        return None
    x = torch.arange(1, len(mean) + 1, dtype=torch.float64, device="cpu").log()
    y = mean.log()
    return float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())


def prior_overlap(prior: Tensor, reached: Tensor) -> float:
    """The mass that an attention map shares with its prior, after both are scaled to sum to 1.

    Args:
        prior: ``[m, blocks, h, w]``, not negative.
        reached: the attention, of the same shape, not negative.

    Returns:
        The mean over maps, in 0..1; 1 if each attention map equals its prior.
    """
    flat = [rearrange(maps, "m l h w -> m l (h w)") for maps in (prior, reached)]
    shares = [maps / maps.sum(-1, keepdim=True).clamp(min=1e-12) for maps in flat]
    return float(torch.minimum(*shares).sum(-1).mean())


def class_features(teacher: Teacher, batches: Iterable[Tensor], runtime: Runtime) -> Iterator[tuple[Tensor, Tensor]]:
    """The input ``[b, D]`` and the logits ``[b, K]`` of the classifier for each batch of images, on the CPU.

    Raises:
        ModelError: the module lacks timm's ``forward_features`` or ``forward_head``.
    """
    module: Any = teacher.module
    if not (hasattr(module, "forward_features") and hasattr(module, "forward_head")):
        raise ModelError(
            f"{teacher.name}: has no forward_features and forward_head methods, so its features are unknown"
        )
    with evaluation_mode(module):
        for images in batches:
            with runtime.own_modes(), torch.no_grad():
                tokens = module.forward_features(images.to(runtime.device))
                features = module.forward_head(tokens, pre_logits=True)
                logits = module.forward_head(tokens)
            yield features.float().cpu(), logits.float().cpu()


def dataset_centroids(teacher: Teacher, spec: Any, runtime: Runtime) -> Centroids | None:
    """Centroids of an evaluation spec's dataset; ``None`` for a model without a head, which predicts no class.

    Raises:
        DataError: the dataset's classes are not the model's, or none of its images can be read.
        ModelError: the module lacks timm's ``forward_features`` or ``forward_head``.
    """
    if teacher.headless:
        return None
    spec.dataset.check_classes(teacher)
    labels: list[Tensor] = []
    unread: list[str] = []
    with runtime.progress("real images", len(spec.dataset)) as advance:

        def images() -> Iterator[Tensor]:
            for batch, found, damaged in spec.dataset.batches(teacher, spec.batch):
                unread.extend(damaged)
                if len(batch):
                    labels.append(found)
                    yield batch
                advance(len(found) + len(damaged))

        features = [found for found, _ in class_features(teacher, images(), runtime)]
    if not features:
        raise DataError(none_readable(unread))
    means = class_centroids(torch.cat(features), torch.cat(labels), teacher.num_classes)
    return evolve(means, damaged=tuple(unread))


def image_head_similarity(teacher: Teacher, batches: Iterable[Tensor], runtime: Runtime) -> float:
    """Similarity of the teacher's attention heads on images; see `spdfq.losses.functional.head_similarity`.

    Raises:
        SpdfqError: the attention cannot be recorded, or no block has two heads.
    """
    total, count = 0.0, 0
    modes, recording = runtime.own_modes(), record_attention(teacher.module, {QUERIES_AND_KEYS})
    with modes, torch.no_grad(), evaluation_mode(teacher.module), recording as record:
        for images in batches:
            teacher.module(images.to(runtime.device))
            total += float(recorded_head_similarity(record).mean()) * len(images)
            count += len(images)
    return total / count


def measure_images(
    images: Tensor, teacher: Teacher, runtime: Runtime, centroids: Centroids | None, batch: int = 64
) -> dict[str, Any]:
    """All quality measures of images, as plain data. A measure that cannot be computed is ``None``; ``notes`` say why.

    An image's class is the one that the teacher predicts, and not the label it was made for. So sources without labels
    can be compared with the others.

    Args:
        images: ``[n, C, h, w]``, normalised for the teacher.
        teacher: the full-precision model.
        runtime: device and progress.
        centroids: of real images, by the same teacher; ``None`` for a teacher without a head.
        batch: images per forward pass.
    """
    pixels = teacher.denormalise(images.float())
    mean, std = channel_statistics(pixels)
    notes: list[str] = []
    alignment = heads = None
    if centroids is None:
        notes.append("semantic_alignment: the model has no head, so it predicts no class")
    else:
        if centroids.damaged:
            notes.append(f"semantic_alignment: of the real images, {left_out(centroids.damaged)}")
        try:
            features, logits = map(torch.cat, zip(*class_features(teacher, images.split(batch), runtime), strict=True))
            alignment = semantic_alignment(features, logits.argmax(1), centroids)
        except (DataError, ModelError) as error:
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
