"""The teacher: a pretrained transformer with its own normalisation and input size."""

import difflib
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from attrs import define, field
from torch import Tensor, nn

from spdfq.errors import DataError, ModelError
from spdfq.recipe import ModelSpec
from spdfq.zoo import BUNDLED, data_file


@define(eq=False)
class Teacher:
    """A full-precision model and what its inputs look like.

    Args:
        module: any classifier taking normalised images ``[B, C, H, W]`` and returning logits ``[B, num_classes]``.
        mean: of each channel, for pixels in 0..1.
        std: of each channel.
        num_classes: length of the logits.
        input_size: ``(C, H, W)``; by default what the module's own ``patch_embed`` or timm configuration says.
        name: how reports call it.
        crop_pct: share of the image kept by the evaluation crop.
        interpolation: of the evaluation resize.
    """

    module: nn.Module
    mean: tuple[float, ...] = field(converter=tuple, kw_only=True)
    std: tuple[float, ...] = field(converter=tuple, kw_only=True)
    num_classes: int = field(kw_only=True)
    input_size: tuple[int, int, int] = field(default=None, kw_only=True)
    name: str = field(default="", kw_only=True)
    crop_pct: float = field(default=1.0, kw_only=True)
    interpolation: str = field(default="bilinear", kw_only=True)

    def __attrs_post_init__(self) -> None:
        self.name = self.name or type(self.module).__name__
        if self.input_size is None:
            self.input_size = (len(self.mean), *_own_size(self.module))
        if len({len(self.mean), len(self.std), self.input_size[0]}) > 1:
            raise ModelError(
                f"{self.name}: mean has {len(self.mean)} values, std {len(self.std)}, the input {self.input_size[0]} "
                "channels; they must agree"
            )
        if self.num_classes < 2:
            raise ModelError(f"{self.name}: needs at least 2 classes, got {self.num_classes}")

    @property
    def device(self) -> torch.device:
        """Where the parameters live."""
        return next(self.module.parameters()).device

    @property
    def parameters(self) -> int:
        """Number of parameters."""
        return sum(parameter.numel() for parameter in self.module.parameters())

    def normalise(self, pixels: Tensor) -> Tensor:
        """Pixels in 0..1 ``[B, C, H, W]`` to what the model takes."""
        mean, std = self._statistics(pixels)
        return (pixels - mean) / std

    def denormalise(self, images: Tensor) -> Tensor:
        """Normalised images back to pixels in 0..1."""
        mean, std = self._statistics(images)
        return (images * std + mean).clamp(0, 1)

    def pixel_range(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """The lowest and highest normalised value of each channel, ``[1, C, 1, 1]``."""
        mean, std = self._statistics(like)
        return (0 - mean) / std, (1 - mean) / std

    @contextmanager
    def frozen(self) -> Iterator[nn.Module]:
        """The module in evaluation mode without parameter gradients; both restored on exit."""
        modes = [(module, module.training) for module in self.module.modules()]
        wanted = [(parameter, parameter.requires_grad) for parameter in self.module.parameters()]
        try:
            self.module.eval().requires_grad_(False)
            yield self.module
        finally:
            for module, training in modes:
                module.training = training
            for parameter, flag in wanted:
                parameter.requires_grad_(flag)

    def fingerprint(self) -> str:
        """A hash of the architecture's printout, every weight and the input description."""
        described = (str(self.module), self.mean, self.std, self.num_classes, self.input_size, self.crop_pct)
        state = hashlib.sha256(repr((*described, self.interpolation)).encode())
        for name, tensor in self.module.state_dict().items():
            state.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
            state.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        return state.hexdigest()[:20]

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        mean, std = (torch.tensor(values, device=like.device).view(1, -1, 1, 1) for values in (self.mean, self.std))
        return mean, std


def _own_size(module: nn.Module) -> tuple[int, int]:
    size = getattr(getattr(module, "patch_embed", None), "img_size", None)
    if isinstance(size, (tuple, list)) and len(size) == 2:
        return size[0], size[1]
    configured = getattr(module, "pretrained_cfg", None) or {}
    if "input_size" in configured:
        return configured["input_size"][1], configured["input_size"][2]
    raise ModelError(f"{type(module).__name__}: its input size is unknown; give Teacher(..., input_size=(C, H, W))")


def load_teacher(spec: ModelSpec, weights: bool = True) -> Teacher:
    """The teacher a recipe names, on the CPU.

    Args:
        spec: the recipe's ``[model]`` section.
        weights: false builds the architecture alone (to look at its sites).

    Raises:
        ModelError: unknown name, unreachable hub, or weights that do not fit.
    """
    import timm
    from timm.data import resolve_model_data_config

    if spec.name.startswith("bundled:"):
        module = _bundled(spec, weights)
    else:
        module = _from_timm(timm, spec, weights)
    if spec.checkpoint and weights:
        _load_weights(module, Path(spec.checkpoint))
    config = resolve_model_data_config(module)
    size = (config["input_size"][0], *_own_size(module))
    return Teacher(
        module.eval(),
        mean=config["mean"],
        std=config["std"],
        num_classes=module.num_classes,
        input_size=size,
        name=spec.name,
        crop_pct=config["crop_pct"],
        interpolation=config["interpolation"],
    )


def _bundled(spec: ModelSpec, weights: bool) -> nn.Module:
    name = spec.name.removeprefix("bundled:")
    if name not in BUNDLED:
        raise ModelError(f"model.name: no bundled model {name!r} (bundled: {', '.join(sorted(BUNDLED))})")
    if spec.num_classes is not None or spec.img_size is not None:
        raise ModelError("model: a bundled model has its own num_classes and img_size; leave them out")
    module = BUNDLED[name].create()
    if weights and not spec.checkpoint:
        _load_weights(module, data_file(f"{name}.safetensors"))
    return module


def _from_timm(timm: Any, spec: ModelSpec, weights: bool) -> nn.Module:
    architecture, _, tag = spec.name.partition(".")
    if not timm.is_model(architecture):
        near = difflib.get_close_matches(architecture, timm.list_models(), n=3)
        hint = f"; did you mean {', '.join(near)}?" if near else ""
        raise ModelError(f"model.name: timm {timm.__version__} has no model {architecture!r}{hint}")
    tags = timm.list_pretrained(f"{architecture}*")
    if tag and spec.name not in tags:
        known = [name for name in tags if name.startswith(f"{architecture}.")]
        raise ModelError(
            f"model.name: {architecture} has no weights {tag!r} (timm knows: {', '.join(known) or 'none'})"
        )
    options = {"num_classes": spec.num_classes, "img_size": spec.img_size}
    given = {key: value for key, value in options.items() if value is not None}
    hub = spec.pretrained and not spec.checkpoint and weights
    try:
        return timm.create_model(spec.name, pretrained=hub, **given)
    except Exception as error:
        if not hub:
            raise ModelError(f"model: timm cannot build {spec.name} with {given}: {_first_line(error)}") from error
        raise ModelError(
            f"model.name: the weights of {spec.name} could not be taken from the hub ({_first_line(error)}); check the "
            "network, or give local ones: model.checkpoint = 'weights.safetensors'"
        ) from error


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:160]}"


def _load_weights(module: nn.Module, path: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if path.suffix != ".safetensors":
        raise ModelError(f"model.checkpoint: {path}: only .safetensors files are read (pickled weights can run code)")
    try:
        state = load_file(path)
    except FileNotFoundError:
        raise ModelError(f"model.checkpoint: {path}: no such file") from None
    except (SafetensorError, OSError) as error:
        raise DataError(f"model.checkpoint: {path}: damaged or not safetensors ({error})") from None
    try:
        module.load_state_dict(state, strict=True)
    except RuntimeError as error:
        reason = "; ".join(line.strip() for line in str(error).splitlines()[1:3])
        raise ModelError(f"model.checkpoint: {path}: does not fit {type(module).__name__}: {reason[:300]}") from None
