"""What attention shows of itself during a forward pass, recorded through the tap."""

import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch.nn.functional as F
from attrs import define, field
from torch import Tensor, nn

from spdfq.attention.interception import (
    PRODUCT_FUNCTIONS,
    SOFTMAX_FUNCTIONS,
    AttentionMode,
    attend,
    attention_probabilities,
    fused_attention,
    module_names,
)
from spdfq.errors import ModelError

CLASS_ATTENTION = "class_attention"
ATTENTION_OUTPUTS = "attention_outputs"
QUERIES_AND_KEYS = "queries_and_keys"
NEEDS = frozenset({CLASS_ATTENTION, ATTENTION_OUTPUTS, QUERIES_AND_KEYS})
_POOLING_HEAD = "attn_pool"
# a smaller input is no image but tokens, whose sides say nothing about the token grid
_SMALLEST_IMAGE = 16
_SERIAL = "_spdfq_softmax"
_REMEDY = "it cannot be recorded, leave out the losses that need it"


@define
class AttentionRecord:
    """What one forward pass showed, a list entry per attention in the order they ran.

    Of attention that a model computes by itself (Swin v2), rows and outputs are the model's own tensors; the rest is
    computed here.

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
        model: any module whose attention calls `scaled_dot_product_attention`, or does so when ``fused_attn`` is set,
            or multiplies a softmax over the keys of a known window or patch grid with the values (Swin v2). A quantized
            model is one; its queries and keys are the quantized ones, its outputs are not recorded.
        needs: any of ``class_attention``, ``attention_outputs`` and ``queries_and_keys``.
        rows: record the first so many images of the batch only.
        grid: the token grid, where some of its tokens were left out, so that the number of keys does not tell it.

    Raises:
        ModelError: an unknown need, or (from the forward pass) attention that is not over the token grid, that is
            computed otherwise (CaiT's talking heads), or none; the message names the module.
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
        self.resized = False
        self.record = AttentionRecord(prefix=prefix, has_class=self.has_class)
        self.batch = 0
        self.image: tuple[int, ...] = (1, 1)
        self.serials = itertools.count()
        self.softmaxes: dict[int, str] = {}
        self.multiplies: str | None = None
        self.padded: dict[str, str] = {}

    def begin(self, _: nn.Module, inputs: tuple, named: dict[str, Any]) -> None:
        self.record.clear()
        self.softmaxes.clear()
        self.padded.clear()
        images = next(iter((*inputs, *named.values())))
        self.batch, self.image = len(images), tuple(getattr(images, "shape", ())[2:])
        self.resized = self._is_resized()
        if len(self.image) != 2 or min(self.image) < _SMALLEST_IMAGE:
            self.image = (1, 1)

    def _is_resized(self) -> bool:
        """Whether the images are not of the size the model states, as those of models that take any size."""
        stated = getattr(getattr(_trunk(self.model), "patch_embed", None), "img_size", None)
        return isinstance(stated, (tuple, list)) and len(self.image) == 2 and tuple(stated) != self.image

    def end(self, *_: Any) -> None:
        self._refuse_unrecorded()
        if not self.record.names:
            where = self._where(self.multiplies or "")
            raise ModelError(
                f"{where}: no attention went through scaled_dot_product_attention or a softmax over tokens; {_REMEDY}"
            )

    def other(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        if func is attention_probabilities:
            return self._quantized(*args)
        result = func(*args, **kwargs)
        if func in SOFTMAX_FUNCTIONS and result.ndim > 2 and not self._pools():
            over_keys = kwargs.get("dim", (*args, None, None)[1]) in (-1, result.ndim - 1)
            self._open(result, over_keys)
        elif func is F.pad and args and result.ndim == 4 and result.shape != args[0].shape:
            self.padded[self._name()] = "x".join(map(str, args[0].shape[1:3]))
        elif func in PRODUCT_FUNCTIONS and args and not self._pools():
            self._close(args[0], result)
        return result

    def _quantized(
        self, query: Tensor, key: Tensor, mask: Tensor | None, scale: float, change: Callable[[Tensor], Tensor] | None
    ) -> Tensor:
        """The probabilities of a quantized model, which multiplies them by the values itself."""
        if not self._pools():
            if ATTENTION_OUTPUTS in self.needs:
                where = self._where(self._name())
                raise ModelError(f"{where}: the attention outputs of a quantized model cannot be recorded")
            self._note(query, key)
            self._class_row(query, key, mask, scale)
        return attention_probabilities(query, key, mask, scale, change)

    def _open(self, softmax: Tensor, over_keys: bool) -> None:
        """A softmax is refused in the end unless it turns out to be attention; until then it carries its number."""
        serial = next(self.serials)
        self.softmaxes[serial] = self._name()
        if over_keys:
            setattr(softmax, _SERIAL, serial)

    def _close(self, left: Any, product: Tensor) -> None:
        """A product of a softmax that is attention, or of anything else."""
        self.multiplies = self.multiplies or self._name()
        serial = getattr(left, _SERIAL, -1)
        if serial in self.softmaxes and self._is_attention(left, product):
            del self.softmaxes[serial]
            self._keep(left, product)

    def _refuse_unrecorded(self) -> None:
        """A record of some blocks without the others would mislead."""
        if self.softmaxes:
            where = self._where(next(iter(self.softmaxes.values())))
            raise ModelError(
                f"{where}: computes a softmax of its own, not over the keys of a known window or patch grid; {_REMEDY}"
            )

    def _is_attention(self, probabilities: Tensor, output: Tensor) -> bool:
        """Whether ``[B, H, N, K] @ [B, H, K, d]`` attends over a grid that the module or the model states."""
        shaped = probabilities.ndim == output.ndim == 4 and probabilities.shape[:3] == output.shape[:3]
        tokens = probabilities.shape[-1] - self.record.prefix
        return shaped and len(probabilities) % self.batch == 0 and self._stated(self._name(), tokens) is not None

    def _keep(self, probabilities: Tensor, output: Tensor) -> None:
        """Record attention that the model computed by itself."""
        name, kept, patches = self._name(), self._kept(probabilities), slice(self.record.prefix, None)
        if QUERIES_AND_KEYS in self.needs:
            raise ModelError(f"{name}: multiplies its queries and keys by itself; {_REMEDY}")
        self._refuse_padding(name)
        grid = self._stated(name, probabilities.shape[-1] - self.record.prefix)
        assert grid is not None
        self.record.grids.append(grid)
        self.record.names.append(name)
        if CLASS_ATTENTION in self.needs:
            rows = probabilities[kept, ..., patches].float()
            self.record.class_attention.append(rows[:, :, 0] if self.has_class else rows[:, :, patches].mean(-2))
        if ATTENTION_OUTPUTS in self.needs:
            self.record.attention_outputs.append(output[kept])

    def _name(self) -> str:
        return self.names[-1] if self.names else ""

    def _where(self, name: str) -> str:
        return name or type(self.model).__name__

    def _pools(self) -> bool:
        return self._name().rpartition(".")[2] == _POOLING_HEAD

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        if self._pools():
            return attend(query, key, value, mask, scale)
        self._refuse_unrecorded()  # before what comes of it: the layout that follows would be blamed
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
        name = self._name()
        self.record.grids.append(self._grid(name, query, key))
        self._refuse_padding(name)
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
        where = self._where(name)
        if query.ndim != 4:
            raise ModelError(f"{where}: its attention runs on {list(query.shape)} instead of [B, H, N, d]; {_REMEDY}")
        tokens = key.shape[-2] - self.record.prefix
        if self.pruned and 0 < tokens <= self.pruned[0] * self.pruned[1]:
            return self.pruned
        if stated := self._stated(name, tokens):
            return stated
        if (self.patches is None or self.resized) and (found := self._inferred(query, tokens)):
            return found
        expected = self.patches or self._window(name)
        layout = f"the {expected[0]}x{expected[1]} token grid" if expected else f"a {self._shape()} token grid"
        if self.record.prefix:
            layout += f" and {self.record.prefix} prefix token{'s' if self.record.prefix > 1 else ''}"
        raise ModelError(f"{where}: attends over {key.shape[-2]} keys, not over {layout}; {_REMEDY}")

    def _window(self, name: str) -> tuple[int, int] | None:
        size = getattr(self.model.get_submodule(name), "window_size", None)
        return (size[0], size[1]) if isinstance(size, (tuple, list)) and len(size) == 2 else None

    def _refuse_padding(self, name: str) -> None:
        """Windows that reach beyond the image hold tokens without pixels, which must not pass for the image's."""
        if tokens := self.padded.get(name.rpartition(".")[0]):
            raise ModelError(
                f"{name}: its windows reach beyond the {tokens} tokens; choose a model.img_size whose token grid is a "
                "multiple of the window in every stage, or leave out the losses that need attention"
            )

    def _stated(self, name: str, tokens: int) -> tuple[int, int] | None:
        """The module's window or the model's patch grid, where it has so many tokens."""
        grids = [tuple(grid) for grid in (self._window(name), self.patches) if grid is not None]
        return next(((grid[0], grid[1]) for grid in grids if grid[0] * grid[1] == tokens), None)

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
