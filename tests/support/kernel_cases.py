"""GPU kernels against their references, at small shapes: the same checks in numba's simulator and on a GPU.

Every check draws fresh inputs (the seed is in the test's name through `SEED`), fills outputs with NaN, and compares
with float64.
"""

import json
import os
import secrets
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from numba_atomflow.ops import ptx
from numba_atomflow.ops.activation import gelu_reference, silu_reference
from numba_atomflow.ops.attention import NO_WINDOW, attend_reference
from numba_atomflow.ops.cuda.attention.decode import AttentionArguments, make_attention
from numba_atomflow.ops.cuda.attention.shape import AttentionShape
from numba_atomflow.ops.cuda.gemv import kernels
from numba_atomflow.ops.cuda.gemv.plan import GemvPlan
from numba_atomflow.ops.cuda.layout.prepack import (
    THREADS,
    make_prepack,
    make_prepack_fp16,
    prepack_arguments,
    prepack_ctas,
)
from numba_atomflow.ops.cuda.layout.weights import (
    PrepackedLayout,
    prepack_fp16_reference,
    prepack_reference,
    unpack_reference,
)
from numba_atomflow.ops.cuda.token import rope
from numba_atomflow.ops.formats import FP8_E4M3, FP8_E4M3_BITS, FP16, WeightFormat
from numba_atomflow.ops.fp8 import dequantize_groups, quantize_groups
from numba_atomflow.ops.rms_norm import rms_norm_reference
from numba_atomflow.ops.rope import rope_reference, rope_table

SEED = int(os.environ.get("ATOMFLOW_TEST_SEED", secrets.randbelow(2**31)))
EPS = 1e-5


def generator(*key: int) -> np.random.Generator:
    print(f"inputs: ATOMFLOW_TEST_SEED={SEED}")  # pytest shows it with a failure
    return np.random.default_rng((SEED, *key))


def poisoned(*shape: int, dtype: Any = np.float32) -> NDArray[Any]:
    """An array of NaN; as uint16 and uint32, the bits of NaN."""
    return np.full(shape, -1, np.int64).astype(dtype) if np.dtype(dtype).kind == "u" else np.full(shape, np.nan, dtype)


def as_words(array: NDArray[Any]) -> NDArray[np.uint32]:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint32)


def relative_error(got: NDArray[Any], expected: NDArray[np.float64]) -> float:
    """Relative L2 error; NaN if anything is NaN."""
    return float(np.linalg.norm(got.astype(np.float64) - expected) / np.linalg.norm(expected))


def within(family: str, error: float, limit: float) -> None:
    """The error is a number and at most the limit. ATOMFLOW_FIGURES names a file that collects errors and limits."""
    figures = os.environ.get("ATOMFLOW_FIGURES")
    if figures:
        with Path(figures).open("a") as file:
            file.write(json.dumps({"family": family, "error": error, "limit": limit}) + "\n")
    assert error <= limit, f"{family}: relative L2 {error:.3g} is {error / limit:.0%} of {limit}"


def launch(kernel: Any, ctas: int, threads: int, shared_bytes: int, *arguments: Any) -> None:
    """Run a kernel over host arrays, which it changes in place: in the simulator, or on the GPU.

    arguments: a value of the NamedTuple class that is the kernel's signature. In the simulator, a test's own kernel may
    take several parameters.
    """
    if ptx.SIMULATED:
        kernel[ctas, threads, 0, shared_bytes](*arguments)
    else:
        from device_launch import launch_on_device

        launch_on_device(kernel, ctas, threads, shared_bytes, *arguments)


# --- prepacked weights -----------------------------------------------------------------------------------------------

LAYOUTS = (
    PrepackedLayout(16, 128, format=FP8_E4M3_BITS),
    PrepackedLayout(37, 200),  # neither rows nor columns fill a tile
    PrepackedLayout(40, 130, half=20),  # gate and up whose number is no multiple of 8
    PrepackedLayout(160, 64, half=40, format=FP8_E4M3_BITS),  # two heads of 80
    PrepackedLayout(16, 576, format=FP8_E4M3_BITS, k_tile=4),  # k-tiles of 4 groups and of 1, each padded
    PrepackedLayout(40, 1024, k_tile=4),  # two whole k-tiles: 8-row tiles can be copied
    PrepackedLayout(12, 330, half=6, k_tile=1),
    PrepackedLayout(9, 130, format=FP8_E4M3_BITS, k_tile=4),  # fewer groups than a k-tile may have
)


def weights(layout: PrepackedLayout, rng: np.random.Generator) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """A random projection as the checkpoint stores it, with large and small groups."""
    values = rng.standard_normal((layout.out_features, layout.in_features)) * 0.05
    values *= np.exp2(rng.integers(-6, 6, (layout.out_features, 1)))
    return quantize_groups(values.astype(np.float32))


def fp16_weights(layout: PrepackedLayout, rng: np.random.Generator) -> NDArray[np.float16]:
    """A random projection in float16, with large and small rows."""
    shape = layout.out_features, layout.in_features
    values = rng.standard_normal(shape) * np.exp2(rng.integers(-8, 2, (layout.out_features, 1)))
    return values.astype(np.float16)


FP16_LAYOUTS = (
    PrepackedLayout(16, 128, format=FP16),
    PrepackedLayout(37, 202, format=FP16),
    PrepackedLayout(20, 300, format=FP16, k_tile=4),  # 6 groups of 64
)


def check_prepack_fp16(layout: PrepackedLayout) -> None:
    values = fp16_weights(layout, generator(layout.out_features))
    words = poisoned(layout.words, dtype=np.uint32)
    source = values.reshape(-1).view(np.uint16)
    launch(make_prepack_fp16(), prepack_ctas(layout), THREADS, 0, prepack_arguments(layout, [source], words))
    np.testing.assert_array_equal(words, prepack_fp16_reference(values, layout))


def check_prepack(layout: PrepackedLayout) -> None:
    rng = generator(layout.out_features)
    codes, scales = weights(layout, rng)
    words = poisoned(layout.words, dtype=np.uint32)
    arguments = prepack_arguments(layout, [codes.reshape(-1), scales.reshape(-1)], words)
    launch(make_prepack(layout.format.converter), prepack_ctas(layout), THREADS, 0, arguments)
    np.testing.assert_array_equal(words, prepack_reference(codes, scales, layout))
    back_codes, back_scales = unpack_reference(words, layout)
    np.testing.assert_array_equal(back_codes, codes)
    np.testing.assert_array_equal(back_scales, scales)


# --- projections -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ProjectionCase:
    """A projection kernel at one geometry. `ctas` below the number of tiles makes CTAs walk."""

    kind: str
    out_features: int
    in_features: int
    tokens: int
    warps: int = 2
    split_k: int = 2
    groups_in_flight: int = 2
    ctas: int = 1
    format: WeightFormat = FP8_E4M3_BITS
    head_dim: int = 64
    heads: int = 1
    kv_heads: int = 1
    k_tile: int = 0

    @property
    def plan(self) -> GemvPlan:
        units = self.out_features // 2
        half = {"swiglu": units, "geglu": units, "qkv": self.head_dim // 2}.get(self.kind, 0)
        layout = PrepackedLayout(self.out_features, self.in_features, half, self.format, self.k_tile)
        return GemvPlan(layout, self.tokens, self.warps, self.split_k, self.groups_in_flight)


def qkv_case(in_features: int, tokens: int, head_dim: int, heads: int, kv_heads: int, **more: Any) -> ProjectionCase:
    rows = (heads + 2 * kv_heads) * head_dim
    return ProjectionCase("qkv", rows, in_features, tokens, head_dim=head_dim, heads=heads, kv_heads=kv_heads, **more)


PROJECTIONS = (
    ProjectionCase("store", 37, 576, 1),  # K padded to 640, N not a multiple of 16; three tiles for one CTA
    # One tile, one group.
    ProjectionCase("store", 16, 128, 8, warps=1, split_k=1, groups_in_flight=1, format=FP8_E4M3),
    ProjectionCase("store", 40, 200, 3, warps=2, split_k=1, ctas=2),  # tiles do not fill the last CTA
    ProjectionCase("store", 37, 576, 1, format=FP16),  # K of 640 is 10 groups of 64
    ProjectionCase("store", 20, 200, 8, warps=2, split_k=1, groups_in_flight=1, format=FP16),
    ProjectionCase("add", 24, 576, 5, warps=4, split_k=4, groups_in_flight=1, format=FP8_E4M3),
    ProjectionCase("add", 16, 300, 2, warps=4, split_k=2, groups_in_flight=1),  # a slot without a tile
    ProjectionCase("swiglu", 40, 256, 4, groups_in_flight=1, ctas=2),  # 20 units: the last tile is not full
    ProjectionCase("swiglu", 16, 576, 1, format=FP8_E4M3),
    ProjectionCase("geglu", 40, 130, 2, groups_in_flight=1),
    ProjectionCase("store without a norm", 20, 198, 3, warps=2, split_k=1),
    ProjectionCase("project", 24, 200, 2, groups_in_flight=1),
    ProjectionCase("store", 37, 576, 1, k_tile=4),  # k-tiles of 4 groups and of 1
    ProjectionCase("store", 20, 576, 2, groups_in_flight=1, format=FP16, k_tile=4),
    ProjectionCase("add", 24, 1100, 3, groups_in_flight=3, format=FP8_E4M3, k_tile=3),  # three equal k-tiles
    ProjectionCase("swiglu", 16, 330, 1, k_tile=2, format=FP8_E4M3),
    ProjectionCase("store", 16, 640, 2, warps=4, split_k=2, groups_in_flight=1),  # two warps stage a token together
    ProjectionCase("store", 16, 130, 3, warps=2, split_k=1),  # no 16 bytes of float32 in a row; teams take turns
    ProjectionCase("store", 16, 192, 2, warps=5, split_k=1, groups_in_flight=1),  # a warp that belongs to no team
    qkv_case(128, 7, 64, 2, 1, groups_in_flight=1, ctas=3),
    qkv_case(192, 1, 80, 1, 1, groups_in_flight=1, warps=1, split_k=1, format=FP8_E4M3),
    qkv_case(128, 2, 96, 1, 1, groups_in_flight=1, warps=1, split_k=1),
    qkv_case(128, 6, 128, 1, 1, groups_in_flight=1, warps=1, split_k=1),
)


def check_projection(case: ProjectionCase) -> None:
    """Relative L2 error against float64: 1e-5 for float32 outputs, 5e-4 (they are rounded to float16) for others."""
    rng = generator(case.out_features, case.in_features, case.tokens)
    plan, layout = case.plan, case.plan.layout
    if layout.format.bits == 16:
        stored = fp16_weights(layout, rng)
        words, matrix = prepack_fp16_reference(stored, layout), stored.astype(np.float64)
    else:
        codes, scales = weights(layout, rng)
        words = prepack_reference(codes, scales, layout)
        matrix = dequantize_groups(codes, scales).astype(np.float64)
    residual = rng.standard_normal((case.tokens, case.in_features)).astype(np.float32)
    norm_weight = rng.uniform(0.5, 1.5, case.in_features).astype(np.float32)
    x_norm, doubt = normed_as_float16(residual, norm_weight)
    if case.kind == "store without a norm":
        x_norm, doubt = residual.astype(np.float16).astype(np.float64), np.zeros_like(x_norm)
        norm_weight = poisoned(case.in_features)
    product = x_norm @ matrix.T
    error = np.abs(doubt) @ np.abs(matrix).T  # any of the doubtful elements may round the other way
    slack = float(np.linalg.norm(error) / np.linalg.norm(product))
    grid = case.ctas, plan.threads, plan.shared_bytes
    seen = poisoned(case.tokens * layout.padded_in_features // 2, dtype=np.uint32)  # what the kernel says it multiplied
    normed = {"weights": words, "residual": as_words(residual), "norm_weight": norm_weight, "x_norm": seen}
    if case.kind in ("store", "store without a norm"):
        y = poisoned(case.tokens * case.out_features)
        kernel = kernels.make_store(plan, EPS, norm=case.kind == "store")
        launch(kernel, *grid, kernels.StoreArguments(**normed, y=y))
        within("projection", relative_error(y.reshape(case.tokens, case.out_features), product), 1e-5 + slack)
    elif case.kind == "add":
        x = np.zeros((case.tokens, layout.padded_in_features), np.float16)
        x[:, : case.in_features] = rng.standard_normal((case.tokens, case.in_features))
        initial = rng.standard_normal((case.tokens, case.out_features)).astype(np.float32)
        residual_out = initial.reshape(-1).copy()
        launch(kernels.make_add(plan), *grid, kernels.AddArguments(weights=words, x=as_words(x), residual=residual_out))
        expected = x[:, : case.in_features].astype(np.float64) @ matrix.T
        within("projection", relative_error(residual_out.reshape(initial.shape), initial + expected), 1e-5)
    elif case.kind == "project":
        x = np.zeros((case.tokens, layout.padded_in_features), np.float16)
        x[:, : case.in_features] = residual
        y = poisoned(case.tokens * case.out_features)
        launch(kernels.make_project(plan), *grid, kernels.ProjectArguments(weights=words, x=as_words(x), y=y))
        expected = x[:, : case.in_features].astype(np.float64) @ matrix.T
        within("projection", relative_error(y.reshape(case.tokens, case.out_features), expected), 1e-5)
    elif case.kind in ("swiglu", "geglu"):
        ffn = case.out_features // 2
        y = poisoned(case.tokens, ffn + 3, dtype=np.uint16)
        kernel, flat = kernels.make_swiglu(plan, EPS, ffn + 3, gelu=case.kind == "geglu"), y.reshape(-1)
        launch(kernel, *grid, kernels.SwigluArguments(**normed, intermediate=flat))
        y = flat.reshape(y.shape)
        activation = gelu_reference if case.kind == "geglu" else silu_reference
        expected = activation(product[:, :ffn]) * product[:, ffn:]
        within("SwiGLU to float16", relative_error(y[:, :ffn].view(np.float16), expected), 5e-4)
        assert (y[:, ffn:] == 0xFFFF).all(), "wrote into the padding"
    else:
        check_qkv(case, grid, normed, product)
    if case.kind in ("store", "swiglu", "geglu", "qkv"):
        reported = seen.view(np.float16).reshape(case.tokens, -1)
        assert relative_error(reported[:, : case.in_features], x_norm) <= 1e-5 + float(
            np.linalg.norm(doubt) / np.linalg.norm(x_norm)
        )
        assert np.isnan(reported[:, case.in_features :]).all(), "wrote into the padding"


def normed_as_float16(
    residual: NDArray[np.float32], norm: NDArray[np.float32]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The norm as the kernel stages it, rounded to float16; and by how much elements that lie so close to the middle
    between two float16 that float32 arithmetic may round them the other way would then differ (mostly 0)."""
    exact = rms_norm_reference(residual.astype(np.float64), norm.astype(np.float64), EPS)
    down, up = ((exact * (1 + e)).astype(np.float16).astype(np.float64) for e in (-5e-7, 5e-7))
    return exact.astype(np.float16).astype(np.float64), up - down


def check_qkv(case: ProjectionCase, grid: Any, normed: dict[str, Any], product: NDArray[np.float64]) -> None:
    positions, first = 20, 20 - case.tokens  # the last token takes the last position of the cache
    dim, q_width, kv_width = case.head_dim, case.heads * case.head_dim, case.kv_heads * case.head_dim
    cosines, sines = rope_table(10000.0 ** (-np.arange(0, dim, 2) / dim), positions)
    q = poisoned(case.tokens * q_width, dtype=np.uint16)
    keys, values = (poisoned(positions * kv_width, dtype=np.uint16) for _ in range(2))
    kernel = kernels.make_qkv(case.plan, EPS, case.heads, case.kv_heads)
    arguments = kernels.QkvArguments(
        **normed,
        position=np.array([first], np.int64),
        cosines=cosines.reshape(-1),
        sines=sines.reshape(-1),
        q=q,
        keys=keys,
        values=values,
    )
    launch(kernel, *grid, arguments)
    rows = slice(first, first + case.tokens)
    angles = cosines[rows].astype(np.float64), sines[rows].astype(np.float64)
    parts = np.split(product, [q_width, q_width + kv_width], axis=1)
    rotated = [rope_reference(part.reshape(case.tokens, -1, dim), *angles) for part in parts[:2]]
    expected = [rotated[0].reshape(case.tokens, -1), rotated[1].reshape(case.tokens, -1), parts[2]]
    for got, want in ((q.reshape(case.tokens, -1), expected[0]), *zip((keys, values), expected[1:], strict=True)):
        new = got.reshape(-1, want.shape[1])
        if new.shape[0] == positions:
            assert (new[:first] == 0xFFFF).all(), "wrote into the past"
            new = new[rows]
        within("q, k, v to float16", relative_error(np.ascontiguousarray(new).view(np.float16), want), 5e-4)


# --- RoPE in a kernel of its own -----------------------------------------------------------------------------


@dataclass(frozen=True)
class RopeCase:
    """What the QKV projection's own epilogue cannot do."""

    head_dim: int
    heads: int
    kv_heads: int
    tokens: int
    bias: bool = False
    norm: bool = False
    norm_of_all_heads: bool = False


ROPES = (
    RopeCase(64, 3, 1, 1, bias=True),
    RopeCase(80, 2, 2, 3, norm=True),  # 40 pairs for 32 lanes
    RopeCase(128, 4, 1, 2, bias=True, norm=True),
    RopeCase(96, 1, 1, 5),
    RopeCase(48, 4, 2, 2, bias=True, norm=True, norm_of_all_heads=True),  # 192 and 96 elements in one norm
)


def check_rope(case: RopeCase) -> None:
    """Relative L2 error 5e-4: results are rounded to float16."""
    rng = generator(case.head_dim, case.heads, case.tokens)
    dim, positions, first = case.head_dim, 20, 20 - case.tokens
    q_width, kv_width = case.heads * dim, case.kv_heads * dim
    rows = q_width + 2 * kv_width
    qkv = rng.standard_normal((case.tokens, rows)).astype(np.float32)
    bias = rng.standard_normal(rows).astype(np.float32) if case.bias else poisoned(rows)
    widths = (q_width, kv_width) if case.norm_of_all_heads else (dim, dim)
    norms = [rng.uniform(0.5, 1.5, n).astype(np.float32) if case.norm else poisoned(n) for n in widths]
    cosines, sines = rope_table(10000.0 ** (-np.arange(0, dim, 2) / dim), positions)
    q = poisoned(case.tokens * q_width, dtype=np.uint16)
    keys, values = (poisoned(positions * kv_width, dtype=np.uint16) for _ in range(2))
    options = {"bias": case.bias, "norm": case.norm, "norm_of_all_heads": case.norm_of_all_heads}
    kernel = rope.make_rope(case.heads, case.kv_heads, dim, case.tokens, EPS, **options)
    arguments = rope.RopeArguments(
        qkv=qkv.reshape(-1),
        bias=bias,
        q_norm=norms[0],
        k_norm=norms[1],
        position=np.array([first], np.int64),
        cosines=cosines.reshape(-1),
        sines=sines.reshape(-1),
        q=q,
        keys=keys,
        values=values,
    )
    launch(kernel, rope.rope_ctas(case.heads, case.kv_heads, case.tokens), rope.THREADS, 0, arguments)
    exact = qkv.astype(np.float64) + (bias if case.bias else 0.0)
    parts = [part.reshape(case.tokens, -1, dim) for part in np.split(exact, [q_width, q_width + kv_width], axis=1)]
    last_rows = slice(first, positions)
    for i, weight in enumerate(norms):
        if case.norm:
            normed = parts[i].reshape(case.tokens, -1, len(weight))
            parts[i] = rms_norm_reference(normed, weight.astype(np.float64), EPS).reshape(parts[i].shape)
        parts[i] = rope_reference(parts[i], cosines[last_rows].astype(np.float64), sines[last_rows].astype(np.float64))
    for got, want in zip((q, keys, values), parts, strict=True):
        new = got.reshape(-1, want.shape[1] * dim)
        if len(new) == positions:
            assert (new[:first] == 0xFFFF).all(), "wrote into the past"
        result = np.ascontiguousarray(new[-case.tokens :]).view(np.float16)
        within("q, k, v to float16", relative_error(result, want.reshape(case.tokens, -1)), 5e-4)


# --- attention ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AttentionCase:
    """Attention at one geometry; `length` counts the new tokens."""

    head_dim: int
    heads: int
    kv_heads: int
    tokens: int
    length: int
    splits: int = 1
    warps: int = 1
    window: int = 0
    soft_cap: float = 0.0

    @property
    def shape(self) -> AttentionShape:
        out_width = self.heads * self.head_dim + 16
        sizes = self.heads, self.kv_heads, self.head_dim, self.tokens, out_width, self.splits, self.warps
        return AttentionShape(*sizes, self.window, self.soft_cap)


ATTENTIONS = (
    AttentionCase(64, 1, 1, 1, 1),  # a token alone
    AttentionCase(64, 3, 1, 1, 17, splits=3),  # chunks of 16: the second holds one key, the third nothing
    AttentionCase(64, 3, 1, 8, 23, splits=2),  # 24 queries are two tiles; a chunk that some queries do not see
    AttentionCase(80, 2, 2, 3, 20),  # MHA, 80 = 64 + 16
    AttentionCase(96, 4, 1, 2, 33, splits=2, warps=2),  # 96 = 64 + 32
    AttentionCase(128, 8, 1, 5, 40, splits=3, warps=1),
    AttentionCase(128, 4, 1, 1, 31, splits=2, warps=2),  # the second warp of a chunk has a step that is not full
    AttentionCase(32, 2, 1, 3, 77, splits=2, warps=1, window=40),  # two splits of what the window leaves
    AttentionCase(48, 3, 1, 2, 33, window=3, soft_cap=4.0),
    AttentionCase(64, 1, 1, 1, 20, window=64),  # has not begun to slide
    AttentionCase(256, 2, 2, 1, 37, splits=2, soft_cap=30.0),  # outputs in two parts
    AttentionCase(192, 6, 1, 3, 19, window=18),  # 18 queries are two tiles, of two parts each
)


@lru_cache(maxsize=2)
def _attention_kernel(shape: AttentionShape) -> Any:
    return make_attention(shape)


def check_attention(case: AttentionCase) -> None:
    """Relative L2 error 1e-3 against float64; loud noise and NaN behind the last token change no bit."""
    rng = generator(case.head_dim, case.heads, case.length)
    shape, positions = case.shape, case.length + 9
    q = (rng.standard_normal((case.tokens, case.heads * case.head_dim)) * 2).astype(np.float16)
    cache = rng.standard_normal((2, positions, case.kv_heads * case.head_dim)).astype(np.float16)
    position = np.array([case.length - case.tokens], np.int64)
    counters = np.zeros(shape.work_tiles, np.uint32)
    kernel = _attention_kernel(shape)
    results = []
    for noise in (np.float16(np.nan), np.float16(60000.0)):
        cache[:, case.length :] = noise
        out = poisoned(case.tokens * case.shape.out_width // 2, dtype=np.uint32)
        keys, values = as_words(cache[0]), as_words(cache[1])
        partials = poisoned(shape.partials)
        arguments = AttentionArguments(as_words(q), keys, values, position, partials, counters, out)
        launch(kernel, shape.ctas, shape.threads, shape.shared_bytes, arguments)
        assert not counters.any(), "a counter does not stand at zero for the next launch"
        results.append(out.view(np.float16).reshape(case.tokens, -1))
    width = case.heads * case.head_dim
    np.testing.assert_array_equal(results[0][:, :width], results[1][:, :width])
    exact = (array.astype(np.float64) for array in (q, cache[0], cache[1]))
    window, first = case.window or NO_WINDOW, case.length - case.tokens
    expected = attend_reference(*exact, first, case.head_dim, window, case.soft_cap)
    within("attention", relative_error(results[0][:, :width], expected), 1e-3)
    assert np.isnan(results[0][:, width:]).all(), "wrote into the padding"
