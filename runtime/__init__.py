"""The decode engine: KV caches, CUDA graphs, and the generation loop around them."""
