"""The ops as Triton kernels, for CUDA devices of capability 8.0 and newer. Nothing here is imported before it is needed."""
