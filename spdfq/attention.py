"""The one tap on attention's products: every transformer that calls `scaled_dot_product_attention` is seen here."""

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from attrs import define, field
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, handle_torch_function, has_torch_function

from spdfq.errors import ModelError

CLASS_ATTENTION = "class_attention"
ATTENTION_OUTPUTS = "attention_outputs"
QUERIES_AND_KEYS = "queries_and_keys"
NEEDS = frozenset({CLASS_ATTENTION, ATTENTION_OUTPUTS, QUERIES_AND_KEYS})
# queries x keys up to which explicit products keep up with the fused kernel on a CPU, forward and backward:
# benchmarks/attention.py
_EXPLICIT_LIMIT_CPU = 64 * 64
_POOLING_HEAD = "attn_pool"
# a smaller input is no image but tokens, whose sides say nothing about the token grid
_SMALLEST_IMAGE = 16
SOFTMAX_FUNCTIONS = frozenset({torch.softmax, Tensor.softmax, F.softmax})
_REMEDY = "it cannot be recorded, leave out the losses that need it"


class AttentionMode(TorchFunctionMode):
    """Hands each scaled-dot-product attention call to `attend`; every other function goes to `other`."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        """Compute the attention output ``[..., N_q, d]`` from its operands."""
        raise TypeError(f"{type(self).__name__} does not say how to attend")

    def other(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Compute any other function."""
        return func(*args, **kwargs)

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return self.other(func, args, kwargs or {})
        return self.attend(*_operands(*args, **(kwargs or {})))


def _operands(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, float]:
    """The operands of a `scaled_dot_product_attention` call, its mask and scale made explicit."""
    if dropout_p:
        raise ModelError("attention with dropout cannot be tapped; put the model into evaluation mode")
    if enable_gqa:
        groups = query.shape[-3] // key.shape[-3]
        key, value = (x.repeat_interleave(groups, dim=-3) for x in (key, value))
    if is_causal:
        attn_mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
    return query, key, value, attn_mask, query.shape[-1] ** -0.5 if scale is None else scale


def attention_probabilities(query: Tensor, key: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Softmax rows ``[..., N_q, N_k]`` in float32; the mask (boolean or additive) is applied before the softmax.

    Seen by an outer `record_attention`, like torch's own functions: so a quantized model's attention is recorded.
    """
    if has_torch_function((query, key)):
        return handle_torch_function(attention_probabilities, (query, key), query, key, mask, scale)
    with torch.autocast(query.device.type, enabled=False):
        scores = query.float() * scale @ key.float().mT
        return masked(scores, mask).softmax(-1)


def masked(scores: Tensor, mask: Tensor | None) -> Tensor:
    """Scores with a boolean (true = keep) or additive mask applied."""
    if mask is None:
        return scores
    return scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Attention output by the faster way: explicit products for few tokens on a CPU, the fused kernel elsewhere."""
    few = query.shape[-2] * key.shape[-2] <= _EXPLICIT_LIMIT_CPU
    if query.device.type == "cpu" and few:
        return explicit_attention(query, key, value, mask, scale)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)


def explicit_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Attention output by two products, the softmax between them in float32."""
    scores = masked(query * scale @ key.mT, mask)
    return scores.softmax(-1, dtype=torch.float32).to(value.dtype) @ value


@contextmanager
def fused_attention(model: nn.Module) -> Iterator[None]:
    """Set timm's ``fused_attn`` flags, so that attention goes through one function; restored on exit."""
    flagged: list[tuple[Any, Any]] = [
        (module, module.fused_attn) for module in model.modules() if hasattr(module, "fused_attn")
    ]
    try:
        for module, _ in flagged:
            module.fused_attn = True
        yield
    finally:
        for module, flag in flagged:
            module.fused_attn = flag


@contextmanager
def module_names(model: nn.Module) -> Iterator[list[str]]:
    """A stack of the names of the modules whose ``forward`` runs, innermost last (leaf modules are left out)."""
    stack: list[str] = []

    def leave(*_: Any) -> None:
        stack.pop()

    with ExitStack() as hooks:
        for name, module in model.named_modules():
            if next(module.children(), None) is not None:
                enter = module.register_forward_pre_hook(lambda *_, name=name: stack.append(name))
                hooks.callback(enter.remove)
                hooks.callback(module.register_forward_hook(leave, always_call=True).remove)
        yield stack


@define
class AttentionRecord:
    """What one forward pass showed, a list entry per attention in the order they ran.

    Args:
        names: module names.
        grids: token grid ``(h, w)`` of the keys, prefix tokens left out; the window's own for windowed attention, the
            pooled one where keys are pooled (PVT v2).
        class_attention: float32 ``[B, H, h*w]``: the class query's softmax row over patch tokens, or the mean over
            queries where there is no class token; windows are folded into the batch, image by image.
        attention_outputs: ``[B, H, N, d]``, prefix tokens included.
        queries: ``[B, H, N, d]`` as they are multiplied, prefix tokens included; rotated where positions are rotary.
        keys: ``[B, H, K, d]``, likewise. Their product is the raw score: without scale, position bias and mask.
        prefix: how many class and register tokens come before the patch tokens.
        has_class: whether the first of them is a class token.
    """

    names: list[str] = field(factory=list)
    grids: list[tuple[int, int]] = field(factory=list)
    class_attention: list[Tensor] = field(factory=list)
    attention_outputs: list[Tensor] = field(factory=list)
    queries: list[Tensor] = field(factory=list)
    keys: list[Tensor] = field(factory=list)
    prefix: int = 0
    has_class: bool = False

    def clear(self) -> None:
        """Forget what was recorded."""
        recorded = (self.class_attention, self.attention_outputs, self.queries, self.keys)
        for entries in (self.names, self.grids, *recorded):
            entries.clear()


@contextmanager
def record_attention(
    model: nn.Module,
    needs: frozenset[str] | set[str] = frozenset({CLASS_ATTENTION}),
    rows: int | None = None,
    grid: tuple[int, int] | None = None,
) -> Iterator[AttentionRecord]:
    """Record attention during calls of ``model`` inside the ``with`` block; each call starts afresh.

    Only what is asked for is computed: a class-token row costs O(N). Nothing stays behind on exit. A pooling head
    (timm's ``attn_pool``) is no block and is left out.

    Args:
        model: any module whose attention calls `scaled_dot_product_attention`, or does so when ``fused_attn`` is set.
            A quantized model is one; its queries and keys are the quantized ones, its outputs are not recorded.
        needs: any of ``class_attention``, ``attention_outputs`` and ``queries_and_keys``.
        rows: record the first so many images of the batch only.
        grid: the token grid, where some of its tokens were left out, so that the number of keys does not tell it.

    Raises:
        ModelError: an unknown need, or (from the forward pass) attention that is not over the token grid, that only
            some blocks hand to `scaled_dot_product_attention` (CaiT), or none.
    """
    if unknown := sorted(set(needs) - NEEDS):
        raise ModelError(f"cannot record {', '.join(unknown)}; known: {', '.join(sorted(NEEDS))}")
    if not needs:
        yield AttentionRecord()
        return
    with ExitStack() as stack:
        stack.enter_context(fused_attention(model))
        names = stack.enter_context(module_names(model))
        recorder = _Recorder(model, names, frozenset(needs), rows, grid)
        stack.callback(model.register_forward_pre_hook(recorder.begin, with_kwargs=True).remove)
        stack.callback(model.register_forward_hook(recorder.end).remove)
        stack.enter_context(recorder)
        yield recorder.record


def prefix_tokens(model: nn.Module) -> tuple[int, bool]:
    """How many class and register tokens precede the patch tokens, and whether the first of them is a class token."""
    trunk = _trunk(model)
    has_class = isinstance(getattr(trunk, "cls_token", None), Tensor)
    return int(getattr(trunk, "num_prefix_tokens", has_class)), has_class


def _trunk(model: nn.Module) -> nn.Module:
    """The module that makes the tokens: a wrapper, for example one that normalises, is looked through."""
    owners = (module for module in model.modules() if hasattr(module, "cls_token") or hasattr(module, "patch_embed"))
    return next(owners, model)


class _Recorder(AttentionMode):
    def __init__(
        self,
        model: nn.Module,
        names: list[str],
        needs: frozenset[str],
        rows: int | None,
        grid: tuple[int, int] | None,
    ) -> None:
        super().__init__()
        self.model, self.names, self.needs, self.rows, self.pruned = model, names, needs, rows, grid
        prefix, self.has_class = prefix_tokens(model)
        self.patches = getattr(getattr(_trunk(model), "patch_embed", None), "grid_size", None)
        self.record = AttentionRecord(prefix=prefix, has_class=self.has_class)
        self.batch = 0
        self.image: tuple[int, ...] = (1, 1)
        self.unseen: str | None = None

    def begin(self, _: nn.Module, inputs: tuple, named: dict[str, Any]) -> None:
        self.record.clear()
        self.unseen = None
        images = next(iter((*inputs, *named.values())))
        self.batch, self.image = len(images), tuple(getattr(images, "shape", ())[2:])
        if len(self.image) != 2 or min(self.image) < _SMALLEST_IMAGE:
            self.image = (1, 1)

    def end(self, *_: Any) -> None:
        if not self.record.names:
            raise ModelError(
                f"{type(self.model).__name__}: no attention went through scaled_dot_product_attention, so none can be "
                "recorded; leave out the losses that need attention"
            )
        if self.unseen is not None:
            raise ModelError(
                f"{self.unseen or type(self.model).__name__}: computes a softmax of its own while other modules call "
                f"scaled_dot_product_attention, so some attention would be missing; {_REMEDY}"
            )

    def other(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        if func is attention_probabilities:
            return self._quantized(*args)
        result = func(*args, **kwargs)
        if func in SOFTMAX_FUNCTIONS and self.unseen is None and result.ndim > 2 and not self._pools():
            self.unseen = self.names[-1] if self.names else ""
        return result

    def _quantized(self, query: Tensor, key: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        """The probabilities of a quantized model, which multiplies them by the values itself."""
        if not self._pools():
            if ATTENTION_OUTPUTS in self.needs:
                raise ModelError(f"{self._where()}: the attention outputs of a quantized model cannot be recorded")
            self._note(query, key)
            self._class_row(query, key, mask, scale)
        return attention_probabilities(query, key, mask, scale)

    def _pools(self) -> bool:
        return bool(self.names) and self.names[-1].rpartition(".")[2] == _POOLING_HEAD

    def _where(self) -> str:
        return (self.names and self.names[-1]) or type(self.model).__name__

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        if self._pools():
            return attend(query, key, value, mask, scale)
        self._note(query, key)
        probabilities = self._class_row(query, key, mask, scale)
        if probabilities is None:
            output = attend(query, key, value, mask, scale)
        else:
            output = probabilities.to(value.dtype) @ value
        if ATTENTION_OUTPUTS in self.needs:
            self.record.attention_outputs.append(output[self._kept(query)])
        return output

    def _note(self, query: Tensor, key: Tensor) -> None:
        name = self.names[-1] if self.names else ""
        self.record.grids.append(self._grid(name, query, key))
        self.record.names.append(name)
        if QUERIES_AND_KEYS in self.needs:
            kept = self._kept(query)
            self.record.queries.append(query[kept])
            self.record.keys.append(key[kept])

    def _class_row(self, query: Tensor, key: Tensor, mask: Tensor | None, scale: float) -> Tensor | None:
        """Record it where it is needed; all probabilities, where they had to be computed for it."""
        if CLASS_ATTENTION not in self.needs:
            return None
        kept = self._kept(query)
        if self.has_class:
            row = attention_probabilities(query[kept, :, :1], key[kept], _first_query(mask, query, kept), scale)
            self.record.class_attention.append(row[:, :, 0, self.record.prefix :])
            return None
        probabilities = attention_probabilities(query, key, mask, scale)
        patches = slice(self.record.prefix, None)
        self.record.class_attention.append(probabilities[kept, :, patches, patches].mean(-2))
        return probabilities

    def _kept(self, query: Tensor) -> slice:
        """The rows of the recorded images: windows are folded into the batch image by image."""
        return slice(None) if self.rows is None else slice(self.rows * (len(query) // self.batch))

    def _grid(self, name: str, query: Tensor, key: Tensor) -> tuple[int, int]:
        """The token grid of the keys; attention over channels, latents or in a layout of its own is refused."""
        where = self._where()
        if query.ndim != 4:
            raise ModelError(f"{where}: its attention runs on {list(query.shape)} instead of [B, H, N, d]; {_REMEDY}")
        tokens = key.shape[-2] - self.record.prefix
        if self.pruned and 0 < tokens <= self.pruned[0] * self.pruned[1]:
            return self.pruned
        window = getattr(self.model.get_submodule(name), "window_size", None)
        for grid in (window, self.patches):
            if isinstance(grid, (tuple, list)) and len(grid) == 2 and grid[0] * grid[1] == tokens:
                return grid[0], grid[1]
        if self.patches is None and (found := self._inferred(query, tokens)):
            return found
        expected = self.patches or window
        layout = f"the {expected[0]}x{expected[1]} token grid" if expected else f"a {self._shape()} token grid"
        layout += f" and {self.record.prefix} prefix tokens" if self.record.prefix else ""
        raise ModelError(f"{where}: attends over {key.shape[-2]} keys, not over {layout}; {_REMEDY}")

    def _inferred(self, query: Tensor, tokens: int) -> tuple[int, int] | None:
        """A grid in the image's proportions, of the keys and, lest latents pass for pooled keys, of the queries."""
        image = self.image if len(query) == self.batch else (1, 1)
        queries = query.shape[-2] - self.record.prefix
        whole = queries in (tokens, 1 - self.record.prefix) or _in_proportion(queries, image) is not None
        return _in_proportion(tokens, image) if whole else None

    def _shape(self) -> str:
        return "square" if self.image[0] == self.image[1] else f"{self.image[0]}:{self.image[1]}"


def _in_proportion(tokens: int, image: tuple[int, ...]) -> tuple[int, int] | None:
    """The grid ``(h, w)`` of so many tokens with ``h / w`` as in the image, where there is one."""
    height = math.isqrt(max(tokens, 0) * image[0] // image[1])
    width = tokens // height if height else 0
    return (height, width) if height * width == tokens > 0 and height * image[1] == width * image[0] else None


def _first_query(mask: Tensor | None, query: Tensor, kept: slice) -> Tensor | None:
    """What of a mask, broadcast or not, belongs to the first query of the kept rows."""
    if mask is None:
        return None
    mask = mask[kept] if mask.ndim == 4 and len(mask) == len(query) else mask
    return mask[..., :1, :]
