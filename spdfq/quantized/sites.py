"""Sites: the named places in a network where a tensor can be quantized, and their kinds."""

from attrs import frozen

WEIGHT, INPUT, QUERY, KEY, VALUE, SOFTMAX, PRODUCT = "weight", "input", "query", "key", "value", "softmax", "product"
OPERANDS = (WEIGHT, INPUT, QUERY, KEY, VALUE, SOFTMAX, PRODUCT)
"""Kinds of sites whose tensor is an operand of a product; ``product`` is an operand of an explicit product."""
LAYER_NORM, BRANCH, RESIDUAL, SCORES, LOGITS = "layer_norm", "branch", "residual", "scores", "logits"
POINTS = frozenset((LAYER_NORM, BRANCH, RESIDUAL, SCORES, LOGITS))
"""Kinds of sites between products."""
ATTENTION = frozenset((QUERY, KEY, VALUE, SOFTMAX, PRODUCT, SCORES))
"""Kinds of sites inside an attention module."""
GELU = "gelu"
"""A maker of tensors, not a kind of site: see `Site.maker`."""


@frozen
class Site:
    """A place in a network where a tensor can be quantized: an operand of a product, or a point between products.

    Args:
        name: for example ``blocks.0.attn.qkv.weight``, ``blocks.0.attn.qkv.input`` or ``blocks.0.attn.softmax``.
        kind: one of `OPERANDS` or `POINTS`.
        shape: shape of the tensor for one image; of a weight, its own shape.
        maker: what computed the tensor, as far as it matters: ``softmax``, ``gelu`` or the kind of an earlier point.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    maker: str = ""


def site_name(module: str, leaf: str) -> str:
    """The name of a site in a module; the module name may be empty."""
    return f"{module}.{leaf}" if module else leaf


def input_site(weight: str) -> str:
    """The name of the site of the activations that a weight is multiplied with."""
    return weight.removesuffix(WEIGHT) + INPUT if weight.endswith(WEIGHT) else f"{weight}_{INPUT}"
