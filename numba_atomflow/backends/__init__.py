"""Backends, which run the ops of a step: CPU and CUDA."""
