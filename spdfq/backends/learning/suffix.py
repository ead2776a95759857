"""The float rest of a network after a block, up to the feature before the classifier."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from attrs import define, field
from torch import Tensor, nn

from spdfq.backends.blocks import BlockCall, Hidden, all_block_calls, tensors_of
from spdfq.errors import ModelError
from spdfq.quantized.model import copied_network
from spdfq.quantized.place import modules_of_role
from spdfq.runtime.shared_modules import own_hooks

_SAME = 1e-4  # relative to the largest value of the feature


class _Reached(Exception):
    """Ends a forward pass whose result is known."""


@define(eq=False)
class Suffix:
    """Computes what a float network makes of the output of one of its blocks.

    It runs a copy of the network, with the same parameters, whose blocks return given tensors up to that block. So what
    lies between the blocks and after them is the network's own code. A block before it returns zeros, except where the
    rest of the network uses its output (the patches in CaiT); then it returns what `keep` was given.

    The feature is the input of the classifier: of the modules that timm's configuration names, or of the linear layer
    whose output the network returns. If there is neither, or no head, it is the network's output.

    Args:
        network: the copy.
        calls: every call of a block, in order.
        classifiers: names of the classifiers; empty if the feature is the network's output.
        needed: for each call, the earlier calls whose output the network uses after it.
    """

    network: nn.Module
    calls: list[BlockCall]
    classifiers: list[str] = field(factory=list, init=False)
    needed: dict[int, list[int]] = field(factory=dict, init=False)
    _kept: dict[int, Hidden] = field(factory=dict, init=False)
    _blanks: dict[tuple[int, ...], Tensor] = field(factory=dict, init=False)
    _returns: dict[int, Hidden] = field(factory=dict, init=False)
    _images: int = field(default=0, init=False)
    _position: int = field(default=0, init=False)
    _start: int = field(default=-1, init=False)
    _end: int | None = field(default=None, init=False)
    _features: list[Tensor] = field(factory=list, init=False)

    @classmethod
    @torch.no_grad()
    def of(cls, network: nn.Module, names: list[str], example: Tensor, headless: bool) -> "Suffix":
        """The suffixes of a network, from some forward passes of an example.

        Args:
            network: the float network; its parameters must not require gradients.
            names: of all blocks.
            example: one image ``[1, C, H, W]``.
            headless: the network returns features; they are the feature then.

        Raises:
            ModelError: the network's output does not follow from the outputs of its blocks.
        """
        twin = copied_network(network, shared=network.parameters())
        suffix = cls(twin, all_block_calls(network, names, example))
        if not headless:
            suffix._watch_classifiers(example)
        for name in names:
            block = suffix.network.get_submodule(name)
            block.forward = partial(suffix._call, block.forward)  # type: ignore[method-assign]
        suffix._find_needed(example)
        return suffix

    def feature(self, images: Tensor) -> Hidden:
        """The float network's feature of images ``[n, C, H, W]``: one tensor ``[n, D]``."""
        return self._run(-1, {}, images, None)

    def after(
        self, position: int, hidden: Hidden, images: Tensor, earlier: dict[int, Hidden], blocks: int | None
    ) -> Hidden:
        """What the network computes when the block called at a position returns ``hidden``.

        Args:
            position: index of the call among all block calls.
            hidden: the streams that the block returns.
            images: the images that they belong to, ``[n, C, H, W]``.
            earlier: what the calls before it that are needed return, for the same images.
            blocks: how many block calls later to stop; ``None`` goes on to the feature.
        """
        end = None if blocks is None or position + blocks >= len(self.calls) else position + blocks
        return self._run(position, {**earlier, position: hidden}, images, end)

    def keep(self, position: int, hidden: Hidden) -> None:
        """Stores what the call at a position returned for all images, if the rest of the network needs it later."""
        if any(position in needed for needed in self.needed.values()):
            self._kept[position] = hidden

    def earlier(self, position: int) -> dict[int, Hidden]:
        """What `after` needs of the calls before a position, for all images."""
        return {index: self._kept[index] for index in self.needed[position]}

    def _run(self, start: int, returns: dict[int, Hidden], images: Tensor, end: int | None) -> Hidden:
        self._position, self._start, self._end, self._returns, self._features = 0, start, end, returns, []
        self._images = len(images)
        try:
            output = self.network(images)
        except _Reached as reached:
            return reached.args[0]  # type: ignore[no-any-return]
        finally:
            self._returns, self._features = {}, []
        return (output,)

    def _call(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        position = self._position
        self._position += 1
        call = self.calls[position]
        if position > self._start:
            output = forward(*args, **kwargs)
        else:
            given = self._returns.get(position)
            # cloned, because the network may change it in place
            hidden = self._blank(call) if given is None else tuple(tensor.clone() for tensor in given)
            output = call.output_of(hidden)
        if position == self._end:
            raise _Reached(call.returned_streams(output))
        return output

    def _blank(self, call: BlockCall) -> Hidden:
        """Zeros in the shapes of what a call returns."""
        return tuple(self._zeros(stream) for stream in call.returned_streams(call.output))

    def _zeros(self, one_image: Tensor) -> Tensor:
        shape = (len(one_image) * self._images, *one_image.shape[1:])
        if shape not in self._blanks:
            self._blanks[shape] = one_image.new_zeros(shape)
        return self._blanks[shape]

    def _watch_classifiers(self, example: Tensor) -> None:
        """Finds the classifiers, and stops the forward pass at the last of them."""
        modules = dict(self.network.named_modules())
        outputs: dict[str, list[Any]] = {}
        handles = [
            module.register_forward_hook(lambda *seen, name=name: outputs.setdefault(name, []).append(seen[1:]))
            for name, module in modules.items()
        ]
        returned = self.network(example)
        for handle in handles:
            handle.remove()
        linear = [name for name, module in modules.items() if isinstance(module, nn.Linear)]
        last = [name for name in linear if any(output is returned for _, output in outputs.get(name, []))]
        named = modules_of_role(self.network, "last") or last
        once = all(len(outputs.get(name, [])) == 1 and _is_row(outputs[name][0][0]) for name in named)
        self.classifiers = named if once else []
        for name in self.classifiers:
            modules[name].register_forward_pre_hook(self._reach)

    def _reach(self, _: nn.Module, args: tuple) -> None:
        self._features.append(args[0].flatten(1))
        if len(self._features) == len(self.classifiers):
            raise _Reached((torch.cat(self._features, dim=-1),))

    def _find_needed(self, example: Tensor) -> None:
        """Finds out which earlier calls the network still uses after each call."""
        outputs = self._outputs(example)
        wanted = self.feature(example)
        names = [call.name for call in self.calls]
        firsts = {names.index(name) for name in names}  # only these are reconstructed, so only their outputs are known

        def reaches(position: int, earlier: Sequence[int]) -> bool:
            given = {index: outputs[index] for index in earlier}
            found = self.after(position, outputs[position], example, given, None)
            return all(_alike(ours, theirs) for ours, theirs in zip(found, wanted, strict=True))

        for position, call in enumerate(self.calls):
            before = range(position)
            if reaches(position, []):
                self.needed[position] = []
            elif reaches(position, before):
                self.needed[position] = [
                    index for index in before if not reaches(position, [other for other in before if other != index])
                ]
            if not firsts.issuperset(self.needed.get(position, [-1])):
                raise ModelError(
                    f"{call.name}: what the network computes after it does not follow from what its blocks return, so "
                    "global_local cannot be used; use blockwise"
                )
        self._blanks.clear()

    def _outputs(self, example: Tensor) -> list[Hidden]:
        """What each call returns for an example."""
        outputs: list[Hidden] = []

        def record(_: nn.Module, __: tuple, output: Any) -> None:
            streams = self.calls[len(outputs)].returned_streams(output)
            outputs.append(tuple(tensor.clone() for tensor in streams))

        blocks = [self.network.get_submodule(name) for name in {call.name for call in self.calls}]
        with own_hooks((block.register_forward_hook, record) for block in blocks):
            self.feature(example)
        return outputs


def _is_row(args: tuple) -> bool:
    """Whether the input of a module for one image is one row of features."""
    return bool(tensors_of(args)) and isinstance(args[0], Tensor) and args[0].ndim >= 2 and len(args[0]) == 1


def _alike(ours: Tensor, theirs: Tensor) -> bool:
    limit = _SAME * float(theirs.nan_to_num().abs().max())
    return bool(torch.isclose(ours, theirs, rtol=0, atol=limit, equal_nan=True).all())
