"""The CUDA driver: checked calls, and ownership of what was made on the GPU."""
