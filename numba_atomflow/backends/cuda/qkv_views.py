"""The views of a QKV op, by the names that the kernels of both prefill paths give them."""

from numba_atomflow.memory.view import View
from numba_atomflow.model.step import Qkv


def rotation_views(op: Qkv) -> dict[str, View]:
    """What RoPE reads, and where q, k and v go."""
    return {
        "position": op.position,
        "cosines": op.cosines,
        "sines": op.sines,
        "q": op.q,
        "keys": op.keys,
        "values": op.values,
    }


def vector_views(op: Qkv) -> dict[str, View]:
    """Bias and norms of heads; what a model does not have is not read, and any other vector stands in for it."""
    vectors = {"bias": op.bias, "q_norm": op.q_norm, "k_norm": op.k_norm}
    return {name: vector or op.norm_weight or op.residual for name, vector in vectors.items()}
