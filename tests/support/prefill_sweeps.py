"""The kernels of prefill steps on a GPU, against float64, over many numbers of tokens.

A kernel serves every number of tokens, so each is compiled once. Inputs are fresh, outputs are poisoned with NaN, and
so are the rows of x behind the last token: they must not reach any other row.

`python scripts/bench_prefill.py --compile 9.0 --tests` compiles all of them into the compile cache, without a GPU.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from kernel_cases import (
    EPS,
    fp16_weights,
    generator,
    normed_as_float16,
    poisoned,
    relative_error,
    weights,
    within,
)
from numpy.typing import NDArray
from prefill_attention_sweeps import ATTENTIONS, LONG_ATTENTIONS, AttentionSweep
from prefill_sweep_sizes import GQA_RATIOS, HEAD_DIMS, LONG, LONG_CAPACITY, SHORT, SHORT_CAPACITY, whole

from numba_atomflow.geometry import ModelGeometry
from numba_atomflow.model.presets import PRESETS
from numba_atomflow.ops.activation import silu_reference
from numba_atomflow.ops.cuda.gemm import arguments as gemm
from numba_atomflow.ops.cuda.gemm.kernels import (
    gemm_kernel,
    make_gemm_add,
    make_gemm_qkv,
    make_gemm_store,
    make_gemm_swiglu,
)
from numba_atomflow.ops.cuda.gemm.plan import GemmPlan, choose_gemm_plan, gemm_plan, mma_plan
from numba_atomflow.ops.cuda.layout.activations import ActivationTiles
from numba_atomflow.ops.cuda.layout.weights import PrepackedLayout, prepack_fp16_reference, prepack_reference
from numba_atomflow.ops.cuda.runtime.chip import Chip
from numba_atomflow.ops.cuda.runtime.spec import Planned
from numba_atomflow.ops.cuda.token.rms_norm import RmsNormTilesArguments, rms_norm_tiles_kernel
from numba_atomflow.ops.formats import FP8_E4M3, FP16
from numba_atomflow.ops.fp8 import dequantize_groups
from numba_atomflow.ops.rope import rope_reference, rope_table

TILES = (16, 32, 64, 128, 256)
_CHECKED_ROWS = 128  # of a long step

# --- GEMM ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GemmSweep:
    """A projection, over many numbers of tokens.

    Attributes:
        kind: "store", "add", "swiglu" or "qkv".
        tile_tokens: of a CTA's tile; 0: the plan's choice for the largest number of tokens.
        k_tile: groups of a k-tile of the weights; 4 is the layout of the persistent kernel.
        bits: of activations: 16, or 8 for FP8.
        weight_bits: 16 for float16 weights, which an LM head may have.
        mma: with `mma.sync` also where the GPU has `wgmma`.
    """

    kind: str
    out_features: int
    in_features: int
    tile_tokens: int
    tokens: tuple[int, ...] = SHORT
    capacity: int = SHORT_CAPACITY
    k_tile: int = 4
    bits: int = 16
    weight_bits: int = 8
    mma: bool = False
    head_dim: int = 64
    heads: int = 1
    kv_heads: int = 1

    def __str__(self) -> str:
        shape = f"{self.kind}-w{self.weight_bits}a{self.bits}-{self.out_features}x{self.in_features}"
        shape += f"-tile{self.tile_tokens}-k_tile{self.k_tile}{'-mma' * self.mma}"
        return f"{shape}-{self.heads}of{self.kv_heads}x{self.head_dim}" if self.kind == "qkv" else shape

    def runs_on(self, chip: Chip) -> bool:
        """Whether the GPU has what it takes: FP8 activations and tiles of 256 tokens need wgmma."""
        return chip.capability == (9, 0) or (self.bits == 16 and self.tile_tokens <= 128)

    def layout(self, chip: Chip) -> PrepackedLayout:
        half = {"swiglu": self.out_features // 2, "qkv": self.head_dim // 2}.get(self.kind, 0)
        weights = chip.native(FP8_E4M3) if self.weight_bits == 8 else FP16
        return PrepackedLayout(self.out_features, self.in_features, half, weights, self.k_tile)

    def plan(self, chip: Chip) -> GemmPlan:
        layout = self.layout(chip)
        x = ActivationTiles(self.in_features, self.capacity, self.bits, self.weight_bits)
        if self.mma:
            return mma_plan(layout, x, self.tile_tokens, chip)
        if self.tile_tokens:
            return gemm_plan(layout, x, self.tile_tokens, chip)
        return choose_gemm_plan(layout, x, self.capacity, chip)

    @property
    def intermediate(self) -> ActivationTiles:
        """The output of SwiGLU."""
        return ActivationTiles(self.out_features // 2, self.capacity)

    @cache  # noqa: B019  a constant of the module
    def planned(self, chip: Chip) -> Planned:
        """The kernel, with its grid."""
        factory, options = {
            "store": (make_gemm_store, {}),
            "add": (make_gemm_add, {}),
            "swiglu": (make_gemm_swiglu, {"intermediate": self.intermediate}),
            "qkv": (make_gemm_qkv, {"heads": self.heads, "kv_heads": self.kv_heads}),
        }[self.kind]
        return gemm_kernel(f"gemm_{self.kind}", factory, self.plan(chip), chip.dependent_launch, **options)


def _qkv(head_dim: int, ratio: int, tile_tokens: int, in_features: int = 576) -> GemmSweep:
    heads, kv_heads = 2 * ratio, 2
    rows = (heads + 2 * kv_heads) * head_dim
    return GemmSweep(
        "qkv", rows, in_features, tile_tokens, head_dim=head_dim, heads=heads, kv_heads=kv_heads, tokens=SHORT
    )


GEMMS = (
    *(GemmSweep("store", 200, 576, tile) for tile in TILES),  # neither rows nor K fill a tile
    *(GemmSweep("add", 576, 1536, tile) for tile in TILES),
    *(GemmSweep("swiglu", 400, 330, tile) for tile in (*TILES, 208)),
    *(GemmSweep("store", 3072, 3072, tile, k_tile=0) for tile in (16, 128, 256)),  # whole-K tiles of weights
    *(GemmSweep("add", 3072, 8192, tile) for tile in (16, 64, 128)),  # tiles that CTAs share
    GemmSweep("add", 200, 8192, 128),  # a tile has 32 CTAs, more than fragments
)
FP8_GEMMS = (
    *(GemmSweep("store", 200, 576, tile, bits=8) for tile in (*TILES, 104, 176, 192, 224)),
    GemmSweep("add", 576, 1536, 64, bits=8),
    GemmSweep("swiglu", 400, 330, 128, bits=8),
    GemmSweep("add", 3072, 8192, 128, bits=8),
    GemmSweep("add", 3072, 3072, 0, tokens=LONG, capacity=LONG_CAPACITY, bits=8),
)
FP16_GEMMS = tuple(GemmSweep("store", 200, 328, tile, k_tile=0, weight_bits=16) for tile in (16, 64, 128))
MMA_GEMMS = (
    *(GemmSweep("store", 200, 576, tile, mma=True) for tile in (16, 32, 64, 128)),
    GemmSweep("add", 576, 1536, 32, k_tile=0, mma=True),
    GemmSweep("swiglu", 400, 330, 64, mma=True),
    GemmSweep("store", 200, 328, 64, k_tile=0, weight_bits=16, mma=True),
    *(GemmSweep("add", 3072, 8192, tile, mma=True) for tile in (16, 128)),  # tiles that CTAs share
)
QKVS = (
    *(_qkv(head_dim, ratio, 64) for head_dim in HEAD_DIMS for ratio in GQA_RATIOS),
    *(_qkv(head_dim, 3, tile) for head_dim, tile in zip(HEAD_DIMS, (128, 176, 224, 256), strict=True)),  # staged
)


def _of_model(geometry: ModelGeometry) -> Iterator[GemmSweep]:
    """The projections of a model at long steps, with the tiles that are chosen for them."""
    g = geometry
    more: dict[str, Any] = {"tile_tokens": 0, "tokens": LONG, "capacity": LONG_CAPACITY}
    sizes = {"head_dim": g.head_dim, "heads": g.heads, "kv_heads": g.kv_heads}
    yield GemmSweep("qkv", g.q_dim + 2 * g.kv_dim, g.hidden, **more, **sizes)
    yield GemmSweep("swiglu", 2 * g.ffn, g.hidden, **more)
    yield GemmSweep("add", g.hidden, g.ffn, **more)


LONG_GEMMS = tuple(_of_model(PRESETS["llama-3.2-3b"]))


@cache
def _gemm_weights(layout: PrepackedLayout) -> tuple[NDArray[np.uint32], NDArray[np.float64]]:
    """Prepacked words, and what they stand for; some groups have the scale zero."""
    rng = generator(layout.out_features, layout.in_features)
    if layout.format.bits == 16:
        stored = fp16_weights(layout, rng)
        return prepack_fp16_reference(stored, layout), stored.astype(np.float64)
    codes, scales = weights(layout, rng)
    zero = rng.random(scales.shape) < 0.02
    scales[zero] = 0.0
    return prepack_reference(codes, scales, layout), dequantize_groups(codes, scales).astype(np.float64)


def _activations(tiles: ActivationTiles, x: NDArray[np.float64]) -> tuple[NDArray[np.uint32], NDArray[Any]]:
    """Words of x, and what they stand for; the tokens behind those of x are NaN."""
    tokens = len(x)
    words = tiles.pack(x.astype(tiles.dtype))
    known = tiles.unpack(words)[:tokens]
    words[tiles._index()[tokens:]] = 0x7F7F7F7F if tiles.bits == 8 else 0x7FFF7FFF
    if tiles.bits == 8:
        words[tiles.scales_start :].reshape(tiles.blocks, -1)[:, tokens:] = 0x7FC00000
    return words, known


def check_gemm(sweep: GemmSweep, tokens: int, chip: Chip) -> None:
    """Relative L2 3e-5 for float32 outputs (tensor cores cut sums off where float32 would round), 5e-4 for float16,
    1e-3 for FP8 activations (of whose sums they keep some 14 bits); nothing behind the tokens' tiles is written; a
    second run has the same bits.
    """
    rng = generator(sweep.out_features, tokens)
    plan, planned = sweep.plan(chip), sweep.planned(chip)
    words, matrix = _gemm_weights(plan.layout)
    spread = 0.25 if sweep.kind == "swiglu" else 1.0  # its results, products of two sums, fit into float16
    x_words, x = _activations(plan.x, spread * rng.standard_normal((tokens, sweep.in_features)))
    padded = -(-tokens // plan.tile_tokens) * plan.tile_tokens
    rows = np.arange(tokens) if tokens <= _CHECKED_ROWS else np.sort(rng.choice(tokens, _CHECKED_ROWS, replace=False))
    product = x[rows].astype(np.float64) @ matrix.T
    partials = np.zeros(plan.partials, np.float32)
    common = {"weights": words, "x": x_words, "token_tiles": padded // plan.tile_tokens, "partials": partials}
    runs = []
    for _ in range(2):
        runs.append(_run_gemm(sweep, planned, common, rows, product, tokens, padded))
        assert not partials.any(), "partial sums are not zero for the next launch"
    for first, second in zip(*runs, strict=True):
        np.testing.assert_array_equal(first, second)


def _run_gemm(
    sweep: GemmSweep,
    planned: Planned,
    common: dict[str, Any],
    rows: NDArray[np.int64],
    product: NDArray[np.float64],
    tokens: int,
    padded: int,
) -> list[NDArray[Any]]:
    """Run and check it; what it has written."""
    from device_launch import launch_planned

    name, limit = ("GEMM", 3e-5) if sweep.bits == 16 else ("GEMM of FP8 activations", 1e-3)

    match sweep.kind:
        case "store":
            y = poisoned(sweep.capacity, sweep.out_features)
            launch_planned(planned, gemm.GemmStoreArguments(**common, y=y))
            within(f"{name}, float32", relative_error(y[rows], product), limit)
            assert np.isnan(y[padded:]).all(), "wrote behind the last tile"
            return [y[:tokens]]
        case "add":
            residual = np.ones((sweep.capacity, sweep.out_features), np.float32)
            launch_planned(planned, gemm.GemmAddArguments(**common, residual=residual))
            within(f"{name}, float32", relative_error(residual[rows], product + 1.0), limit)
            assert (residual[padded:] == 1.0).all(), "wrote behind the last tile"
            return [residual[:tokens]]
        case "swiglu":
            tiles, units = sweep.intermediate, sweep.out_features // 2
            words = poisoned(tiles.words, dtype=np.uint32)
            launch_planned(planned, gemm.GemmSwigluArguments(**common, intermediate=words))
            got = whole(tiles).unpack(words)
            expected = silu_reference(product[:, :units]) * product[:, units:]
            within(f"{name}, SwiGLU to float16", relative_error(got[rows, :units], expected), max(limit, 5e-4))
            assert np.isnan(got[padded:]).all(), "wrote behind the last tile"
            return [got[:tokens]]
    return _run_qkv(sweep, planned, common, rows, product, tokens)


def _run_qkv(
    sweep: GemmSweep,
    planned: Planned,
    common: dict[str, Any],
    rows: NDArray[np.int64],
    product: NDArray[np.float64],
    tokens: int,
) -> list[NDArray[Any]]:
    from device_launch import launch_planned

    dim, first, behind = sweep.head_dim, 5, 3  # positions before and after those of the step
    q_width, kv_width = sweep.heads * dim, sweep.kv_heads * dim
    cosines, sines = rope_table(10000.0 ** (-np.arange(0, dim, 2) / dim), first + tokens)
    q = poisoned(sweep.capacity, q_width, dtype=np.uint16)
    cache_ = [poisoned(first + tokens + behind, kv_width, dtype=np.uint16) for _ in range(2)]
    arguments = gemm.GemmQkvArguments(
        **common,
        count=np.array([tokens], np.int64),
        position=np.array([first], np.int64),
        cosines=cosines,
        sines=sines,
        q=q,
        keys=cache_[0],
        values=cache_[1],
    )
    launch_planned(planned, arguments)
    angles = cosines[first + rows].astype(np.float64), sines[first + rows].astype(np.float64)
    parts = np.split(product, [q_width, q_width + kv_width], axis=1)
    rotated = [rope_reference(part.reshape(len(rows), -1, dim), *angles).reshape(part.shape) for part in parts[:2]]
    written = [q[:tokens], *(each[first : first + tokens] for each in cache_)]
    for got, expected in zip(written, [*rotated, parts[2]], strict=True):
        within("GEMM, q, k, v to float16", relative_error(got.view(np.float16)[rows], expected), 5e-4)
    for each in cache_:
        assert (each[:first] == 0xFFFF).all(), "wrote into the past"
        assert (each[first + tokens :] == 0xFFFF).all(), "wrote keys or values of padding"
    return written


# --- RMSNorm ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NormSweep:
    """RMSNorm to tiles, over many numbers of tokens."""

    in_features: int
    tokens: tuple[int, ...]
    capacity: int

    @property
    def tiles(self) -> ActivationTiles:
        return ActivationTiles(self.in_features, self.capacity)

    def planned(self, chip: Chip) -> Planned:
        return rms_norm_tiles_kernel("norm_tiles", self.tiles, EPS, chip.dependent_launch)


NORMS = (
    *(NormSweep(size, SHORT, SHORT_CAPACITY) for size in (330, 576, 2048, 4096)),
    NormSweep(3072, LONG, LONG_CAPACITY),
)


def check_norm(sweep: NormSweep, tokens: int, chip: Chip) -> None:
    """Relative L2 2e-6 beside float16's rounding; nothing behind the tokens is written."""
    from device_launch import launch_planned

    width = sweep.in_features
    rng = generator(width, tokens)
    residual = rng.standard_normal((tokens, width)).astype(np.float32)
    weight = rng.uniform(0.5, 1.5, width).astype(np.float32)
    words = poisoned(sweep.tiles.words, dtype=np.uint32)
    launch_planned(sweep.planned(chip), RmsNormTilesArguments(residual, weight, words), tokens)
    got = whole(sweep.tiles).unpack(words)
    expected, doubt = normed_as_float16(residual, weight)
    slack = float(np.linalg.norm(doubt) / np.linalg.norm(expected))
    within("RMSNorm to tiles", relative_error(got[:tokens, :width], expected), 2e-6 + slack)
    assert not got[:tokens, width:].any(), "the padding of K is not zero"
    assert np.isnan(got[tokens:]).all(), "wrote tokens that have no CTA"


# --- compiling -------------------------------------------------------------------------------------------------------


def all_kernels(chip: Chip) -> list[Planned]:
    """Every kernel of these checks."""
    gemms = (*GEMMS, *FP8_GEMMS, *FP16_GEMMS, *MMA_GEMMS, *QKVS, *LONG_GEMMS)
    sweeps: Sequence[GemmSweep | AttentionSweep | NormSweep]
    sweeps = (*(sweep for sweep in gemms if sweep.runs_on(chip)), *ATTENTIONS, *LONG_ATTENTIONS, *NORMS)
    return list({planned.spec: planned for planned in (sweep.planned(chip) for sweep in sweeps)}.values())
