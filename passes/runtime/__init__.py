"""Passes that need a KV cache or a decode loop owned by effpass."""
