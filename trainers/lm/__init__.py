"""Pretraining of causal language models: `effpass train lm`.

transformers' Trainer and accelerate run the training loop. This package adds the config, packed text, synthetic tasks
and rendered pictures as data, the choice of the optimizer, a memory estimate, and an output folder that records
everything the run was made of.
"""
