"""Kernels per token: embedding, RoPE, sampling."""
