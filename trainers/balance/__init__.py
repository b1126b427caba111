"""Long-context training with sparse attention whose ranks do not wait for each other (arXiv 2604.13847).

Three objects: the attention, which reads its budget from a tensor; the tuner, which gives each micro-batch the budgets
that its group's pace allows; the batch sampler, which shares a step's samples out so that micro-batches cost alike.
"""
