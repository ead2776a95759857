"""A model whose products are quantized at named sites."""

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from attrs import frozen
from torch import Tensor, nn

from spdfq.errors import SpdfqError
from spdfq.quantized.products import BRANCH, INPUT, POINTS, Visit, Watch, ignore, maker, products
from spdfq.quantizers import Quantizer
from spdfq.quantizers.affine import AffineQuantizer


@frozen
class Site:
    """A tensor that takes part in a product, or is seen at another point.

    Args:
        name: for example ``blocks.0.attn.qkv.weight``, ``blocks.0.attn.qkv.input`` or ``blocks.0.attn.softmax``.
        kind: one of `spdfq.quantized.products.KINDS` or `POINTS`.
        shape: as seen with one image; a weight's own.
        maker: what made it, where that counts: ``gelu``.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    maker: str = ""


class QuantizedModel(nn.Module):
    """A fake-quantized copy of a network: every product's operands pass the quantizers of its sites.

    The network keeps its modules and attributes; a quantizer is a child of the module that multiplies, so that its
    state is found under ``network.blocks.0.attn.qkv.weight_quantizer.scale`` (of a Sequential, which would run it, it
    is a child of this model).

    Args:
        network: a float model; it is copied, not touched.
        sites: every site found, also those left in float.
        quantizers: a quantizer for each site that has one.
        leftovers: products whose operands cannot be replaced, and what they are.
        biases: names of biases that steps added to layers without one.
    """

    def __init__(
        self,
        network: nn.Module,
        sites: dict[str, Site],
        quantizers: dict[str, Quantizer],
        leftovers: dict[str, str],
        biases: Iterable[str] = (),
    ) -> None:
        super().__init__()
        self.network = copy.deepcopy(network).eval().requires_grad_(False)
        self.sites, self.quantizers, self.leftovers = sites, dict(quantizers), leftovers
        self.biases: list[str] = []
        self.notes: list[str] = []
        self.points = frozenset(site.kind for site in sites.values()) & POINTS
        for name, quantizer in quantizers.items():
            self.replace_quantizer(name, quantizer)
        for name in biases:
            self.bias(name)
        super().train(False)

    def forward(self, images: Tensor) -> Tensor:
        """The logits of normalised images ``[B, C, H, W]``."""
        with self.quantizing():
            return self.network(images)

    @contextmanager
    def quantizing(self) -> Iterator[None]:
        """Inside, calling ``network`` or one of its blocks is quantized.

        Raises:
            SpdfqError: a site was not calibrated.
        """
        self.check_calibrated()
        with products(self.network, self.quantized, points=self.points):
            yield

    def quantized(self, name: str, _: str, tensor: Tensor) -> Tensor:
        """What is multiplied at a site instead of the tensor there."""
        quantizer = self.quantizers.get(name)
        return tensor if quantizer is None else quantizer(tensor)

    def check_calibrated(self) -> None:
        """Raises SpdfqError where a site was not calibrated."""
        if unfrozen := next((name for name, quantizer in self.quantizers.items() if not quantizer.frozen), None):
            raise SpdfqError(f"{unfrozen} was not calibrated; put {{ type = 'calibrate' }} first in quantization.steps")

    @contextmanager
    def visiting(self, visit: Visit, watch: Watch = ignore) -> Iterator[None]:
        """Inside, every site's tensor of the float network passes ``visit``; ``watch`` is told of products."""
        with products(self.network, visit, points=self.points, watch=watch):
            yield

    def train(self, mode: bool = True) -> "QuantizedModel":
        """Changes nothing: the network stays in evaluation mode, without stochastic depth."""
        return self

    def weight(self, name: str) -> nn.Parameter:
        """The float parameter behind a weight site."""
        return self.network.get_parameter(name)

    def bias(self, name: str) -> nn.Parameter:
        """The bias of a layer; where the layer has none, one of zeros is added and listed in ``biases``."""
        owner = self.network.get_submodule(name.rpartition(".")[0])
        if owner.bias is None:
            weight = self.network.get_parameter(name.removesuffix("bias") + "weight")
            owner.bias = nn.Parameter(weight.new_zeros(len(weight)), requires_grad=False)
            self.biases.append(name)
        return self.network.get_parameter(name)

    def affine(self, name: str) -> AffineQuantizer:
        """The quantizer of a site whose values must be evenly spaced; another kind raises SpdfqError."""
        quantizer = self.quantizers[name]
        if not isinstance(quantizer, AffineQuantizer):
            raise SpdfqError(f"{name}: this step needs evenly spaced values here, not a {type(quantizer).__name__}")
        return quantizer

    def replace_quantizer(self, name: str, quantizer: Quantizer) -> None:
        """Give a site that has a quantizer another one."""
        self.quantizers[name] = quantizer
        owner, _, leaf = name.rpartition(".")
        module = self.network.get_submodule(owner)
        if isinstance(module, nn.Sequential):  # which would run it as one of its layers
            self.add_module(f"{name}_quantizer".replace(".", "_"), quantizer)
        else:
            module.add_module(f"{leaf}_quantizer", quantizer)

    def note(self, step: str, lines: Iterable[str]) -> None:
        """Keep what a step did not do, and why, for ``sites.json``."""
        self.notes += [f"{step}: {line}" for line in lines]

    def weight_names(self, prefix: str = "") -> list[str]:
        """Names of the parameters that have a quantizer, or of those that start with a prefix."""
        return [name for name in self.quantizers if self.sites[name].kind == "weight" and name.startswith(prefix)]

    def site_table(self) -> dict[str, list[Any]]:
        """What is quantized and how, everything that is left in float, and what steps left undone, as plain data."""
        notes: dict[str, list[Any]] = {"notes": self.notes} if self.notes else {}
        return {"quantized": self._quantized_rows(), "float": self._float_rows(), **notes}

    def _quantized_rows(self) -> list[dict[str, Any]]:
        from spdfq.registry import quantizers

        return [
            {
                "name": name,
                "kind": self.sites[name].kind,
                "quantizer": quantizers.name_of(type(quantizer)),
                "bits": quantizer.bits,
                "granularity": "tensor" if quantizer.channel_axis is None else "channel",
                "shape": list(self.sites[name].shape),
            }
            for name, quantizer in self.quantizers.items()
        ]

    def _float_rows(self) -> list[dict[str, Any]]:
        left = [site for name, site in self.sites.items() if name not in self.quantizers and site.kind != "weight"]
        rows = [{"name": s.name, "what": f"{_what(s.kind)}, left in float", "parameters": 0} for s in left]
        rows += [
            {"name": name, "what": f"{what}, not quantized", "parameters": 0} for name, what in self.leftovers.items()
        ]
        for name, parameter in self.network.named_parameters():
            if name not in self.quantizers:
                owner = type(self.network.get_submodule(name.rpartition(".")[0])).__name__
                what = f"weight of {owner}, left in float" if name in self.sites else f"parameter of {owner}"
                rows.append({"name": name, "what": what, "parameters": parameter.numel()})
        return rows


def _what(kind: str) -> str:
    return kind if kind in POINTS else f"{kind} of a product"


@torch.no_grad()
def find_sites(
    network: nn.Module, example: Tensor, points: frozenset[str] = frozenset()
) -> tuple[dict[str, Site], dict[str, str]]:
    """Every site of a network, in the order of a forward pass, and the products that cannot be quantized.

    Args:
        network: any module in evaluation mode.
        example: one normalised image ``[1, C, H, W]``.
        points: kinds of tensors to be seen besides the operands of products; what they see is no second site where it
            enters a linear layer or is added.
    """
    sites: dict[str, Site] = {}
    leftovers: dict[str, str] = {}

    def visit(name: str, kind: str, tensor: Tensor) -> Tensor:
        seen_before = kind in (INPUT, BRANCH) and maker(tensor) in points
        if not seen_before:
            sites.setdefault(name, Site(name, kind, tuple(tensor.shape), maker(tensor)))
        return tensor

    with products(network, visit, leftovers.setdefault, points):
        network(example)
    return sites, leftovers
