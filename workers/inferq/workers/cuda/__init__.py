"""What touches CUDA. Imported only in a process that was pinned to one GPU beforehand."""
