"""Learn linear attention from the attention that it replaces."""
