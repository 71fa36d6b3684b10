"""What touches NVIDIA's libraries, imported only in a process that was pinned to its GPU.

But for `gpus`, `libcuda`, `pinning` and `telemetry`: these ask the driver and make no CUDA context.
"""
