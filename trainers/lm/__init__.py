"""Pretraining of causal language models: `effpass train lm`.

transformers' Trainer and accelerate run the loop. What stands here: the config, packed text, synthetic tasks, the
choice of optimiser, the memory estimate, and a folder that holds everything the run was made of.
"""
