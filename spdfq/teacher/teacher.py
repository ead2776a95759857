"""The teacher: a pretrained transformer with the normalisation and size of its input."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from attrs import define, field
from einops import rearrange
from torch import Tensor, nn

from spdfq.errors import ModelError, is_out_of_memory
from spdfq.recipe import ModelSpec
from spdfq.teacher.architectures import build, first_line
from spdfq.teacher.state import check_dense, extra_states


def _floats(values: Iterable[Any]) -> tuple[float, ...]:
    return tuple(map(float, values))


@contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[nn.Module]:
    """The module in evaluation mode; on exit, the mode of every submodule is restored."""
    modes = [(part, part.training) for part in module.modules()]
    try:
        yield module.eval()
    finally:
        for part, training in modes:
            part.training = training


@define(eq=False)
class Teacher:
    """A full-precision model and the description of its input.

    Args:
        module: any network in float32 from normalised images ``[B, C, H, W]`` to logits ``[B, num_classes]``, or to
            features ``[B, D]`` if it has no head.
        mean: of each channel, for pixels in 0..1.
        std: of each channel, for pixels in 0..1.
        num_classes: number of logits; 0 for a model without a head.
        input_size: ``(C, H, W)``; by default that of the module's ``patch_embed`` or timm configuration.
        name: the model's name in reports.
        crop_pct: share of the image that the evaluation crop keeps.
        interpolation: interpolation of the evaluation resize.
        crop_mode: timm's mode of the evaluation crop.
    """

    module: nn.Module
    mean: tuple[float, ...] = field(converter=_floats, kw_only=True)
    std: tuple[float, ...] = field(converter=_floats, kw_only=True)
    num_classes: int = field(kw_only=True)
    input_size: tuple[int, int, int] = field(default=None, kw_only=True)
    name: str = field(default="", kw_only=True)
    crop_pct: float = field(default=1.0, kw_only=True)
    interpolation: str = field(default="bilinear", kw_only=True)
    crop_mode: str = field(default="center", kw_only=True)

    def __attrs_post_init__(self) -> None:
        self.name = self.name or type(self.module).__name__
        if self.input_size is None:
            self.input_size = (len(self.mean), *_own_size(self.module))
        coarse = {p.dtype for p in self.module.parameters() if p.is_floating_point()} - {torch.float32}
        if coarse:
            raise ModelError(f"{self.name}: has weights in {_named(coarse)}; give Teacher(module.float(), ...)")
        if len({len(self.mean), len(self.std), self.input_size[0]}) > 1:
            raise ModelError(
                f"{self.name}: mean has {len(self.mean)} values, std {len(self.std)}, the input {self.input_size[0]} "
                "channels; they must agree"
            )
        if not all(value > 0 for value in self.std):
            raise ModelError(f"{self.name}: std must be above 0, got {list(self.std)}")
        if self.num_classes < 2 and not self.headless:
            raise ModelError(
                f"{self.name}: needs at least 2 classes, or 0 for a backbone without a head, got {self.num_classes}"
            )

    @property
    def headless(self) -> bool:
        """Whether the network returns features instead of logits."""
        return self.num_classes == 0

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        parameter = next(self.module.parameters(), None)
        return torch.device("cpu") if parameter is None else parameter.device

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

    def pixel_range(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """The lowest and highest normalised value of each channel, ``[1, C, 1, 1]``."""
        mean, std = self._statistics(like)
        return (0 - mean) / std, (1 - mean) / std

    @contextmanager
    def frozen(self) -> Iterator[nn.Module]:
        """The module in evaluation mode and without parameter gradients; both are restored on exit."""
        wanted = [(parameter, parameter.requires_grad) for parameter in self.module.parameters()]
        try:
            with evaluation_mode(self.module) as module:
                yield module.requires_grad_(False)
        finally:
            for parameter, flag in wanted:
                parameter.requires_grad_(flag)

    def fingerprint(self) -> str:
        """A hash of the module's printed architecture, of all parameters, buffers and extra state, and of the input.

        Raises:
            ModelError: a tensor is sparse, quantized or without a shape, or extra state is not plain data.
        """
        described = (str(self.module), self.mean, self.std, self.num_classes, self.input_size, self.crop_pct)
        state = hashlib.sha256(repr((*described, self.interpolation, self.crop_mode)).encode())
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
        mean, std = (torch.tensor(values, device=like.device) for values in (self.mean, self.std))
        return rearrange(mean, "c -> 1 c 1 1"), rearrange(std, "c -> 1 c 1 1")


def _named(dtypes: set[torch.dtype]) -> str:
    return " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))


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


@torch.no_grad()
def _try_size(spec: ModelSpec, module: nn.Module, size: tuple[int, int, int]) -> None:
    try:
        module(torch.zeros(1, *size))
    except Exception as error:  # each architecture fails with its own error
        if is_out_of_memory(error):
            raise
        raise ModelError(
            f"model.img_size: {spec.name} cannot run on {size[1]}x{size[2]} pixels ({first_line(error)}); use another "
            "size, or leave it out"
        ) from None


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

    spec = ModelSpec(name=spec) if isinstance(spec, str) else spec
    module = build(spec, weights)
    config = resolve_model_data_config(module)
    size = (config["input_size"][0], *_input_sides(spec, module))
    if spec.img_size is not None:
        _try_size(spec, module.eval(), size)
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
