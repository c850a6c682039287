"""The host: CPU, threads, versions, numba's settings."""
