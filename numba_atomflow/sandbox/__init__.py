"""The serving sandbox: continuous batching of many requests over a paged KV cache, to measure what that costs.

It is independent of `engine` and `backends`: they share only kernels (`ops`) and memory (`memory`).
"""
