"""KV caches with a budget: each layer keeps its most important tokens, in buffers that hold no more than these."""
