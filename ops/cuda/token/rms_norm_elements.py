"""RMSNorm of a token's elements in the registers of a CTA, as the kernels that write tiled activations hold them.

A thread has one or two 16-byte chunks of a K block (`layout/activations.py`): four times 4 elements along K, so that it
reads and writes 16 bytes at a time. The token stays in registers between the sum of squares and the scaling.
"""

from typing import Any, NamedTuple

from numba import cuda, float32

from numba_atomflow.ops import ptx
from numba_atomflow.ops.cuda.layout.activations import ActivationTiles
from numba_atomflow.ops.cuda.scalars import f32, i32

VECTORS, VECTOR_ELEMENTS = 4, 4  # of a thread in a K block
THREAD_ELEMENTS = VECTORS * VECTOR_ELEMENTS
_CHUNKS = 8  # of a K block
_MAX_THREADS = 256
_ZERO = f32(0.0)


class NormShape(NamedTuple):
    """How a token is divided among the threads of its CTA.

    Attributes:
        threads: of the CTA.
        block_threads: of a K block, a power of two. thread_chunks: 16-byte chunks of a thread in it.
        turns: K blocks of a thread. turn_blocks: from one of its blocks to the next.
        whole: every thread has elements in all its turns.
    """

    threads: int
    block_threads: int
    thread_chunks: int
    turns: int
    turn_blocks: int
    whole: bool


def norm_shape(x: ActivationTiles) -> NormShape:
    """That of tiles in float16 or FP8."""
    block_threads = x.block_elements // THREAD_ELEMENTS
    threads = min(_MAX_THREADS, -(-x.blocks * block_threads // 32) * 32)
    turns, turn_blocks = -(-x.blocks * block_threads // threads), threads // block_threads
    whole = x.in_features == x.blocks * x.block_elements and x.blocks == turns * turn_blocks
    return NormShape(threads, block_threads, _CHUNKS // block_threads, turns, turn_blocks, whole)


def make_normed_elements(x: ActivationTiles, eps: float, dependent: bool) -> Any:
    """Device function (io, token, block, chunk, values): those of the calling thread, whose first K block and chunk are
    given: float32 [turns * THREAD_ELEMENTS], in the order of its chunks' words: value 4 v + i is of word v of a chunk,
    or of one chunk and then of the next. Elements beyond K are 0. `io` has `residual` and `norm_weight`.
    """
    shape = norm_shape(x)
    turns, turn_blocks, warps = shape.turns, shape.turn_blocks, shape.threads // 32
    count, in_features, word_elements = turns * THREAD_ELEMENTS, x.in_features, 32 // x.bits
    chunk_index, step, load_vector = x.make_chunk_index(), word_elements * x.chunk_step, _make_load_vector(x)
    inverse_width, epsilon = f32(1.0 / in_features), f32(eps)

    @ptx.device_function
    def load(array, start, block, chunk, values):
        for turn in range(turns):
            _, word = chunk_index(i32(0), i32(block + turn * turn_blocks), chunk)
            for v in range(VECTORS):
                first = turn * THREAD_ELEMENTS + v * VECTOR_ELEMENTS
                load_vector(array, start, i32(word * word_elements + v * step), values, first)

    @ptx.device_function
    def normed(io, token, block, chunk, values):
        sums = cuda.shared.array(warps, float32)
        weights = cuda.local.array(count, float32)
        thread = i32(cuda.threadIdx.x)
        load(io.norm_weight, 0, block, chunk, weights)  # no kernel writes them
        if dependent:
            ptx.let_next_kernel_start()
            ptx.wait_for_previous_kernel()
        load(io.residual, token * in_features, block, chunk, values)
        squares = _ZERO
        for i in range(count):
            squares += values[i] * values[i]
        squares = ptx.warp_sum(squares)
        if thread & 31 == 0:
            sums[thread >> 5] = squares
        cuda.syncthreads()
        squares = _ZERO
        for i in range(warps):
            squares += sums[i]
        factor = ptx.rsqrt(squares * inverse_width + epsilon)
        for i in range(count):
            values[i] *= factor * weights[i]

    return normed


def _make_load_vector(x: ActivationTiles) -> Any:
    """Device function (array, start, k, values, first): elements `start` + k to `start` + k + 3 into `values` from
    `first` on; 0 for those beyond K.
    """
    in_features, whole, aligned = x.in_features, norm_shape(x).whole, x.in_features % VECTOR_ELEMENTS == 0

    @ptx.device_function
    def load_vector(array, start, k, values, first):
        a, b, c, d = _ZERO, _ZERO, _ZERO, _ZERO
        if aligned:
            if whole or k < in_features:
                a, b, c, d = ptx.load_f32x4(array, start + k)
        else:
            if k < in_features:
                a, b = ptx.load_f32x2(array, start + k)
            if k + 2 < in_features:
                c, d = ptx.load_f32x2(array, start + k + 2)
        values[first], values[first + 1], values[first + 2], values[first + 3] = a, b, c, d

    return load_vector
