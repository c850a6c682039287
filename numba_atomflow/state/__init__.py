"""Copies of the KV cache: in memory, and as files."""
