"""The static KV cache: one contiguous tensor [layer][k | v][position][kv_head * head_dim]."""

from numba_atomflow.memory.plan import Buffer
from numba_atomflow.memory.view import View

NAME = "kv_cache"


def kv_cache_buffer(layers: int, positions: int, kv_dim: int, dtype: str) -> Buffer:
    """The cache as a buffer of the memory plan."""
    return Buffer("kv cache", NAME, (layers, 2, positions, kv_dim), dtype)


def layer_cache(cache: View, layer: int) -> tuple[View, View]:
    """Keys and values of one layer: two views [positions, kv_dim]."""
    return cache.index(layer, 0), cache.index(layer, 1)
