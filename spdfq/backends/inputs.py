"""What all steps of one call depend on, as a hash for their state files."""

import hashlib

import torch
from attrs import define, field
from torch import Tensor

from spdfq.runtime import Runtime
from spdfq.runtime.state_key import state_key
from spdfq.teacher import Teacher


@define(eq=False)
class Inputs:
    """The inputs of all steps. They are hashed only if a state file needs it, because that reads every weight.

    Args:
        teacher: the float model, as it was before the first step.
        images: the calibration images.
        runtime: seed and precision.
    """

    teacher: Teacher
    images: Tensor
    runtime: Runtime
    _digest: str = field(default="", init=False)

    @property
    def digest(self) -> str:
        """A hash of the teacher, the images, the seed and the precision; the device is not part of it."""
        if not self._digest:
            images = self.images.detach().cpu().contiguous()
            pixels = hashlib.sha256(images.view(-1).view(torch.uint8).numpy().data).hexdigest()
            shape, runtime = [str(images.dtype), *images.shape], self.runtime
            self._digest = state_key(self.teacher.fingerprint(), pixels, shape, runtime.seed, runtime.precision)
        return self._digest
