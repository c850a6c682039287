"""Embedding lookup in the prepacked weights of the LM head: with tied embeddings they are stored once.

One thread takes 4 elements of a row, from where `layout/weights.py` puts them. Cost model: one launch (2-3 us); the
bytes, hidden * 1.03 read and 4 * hidden written per token, are negligible. The result is the CPU's, bit for bit.

It begins a step and is launched without programmatic dependent launch: it starts when the step before has ended. So
the later kernels of a step, which may start early, can read the position before they wait.
"""

from typing import Any, NamedTuple

from numba import cuda

from numba_atomflow.ops import ptx
from numba_atomflow.ops.cuda.layout.weights import PrepackedLayout, make_offsets
from numba_atomflow.ops.cuda.runtime.spec import F32, I32, I64, U32, Planned, kernel_spec

THREADS = 256


class EmbedArguments(NamedTuple):
    """The kernel's parameter.

    Attributes:
        weights: the embedding, prepacked.
        tokens: [tokens], their ids.
        residual: [tokens, hidden].
    """

    weights: U32
    tokens: I32
    residual: F32


class EmbedChunkArguments(NamedTuple):
    """The parameter of the kernel for any number of tokens.

    Attributes:
        count: [1], tokens of the chunk; the others are padding, and their rows are not written.
        weights, tokens, residual: as in `EmbedArguments`.
    """

    weights: U32
    tokens: I32
    count: I64
    residual: F32


def make_quad(layout: PrepackedLayout) -> Any:
    """Device function (words, start, row, quad) -> elements 4 quad .. 4 quad + 3 of a row of the embedding.

    The embedding begins at word `start` of `words` uint32. Plain rows.
    """
    tile_words = layout.tile_words
    convert = layout.convert
    codes_at, scale_at = make_offsets(layout)

    @ptx.device_function
    def quad_of_fp8(words, start, row, quad):
        tile, r, group = start + row // 16 * tile_words, row % 16, quad // 32
        code = words[tile + codes_at(group, quad // 16 % 2, r // 8) + r % 8 * 16 + quad % 16]
        scale = ptx.bits_f32(words[tile + scale_at(group, r)])
        pair_0, pair_1 = convert(code)
        x0, x1 = ptx.unpack_f16x2(pair_0)
        x2, x3 = ptx.unpack_f16x2(pair_1)
        return x0 * scale, x1 * scale, x2 * scale, x3 * scale

    @ptx.device_function
    def quad_of_fp16(words, start, row, quad):
        base = start + row // 16 * tile_words + quad // 8 * 256 + row % 16 // 8 * 128 + row % 8 * 16 + quad % 8 * 2
        x0, x1 = ptx.unpack_f16x2(words[base])
        x2, x3 = ptx.unpack_f16x2(words[base + 1])
        return x0, x1, x2, x3

    return quad_of_fp16 if layout.format.bits == 16 else quad_of_fp8


def make_embed(layout: PrepackedLayout, tokens: int) -> Any:
    """Kernel (`EmbedArguments`): residual[t] = row tokens[t] of the embedding. Plain row order.

    Launch: `embed_ctas(layout, tokens)` CTAs of `THREADS` threads, no shared memory.
    """

    @ptx.device_function
    def count_of(io):
        return tokens

    return _make_embed(layout, count_of)


def make_embed_chunk(layout: PrepackedLayout) -> Any:
    """Kernel (`EmbedChunkArguments`): the same for the first `count` tokens. Launch: as above, for all with padding."""

    @ptx.device_function
    def count_of(io):
        return io.count[0]

    return _make_embed(layout, count_of)


def _make_embed(layout: PrepackedLayout, count_of: Any) -> Any:
    """`count_of`: device function (io) -> number of tokens."""
    hidden = layout.in_features
    row_quads = -(-hidden // 4)
    quad_of = make_quad(layout)

    @ptx.kernel(THREADS, 1)
    def embed(io):
        index = cuda.blockIdx.x * THREADS + cuda.threadIdx.x
        if index >= count_of(io) * row_quads:
            return
        token, quad = index // row_quads, index % row_quads
        x0, x1, x2, x3 = quad_of(io.weights, 0, io.tokens[token], quad)
        start = token * hidden + quad * 4
        io.residual[start] = x0
        if quad * 4 + 1 < hidden:
            io.residual[start + 1] = x1
        if quad * 4 + 2 < hidden:
            io.residual[start + 2] = x2
        if quad * 4 + 3 < hidden:
            io.residual[start + 3] = x3

    return embed


def embed_kernel(layout: PrepackedLayout, tokens: int) -> Planned:
    """The spec of the kernel of `make_embed`."""
    spec = kernel_spec(f"embed_x{tokens}", make_embed, EmbedArguments, THREADS, layout=layout, tokens=tokens)
    return Planned(spec, embed_ctas(layout, tokens))


def embed_chunk_kernel(layout: PrepackedLayout) -> Planned:
    """The spec of the kernel of `make_embed_chunk`; `embed_ctas` is the grid of a launch."""
    return Planned(kernel_spec("embed_chunk", make_embed_chunk, EmbedChunkArguments, THREADS, layout=layout), 0)


def embed_ctas(layout: PrepackedLayout, tokens: int) -> int:
    """CTAs of a launch."""
    return -(-tokens * -(-layout.in_features // 4) // THREADS)
