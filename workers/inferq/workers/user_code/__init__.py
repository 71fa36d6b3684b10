"""User code: classes of model.py, each run by a process of its own (a lane) or by a thread.

`lane` is the worker's side, `child` the process. Between them are a socket, for messages of a few
bytes (`messages`), and two pieces of shared memory, for the tensors of a batch and of its answer
(`memory`, `tensors`). Nothing is pickled.
"""
