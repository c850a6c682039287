"""The kernels around the GEMMs of a prefill chunk, against references: in the simulator, or on a GPU."""

from typing import Any

import numpy as np
from kernel_cases import (
    EPS,
    RopeCase,
    generator,
    launch,
    normed_as_float16,
    poisoned,
    relative_error,
    weights,
    within,
)

from numba_atomflow.ops.cuda.layout.activations import ActivationTiles
from numba_atomflow.ops.cuda.layout.weights import PrepackedLayout, prepack_reference
from numba_atomflow.ops.cuda.token import embedding, rms_norm, rope
from numba_atomflow.ops.embedding import embed_reference
from numba_atomflow.ops.rms_norm import rms_norm_reference
from numba_atomflow.ops.rope import rope_reference, rope_table

NORMS = (
    (ActivationTiles(202, 8), 5),  # K padded to 256, 4 K blocks of 64; not every token has a CTA
    (ActivationTiles(576, 16), 16),  # 10 K blocks for 3 warps
    (ActivationTiles(1154, 8, weight_bits=16), 2),
)


def check_rms_norm_tiles(x: ActivationTiles, tokens: int) -> None:
    """Relative L2 error 2e-6 against float64 rounded to float16, but for elements between two float16."""
    rng = generator(x.in_features, tokens)
    residual = rng.standard_normal((tokens, x.in_features)).astype(np.float32)
    norm_weight = rng.uniform(0.5, 1.5, x.in_features).astype(np.float32)
    words = poisoned(x.words, dtype=np.uint32)
    arguments = rms_norm.RmsNormTilesArguments(residual.reshape(-1), norm_weight, words)
    launch(rms_norm.make_rms_norm_tiles(x, EPS), tokens, rms_norm.rms_norm_tiles_threads(x), 0, arguments)
    expected, doubt = normed_as_float16(residual, norm_weight)
    padded = ActivationTiles(x.blocks * 64, x.tokens, weight_bits=x.weight_bits).unpack(words)
    slack = float(np.linalg.norm(doubt) / np.linalg.norm(expected))
    within("RMSNorm to tiles", relative_error(padded[:tokens, : x.in_features], expected), 2e-6 + slack)
    assert not padded[:tokens, x.in_features :].any(), "padding of K is not zero"
    assert np.isnan(padded[tokens:]).all(), "wrote tokens that have no CTA"


CHUNK_ROPES = (
    (RopeCase(80, 2, 1, 4, bias=True, norm=True), 3),
    (RopeCase(64, 1, 1, 5), 5),
)


def check_rope_chunk(case: RopeCase, count: int) -> None:
    """Of `case.tokens` padded tokens `count`: relative L2 error 5e-4, and nothing is written for the others."""
    rng = generator(case.head_dim, case.heads, count)
    dim, positions, first = case.head_dim, 20, 20 - count  # the last token takes the last position
    q_width, kv_width = case.heads * dim, case.kv_heads * dim
    rows = q_width + 2 * kv_width
    qkv = rng.standard_normal((case.tokens, rows)).astype(np.float32)
    bias = rng.standard_normal(rows).astype(np.float32) if case.bias else poisoned(rows)
    norms = [rng.uniform(0.5, 1.5, dim).astype(np.float32) if case.norm else poisoned(dim) for _ in range(2)]
    cosines, sines = rope_table(10000.0 ** (-np.arange(0, dim, 2) / dim), positions)
    q = poisoned(case.tokens * q_width, dtype=np.uint16)
    keys, values = (poisoned(positions * kv_width, dtype=np.uint16) for _ in range(2))
    arguments = rope.RopeChunkArguments(
        qkv=qkv.reshape(-1),
        bias=bias,
        q_norm=norms[0],
        k_norm=norms[1],
        count=np.array([count], np.int64),
        position=np.array([first], np.int64),
        cosines=cosines.reshape(-1),
        sines=sines.reshape(-1),
        q=q,
        keys=keys,
        values=values,
    )
    kernel = rope.make_rope_chunk(case.heads, case.kv_heads, dim, EPS, case.bias, case.norm)
    launch(kernel, rope.rope_ctas(case.heads, case.kv_heads, case.tokens), rope.THREADS, 0, arguments)
    exact = qkv[:count].astype(np.float64) + (bias if case.bias else 0.0)
    parts = [part.reshape(count, -1, dim) for part in np.split(exact, [q_width, q_width + kv_width], axis=1)]
    angles = cosines[first:].astype(np.float64), sines[first:].astype(np.float64)
    for i, weight in enumerate(norms):
        if case.norm:
            parts[i] = rms_norm_reference(parts[i], weight.astype(np.float64), EPS)
        parts[i] = rope_reference(parts[i], *angles)
    for got, want in zip((q, keys, values), parts, strict=True):
        new = got.reshape(-1, want.shape[1] * dim)
        start = 0 if got is q else first
        assert (new[:start] == 0xFFFF).all(), "wrote into the past"
        assert (new[start + count :] == 0xFFFF).all(), "wrote for padding"
        result = np.ascontiguousarray(new[start : start + count]).view(np.float16)
        within("q, k, v to float16", relative_error(result, want.reshape(count, -1)), 5e-4)


def check_embed_chunk(layout: PrepackedLayout, padded: int, count: int) -> None:
    """Bit for bit; ids of padding are not read."""
    rng = generator(layout.out_features, count)
    codes, scales = weights(layout, rng)
    table = embed_reference(np.arange(layout.out_features), codes, scales)
    tokens = np.full(padded, -(2**31), np.int32)
    tokens[:count] = rng.integers(0, layout.out_features, count)
    residual = poisoned(padded * layout.in_features)
    arguments = embedding.EmbedChunkArguments(
        prepack_reference(codes, scales, layout), tokens, np.array([count], np.int64), residual
    )
    kernel: Any = embedding.make_embed_chunk(layout)
    launch(kernel, embedding.embed_ctas(layout, padded), embedding.THREADS, 0, arguments)
    rows = residual.reshape(padded, -1)
    np.testing.assert_array_equal(rows[:count], table[tokens[:count]].astype(np.float32))
    assert np.isnan(rows[count:]).all(), "wrote for padding"
