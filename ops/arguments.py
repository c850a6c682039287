"""Conditions on the arguments of CPU kernels. Compiled code has no bounds checks: a wrong index would corrupt memory.

Shapes are checked once for all calls, when a kernel is bound to its arguments. Values in memory that change from step
to step (positions, tokens, slots, block tables) are checked before each step (memory/bounds.py). A bad file or
option is refused elsewhere, with an error of its own: an IndexError from here is a bug of this program.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from numba_atomflow.ops import attention, projection
from numba_atomflow.ops.fp8 import group_count

Array = NDArray[Any]
Scales = NDArray[Any] | None
Conditions = tuple[bool, ...]


def bind(kernel: Any, *arguments: Any) -> Callable[[], None]:
    """The kernel, bound to its arguments.

    Raises:
        IndexError: their shapes do not fit together.
    """
    name = kernel.py_func.__name__
    if not all(_CONDITIONS[name](*arguments)):
        shapes = ", ".join(str(getattr(argument, "shape", argument)) for argument in arguments)
        raise IndexError(f"{name} cannot take arguments of these shapes: {shapes}")
    return partial(kernel, *arguments)


# --- per kernel: arguments as the kernel takes them ---------------------------------------------------------------


def _is_weight(codes: Array, scales: Scales) -> bool:
    """Whether codes [N, K] have their scales [N, ceil(K / 128)], or are the bits of float16."""
    if codes.ndim != 2 or not codes.flags.c_contiguous:
        return False
    if scales is None:
        return codes.dtype == np.int16
    return scales.shape == (len(codes), group_count(codes.shape[1])) and bool(scales.flags.c_contiguous)


def _embed(tokens: Array, codes: Array, scales: Scales, residual: Array) -> Conditions:
    return _is_weight(codes, scales), tokens.ndim == 1, residual.shape == (tokens.size, codes.shape[1])


def _project_token(codes: Array, scales: Scales, x: Array, y: Array, accumulate: bool) -> Conditions:
    return *_project_tokens(codes, scales, x, y, accumulate), len(x) == 1


def _project_tokens(codes: Array, scales: Scales, x: Array, y: Array, accumulate: bool) -> Conditions:
    del accumulate
    few = len(x) == len(y) <= projection.GEMV_TOKENS
    return _is_weight(codes, scales), few, (y.shape[1], x.shape[1]) == codes.shape


def _project_token_swiglu(codes: Array, scales: Array, x: Array, y: Array) -> Conditions:
    return *_project_tokens_swiglu(codes, scales, x, y), len(x) == 1


def _project_tokens_swiglu(codes: Array, scales: Array, x: Array, y: Array) -> Conditions:
    few = len(x) == len(y) <= projection.GEMV_TOKENS
    return _is_weight(codes, scales), few, (2 * y.shape[1], x.shape[1]) == codes.shape


def _project_chunk(codes: Array, scales: Scales, x: Array, y: Array, accumulate: bool, scratch: Array) -> Conditions:
    del accumulate
    rows = len(codes)
    return *_chunk(codes, scales, x, scratch), y.shape == (len(x), rows)


def _project_chunk_swiglu(codes: Array, scales: Array, x: Array, y: Array, scratch: Array) -> Conditions:
    return *_chunk(codes, scales, x, scratch), (len(x), len(codes)) == (len(y), 2 * y.shape[1])


def _chunk(codes: Array, scales: Scales, x: Array, scratch: Array) -> Conditions:
    in_features = codes.shape[1]
    is_input = x.shape == (len(x), in_features) and bool(x.flags.c_contiguous)
    return _is_weight(codes, scales), is_input, scratch.shape[1] >= projection.chunk_scratch()


def _swiglu(gate_up: Array, y: Array) -> Conditions:
    return (gate_up.shape == (len(y), 2 * y.shape[1]),)


def _rms_norm(x: Array, weight: Array, eps: float, y: Array) -> Conditions:
    del eps
    return x.ndim == 2, x.shape == y.shape, weight.shape == x.shape[1:]


def _rms_norm_heads(qkv: Array, q_weight: Array, k_weight: Array, q_dim: int, kv_dim: int, eps: float) -> Conditions:
    del eps
    whole_heads = q_dim % q_weight.size == 0 and kv_dim % k_weight.size == 0
    return q_weight.ndim == k_weight.ndim == 1, whole_heads, qkv.shape[1:] == (q_dim + 2 * kv_dim,)


def _add_rms_norm(x: Array, weight: Array, eps: float, residual: Array) -> Conditions:
    return _rms_norm(x, weight, eps, residual)


def _geglu(gate_up: Array, y: Array) -> Conditions:
    return _swiglu(gate_up, y)


def _soft_cap(x: Array, cap: float) -> Conditions:
    return x.ndim == 2, cap > 0


def _rope(qkv: Array, cosines: Array, sines: Array, q: Array, keys: Array, values: Array) -> Conditions:
    (tokens, q_dim), kv_dim, head_dim = q.shape, keys.shape[1], 2 * cosines.shape[1]
    return (
        qkv.shape == (tokens, q_dim + 2 * kv_dim),
        cosines.shape == sines.shape,
        keys.shape == values.shape,
        q_dim % head_dim == 0 and kv_dim % head_dim == 0,
    )


def _rope_and_store(
    qkv: Array, position: Array, cosines: Array, sines: Array, q: Array, keys: Array, values: Array
) -> Conditions:
    long_enough = len(q) <= len(keys) <= len(cosines)
    return *_rope(qkv, cosines, sines, q, keys, values), position.shape == (1,), long_enough


def _rope_and_store_paged(
    qkv: Array, positions: Array, slots: Array, cosines: Array, sines: Array, q: Array, keys: Array, values: Array
) -> Conditions:
    return *_rope(qkv, cosines, sines, q, keys, values), positions.shape == slots.shape == (len(q),)


def _attention(q: Array, keys: Array, values: Array, head_dim: int, out: Array) -> Conditions:
    heads, kv_heads = q.shape[-1] // head_dim, keys.shape[1] // head_dim
    whole_heads = q.shape[-1] == heads * head_dim and keys.shape[1] == kv_heads * head_dim
    return whole_heads, heads % kv_heads == 0, keys.shape == values.shape, q.shape == out.shape


def _attend_tokens(
    q: Array,
    keys: Array,
    values: Array,
    position: Array,
    head_dim: int,
    window: int,
    soft_cap: float,
    scores: Array,
    out: Array,
) -> Conditions:
    del soft_cap
    enough_scratch = scores.shape[1] >= len(q) and scores.shape[2] >= len(keys) >= len(q)
    is_position = position.shape == (1,)
    return *_attention(q, keys, values, head_dim, out), q.ndim == 2, is_position, window > 0, enough_scratch


def _attend_chunk(
    q: Array,
    keys: Array,
    values: Array,
    position: Array,
    head_dim: int,
    window: int,
    soft_cap: float,
    scratch: Array,
    out: Array,
) -> Conditions:
    del soft_cap
    enough = window > 0 and len(q) <= len(keys) and scratch.shape[1] >= attention.chunk_scratch(head_dim)
    contiguous = bool(keys.flags.c_contiguous and values.flags.c_contiguous)
    return *_attention(q, keys, values, head_dim, out), q.ndim == 2, position.shape == (1,), enough, contiguous


def _attend_paged(
    q: Array,
    keys: Array,
    values: Array,
    block_table: Array,
    table_rows: Array,
    positions: Array,
    block_size: int,
    head_dim: int,
    scores: Array,
    out: Array,
) -> Conditions:
    del scores  # as long as the longest sequence, which depends on the values of `positions`
    per_token = table_rows.shape == positions.shape == (len(q),)
    return *_attention(q, keys, values, head_dim, out), q.ndim == block_table.ndim == 2, per_token, block_size > 0


_CONDITIONS: dict[str, Callable[..., Conditions]] = {
    condition.__name__.removeprefix("_"): condition
    for condition in (
        _embed,
        _project_token,
        _project_tokens,
        _project_token_swiglu,
        _project_tokens_swiglu,
        _project_chunk,
        _project_chunk_swiglu,
        _swiglu,
        _rms_norm,
        _rms_norm_heads,
        _add_rms_norm,
        _geglu,
        _soft_cap,
        _rope_and_store,
        _rope_and_store_paged,
        _attend_tokens,
        _attend_chunk,
        _attend_paged,
    )
}
