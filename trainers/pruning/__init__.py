"""Structured pruning: choose the units of a model to keep, cut the others, and train the pruned model.

This package implements `effpass train prune`. A *unit* is a part of a layer that can be removed, such as a KV group or
a feed-forward channel (:mod:`effpass.passes.weights.prunable_units`). :mod:`~effpass.trainers.pruning.minimax` learns
masks on the units and the sizes of the pruned model together with the weights;
:mod:`~effpass.trainers.pruning.scores` has methods that score the units of a given model once. All methods keep the
same number of units in every layer, so that the result is an ordinary checkpoint, and they share the loss, the training
loop and the recovery, which is the training after the cut.
"""
