"""The CUDA driver: checked calls, and ownership of GPU resources."""
