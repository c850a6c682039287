"""Attention of decode steps: split-KV over a contiguous or a paged KV cache."""
