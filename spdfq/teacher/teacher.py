"""The teacher: a pretrained transformer with the normalisation and size of its input."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain

import torch
from attrs import define, field
from einops import rearrange
from torch import Tensor, nn

from spdfq.attention import watchable
from spdfq.errors import DataError, ModelError, first_line, shown
from spdfq.inference.pixels import MODES
from spdfq.recipe import ModelSpec
from spdfq.runtime.shared_modules import as_written, held
from spdfq.teacher.architectures import build
from spdfq.teacher.description import check_description, check_module, mean_of_channels, std_of_channels
from spdfq.teacher.forward import device_of, evaluation_mode, returning_tensor
from spdfq.teacher.state import check_dense, extra_states
from spdfq.teacher.transform import ImageTransform


@define(eq=False)
class Teacher:
    """A full-precision model and the description of its input.

    Making a teacher runs the module once, on one image, to check what it returns. The module's weights, buffers and
    modes, and torch's random state, do not change.

    Args:
        module: any network in float32 from normalised images ``[B, C, H, W]`` to logits ``[B, num_classes]``, or to
            features ``[B, D]`` if it has no head. Of a compiled module, the one inside is used.
        mean: of each channel, for pixels in 0..1.
        std: of each channel, for pixels in 0..1.
        num_classes: number of logits; 0 for a model without a head.
        input_size: ``(C, H, W)``; by default that of the module's ``patch_embed`` or timm configuration.
        name: the model's name in reports.
        crop_pct: share of the image that the evaluation crop keeps.
        interpolation: interpolation of the evaluation resize.
        crop_mode: timm's mode of the evaluation crop.
        output: for a module that returns a dict, a tuple or an object (Hugging Face): the name or position of the
            logits or features in it. By default, the only tensor of their shape is taken. ``module`` is then a shallow
            copy that returns this tensor alone; it shares its weights with yours.

    Raises:
        ModelError: a value that cannot be right, a module that cannot run on such an image, or that returns something
            else.
    """

    module: nn.Module
    mean: tuple[float, ...] = field(converter=mean_of_channels, kw_only=True)
    std: tuple[float, ...] = field(converter=std_of_channels, kw_only=True)
    num_classes: int = field(kw_only=True)
    input_size: tuple[int, int, int] = field(default=None, kw_only=True)
    name: str = field(default="", kw_only=True)
    crop_pct: float = field(default=1.0, kw_only=True)
    interpolation: str = field(default="bilinear", kw_only=True)
    crop_mode: str = field(default="center", kw_only=True)
    output: str | int | None = field(default=None, kw_only=True)

    def __attrs_post_init__(self) -> None:
        check_module(self.module)
        self.module = watchable(self.module)
        self.name = self.name or type(self.module).__name__
        if self.input_size is None:
            self.input_size = (len(self.mean), *_own_size(self.module))
        elif isinstance(self.input_size, list):
            self.input_size = tuple(self.input_size)
        check_description(self)
        wanted = self.output
        self.module, self.output = returning_tensor(self.module, self.name, self.input_size, self.num_classes, wanted)
        if wanted is not None and self.output is None:
            raise ModelError(f"{self.name}: returns a tensor, which has no field output={wanted!r}; leave it out")

    @property
    def headless(self) -> bool:
        """Whether the network returns features instead of logits."""
        return self.num_classes == 0

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        return device_of(self.module)

    @property
    def parameters(self) -> int:
        """Number of parameters."""
        return sum(parameter.numel() for parameter in self.module.parameters())

    def normalise(self, pixels: Tensor) -> Tensor:
        """Normalise pixels ``[B, C, H, W]`` in 0..1 for the model."""
        mean, std = self._statistics(pixels)
        return (pixels - mean) / std

    def denormalise(self, images: Tensor) -> Tensor:
        """Pixels in 0..1 of normalised images ``[B, C, H, W]``."""
        mean, std = self._statistics(images)
        return (images * std + mean).clamp(0, 1)

    def transform(self) -> ImageTransform:
        """timm's evaluation transform of this model: from a PIL image to a normalised tensor ``[C, H, W]``.

        Raises:
            DataError: the model takes more than 4 channels.
        """
        if self.input_size[0] not in MODES:
            raise DataError(
                f"{self.name}: takes {self.input_size[0]} channels, but image files give 1 to 4 (grey, grey and alpha, "
                "RGB, RGBA); write a dataset of your own"
            )
        from timm.data import create_transform

        steps = create_transform(
            self.input_size,
            is_training=False,
            mean=self.mean,
            std=self.std,
            crop_pct=self.crop_pct,
            crop_mode=self.crop_mode,
            interpolation=self.interpolation,
        )
        return ImageTransform(MODES[self.input_size[0]], steps)

    def pixel_range(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """The lowest and highest normalised value of each channel, ``[1, C, 1, 1]``."""
        mean, std = self._statistics(like)
        return (0 - mean) / std, (1 - mean) / std

    @contextmanager
    def frozen(self) -> Iterator[nn.Module]:
        """The module in evaluation mode and without parameter gradients; both are restored on exit."""
        without_gradients = ((parameter, "requires_grad", False) for parameter in self.module.parameters())
        written = as_written(self.module.modules())
        with held([*without_gradients, *written]), evaluation_mode(self.module) as module:
            yield module

    def fingerprint(self) -> str:
        """A hash of the module's printed architecture, of all parameters, buffers and extra state, and of the input.

        Raises:
            ModelError: a tensor is sparse, quantized or without a shape, or extra state is not plain data.
        """
        described = (str(self.module), self.mean, self.std, self.num_classes, self.input_size, self.crop_pct)
        state = hashlib.sha256(repr((*described, self.interpolation, self.crop_mode, self.output)).encode())
        extra = extra_states(self.module)
        tensors = {f"{name}:": value for name, value in extra.items() if isinstance(value, Tensor)}
        plain = {name: value for name, value in extra.items() if not isinstance(value, Tensor)}
        state.update(json.dumps(plain, sort_keys=True).encode())
        for name, tensor in chain(self.module.named_parameters(), self.module.named_buffers(), tensors.items()):
            check_dense(name, tensor)
            state.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
            state.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        return state.hexdigest()[:20]

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation ``[1, C, 1, 1]`` on the device of a tensor."""
        mean, std = (torch.tensor(values, device=like.device, dtype=torch.float32) for values in (self.mean, self.std))
        return rearrange(mean, "c -> 1 c 1 1"), rearrange(std, "c -> 1 c 1 1")


def _own_size(module: nn.Module) -> tuple[int, int]:
    size = getattr(getattr(module, "patch_embed", None), "img_size", None)
    if isinstance(size, (tuple, list)) and len(size) == 2:
        return size[0], size[1]
    configured = getattr(module, "pretrained_cfg", None) or {}
    if "input_size" in configured:
        return configured["input_size"][1], configured["input_size"][2]
    raise ModelError(f"{type(module).__name__}: its input size is unknown; give Teacher(..., input_size=(C, H, W))")


def _input_sides(spec: ModelSpec, module: nn.Module) -> tuple[int, int]:
    """Height and width of the input."""
    if spec.img_size is None:
        return _own_size(module)
    return (spec.img_size, spec.img_size) if isinstance(spec.img_size, int) else spec.img_size


def load_teacher(spec: ModelSpec | str, weights: bool = True) -> Teacher:
    """The teacher of a recipe, in float32 on the CPU. The global random state does not change.

    Args:
        spec: the recipe's ``[model]`` section, or only its name. Without a source of trained weights, the weights are
            random, but always the same.
        weights: with ``False``, trained weights are not loaded; enough to look at the architecture.

    Raises:
        ModelError: unknown name, unreachable hub, weights that do not fit, or a size that the model cannot run at.
        DataError: damaged weights.
    """
    from timm.data import resolve_model_data_config

    if not isinstance(spec, (str, ModelSpec)):
        raise ModelError(f"load_teacher: expected a model's name or a ModelSpec, got {shown(spec)}")
    if not isinstance(weights, bool):
        raise ModelError(f"load_teacher: weights must be True or False, got {shown(weights)}")
    spec = ModelSpec(name=spec) if isinstance(spec, str) else spec
    module = build(spec, weights)
    config = resolve_model_data_config(module)
    size = (config["input_size"][0], *_input_sides(spec, module))
    try:
        return Teacher(
            module.eval(),
            mean=config["mean"],
            std=config["std"],
            num_classes=module.num_classes,
            input_size=size,
            name=spec.name,
            crop_pct=config["crop_pct"],
            interpolation=config["interpolation"],
            crop_mode=config["crop_mode"],
        )
    except ModelError as error:
        if spec.img_size is None or not isinstance(error.__cause__, Exception):
            raise
        raise ModelError(
            f"model.img_size: {spec.name} cannot run on {size[1]}x{size[2]} pixels ({first_line(error.__cause__)}); "
            "use another size, or leave it out"
        ) from None
