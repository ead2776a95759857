"""Recording of attention during forward passes."""

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spdfq.attention.interception import (
    PRODUCT_FUNCTIONS,
    SOFTMAX_FUNCTIONS,
    AttentionMode,
    fused_attention,
    module_names,
)
from spdfq.attention.module_checks import uncompiled_module
from spdfq.attention.operations import attend, attention_probabilities, explicit_is_faster
from spdfq.attention.record import (
    ATTENTION_OUTPUTS,
    CANNOT_RECORD,
    CLASS_ATTENTION,
    NEEDS,
    QUERIES_AND_KEYS,
    AttentionRecord,
)
from spdfq.attention.token_grid import TokenGrids, prefix_tokens
from spdfq.errors import ModelError
from spdfq.runtime.shared_modules import own_hooks

_POOLING_HEAD = "attn_pool"
_SOFTMAX_NUMBER = "_spdfq_softmax"


@contextmanager
def record_attention(
    model: nn.Module,
    needs: frozenset[str] | set[str] = frozenset({CLASS_ATTENTION}),
    rows: int | None = None,
    grid: tuple[int, int] | None = None,
) -> Iterator[AttentionRecord]:
    """Record the attention of each call of ``model`` inside the ``with`` block; a call replaces the record before it.

    A call of a method, such as timm's ``forward_features``, or of a part of the model is recorded too. Only what is
    asked for is computed: the class token's row costs O(n). Nothing stays behind on exit. Pooling heads (timm's
    ``attn_pool``, or a single query where there is no class token) are not recorded.

    Args:
        model: any module whose attention calls `scaled_dot_product_attention`, or does so if ``fused_attn`` is set, or
            multiplies a softmax over the keys of a known window or patch grid by the values (Swin v2). For a quantized
            model, the quantized queries and keys are recorded; its outputs cannot be recorded.
        needs: any of ``class_attention``, ``attention_outputs`` and ``queries_and_keys``.
        rows: record only the first images of the batch, this many.
        grid: the token grid, if some of its tokens are left out, so that the number of keys does not show it.

    Raises:
        ModelError: an unknown need. The forward pass raises it if there is no attention, or if attention does not run
            over the token grid or is computed in another way (CaiT's talking heads); the message names the module.
    """
    if isinstance(needs, str):
        raise ModelError(f"needs must be a set of names, such as {{{needs!r}}}, got {needs!r}")
    if rows is not None and (type(rows) is not int or rows < 1):
        raise ModelError(f"rows must be a number of images from 1 up, got {rows!r}")
    if unknown := sorted(set(needs) - NEEDS):
        raise ModelError(f"cannot record {', '.join(unknown)}; known: {', '.join(sorted(NEEDS))}")
    if not needs:
        yield AttentionRecord()
        return
    model = uncompiled_module(model)
    with (
        module_names(model, lambda *call: recorder.begin_part(*call)) as names,
        fused_attention(model),
    ):
        recorder = _Recorder(model, names, frozenset(needs), rows, grid)
        begin = partial(model.register_forward_pre_hook, with_kwargs=True), recorder.begin
        with own_hooks([begin, (model.register_forward_hook, recorder.end)]), recorder:
            yield recorder.record


class _Recorder(AttentionMode):
    """Fills the record while a model runs.

    Three kinds of attention are recorded:

    * calls of `scaled_dot_product_attention`, in `attend`;
    * the probabilities of quantized models, in `_quantized`;
    * attention that a model computes itself. `_note_softmax` numbers each softmax of the model, and `_note_product`
      waits for the product of that softmax with the values. A softmax that is never multiplied in this way is refused,
      because a record of some blocks without the others would mislead.
    """

    def __init__(
        self,
        model: nn.Module,
        names: list[str],
        needs: frozenset[str],
        rows: int | None,
        grid: tuple[int, int] | None,
    ) -> None:
        super().__init__()
        self.model, self.names, self.needs, self.rows = model, names, needs, rows
        prefix, self.has_class = prefix_tokens(model)
        self.patch_tokens = slice(prefix, None)
        self.grids = TokenGrids(model, prefix, grid)
        self.record = AttentionRecord(prefix=prefix, has_class=self.has_class)
        self.softmax_numbers = itertools.count()
        self.unmatched: dict[int, str] = {}
        """Number of each softmax without its product so far, and the module that computed it."""
        self.padded: dict[str, str] = {}
        """Modules that padded their tokens, and the token grid before that."""
        self.first_product: str | None = None
        self.running = False
        """Whether the model itself is called, and not a method or a part of it."""
        self.first_part = ""
        """The part that takes the images if a method is called."""

    # the forward pass

    def begin(self, _: nn.Module, inputs: tuple, named: dict[str, Any]) -> None:
        self.running = True
        self._begin(next(iter((*inputs, *named.values()))))

    def begin_part(self, name: str, inputs: tuple) -> None:
        """If a method of the model is called, a forward pass begins where the images enter the first part."""
        takes_images = name and inputs and isinstance(inputs[0], Tensor) and inputs[0].ndim == 4
        if takes_images and self.first_part in ("", name):
            self.first_part = name
            self._begin(inputs[0])

    def _begin(self, images: Any) -> None:
        self.record.clear()
        self.unmatched.clear()
        self.padded.clear()
        self.grids.begin(images)

    def end(self, *_: Any) -> None:
        self.running = False
        self._refuse_unmatched()
        if not self.record.names:
            where = self._where(self.first_product or "")
            raise ModelError(
                f"{where}: no attention went through scaled_dot_product_attention or a softmax over tokens; "
                f"{CANNOT_RECORD}"
            )

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        if self._is_pooling_head() or self._pools(query, key):
            return attend(query, key, value, mask, scale)
        # first, so that the error names the block at fault and not the token layout of a later block
        self._refuse_unmatched()
        self._record_operands(query, key)
        output = self._output_and_class_row(query, key, value, mask, scale)
        if ATTENTION_OUTPUTS in self.needs:
            self.record.attention_outputs.append(output[self._recorded_rows(query)])
        return output

    def other(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        if func is attention_probabilities:
            return self._quantized(*args)
        result = func(*args, **kwargs)
        if func in SOFTMAX_FUNCTIONS and result.ndim > 2 and not self._is_pooling_head():
            over_keys = kwargs.get("dim", (*args, None, None)[1]) in (-1, result.ndim - 1)
            self._note_softmax(result, over_keys)
        elif func is F.pad and args and result.ndim == 4 and result.shape != args[0].shape:
            self.padded[self._name()] = "x".join(map(str, args[0].shape[1:3]))
        elif func in PRODUCT_FUNCTIONS and args and not self._is_pooling_head():
            self._note_product(args[0], result)
        return result

    def _quantized(
        self, query: Tensor, key: Tensor, mask: Tensor | None, scale: float, change: Callable[[Tensor], Tensor] | None
    ) -> Tensor:
        """The probabilities of a quantized model, which multiplies them by the values itself."""
        if not self._is_pooling_head() and not self._pools(query, key):
            if ATTENTION_OUTPUTS in self.needs:
                where = self._where(self._name())
                raise ModelError(
                    f"{where}: the attention outputs of a quantized model cannot be recorded; leave out the losses "
                    "that need them"
                )
            self._record_operands(query, key)
            self._record_class_row(query, key, mask, scale)
        return attention_probabilities(query, key, mask, scale, change)

    # attention through one function

    def _record_operands(self, query: Tensor, key: Tensor) -> None:
        name = self._named_once()
        self.record.grids.append(self.grids.of_keys(name, self._where(name), query, key))
        self._refuse_padding(name)
        self.record.names.append(name)
        if QUERIES_AND_KEYS in self.needs:
            rows = self._recorded_rows(query)
            self.record.queries.append(query[rows])
            self.record.keys.append(key[rows])

    def _output_and_class_row(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float
    ) -> Tensor:
        """The attention output; records the class attention if it is needed."""
        explicit = explicit_is_faster(query, key)
        # where all probabilities are computed anyway, a product for the class token's row alone would be a waste
        free = explicit and query.dtype == torch.float32
        if CLASS_ATTENTION not in self.needs or (self.has_class and not free):
            self._record_class_row(query, key, mask, scale)
            return attend(query, key, value, mask, scale)
        rows = self._recorded_rows(query)
        count = len(query[rows])
        if explicit or not count < len(query) == len(key) == len(value):
            return self._explicit_output(query, key, value, mask, scale, rows)
        # the probabilities of all other images would be kept for the gradient
        queries, keys, values = (x.split([count, len(x) - count]) for x in (query, key, value))
        masks = [_of_rows(mask, query, part) for part in (rows, slice(count, None))]
        output = self._explicit_output(queries[0], keys[0], values[0], masks[0], scale, rows)
        return torch.cat([output, attend(queries[1], keys[1], values[1], masks[1], scale)])

    def _explicit_output(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, rows: slice
    ) -> Tensor:
        """The attention output by explicit products; records the class attention of ``rows``."""
        probabilities = attention_probabilities(query, key, mask, scale)
        self._record_patches(probabilities[rows, ..., self.patch_tokens])
        return probabilities.to(value.dtype) @ value

    def _record_class_row(self, query: Tensor, key: Tensor, mask: Tensor | None, scale: float) -> None:
        """Record the class attention if it is needed, from products of the recorded images alone."""
        if CLASS_ATTENTION not in self.needs:
            return
        rows = self._recorded_rows(query)
        mask = _of_rows(mask, query, rows)
        query, key = query[rows], key[rows]
        if self.has_class:
            query, mask = query[:, :, :1], None if mask is None else mask[..., :1, :]
        self._record_patches(attention_probabilities(query, key, mask, scale)[..., self.patch_tokens])

    def _record_patches(self, patches: Tensor) -> None:
        """Record the class token's row, or the mean row, of probabilities ``[B, heads, q, h*w]`` over patches."""
        row = patches[:, :, 0] if self.has_class else patches[:, :, self.patch_tokens].mean(-2)
        self.record.class_attention.append(row)

    # attention that a model computes itself

    def _note_softmax(self, softmax: Tensor, over_keys: bool) -> None:
        """Number a softmax. Only one over the keys carries its number, so that `_note_product` can find it."""
        number = next(self.softmax_numbers)
        self.unmatched[number] = self._name()
        if over_keys:
            setattr(softmax, _SOFTMAX_NUMBER, number)

    def _note_product(self, left: Any, product: Tensor) -> None:
        """Record a product if its left operand is a numbered softmax and the product is attention."""
        self.first_product = self.first_product or self._name()
        number = getattr(left, _SOFTMAX_NUMBER, -1)
        if number in self.unmatched and self._is_attention(left, product):
            del self.unmatched[number]
            self._record_own(left, product)

    def _is_attention(self, probabilities: Tensor, output: Tensor) -> bool:
        """Whether ``[B, heads, n, k] @ [B, heads, k, d]`` attends over a grid that the module or the model states."""
        shaped = probabilities.ndim == output.ndim == 4 and probabilities.shape[:3] == output.shape[:3]
        tokens = probabilities.shape[-1] - self.record.prefix
        return (
            shaped
            and len(probabilities) % self.grids.batch == 0
            and self.grids.stated(self._name(), tokens) is not None
        )

    def _record_own(self, probabilities: Tensor, output: Tensor) -> None:
        name, rows = self._named_once(), self._recorded_rows(probabilities)
        if QUERIES_AND_KEYS in self.needs:
            raise ModelError(f"{name}: multiplies its queries and keys by itself; {CANNOT_RECORD}")
        self._refuse_padding(name)
        grid = self.grids.stated(name, probabilities.shape[-1] - self.record.prefix)
        assert grid is not None
        self.record.grids.append(grid)
        self.record.names.append(name)
        if CLASS_ATTENTION in self.needs:
            self._record_patches(probabilities[rows, ..., self.patch_tokens].float())
        if ATTENTION_OUTPUTS in self.needs:
            self.record.attention_outputs.append(output[rows])

    # refusals

    def _refuse_unmatched(self) -> None:
        if self.unmatched:
            where = self._where(next(iter(self.unmatched.values())))
            raise ModelError(
                f"{where}: computes a softmax of its own, not over the keys of a known window or patch grid; "
                f"{CANNOT_RECORD}"
            )

    def _refuse_padding(self, name: str) -> None:
        """Refuse windows with padding: their attention to tokens without pixels would count as the image's."""
        if tokens := self.padded.get(name.rpartition(".")[0]):
            raise ModelError(
                f"{name}: its windows reach beyond the {tokens} tokens; choose a model.img_size whose token grid is a "
                "multiple of the window in every stage, or leave out the losses that need attention"
            )

    # names and rows

    def _named_once(self) -> str:
        """The name of the attention. If only a part of the model is called, a name that comes again begins a pass."""
        name = self._name()
        if not self.running and not self.first_part and name in self.record.names:
            self.record.clear()
        return name

    def _name(self) -> str:
        return self.names[-1] if self.names else ""

    def _where(self, name: str) -> str:
        return name or type(self.model).__name__

    def _is_pooling_head(self) -> bool:
        return self._name().rpartition(".")[2] == _POOLING_HEAD

    def _pools(self, query: Tensor, key: Tensor) -> bool:
        """Whether a single query, which is no class token, attends to all tokens (SigLIP)."""
        return not self.has_class and query.shape[-2] == 1 < key.shape[-2]

    def _recorded_rows(self, query: Tensor) -> slice:
        """The rows of the recorded images. Windows are folded into the batch, image by image."""
        return slice(None) if self.rows is None else slice(self.rows * (len(query) // self.grids.batch))


def _of_rows(mask: Tensor | None, query: Tensor, rows: slice) -> Tensor | None:
    """The part of a mask, broadcast or not, that belongs to some rows of the query."""
    return mask[rows] if mask is not None and mask.ndim == 4 and len(mask) == len(query) else mask
