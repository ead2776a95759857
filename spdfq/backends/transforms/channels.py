"""What a network's float pass shows of the channels of layer inputs."""

from collections.abc import Mapping

from einops import rearrange
from torch import Tensor

from spdfq.backends.base import Calibration
from spdfq.errors import NonFiniteError
from spdfq.quantized.model import QuantizedModel
from spdfq.quantizers.statistics import Statistics


def channel_statistics(
    model: QuantizedModel, sites: Mapping[str, str], calibration: Calibration, batch: int, step: str
) -> dict[str, Statistics]:
    """The values of each channel at these input sites, from one float pass over the images.

    Args:
        model: not quantized during the pass.
        sites: the sites, whose channels are on the last axis, each with a description for messages.
        calibration: the images.
        batch: images per forward pass.
        step: name of the step, for messages.

    Raises:
        NonFiniteError: a site saw NaN or infinity.
    """
    seen: dict[str, Statistics] = {}

    def visit(name: str, _: str, tensor: Tensor) -> Tensor:
        if name in sites:
            channels = rearrange(tensor.float(), "... c -> c (...)")
            low, high = channels.aminmax(dim=1)
            if not bool((low.isfinite() & high.isfinite()).all()):
                raise NonFiniteError(f"{step}: {sites[name]} is not finite; check the images")
            seen.setdefault(name, Statistics(channels, channels.shape[1] // len(tensor))).add(channels, low, high)
        return tensor

    progress = calibration.runtime.progress("observing channels", len(calibration.images))
    with model.visiting(visit), progress as advance:
        for images in calibration.images.split(batch):
            model.network(images)
            advance(len(images))
    return seen
