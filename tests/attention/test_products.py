"""The products of attention: probabilities and outputs."""

import pytest
import torch
import torch.nn.functional as F

from spdfq.attention import attend, attention_probabilities, explicit_attention


def test_probabilities_computed_by_hand():
    query, key = torch.tensor([[[[2.0, 0.0]]]]), torch.tensor([[[[1.0, 5.0], [0.0, 7.0], [3.0, 1.0]]]])
    # scores / 2: 1, 0, 3; softmax: e^1, e^0, e^3 over their sum 23.80382
    assert attention_probabilities(query, key, None, 0.5).flatten().tolist() == pytest.approx(
        [0.114195, 0.042010, 0.843795], abs=1e-6
    )
    keep = torch.tensor([True, True, False])
    assert attention_probabilities(query, key, keep, 0.5).flatten().tolist() == pytest.approx(
        [0.731059, 0.268941, 0], abs=1e-6
    )
    bias = torch.tensor([0.0, 1.0, float("-inf")])
    assert attention_probabilities(query, key, bias, 0.5).flatten().tolist() == pytest.approx([0.5, 0.5, 0], abs=1e-6)


@pytest.mark.parametrize("mask", [None, "boolean", "additive"])
def test_explicit_and_fused_attention_agree(mask):
    generator = torch.Generator().manual_seed(3)
    query, key, value = (torch.randn(2, 3, 9, 8, generator=generator) for _ in range(3))
    masks = {
        None: None,
        "boolean": torch.ones(9, 9).tril().bool(),
        "additive": torch.randn(1, 3, 9, 9, generator=generator),
    }
    explicit = explicit_attention(query, key, value, masks[mask], 0.3)
    fused = F.scaled_dot_product_attention(query, key, value, masks[mask], scale=0.3)
    assert torch.allclose(explicit, fused, atol=1e-6)
    assert torch.equal(attend(query, key, value, masks[mask], 0.3), explicit)


@pytest.mark.parametrize(
    ("dtype", "tokens", "explicit"),
    [(torch.float32, 65, True), (torch.float32, 66, False), (torch.bfloat16, 200, True), (torch.bfloat16, 201, False)],
)
def test_few_tokens_are_explicit_products_on_a_cpu_more_in_bfloat16(dtype, tokens, explicit):
    query = torch.randn(1, 1, tokens, 8, generator=torch.Generator().manual_seed(3)).to(dtype).requires_grad_()
    output = attend(query, query, query, None, 0.3)
    assert output.dtype == dtype
    assert ("ScaledDotProduct" in output.grad_fn.name()) is not explicit
