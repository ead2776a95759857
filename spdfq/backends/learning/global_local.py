"""Global-local reconstruction: each block is trained through the float rest of the network, and by its own output."""

from collections.abc import Iterable
from typing import ClassVar

import torch
from attrs import define, field, validators
from torch import Tensor, nn

from spdfq.attention import unwatched
from spdfq.backends.base import Calibration
from spdfq.backends.blocks import BlockCall, Hidden, block_names
from spdfq.backends.finished_parts import FinishedParts
from spdfq.backends.learning.blockwise import StraightThrough, learned_parameters
from spdfq.backends.learning.reconstruction import (
    BlockData,
    BlockLearner,
    BlockReconstruction,
    Reconstruction,
    squared_errors,
)
from spdfq.backends.learning.shares import Share
from spdfq.backends.learning.suffix import Suffix
from spdfq.backends.learning.training import Training
from spdfq.backends.propagation import Propagation, joined, of_images
from spdfq.errors import SpdfqError
from spdfq.quantized.model import QuantizedModel
from spdfq.quantized.visiting import Visit
from spdfq.registry import steps
from spdfq.runtime import Advance

_TINY = 1e-12


@steps.register("global_local")
@define(kw_only=True)
class GlobalLocal(Reconstruction):
    """Reconstruct block by block: minimise the errors of the network's feature and of the block's output together.

    For the quantized output ``ŷ`` of a block, and the teacher's output ``y`` and feature ``f``, the error is
    ``mean (F(ŷ) - f)² / first + local_weight · mean (ŷ - y)² / first``, where F is the float rest of the network up to
    the input of its classifier, and each mean is divided by its value in the first iteration. A model without a head
    has its output as feature, and so does one whose classifier is unknown. What bypasses all blocks is float in F. This
    is the loss of GLF-Q (Nanjing University, 2026).

    Adam learns the weights and biases, with a straight-through gradient, and the activations' scales, with cosine decay
    to zero. The paper takes 3,000 iterations of 32 out of 1,024 images. Weights that ``ridge`` has rounded lie half a
    step away from any other rounding, where small steps change nothing, so ``ridge`` comes after this step.

    Args:
        scale_lr: learning rate of the activations' scales; lower for small scales, so that none changes by more than
            about half. 0 does not change them.
        local_weight: of the block's own error.
        suffix_blocks: measure the global error so many blocks later instead of at the feature (unpublished).
        suffix_every: compute the global error in every so many iterations only, times that number (unpublished).
        decay: of the penalty ``decay · Σ (W - W₀)² / Σ W₀²``, where W₀ are the weights before the step (unpublished).
        guard: leave out a tenth of the images. A block keeps what it learned only if its local and its global error on
            them both fell (unpublished).
    """

    name: ClassVar[str] = "global_local"

    lr: float = field(default=2e-5, validator=validators.gt(0.0))
    scale_lr: float = field(default=2e-4, validator=validators.ge(0.0))
    local_weight: float = field(default=2.0, validator=validators.ge(0.0))
    suffix_blocks: int | None = field(default=None, validator=validators.optional(validators.ge(1)))
    suffix_every: int = field(default=1, validator=validators.ge(1))
    decay: float = field(default=0.0, validator=validators.ge(0.0))
    guard: bool = False

    def learner(self, model: QuantizedModel, block: str) -> BlockLearner:
        """Learns the weights themselves, and the biases."""
        return Decayed(model.quantized, learned_parameters(model, block, biases=True), self.decay)

    def distance(self, output: Hidden, target: Hidden, importance: Hidden | None) -> Tensor:
        """The mean squared difference, over all tensors together."""
        errors = squared_errors(output, target, importance)
        return torch.stack([error.sum() for error in errors]).sum() / sum(error.numel() for error in errors)

    def scale_rate(self, scale: Tensor) -> float:
        """At most a share of the scale, so that all steps together move it by half: Adam's steps do not know its size.

        The step of an 8-bit softmax, of 1e-4 and less, would otherwise change its sign in the first iteration.
        """
        return min(self.scale_lr, float(scale.detach()) / self.iterations)

    def run(self, model: QuantizedModel, calibration: Calibration) -> None:
        """Reconstructs every block.

        Raises:
            ModelError: the model's feature does not follow from the output of its blocks.
            SpdfqError: there is only one image, so that ``guard`` can leave out none.
        """
        if self.guard and len(calibration.images) < 2:
            raise SpdfqError("global_local: guard leaves out a tenth of the images, so it needs at least 2")
        super().run(model, calibration)

    def jobs(
        self,
        network: nn.Module,
        calls: list[BlockCall],
        model: QuantizedModel,
        calibration: Calibration,
        advance: Advance,
    ) -> Iterable[BlockReconstruction]:
        """The reconstruction of each block, all with one suffix and one list of features."""
        headless = calibration.teacher.headless
        suffix = Suffix.of(network, block_names(model), calibration.images[:1], headless)
        if not (suffix.classifiers or headless):
            model.note(self.name, ["the classifier is unknown, so the global error is that of the logits"])
        with torch.no_grad():
            feature = joined([suffix.feature(part) for part in calibration.images.split(self.batch)])
        return (
            GlobalLocalBlock(
                spec=self,
                call=call,
                model=model,
                calibration=calibration,
                advance=advance,
                suffix=suffix,
                feature=feature,
            )
            for call in calls
        )


class Decayed(StraightThrough):
    """Straight-through learning with a penalty on the distance from the first weights.

    Args:
        quantized: quantizes the sites.
        named: parameters of the network by name.
        decay: weight of the penalty.
    """

    def __init__(self, quantized: Visit, named: dict[str, Tensor], decay: float) -> None:
        super().__init__(quantized, named)
        self.decay = decay
        self.weights = [tensor for name, tensor in named.items() if not name.endswith("bias")] if decay else []
        self.first = [weight.detach().clone() for weight in self.weights]
        self.size = sum(float(weight.square().sum()) for weight in self.first)

    def penalty(self, share: float) -> Tensor | float:
        """``decay · Σ (W - W₀)² / Σ W₀²``."""
        if not self.size:
            return 0.0
        moved = [(weight - first).square().sum() for weight, first in zip(self.weights, self.first, strict=True)]
        return self.decay / self.size * torch.stack(moved).sum()


@define(eq=False)
class GlobalLocalBlock(BlockReconstruction):
    """The global-local reconstruction of one block.

    Args:
        suffix: the float rest of the network after each block.
        feature: the teacher's feature of all images.
    """

    spec: GlobalLocal
    suffix: Suffix
    feature: Hidden
    first: Tensor = field(init=False)  # the global and the local error of the first iteration
    held_out: Tensor | None = field(default=None, init=False)

    def __attrs_post_init__(self) -> None:
        super().__attrs_post_init__()
        images = self.calibration.images
        self.first = torch.zeros(2, dtype=torch.float32, device=images.device)
        if self.spec.guard:
            generator = self.calibration.runtime.generator(self.spec.name, self.calibration.index, "guard")
            order = torch.randperm(len(images), generator=generator, device="cpu").to(images.device)
            self.held_out, self.trained_on = order.tensor_split([max(1, len(images) // 10)])

    def run(self, teacher: Propagation, student: Propagation, finished: FinishedParts) -> Hidden:
        """Trains the block or restores it, and reports whether it was reverted."""
        before = self._state() if self.spec.guard else {}
        outputs = super().run(teacher, student, finished)
        self.suffix.keep(self.call.position, outputs)
        after = self.model.tensors()
        if before and all(torch.equal(after[name], tensor) for name, tensor in before.items()):
            line = f"{self.call.name} was reverted: its local or global error on the images left out did not fall"
            self.model.note(self.spec.name, [line])
        return outputs

    def train(self, data: BlockData) -> None:
        """Trains the block, and reverts it if its errors on the images left out did not both fall."""
        if self.spec.suffix_blocks is not None:
            self.feature = self._later_outputs(data.targets)
        if self.held_out is None:
            super().train(data)
            return
        before, errors = self._state(), self.errors(data, self.held_out)
        super().train(data)
        fell = bool((self.errors(data, self.held_out) < errors).all())
        if not self.ranks.first(lambda: fell):
            self._restore_state(before)

    def error(self, output: Hidden, data: BlockData, share: Share, iteration: int) -> Tensor:
        """The sum of the two errors, each divided by its first value."""
        local = super().error(output, data, share, iteration)
        if iteration % self.spec.suffix_every:
            return self.spec.local_weight * local / self.first[1]
        with unwatched():
            final = self.global_error(output, share)
        if iteration == 0:
            self.first.copy_(torch.stack([final.detach(), local.detach()]).clamp(min=_TINY))
        return self.spec.suffix_every * final / self.first[0] + self.spec.local_weight * local / self.first[1]

    def training(self) -> Training:
        """The tensors to learn, and the first errors, which a resumed run needs too."""
        training = super().training()
        training.named["first"] = self.first
        return training

    @torch.no_grad()
    def _later_outputs(self, outputs: Hidden) -> Hidden:
        """What the float network computes from the block's outputs for all images."""
        rows = torch.arange(len(self.calibration.images), device=self.calibration.images.device)
        parts = rows.split(self.spec.batch)
        return joined([self._after(of_images(outputs, len(rows), part), part) for part in parts])

    def global_error(self, output: Hidden, share: Share) -> Tensor:
        """The error of the whole batch's feature, which the float network computes from the block's output."""
        with self.calibration.runtime.autocast():
            found = self._after(output, share.own)
        wanted = of_images(self.feature, len(self.calibration.images), share.rows)
        return self.spec.distance(share.joined(found), wanted, None)

    def _after(self, output: Hidden, chosen: Tensor | slice) -> Hidden:
        """What the float network computes from the block's output for the chosen images."""
        images, position = self.calibration.images, self.call.position
        earlier = {
            index: of_images(hidden, len(images), chosen) for index, hidden in self.suffix.earlier(position).items()
        }
        return self.suffix.after(position, output, images[chosen], earlier, self.spec.suffix_blocks)

    @torch.no_grad()
    def errors(self, data: BlockData, rows: Tensor) -> Tensor:
        """The global and the local error of some images, with everything quantized."""
        images = len(self.calibration.images)
        total = torch.zeros_like(self.first)
        for part in rows.split(self.spec.batch):
            with self.model.visiting(self.spec.quantized(self.model)), self.calibration.runtime.autocast():
                output = self.call.run(self.model.network, of_images(data.inputs, images, part))
            share = Share.whole(part)
            errors = self.global_error(output, share), super().error(output, data, share, 0)
            total += len(part) * torch.stack(errors)
        return total / len(rows)

    def _state(self) -> dict[str, Tensor]:
        tensors = self.model.tensors()
        return {name: tensors[name].clone() for name in self.changes}

    @torch.no_grad()
    def _restore_state(self, state: dict[str, Tensor]) -> None:
        tensors = self.model.tensors()
        for name, tensor in state.items():
            tensors[name].copy_(tensor)
