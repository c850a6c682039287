"""How tensors of a Hugging Face model become those of a checkpoint: factors and orders that are part of the weights.

Kernels know no multiplier and no partial RoPE. What a model multiplies by a constant is linear in a weight, so that the
checkpoint's weight has the factor in it:

    embedding_scale     the embedding; if it is the LM head too, the final norm is divided by it
    logit_scale         the final norm
    residual_scale      o and down
    attention_scale     q (its norm, if it has one), as attention_scale * sqrt(head_dim)

Partial RoPE rotates pairs (i, i + rotary_dim / 2) of a head, kernels pairs (i, i + head_dim / 2): rows of q and k are
reordered alike, so that their products stay the same. With that, q is what transformers calls q, times its factor and
in this order; the same holds for the final norm and its factor.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from numba_atomflow.geometry import ModelGeometry

Rows = NDArray[Any]


def factor_of(geometry: ModelGeometry, name: str) -> float:
    """The factor between a tensor of Hugging Face's and the checkpoint's."""
    g = geometry
    match name.removesuffix(".weight").removesuffix(".bias").rpartition(".")[2]:
        case "embed_tokens":
            return g.embedding_scale
        case "norm":
            return final_norm_factor(g)
        case "o_proj" | "down_proj":
            return g.residual_scale
        case "q_norm":
            return query_factor(g)
        case "q_proj" if not g.qk_norm:
            return query_factor(g)
    return 1.0


def final_norm_factor(geometry: ModelGeometry) -> float:
    """The factor of the final norm."""
    return geometry.logit_scale / (geometry.embedding_scale if geometry.tied_embeddings else 1.0)


def query_factor(geometry: ModelGeometry) -> float:
    """The factor of q."""
    scale = geometry.attention_scale
    return 1.0 if scale is None else scale * math.sqrt(geometry.head_dim)


def is_reordered(geometry: ModelGeometry, name: str) -> bool:
    """Whether the rows of a tensor are in another order."""
    parts = ("q_proj", "k_proj") + (() if geometry.qk_norm_of_all_heads else ("q_norm", "k_norm"))
    return geometry.rotary_dim is not None and any(f".{part}." in name for part in parts)


def head_order(geometry: ModelGeometry) -> NDArray[np.intp]:
    """For each element of a head as the checkpoint has it, its index in Hugging Face's order."""
    rotary = geometry.rotary_dim or geometry.head_dim
    pairs, rest = rotary // 2, (geometry.head_dim - rotary) // 2
    first, second = np.arange(pairs), np.arange(pairs) + pairs
    return np.concatenate([first, rotary + np.arange(rest), second, rotary + rest + np.arange(rest)])


def reordered_heads(geometry: ModelGeometry, values: Rows, *, axis: int = 0) -> Rows:
    """Whole heads, from Hugging Face's order to the checkpoint's."""
    return _heads_in_order(geometry, values, head_order(geometry), axis)


def original_heads(geometry: ModelGeometry, values: Rows, *, axis: int = 0) -> Rows:
    """Whole heads, from the checkpoint's order to Hugging Face's."""
    return _heads_in_order(geometry, values, np.argsort(head_order(geometry)), axis)


def _heads_in_order(geometry: ModelGeometry, values: Rows, order: NDArray[np.intp], axis: int) -> Rows:
    starts = np.arange(0, values.shape[axis], geometry.head_dim)
    return np.take(values, (starts[:, None] + order).reshape(-1), axis=axis)


def reordered_rows(
    geometry: ModelGeometry, start: int, stop: int, read: Callable[[int, int], tuple[Rows, ...]]
) -> tuple[Rows, ...]:
    """Rows start .. stop - 1 in the checkpoint's order, by reading whole heads.

    Args:
        read: from a range of rows to arrays of these rows, in Hugging Face's order.
    """
    width = geometry.head_dim
    first, last = start // width * width, -(-stop // width) * width
    return tuple(reordered_heads(geometry, values)[start - first : stop - first] for values in read(first, last))


def original(geometry: ModelGeometry, name: str, values: NDArray[np.float32]) -> NDArray[np.float32]:
    """A whole tensor of a checkpoint as Hugging Face has it, but for the 1 that Gemma adds to the weights of norms."""
    if is_reordered(geometry, name):
        values = original_heads(geometry, values)
    factor = factor_of(geometry, name)
    return values if factor == 1.0 else (values / np.float32(factor)).astype(np.float32)
