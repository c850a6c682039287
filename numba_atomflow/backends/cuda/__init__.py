"""The CUDA backend: one allocation of device memory, fused FP8 kernels, captured steps."""
