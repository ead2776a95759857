"""Attention of any transformer: interception, recording and the arithmetic itself."""

from spdfq.attention.interception import PRODUCT_FUNCTIONS as PRODUCT_FUNCTIONS
from spdfq.attention.interception import SOFTMAX_FUNCTIONS as SOFTMAX_FUNCTIONS
from spdfq.attention.interception import AttentionMode as AttentionMode
from spdfq.attention.interception import FunctionMode as FunctionMode
from spdfq.attention.interception import fused_attention as fused_attention
from spdfq.attention.interception import module_names as module_names
from spdfq.attention.interception import unwatched as unwatched
from spdfq.attention.module_checks import watchable as watchable
from spdfq.attention.operations import attend as attend
from spdfq.attention.operations import attention_probabilities as attention_probabilities
from spdfq.attention.operations import attention_scores as attention_scores
from spdfq.attention.operations import explicit_attention as explicit_attention
from spdfq.attention.record import ATTENTION_OUTPUTS as ATTENTION_OUTPUTS
from spdfq.attention.record import CLASS_ATTENTION as CLASS_ATTENTION
from spdfq.attention.record import NEEDS as NEEDS
from spdfq.attention.record import QUERIES_AND_KEYS as QUERIES_AND_KEYS
from spdfq.attention.record import AttentionRecord as AttentionRecord
from spdfq.attention.recording import record_attention as record_attention
from spdfq.attention.token_grid import prefix_tokens as prefix_tokens
