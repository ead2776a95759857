"""The quantized model: a copy of a network with a quantizer at each of its quantized sites."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from spdfq.errors import ModelError, SpdfqError, first_line, is_out_of_memory
from spdfq.quantized.multiplications import FloatShare, Multiplications, float_share
from spdfq.quantized.shifted_linear import ShiftedLinear
from spdfq.quantized.sites import POINTS, WEIGHT, Site
from spdfq.quantized.visiting import OnProduct, Visit, ignore, visit_sites
from spdfq.quantizers import Quantizer
from spdfq.quantizers.affine import AffineQuantizer
from spdfq.registry import quantizers as registered_quantizers
from spdfq.runtime.shared_modules import copied

# smaller products, such as the angles of a rotary embedding, count in the share and are not listed
_LISTED_PERCENT = 0.01


class QuantizedModel(nn.Module):
    """A fake-quantized copy of a network: the tensors at its sites pass quantizers before they are used.

    Call the model itself. Its ``network`` computes in full precision if it is called alone.

    The network keeps its modules, attributes and names. The quantizers are children of this model: a module of the
    network could run one as a layer, or have a child of its own under the same name.

    Args:
        network: a float model; it is copied and not changed.
        sites: all sites by name, also those that stay in float.
        quantizers: the quantizers of the quantized sites, by site.
        leftovers: products whose operands cannot be replaced: site and function.
        biases: names of biases that steps added to layers without one.
        multiplications: those of one forward pass, by product; empty if they could not be counted.
        shifted: names of weights whose layers steps made shift and scale their inputs.
        norms: norms that steps replaced by an RMSNorm without parameters: features and eps, by module.
    """

    def __init__(
        self,
        network: nn.Module,
        sites: dict[str, Site],
        quantizers: dict[str, Quantizer],
        leftovers: dict[str, str],
        biases: Iterable[str] = (),
        multiplications: Iterable[Multiplications] = (),
        norms: Mapping[str, tuple[int, float | None]] = MappingProxyType({}),
        shifted: Iterable[str] = (),
    ) -> None:
        super().__init__()
        self.network = copied_network(network).eval().requires_grad_(False)
        self.sites, self.quantizers, self.leftovers = sites, dict(quantizers), leftovers
        self.site_quantizers = nn.ModuleDict()
        self.biases: list[str] = []
        self.norms: dict[str, tuple[int, float | None]] = {}
        self.shifted: list[str] = []
        self.notes: list[str] = []
        self.multiplications = list(multiplications)
        self.points = frozenset(site.kind for site in sites.values()) & POINTS
        for name, quantizer in quantizers.items():
            self.replace_quantizer(name, quantizer)
        for name in biases:
            self.bias(name)
        for name, (features, eps) in norms.items():
            self.replace_norm(name, features, eps)
        for name in shifted:
            self.shift_input(name)
        super().train(False)

    def forward(self, images: Tensor) -> Tensor:
        """The logits of normalised images ``[B, C, H, W]``.

        Several threads may call one model. `torch.compile` leaves it as it is. Under your own `torch.autocast`,
        products are computed in its dtype, and quantizers in float32. `spdfq.evaluate` measures without autocast.

        Raises:
            ModelError: `nn.DataParallel` replicated the model.
        """
        if getattr(self, "_is_replica", False):  # the weights of a replica are no parameters, so no site would be found
            raise ModelError("nn.DataParallel cannot run a quantized model; give each device a copy.deepcopy of it")
        if torch.compiler.is_dynamo_compiling():  # a compiler sees neither hooks nor function modes
            logits: Tensor = torch.compiler.disable(self.forward)(images)
            return logits
        with self.quantizing():
            return self.network(images)

    @contextmanager
    def quantizing(self) -> Iterator[None]:
        """Inside the ``with`` block, calls of ``network`` or of one of its blocks are quantized.

        Raises:
            SpdfqError: a site was not calibrated.
        """
        self.check_calibrated()
        with visit_sites(self.network, self.quantized, points=self.points):
            yield

    def quantized(self, name: str, kind: str, tensor: Tensor) -> Tensor:
        """The quantized tensor of a site, or the tensor itself if the site has no quantizer; a `Visit`."""
        quantizer = self.quantizers.get(name)
        if quantizer is None:
            return tensor
        return quantizer.of_weight(tensor) if kind == WEIGHT else quantizer(tensor)

    def check_calibrated(self) -> None:
        """Raises SpdfqError if a site was not calibrated."""
        if unfrozen := next((name for name, quantizer in self.quantizers.items() if not quantizer.frozen), None):
            raise SpdfqError(f"{unfrozen} was not calibrated; put {{ type = 'calibrate' }} first in quantization.steps")

    @contextmanager
    def visiting(self, visit: Visit, on_product: OnProduct = ignore) -> Iterator[None]:
        """Inside the ``with`` block, calls of the network pass the tensors of all sites to ``visit`` (`visit_sites`).

        The network's own quantizers are not applied.
        """
        with visit_sites(self.network, visit, points=self.points, on_product=on_product):
            yield

    def train(self, mode: bool = True) -> "QuantizedModel":
        """Does nothing: the network stays in evaluation mode, without stochastic depth."""
        return self

    def weight(self, name: str) -> nn.Parameter:
        """The float parameter behind a weight site."""
        return self.network.get_parameter(name)

    def bias(self, name: str) -> nn.Parameter:
        """The bias of a layer. A layer without a bias gets one of zeros, which is listed in ``biases``."""
        owner, leaf = self.network.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
        if getattr(owner, leaf) is None:
            weight = self.network.get_parameter(name.removesuffix("bias") + "weight")
            setattr(owner, leaf, nn.Parameter(weight.new_zeros(len(weight)), requires_grad=False))
            self.biases.append(name)
        return self.network.get_parameter(name)

    def replace_norm(self, name: str, features: int, eps: float | None) -> None:
        """Puts an RMSNorm without parameters in the place of a norm over the last axis; ``norms`` lists it."""
        self._replace_module(name, nn.RMSNorm(features, eps, elementwise_affine=False))
        self.norms[name] = (features, eps)

    def shift_input(self, weight: str) -> ShiftedLinear:
        """Puts a `ShiftedLinear` in the place of the `nn.Linear` of a weight; ``shifted`` lists it.

        Raises:
            ModelError: the weight is not that of a plain `nn.Linear`.
        """
        name = weight.removesuffix(".weight")
        layer = self.network.get_submodule(name)
        if not isinstance(layer, nn.Linear) or type(layer) is not nn.Linear:
            raise ModelError(f"{weight}: is not the weight of a plain nn.Linear, so its input cannot be shifted")
        shifted = ShiftedLinear(layer)
        self._replace_module(name, shifted)
        self.shifted.append(weight)
        return shifted

    def _replace_module(self, name: str, module: nn.Module) -> None:
        self.network.set_submodule(name, module.eval())
        owner = self.network.get_submodule(name.rpartition(".")[0])
        if isinstance(owner, nn.TransformerEncoderLayer):
            owner.activation_relu_or_gelu = 0  # its fast path would read weights instead of calling modules

    def affine(self, name: str) -> AffineQuantizer:
        """The quantizer of a site, which must have evenly spaced values.

        Raises:
            SpdfqError: its values are not evenly spaced.
        """
        quantizer = self.quantizers[name]
        if not isinstance(quantizer, AffineQuantizer):
            raise SpdfqError(f"{name}: this step needs evenly spaced values here, not a {type(quantizer).__name__}")
        return quantizer

    def replace_quantizer(self, name: str, quantizer: Quantizer) -> None:
        """Gives a site a new quantizer."""
        self.quantizers[name] = quantizer
        self.site_quantizers[f"{name}_quantizer".replace(".", "/")] = quantizer

    def tensors(self) -> dict[str, Tensor]:
        """All that steps can change, by name and not copied: parameters, and the tensors of frozen quantizers.

        A shared parameter has each of its names. Tensors of quantizers are called
        ``blocks.0.attn.qkv.weight_quantizer.scale``.
        """
        found: dict[str, Tensor] = dict(self.network.named_parameters(remove_duplicate=False))
        for name, quantizer in self.quantizers.items():
            if quantizer.frozen:
                found |= {f"{name}_quantizer.{key}": tensor for key, tensor in quantizer.tensors().items()}
        return found

    def note(self, step: str, lines: Iterable[str]) -> None:
        """Keeps lines about what a step left undone, and why, for ``sites.json``."""
        self.notes += [f"{step}: {line}" for line in lines]

    def weight_names(self, prefix: str = "") -> list[str]:
        """Names of the quantized weights that start with a prefix."""
        return [name for name in self.quantizers if self.sites[name].kind == WEIGHT and name.startswith(prefix)]

    def float_share(self) -> FloatShare:
        """How many multiplications of a forward pass have an operand in float."""
        return float_share(self.multiplications, lambda site: site in self.sites and site not in self.quantizers)

    def site_table(self) -> dict[str, Any]:
        """What is quantized and how, what stays in float, and what steps left undone, as plain data."""
        share = self.float_share()
        counts = {"total": share.total, "float": share.floating, "percent_in_float": round(share.percent, 4)}
        notes: dict[str, Any] = {"notes": self.notes} if self.notes else {}
        return {"quantized": self._quantized_rows(), "float": self._float_rows(), "multiplications": counts, **notes}

    def _quantized_rows(self) -> list[dict[str, Any]]:
        return [
            {
                "name": name,
                "kind": self.sites[name].kind,
                "quantizer": registered_quantizers.name_of(type(quantizer)),
                "bits": quantizer.bits,
                "granularity": "tensor" if quantizer.channel_axis is None else "channel",
                "shape": list(self.sites[name].shape),
            }
            for name, quantizer in self.quantizers.items()
        ]

    def _float_rows(self) -> list[dict[str, Any]]:
        left = [site for name, site in self.sites.items() if name not in self.quantizers and site.kind != WEIGHT]
        rows = [{"name": s.name, "what": f"{_description(s.kind)}, left in float", "parameters": 0} for s in left]
        rows += [
            {"name": name, "what": f"{what}, not quantized", "parameters": 0} for name, what in self.leftovers.items()
        ]
        unseen = {name: percent for name, percent in self.float_share().unseen.items() if name not in self.leftovers}
        rows += [
            {"name": name, "what": "product that no site accounts for, not quantized", "parameters": 0}
            for name, percent in unseen.items()
            if percent is None or percent >= _LISTED_PERCENT
        ]
        for name, parameter in self.network.named_parameters():
            if name not in self.quantizers:
                owner = type(self.network.get_submodule(name.rpartition(".")[0])).__name__
                what = f"weight of {owner}, left in float" if name in self.sites else f"parameter of {owner}"
                rows.append({"name": name, "what": what, "parameters": parameter.numel()})
        return rows


def copied_network(network: nn.Module, shared: Iterable[Tensor] = ()) -> nn.Module:
    """A copy of a network, in which no two numbers of a buffer share memory, so that all of them can be restored.

    Args:
        network: any module.
        shared: tensors that the copy takes from the network instead of copying them.

    Raises:
        ModelError: the network cannot be copied.
    """
    # a tensor with a graph cannot be copied; the hooks of `torch.nn.utils.weight_norm` leave one
    attributes = [value for part in network.modules() for value in vars(part).values() if isinstance(value, Tensor)]
    memo = {id(value): value.detach().clone() for value in attributes if not value.is_leaf}
    memo |= {id(tensor): tensor for tensor in shared}
    try:
        twin = copied(network, memo)
    except Exception as error:  # whatever the network's attributes raise
        if is_out_of_memory(error):
            raise
        raise ModelError(
            f"{type(network).__name__}: cannot be copied ({first_line(error)}); remove the attribute that cannot"
        ) from None
    for part in twin.modules():
        for name, buffer in part.named_buffers(recurse=False):
            if buffer.layout == torch.strided and not buffer.is_contiguous():
                setattr(part, name, buffer.contiguous())
    return twin


def _description(kind: str) -> str:
    return kind if kind in POINTS else f"{kind} of a product"
