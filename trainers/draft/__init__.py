"""Training of EAGLE-3 heads, drafts for speculative decoding with one model (`effpass train draft`).

The model answers the prompts of a data set, and the head learns to predict the model's distribution: from the inputs of
some of the model's layers, and, unrolled over several tokens as in use (*training-time test*), from its own states.
"""
