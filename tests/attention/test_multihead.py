"""`nn.MultiheadAttention`: the body of its function is seen, and its results stay the same."""

from itertools import product

import pytest
import torch
from support.multihead import multihead_network
from torch import nn

from spdfq.attention import AttentionMode, attend, attention_probabilities, record_attention
from spdfq.attention.record import NEEDS
from spdfq.errors import ModelError


class Counting(AttentionMode):
    """Computes attention unchanged, and notes the shapes of the queries."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def attend(self, query, key, value, mask, scale):
        self.shapes.append(tuple(query.shape))
        return attend(query, key, value, mask, scale)


IMAGES, QUERIES, KEYS = 3, 4, 5
MASKS = {
    "none": None,
    "shared": torch.rand(QUERIES, KEYS, generator=torch.Generator().manual_seed(0)) < 0.3,
    "added": torch.randn(QUERIES, KEYS, generator=torch.Generator().manual_seed(0)),
    "per_head": torch.rand(IMAGES * 2, QUERIES, KEYS, generator=torch.Generator().manual_seed(0)) < 0.3,
}


def attention_module(**options):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = nn.MultiheadAttention(8, 2, **options).eval()
        for parameter in module.parameters():
            nn.init.normal_(parameter, std=0.5)
    return module


def states(tokens, width=8, first=True, seed=0):
    shape = (IMAGES, tokens, width) if first else (tokens, IMAGES, width)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def check_same(module, query, key, value, **options):
    expected = module(query, key, value, **options)
    with Counting() as mode:
        found = module(query, key, value, **options)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)
    assert len(mode.shapes) == 1


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"add_bias_kv": True}, {"add_zero_attn": True}])
def test_the_result_is_torchs_for_every_layout_and_mask(options):
    for first, mask, padded, weights in product((True, False), MASKS.values(), (False, True), (False, True)):
        module = attention_module(batch_first=first, **options)
        query, key, value = (states(n, first=first, seed=n) for n in (QUERIES, KEYS, KEYS))
        hidden = None if mask is None or mask.dtype != torch.bool else mask & (torch.arange(KEYS) > 0)
        padding = torch.arange(KEYS).expand(IMAGES, -1) > 3 if padded else None
        given = {"attn_mask": mask if hidden is None else hidden, "key_padding_mask": padding}
        if padded and mask is not None and mask.dtype != torch.bool:
            continue  # torch warns of masks of two types
        check_same(module, query, key, value, need_weights=weights, **given)
        check_same(module, query, key, key, need_weights=weights, **given)


def test_self_attention_in_evaluation_mode_has_a_fast_path_and_is_seen_all_the_same():
    module, tokens = attention_module(batch_first=True), states(QUERIES)
    check_same(module, tokens, tokens, tokens, need_weights=False)
    check_same(module, tokens, tokens, tokens, average_attn_weights=False)


def test_other_widths_of_keys_and_values_and_a_single_sequence():
    module = attention_module(kdim=6, vdim=10, batch_first=True)
    check_same(module, states(QUERIES), states(KEYS, 6), states(KEYS, 10))
    check_same(module, states(QUERIES)[0], states(KEYS, 6)[0], states(KEYS, 10)[0])


def test_a_causal_hint_counts_as_the_causal_mask():
    module, tokens = attention_module(batch_first=True), states(QUERIES)
    mask = torch.ones(QUERIES, QUERIES, dtype=torch.bool).triu(1)
    for weights in (False, True):
        check_same(module, tokens, tokens, tokens, attn_mask=mask, is_causal=True, need_weights=weights)


def test_dropout_and_ready_made_keys_are_refused():
    module = nn.MultiheadAttention(8, 2, dropout=0.5).train()
    with Counting(), pytest.raises(ModelError, match="put the model into evaluation mode"):
        module(*[states(QUERIES, first=False)] * 3)
    module = attention_module()
    with Counting(), pytest.raises(ModelError, match="static_k and static_v are not supported"):
        nn.functional.multi_head_attention_forward(
            *[states(QUERIES, first=False)] * 3,
            *(8, 2, module.in_proj_weight, module.in_proj_bias, None, None, False, 0.0),
            *(module.out_proj.weight, module.out_proj.bias, False),
            static_k=torch.zeros(IMAGES * 2, KEYS, 4),
        )


@pytest.mark.parametrize("name", ["torchvision", "clip", "encoder"])
def test_it_is_recorded_like_any_other_attention(name):
    module, images = multihead_network(name), torch.randn(2, 3, 32, 32)
    expected = module(images)
    with record_attention(module, NEEDS) as record:
        logits = module(images)
    torch.testing.assert_close(logits, expected, atol=2e-5, rtol=1e-4)
    prefix = 0 if name == "encoder" else 1
    assert (record.prefix, record.has_class) == (prefix, bool(prefix))
    assert record.grids == [(4, 4)] * 2
    assert [row.shape for row in record.class_attention] == [(2, 2, 16)] * 2
    assert [output.shape for output in record.attention_outputs] == [(2, 2, 16 + prefix, 16)] * 2
    assert [query.shape for query in record.queries] == [(2, 2, 16 + prefix, 16)] * 2


def test_the_recorded_class_row_is_the_softmax_row_that_torch_returns():
    module, images = multihead_network("torchvision"), torch.randn(2, 3, 32, 32)
    seen = []
    attention = module.encoder.layers[0].self_attention
    attention.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with record_attention(module) as record:
        module(images)
    expected = attention(seen[0], seen[0], seen[0], average_attn_weights=False)[1]
    torch.testing.assert_close(record.class_attention[0], expected[:, :, 0, 1:], atol=1e-6, rtol=1e-4)


def test_probabilities_are_those_of_the_softmax():
    query, key = torch.randn(2, 2, 4, 4), torch.randn(2, 2, 5, 4)
    with Counting() as mode:
        output, probabilities = mode.attend_with_probabilities(query, key, key, None, 0.5)
    torch.testing.assert_close(probabilities, attention_probabilities(query, key, None, 0.5))
    torch.testing.assert_close(output, probabilities @ key)


def test_a_query_that_pools_all_tokens_is_no_block():
    module = multihead_network("cross")
    with record_attention(module) as record:
        module(torch.randn(2, 3, 32, 32))
    assert record.names == ["layers.0", "layers.1"]
