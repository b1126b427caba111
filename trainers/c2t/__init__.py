"""Training of the C2T classifier for a model and its draft (`effpass train c2t`; https://arxiv.org/abs/2502.13652)."""
