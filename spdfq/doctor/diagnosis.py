"""The diagnosis of a quantized model: what costs accuracy, where, and what to change."""

from typing import Any

import torch
from attrs import asdict, frozen
from torch import Tensor

from spdfq.data import LabelledImages
from spdfq.doctor.block_errors import BlockError, block_errors
from spdfq.doctor.effects import TOP, SiteEffect, site_effects
from spdfq.doctor.findings import findings
from spdfq.doctor.pair import Images, Pair
from spdfq.doctor.reference import learns, reference_model
from spdfq.doctor.site_values import SiteValues, site_values
from spdfq.doctor.suggestion import Suggestion, suggested
from spdfq.errors import DataError, ModelError
from spdfq.quantized.model import QuantizedModel
from spdfq.recipe import Quantization
from spdfq.runtime import Runtime
from spdfq.teacher import Teacher

BATCH = 32


@frozen
class Diagnosis:
    """What a quantized model loses where. Divergences are those of `Outcome`.

    Args:
        images: number of calibration images.
        heldout: number of held-out images; 0 without any.
        passes: number of forward passes of one image.
        kl: divergence of the quantized model from the teacher on the calibration images.
        heldout_kl: on the held-out images; ``None`` without any.
        full_top1: top-1 of the teacher on the held-out images in percent; ``None`` without labels or without a head.
        top1: top-1 of the quantized model on them.
        effects: what each site costs, the worst first.
        values: the values of each site against its range.
        blocks: the error of each block before and after the steps that learn; empty without such steps.
        suggestion: more bits for some sites; ``None`` if that promises nothing.
        findings: what stands out, a sentence each.
        notes: what could not be looked at, a sentence each.
    """

    images: int
    heldout: int
    passes: int
    kl: float
    heldout_kl: float | None
    full_top1: float | None
    top1: float | None
    effects: tuple[SiteEffect, ...]
    values: tuple[SiteValues, ...]
    blocks: tuple[BlockError, ...]
    suggestion: Suggestion | None
    findings: tuple[str, ...]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """The diagnosis as plain data."""
        return asdict(self)


def diagnosed(
    model: QuantizedModel,
    teacher: Teacher,
    images: Tensor,
    spec: Quantization,
    runtime: Runtime,
    heldout: tuple[Tensor, Tensor] | None = None,
) -> Diagnosis:
    """Diagnose a quantized model.

    Args:
        model: quantized by the section, on the runtime's device.
        teacher: of which it is a copy, on the same device.
        images: calibration images ``[n, C, H, W]``, normalised.
        spec: the quantization section.
        runtime: device, seeds and progress.
        heldout: other images, and their labels int64 ``[n]``.

    Raises:
        DataError: there are no images.
        NonFiniteError: an output is not finite.
        ModelError: the model has no quantized site that can be looked at.
    """
    if not len(images):
        raise DataError("doctor: needs at least one calibration image")
    model.check_calibrated()
    with runtime.own_modes(), torch.no_grad(), teacher.frozen() as network:
        images = images.to(runtime.device, torch.float32)
        bits = {name: quantizer.bits for name, quantizer in model.quantizers.items()}
        pair = Pair(model, reference_model(teacher, images, spec, runtime, bits), teacher.headless, BATCH)
        if not pair.sites:
            raise ModelError("doctor: no quantized site has a counterpart in float; was the model made by this recipe?")
        ours = Images(images, pair.outputs(network, images))
        others = _labelled(pair, network, heldout, runtime.device) if heldout else None
        now = pair.all_quantized(ours)
        there = pair.all_quantized(others) if others else None
        effects = site_effects(pair, ours, now, others, there, runtime)
        values = site_values(pair, ours, runtime, any(map(learns, spec.steps)))
        blocks, notes = _blocks(pair, ours, others, spec)
        suggestion = suggested(pair, effects, teacher, ours, spec, runtime, now, others)
    return Diagnosis(
        images=len(ours),
        heldout=len(others) if others else 0,
        passes=pair.passes,
        kl=now.kl,
        heldout_kl=there.kl if there else None,
        full_top1=_top1(others),
        top1=there.top1 if there else None,
        effects=tuple(effects),
        values=tuple(values),
        blocks=tuple(blocks),
        suggestion=suggestion,
        findings=tuple(findings(effects, values, blocks, now)),
        notes=(*notes, *(f"{name}: is not near its weight in float, so it was not looked at" for name in pair.lost)),
    )


def planned_passes(sites: int, images: int, heldout: int) -> int:
    """About how many forward passes of one image a diagnosis takes: its cost grows with the number of sites.

    Two for each site and calibration image, two for each of the first `TOP` sites and held-out image, and a few more.
    """
    return images * (2 * sites + 8 + TOP) + heldout * (2 * min(TOP, sites) + 6)


def heldout_images(dataset: LabelledImages, teacher: Teacher, count: int, batch: int) -> tuple[Tensor, Tensor]:
    """Evenly spaced images of a dataset and their labels, at most so many; damaged ones are left out.

    Raises:
        DataError: none can be read.
    """
    size = len(dataset)
    chosen = sorted({index * size // count for index in range(count)} if count < size else range(size))
    parts = [(images, labels) for images, labels, _ in dataset.batches(teacher, batch, chosen) if len(images)]
    if not parts:
        raise DataError("evaluation.dataset: none of the images can be read")
    images, labels = (torch.cat(column) for column in zip(*parts, strict=True))
    return images, labels


def _labelled(pair: Pair, network: torch.nn.Module, given: tuple[Tensor, Tensor], device: torch.device) -> Images:
    images, labels = (part.to(device) for part in given)
    return Images(images, pair.outputs(network, images), None if pair.headless else labels)


def _top1(images: Images | None) -> float | None:
    if images is None or images.labels is None:
        return None
    return 100 * float((images.target.argmax(1) == images.labels).float().mean())


def _blocks(
    pair: Pair, images: Images, heldout: Images | None, spec: Quantization
) -> tuple[list[BlockError], list[str]]:
    if not any(map(learns, spec.steps)):
        return [], []
    try:
        return block_errors(pair, images, heldout), []
    except ModelError as error:
        return [], [f"blocks were not compared: {error}"]
