"""EAGLE-3 heads: a draft that is learned for one model (`effpass train draft`).

The model answers the prompts of a data set, and the head learns to go on as the model does: from the inputs of some of
its layers, and, unrolled over several tokens as in use (*training-time test*), from its own states.
"""
