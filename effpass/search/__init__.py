"""Search for a recipe: ``effpass optimize`` ranks legal recipes by the cost model and measures the promising ones.

choices     passes and options that can act on the model, and reasons why others are left out
calibrated  artifacts that choices need, learned from a calibration text
recipes     combinations of choices in a legal order
predict     predicted gain of each recipe
explore     which recipe to measure next, and when to stop
measure     time, memory and loss of one recipe, on another text
log         the folder in which a search is stored
run         the whole search, which can be resumed from its folder
"""
