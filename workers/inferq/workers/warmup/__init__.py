"""What is done before a model's first request: how much fits, which batch size is best.

limits      what memory is left, and whether the kernel killed for want of it
forecast    what a larger batch will take, from what smaller ones took
runs        runs the sizes on all lanes, within memory and time
cache       what was measured, and which size ended a process, for the next start
notes       which size a process tries for the first time, readable after its death
fit         no batch runs that is larger than what fits
learning    the lanes' real batches go on refining which size is best
prepare     one model's warm-up, put together
"""
