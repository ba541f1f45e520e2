"""Names under which the parts of a step stand in a profiler's trace.

For `with torch.profiler.record_function(NAME)`, which costs microseconds while nothing is profiled.
"""

FULL_ATTENTION = "attention, full"
SPARSE_ATTENTION = "attention, sparse and window"
OPTIMIZER = "optimizer"
LOSS = "loss"
