"""The kernels of prefill chunks: which, with what tiling and grid, and the sizes that chunks are padded to."""
