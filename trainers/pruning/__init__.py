"""Structured pruning: which units of a model stay, learned or scored, and the training of what is left.

`effpass train prune`. :mod:`~effpass.trainers.pruning.minimax` learns masks and sizes together with the weights;
:mod:`~effpass.trainers.pruning.scores` has the methods that look at a model once. All of them cut every layer alike, so
that the result is an ordinary checkpoint, and share the loss, the loop and the recovery.
"""
