"""Fine-tuning of causal language models: `effpass train sft`, `afa-lora` and `grpo`.

transformers' Trainer runs supervised fine-tuning, and TRL's GRPOTrainer reinforcement learning. What stands here: the
data, packing, what is trained (all weights, LoRA, or an annealed adapter), exact resume, and the memory said before.
"""
