"""The server sandbox: many requests over one model, with a paged KV cache, to measure what that costs.

It stands beside the engine and shares only kernels (`ops`) and memory (`memory`) with it.
"""
