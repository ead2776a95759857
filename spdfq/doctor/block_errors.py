"""The error of each block's output before and after the steps that learn, also on images that they have not seen."""

import torch
from attrs import frozen
from torch import Tensor

from spdfq.backends.blocks import BlockCall, Hidden, block_calls, block_names
from spdfq.backends.propagation import Propagation, of_images
from spdfq.doctor.pair import Images, Pair


@frozen
class BlockError:
    """The squared error of a block's output, relative to the square of the teacher's output.

    What enters the block is the output of the quantized blocks before it, in all cases.

    Args:
        block: its name.
        before: without the steps that learn, on the calibration images.
        after: of the quantized model, on the calibration images.
        heldout_before: as ``before``, on the held-out images; ``None`` without such images.
        heldout_after: as ``after``, on the held-out images.
    """

    block: str
    before: float
    after: float
    heldout_before: float | None = None
    heldout_after: float | None = None

    @property
    def worse(self) -> bool:
        """Whether learning made the block worse on images that it has not seen."""
        if self.heldout_before is None or self.heldout_after is None:
            return False
        return self.heldout_after > self.heldout_before


def block_errors(pair: Pair, images: Images, heldout: Images | None) -> list[BlockError]:
    """The errors of all blocks, in order.

    Raises:
        ModelError: the model has no blocks that can be called alone.
    """
    calls = block_calls(pair.reference.network, block_names(pair.model), images.images[:1])
    seen = _errors(pair, calls, images)
    unseen = _errors(pair, calls, heldout) if heldout else [(None, None)] * len(calls)
    return [BlockError(call.name, *ours, *theirs) for call, ours, theirs in zip(calls, seen, unseen, strict=True)]


@torch.no_grad()
def _errors(pair: Pair, calls: list[BlockCall], images: Images) -> list[tuple[float, float]]:
    """The error of each block before and after learning."""
    network, model = pair.reference.network, pair.model
    teacher = Propagation(network, images.images, pair.batch)
    student = Propagation(model.network, images.images, pair.batch)
    found = []
    for call in calls:
        target = teacher.through(call, teacher.inputs_of(call))
        with model.visiting(pair.quantized):
            inputs = student.inputs_of(call)
            after = student.through(call, inputs)
        with pair.reference.visiting(pair.reference.quantized):
            before = _through(call, pair, inputs, len(images))
        found.append((_relative(before, target), _relative(after, target)))
    pair.passes += 3 * len(images)
    return found


def _through(call: BlockCall, pair: Pair, inputs: Hidden, count: int) -> Hidden:
    parts = [slice(start, start + pair.batch) for start in range(0, count, pair.batch)]
    outputs = [call.run(pair.reference.network, of_images(inputs, count, part)) for part in parts]
    return tuple(torch.cat(column) for column in zip(*outputs, strict=True))


def _relative(output: Hidden, target: Hidden) -> float:
    return _squares([a - b for a, b in zip(output, target, strict=True)]) / max(_squares(target), 1e-30)


def _squares(tensors: Hidden | list[Tensor]) -> float:
    return sum(float(tensor.float().square().sum()) for tensor in tensors)
