"""Warm-up before a model's first request: finds how much fits and which batch size is best.

limits      what memory is left, and whether the kernel killed processes for lack of it
forecast    how much memory a larger batch will take, from what smaller ones took
runs        runs the sizes on all lanes, within memory and time
cache       keeps what was measured, and which size ended a process, for the next start
notes       notes which size a process tries for the first time, readable after it died
fit         keeps batches from being larger than what fits
learning    refines which size is best by the lanes' real batches
prepare     puts one model's warm-up together
"""
