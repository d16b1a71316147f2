"""Parts of `benchmarks/gpu_suite.py`: what is measured on a GPU, how it is timed, and how figures become rows."""
