"""The CUDA backend: one block of device memory, fused FP8 kernels, the whole step in one captured graph."""
