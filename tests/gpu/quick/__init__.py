"""`make gpu-quick`: ten minutes on a bare machine with one card; what docs/gpu.md says of it.

    __main__   puts the wheels of build/gpu-wheels in place, runs the steps, prints the table
    steps      which there are, how long each may take, what it tells
    step       one step, in a process of its own
    report     what it finds, written down as it goes
    driver     the driver's own functions, by ctypes: what they answer, as numbers
    kernels    PTX that the driver compiles itself; on the fake driver, what stands for it
    busy       an executor, a lane and an engine whose kernel takes as long as it is told to

    machine captures trap copies cases warmups shares resnet host path sticky     the steps

Only Python, NumPy, PyTorch and pytest need be installed there: `make gpu-wheels`, on a machine that
reaches a registry, collects all else (see gpu.wheels). ``--fake`` is a dry run on the fake driver:
to see that it runs; its figures mean nothing, and its lines say so.
"""
