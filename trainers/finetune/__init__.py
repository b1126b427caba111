"""Fine-tuning of causal language models: `effpass train sft`, `afa-lora` and `grpo`.

Supervised fine-tuning runs on transformers' Trainer, and reinforcement learning on TRL's GRPOTrainer. This package adds
the data format, packing, the choice of what is trained (all weights, LoRA, or an annealed adapter), exact resumption,
and a memory estimate before the run starts.
"""
