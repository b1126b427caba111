"""Linear attention in transformers models: the layer, its cache, and hybrid models with linear and softmax attention.

Importing this package registers saved hybrids with `AutoConfig` and `AutoModelForCausalLM`.
"""

from effpass.runtime.linear_attention.hybrid import MODEL_TYPE, is_hybrid, linear_layers, make_hybrid
from effpass.runtime.linear_attention.layer import GatedDeltaAttention
from effpass.runtime.linear_attention.settings import GatedDeltaSettings
from effpass.runtime.linear_attention.state import StateLayer

__all__ = [
    "MODEL_TYPE",
    "GatedDeltaAttention",
    "GatedDeltaSettings",
    "StateLayer",
    "is_hybrid",
    "linear_layers",
    "make_hybrid",
]
