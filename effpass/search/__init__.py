"""Finding a recipe: legal ones are ranked by the cost model, and the promising ones measured on the decode engine.

choices     what each pass could do to this model, and why others are left out
calibrated  what choices need to know of the model, learned from one text
recipes     choices that stand together, in a legal order
predict     what each recipe should gain
explore     which one to measure next, and when to stop
measure     time, memory and loss of one recipe, on another text
run         all of it, kept in a folder that it goes on from
"""
