"""Embedding lookup out of the vocabulary projection's own weights: with tied embeddings they are stored once.

One thread takes 4 columns, wherever `fragments.py` has put it. Cost model: one launch (2-3 us); the
bytes, hidden * 1.03 read and 4 * hidden written per token, are nothing beside it. The result is the CPU's, bit for bit.

It begins a step and is always launched plainly: it starts when the step before has ended. So the later kernels of a
step, which may start early (programmatic dependent launch), can rely on the position before they wait.
"""

from typing import Any

from numba import cuda

from numba_atomflow.ops import ptx
from numba_atomflow.ops.cuda.layout.weights import FragmentLayout, make_places
from numba_atomflow.ops.cuda.runtime.spec import F32, I32, U32, Planned, kernel_spec

THREADS = 256


def make_quad(layout: FragmentLayout) -> Any:
    """Device function (words, start, row, quad) -> elements 4 quad .. 4 quad + 3 of a row of the embedding.

    The embedding begins at word `start` of `words` uint32. Plain rows.
    """
    tile_words = layout.tile_words
    decode = layout.decode
    codes_at, scale_at = make_places(layout)

    @ptx.device_function
    def quad_of_codes(words, start, row, quad):
        tile, r, group = start + row // 16 * tile_words, row % 16, quad // 32
        code = words[tile + codes_at(group, quad // 16 % 2, r // 8) + r % 8 * 16 + quad % 16]
        scale = ptx.bits_f32(words[tile + scale_at(group, r)])
        pair_0, pair_1 = decode(code)
        x0, x1 = ptx.unpack_f16x2(pair_0)
        x2, x3 = ptx.unpack_f16x2(pair_1)
        return x0 * scale, x1 * scale, x2 * scale, x3 * scale

    @ptx.device_function
    def quad_of_halves(words, start, row, quad):
        at = start + row // 16 * tile_words + quad // 8 * 256 + row % 16 // 8 * 128 + row % 8 * 16 + quad % 8 * 2
        x0, x1 = ptx.unpack_f16x2(words[at])
        x2, x3 = ptx.unpack_f16x2(words[at + 1])
        return x0, x1, x2, x3

    return quad_of_halves if layout.halves else quad_of_codes


def make_embed(layout: FragmentLayout, columns: int) -> Any:
    """residual[t] = row tokens[t] of the embedding.

    Kernel (words uint32 [layout.words], tokens int32 [columns], residual float32 [columns * hidden]). Plain rows.
    Launch: `embed_blocks(layout, columns)` blocks of `THREADS` threads, no shared memory.
    """
    hidden = layout.columns
    row_quads = -(-hidden // 4)
    total = columns * row_quads
    quad_of = make_quad(layout)

    @ptx.kernel(THREADS, 1)
    def embed(words, tokens, residual):
        index = cuda.blockIdx.x * THREADS + cuda.threadIdx.x
        if index >= total:
            return
        column, quad = index // row_quads, index % row_quads
        x0, x1, x2, x3 = quad_of(words, 0, tokens[column], quad)
        start = column * hidden + quad * 4
        residual[start] = x0
        if quad * 4 + 1 < hidden:
            residual[start + 1] = x1
        if quad * 4 + 2 < hidden:
            residual[start + 2] = x2
        if quad * 4 + 3 < hidden:
            residual[start + 3] = x3

    return embed


def embed_kernel(layout: FragmentLayout, columns: int) -> Planned:
    """The kernel of `make_embed`."""
    name, signature = f"embed_x{columns}", (U32, I32, F32)
    spec = kernel_spec(name, make_embed, signature, THREADS, layout=layout, columns=columns)
    return Planned(spec, embed_blocks(layout, columns))


def embed_blocks(layout: FragmentLayout, columns: int) -> int:
    """Blocks of the embedding kernel."""
    return -(-columns * -(-layout.columns // 4) // THREADS)
