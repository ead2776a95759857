"""The token grid that an attention runs over: stated by the model, or inferred from the shape of the image."""

import math
from typing import Any

from torch import Tensor, nn

from spdfq.attention.record import CANNOT_RECORD
from spdfq.errors import ModelError

Grid = tuple[int, int]
# an input with shorter sides holds tokens, not pixels, so its shape says nothing about the token grid
_SMALLEST_IMAGE = 16
# timm and transformers, torchvision, CLIP
_CLASS_TOKENS = ("cls_token", "class_token", "class_embedding")
_OTHER_TOKENS = ("dist_token", "distillation_token", "register_tokens", "reg_token")


def prefix_tokens(model: nn.Module) -> tuple[int, bool]:
    """Number of class and register tokens before the patch tokens, and whether the first of them is a class token.

    The module that makes the tokens states it: by ``num_prefix_tokens``, or by the names of its parameters as in timm,
    torchvision, CLIP and Hugging Face transformers.
    """
    embedder = _embedder(model)
    has_class = any(isinstance(getattr(embedder, name, None), Tensor) for name in _CLASS_TOKENS)
    others = [getattr(embedder, name, None) for name in _OTHER_TOKENS]
    more = sum(tokens.shape[-2] for tokens in others if isinstance(tokens, Tensor) and tokens.ndim > 1)
    return int(getattr(embedder, "num_prefix_tokens", has_class + more)), has_class


def _embedder(model: nn.Module) -> nn.Module:
    """The module that makes the tokens. It may be inside a wrapper, for example one that normalises the images."""
    marks = (*_CLASS_TOKENS, "patch_embed")
    return next((module for module in model.modules() if any(hasattr(module, mark) for mark in marks)), model)


class TokenGrids:
    """Finds the token grids of a model's attentions.

    Args:
        model: the model.
        prefix: number of tokens before the patch tokens.
        pruned: the token grid if some of its tokens are left out, so that the number of keys does not show it.
    """

    def __init__(self, model: nn.Module, prefix: int, pruned: Grid | None) -> None:
        self.model, self.prefix, self.pruned = model, prefix, pruned
        embedding = getattr(_embedder(model), "patch_embed", None)
        self.patches = getattr(embedding, "grid_size", None)
        self._image_size = getattr(embedding, "img_size", None)
        self.begin(None)

    def begin(self, images: Any) -> None:
        """Note the shape of the images ``[B, C, H, W]`` that a forward pass starts with."""
        self.batch = 1 if images is None else len(images)
        self.image: tuple[int, ...] = tuple(getattr(images, "shape", ())[2:])
        stated = self._image_size
        # models that take any size still state the size that they were built for
        self.resized = isinstance(stated, (tuple, list)) and len(self.image) == 2 and tuple(stated) != self.image
        if len(self.image) != 2 or min(self.image) < _SMALLEST_IMAGE:
            self.image = (1, 1)

    def stated(self, name: str, tokens: int) -> Grid | None:
        """The window of a module or the patch grid of the model, if it has this number of tokens."""
        grids = [tuple(grid) for grid in (self._window(name), self.patches) if grid is not None]
        return next(((grid[0], grid[1]) for grid in grids if grid[0] * grid[1] == tokens), None)

    def of_keys(self, name: str, where: str, query: Tensor, key: Tensor) -> Grid:
        """The token grid of the keys.

        Args:
            name: name of the module that attends.
            where: what to call it in an error message.
            query: ``[B, heads, n, d]``.
            key: ``[B, heads, k, d]``.

        Raises:
            ModelError: the attention runs over channels, latents or in another layout.
        """
        if query.ndim != 4:
            raise ModelError(
                f"{where}: its attention runs on {list(query.shape)} instead of [B, H, N, d]; {CANNOT_RECORD}"
            )
        tokens = key.shape[-2] - self.prefix
        if self.pruned and 0 < tokens <= self.pruned[0] * self.pruned[1]:
            return self.pruned
        if stated := self.stated(name, tokens):
            return stated
        if (self.patches is None or self.resized) and (inferred := self._inferred(query, tokens)):
            return inferred
        raise ModelError(
            f"{where}: attends over {key.shape[-2]} keys, not over {self._expected(name)}; {CANNOT_RECORD}"
        )

    def _window(self, name: str) -> Grid | None:
        size = getattr(self.model.get_submodule(name), "window_size", None)
        return (size[0], size[1]) if isinstance(size, (tuple, list)) and len(size) == 2 else None

    def _inferred(self, query: Tensor, tokens: int) -> Grid | None:
        """A grid of the keys with the proportions of the image.

        The queries must form such a grid too, unless there are as many of them or only a class token. Otherwise latents
        could be mistaken for pooled keys.
        """
        image = self.image if len(query) == self.batch else (1, 1)
        queries = query.shape[-2] - self.prefix
        plausible = queries in (tokens, 1 - self.prefix) or _in_proportion(queries, image) is not None
        return _in_proportion(tokens, image) if plausible else None

    def _expected(self, name: str) -> str:
        """The layout that was expected, for an error message."""
        height, width = self.image
        grid = self.patches or self._window(name)
        shape = "square" if height == width else f"{height}:{width}"
        layout = f"the {grid[0]}x{grid[1]} token grid" if grid else f"a {shape} token grid"
        if self.prefix:
            layout += f" and {self.prefix} prefix token{'s' if self.prefix > 1 else ''}"
        return layout


def _in_proportion(tokens: int, image: tuple[int, ...]) -> Grid | None:
    """The grid ``(h, w)`` of this number of tokens with ``h / w`` as in the image; ``None`` if there is none."""
    height = math.isqrt(max(tokens, 0) * image[0] // image[1])
    width = tokens // height if height else 0
    return (height, width) if height * width == tokens > 0 and height * image[1] == width * image[0] else None
