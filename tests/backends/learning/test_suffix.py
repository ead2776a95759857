"""The float rest of a network after a block: its values and gradients are those of the whole network."""

import pytest
import timm
import torch
from support.backends import images, network
from support.multihead import multihead_network
from torch import nn

from spdfq.backends.blocks import block_names, tensors_of, with_tensors
from spdfq.backends.learning.suffix import Suffix
from spdfq.errors import ModelError
from spdfq.quantized import QuantizedModel
from spdfq.quantized.visiting import find_sites
from spdfq.runtime.shared_modules import own_hooks

COUNT = 3
TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
MORE = {
    "mean_token": ("vit_base_patch16_siglip_gap_224", TINY),
    "attention_pooling": ("vit_base_patch16_siglip_224", TINY),
    "hybrid": ("vit_tiny_r_s16_p8_224", {**TINY, "patch_size": 1}),
    "levit": ("levit_128s", {"embed_dim": (16, 32), "depth": (1, 1), "num_heads": (1, 2), "key_dim": 8}),
}
TIMM = ["vit", "deit_distilled", "dinov2_registers", "beit", "eva02", "swin", "swinv2", "cait"]
OTHERS = ["torchvision", "clip", "encoder", "cross", "repeated", "headless"]
# what an earlier block returns and the network uses after the last one but one
BYPASSED = {"cait": {0: [], 1: [], 2: [1], 3: []}, "cross": {0: [], 1: [0]}}


def built(name):
    if name in ("torchvision", "clip", "encoder", "cross"):
        return multihead_network(name)
    if name in MORE:
        entrypoint, arguments = MORE[name]
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return timm.create_model(entrypoint, num_classes=10, **arguments).eval()
    if name == "repeated":
        model = network("vit")
        model.blocks = nn.Sequential(model.blocks[0], model.blocks[0], model.blocks[1])
        return model
    return network("swin", num_classes=0) if name == "headless" else network(name)


def suffix_of(module, example, headless=False):
    sites, leftovers = find_sites(module, example)
    names = block_names(QuantizedModel(module, sites, {}, leftovers))
    return Suffix.of(module.requires_grad_(False), names, example, headless)


def continued(module, suffix, position, given, hidden):
    """The feature of the whole network in which a block call's output is replaced, by hooks on the network itself."""
    seen, features = [], []

    def replace(block, args, output):
        call = suffix.calls[len(seen)]
        if len(seen) == position:
            pairs = zip(call.returned.items(), hidden, strict=True)
            output = with_tensors(output, {index: stream.movedim(0, axis) for (index, axis), stream in pairs})
        seen.append(tensors_of(output))
        return output

    heads = [module.get_submodule(name) for name in suffix.classifiers]
    catch = [(head.register_forward_pre_hook, lambda _, args: features.append(args[0].flatten(1))) for head in heads]
    blocks = {call.name: module.get_submodule(call.name) for call in suffix.calls}
    with own_hooks([*((block.register_forward_hook, replace) for block in blocks.values()), *catch]):
        output = module(given)
    return torch.cat(features, -1) if features else output


def outputs_of(module, suffix, given):
    """The streams that each block call returns."""
    found = []

    def record(block, args, output):
        found.append(tuple(stream.clone() for stream in suffix.calls[len(found)].returned_streams(output)))

    blocks = {call.name: module.get_submodule(call.name) for call in suffix.calls}
    with own_hooks((block.register_forward_hook, record) for block in blocks.values()), torch.no_grad():
        module(given)
    return found


@pytest.mark.parametrize("name", [*TIMM, *MORE, *OTHERS])
def test_values_and_gradients_are_those_of_the_whole_network(name):
    side = 224 if name == "levit" else 32
    given = torch.randn(COUNT, 3, side, side, generator=torch.Generator().manual_seed(0))
    module = built(name)
    suffix = suffix_of(module, given[:1], name == "headless")
    assert bool(suffix.classifiers) == (name != "headless")
    assert suffix.needed == BYPASSED.get(name, {call.position: [] for call in suffix.calls})
    outputs = outputs_of(module, suffix, given)
    (feature,) = suffix.feature(given)
    assert feature.ndim == 2
    torch.testing.assert_close(feature, continued(module, suffix, -1, given, ()))
    for call in suffix.calls:
        leaves = [tuple((1.1 * stream).requires_grad_() for stream in outputs[call.position]) for _ in range(2)]
        earlier = {index: outputs[index] for index in suffix.needed[call.position]}
        (ours,) = suffix.after(call.position, leaves[0], given, earlier, None)
        whole = continued(module, suffix, call.position, given, leaves[1])
        torch.testing.assert_close(ours, whole)
        found, wanted = (
            torch.autograd.grad((values - feature).square().mean(), taken, materialize_grads=True)
            for values, taken in ((ours, leaves[0]), (whole, leaves[1]))
        )
        assert any(gradient.abs().max() > 0 for gradient in wanted)
        torch.testing.assert_close(found, wanted)


def test_it_can_stop_some_blocks_later():
    module = network("swin")
    suffix, given = suffix_of(module, images(1)), images(COUNT)
    outputs = outputs_of(module, suffix, given)
    for blocks, wanted in ((1, outputs[2]), (2, outputs[3]), (3, suffix.feature(given)), (9, suffix.feature(given))):
        found = suffix.after(1, outputs[1], given, {}, blocks)
        torch.testing.assert_close(found, wanted)


def test_it_shares_the_parameters_and_leaves_the_network_alone():
    module = network("swin")
    before = module(images(COUNT))
    suffix = suffix_of(module, images(1))
    shared = {id(parameter) for parameter in module.parameters()}
    assert {id(parameter) for parameter in suffix.network.parameters()} == shared
    assert not any("forward" in vars(part) or part._forward_pre_hooks for part in module.modules())
    assert torch.equal(module(images(COUNT)), before)


def test_earlier_outputs_are_kept_only_where_they_are_needed():
    suffix = suffix_of(network("cait"), images(1))
    for position in range(4):
        suffix.keep(position, (torch.full((1,), float(position)),))
    assert suffix.earlier(3) == {}
    assert {index: streams[0].item() for index, streams in suffix.earlier(2).items()} == {1: 1.0}


class Head(nn.Module):
    """Mean tokens, or the mean of a linear layer's output, as logits."""

    def __init__(self, per_token):
        super().__init__()
        body = network("vit")
        self.patch_embed, self.blocks, self.per_token = body.patch_embed, body.blocks, per_token
        self.head = nn.Linear(32, 10)

    def forward(self, pixels):
        tokens = self.blocks(self.patch_embed(pixels))
        return self.head(tokens).mean(1) if self.per_token else 2 * self.head(tokens.mean(1))


@pytest.mark.parametrize("per_token", [False, True])
def test_an_unknown_classifier_leaves_the_logits(per_token):
    module = Head(per_token)
    suffix = suffix_of(module, images(1))
    assert suffix.classifiers == []
    torch.testing.assert_close(suffix.feature(images(COUNT)), (module(images(COUNT)),))


class Seeing(nn.Module):
    """Keeps what it was given, besides passing it on."""

    seen = 0.0

    def forward(self, x):
        self.seen = x.mean()
        return x


class Skipping(nn.Module):
    """Adds something to its logits that its blocks do not return."""

    def __init__(self):
        super().__init__()
        self.body = network("vit")
        self.body.blocks[0].ls1 = Seeing()

    def forward(self, pixels):
        self.body.blocks[0].ls1.seen = 0.0
        return self.body(pixels) + self.body.blocks[0].ls1.seen


def test_a_network_whose_output_does_not_follow_from_its_blocks_is_refused():
    with pytest.raises(ModelError, match=r"^body.blocks.0: what the network computes after it does not follow"):
        suffix_of(Skipping(), images(1))
