"""The parameters of the GEMM kernels: one class for each epilogue, whatever instructions the main loop uses.

`weights`: prepacked. `x`: tiled activations (`layout/activations.py`). `partials`: scratch, float32 partial sums of
tiles that several CTAs share: 0 before and after every launch.
`token_tiles`: tiles of `plan.tile_tokens` tokens that are computed, so that one kernel serves chunks of any length.
"""

from typing import NamedTuple

from numba_atomflow.ops.cuda.runtime.spec import F32, I64, NUMBER, U16, U32


class GemmStoreArguments(NamedTuple):
    """Y = X W^T, plain row order.

    Attributes:
        y: [tokens, out_features].
    """

    weights: U32
    x: U32
    partials: F32
    token_tiles: NUMBER
    y: F32


class GemmAddArguments(NamedTuple):
    """residual += X W^T, plain row order.

    Attributes:
        residual: [tokens, out_features].
    """

    weights: U32
    x: U32
    partials: F32
    token_tiles: NUMBER
    residual: F32


class GemmSwigluArguments(NamedTuple):
    """intermediate = silu(gate) * up with (gate, up) = X W^T. Rows paired with half = number of units.

    Attributes:
        intermediate: tiled activations, x of the down projection.
    """

    weights: U32
    x: U32
    partials: F32
    token_tiles: NUMBER
    intermediate: U32


class GemmQkvArguments(NamedTuple):
    """q, k and v = X W^T; q and k rotated; k and v to the KV cache. Rows paired with half = head_dim / 2.

    Attributes:
        count: [1], tokens of the step; the others are padding, and their keys and values are not written.
        position: [1], of the first token; the others follow.
        cosines, sines: [positions, head_dim / 2].
        q: bits of float16 [tokens, heads * head_dim].
        keys, values: bits of float16 [positions, kv_heads * head_dim].
    """

    weights: U32
    x: U32
    partials: F32
    token_tiles: NUMBER
    count: I64
    position: I64
    cosines: F32
    sines: F32
    q: U16
    keys: U16
    values: U16
