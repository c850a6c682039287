"""The machine that runs the process: CPU, memory, threads, numba's settings."""
