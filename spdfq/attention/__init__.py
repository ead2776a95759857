"""The one tap on attention's products: every transformer that calls `scaled_dot_product_attention` is seen here."""

from spdfq.attention.interception import (
    PRODUCT_FUNCTIONS,
    SOFTMAX_FUNCTIONS,
    AttentionMode,
    attend,
    attention_probabilities,
    attention_scores,
    explicit_attention,
    fused_attention,
    module_names,
)
from spdfq.attention.recording import (
    ATTENTION_OUTPUTS,
    CLASS_ATTENTION,
    NEEDS,
    QUERIES_AND_KEYS,
    AttentionRecord,
    prefix_tokens,
    record_attention,
)

__all__ = [
    "ATTENTION_OUTPUTS",
    "CLASS_ATTENTION",
    "NEEDS",
    "PRODUCT_FUNCTIONS",
    "QUERIES_AND_KEYS",
    "SOFTMAX_FUNCTIONS",
    "AttentionMode",
    "AttentionRecord",
    "attend",
    "attention_probabilities",
    "attention_scores",
    "explicit_attention",
    "fused_attention",
    "module_names",
    "prefix_tokens",
    "record_attention",
]
