"""Linear attention in transformers models: the layer, what it caches, and hybrids with other attention layers.

Importing this package makes `AutoConfig` and `AutoModelForCausalLM` know hybrids that were saved.
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
