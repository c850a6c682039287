"""Kernels of their own for what some families have: a norm of what is added to the stream, a soft cap of logits; and on
the GEMM path GELU, and the stream as it is in place of its norm.

Gemma 2 and 3 and OLMo 2 norm what attention and the MLP add. That norm is of a projection's whole result, of which a
CTA of the projection has a part: so it is a kernel, with a CTA for each token. Cost model: a launch (2-3 us); 12 bytes
per element of a token. The cap of logits (Gemma 2): a launch, and 8 bytes per logit. GELU of a chunk: 8 bytes read and
2 written per unit, beside 8 that the GEMM writes.
"""

from typing import Any, NamedTuple

from numba import cuda, float32

from numba_atomflow.ops import ptx
from numba_atomflow.ops.cuda.elementwise import geglu, make_soft_cap
from numba_atomflow.ops.cuda.layout.activations import BLOCK_WORDS, ActivationTiles
from numba_atomflow.ops.cuda.runtime.spec import F32, NUMBER, U32, Planned, kernel_spec
from numba_atomflow.ops.cuda.scalars import f32

THREADS = 256
_ZERO = f32(0.0)


class AddNormArguments(NamedTuple):
    """residual += norm(x).

    Attributes:
        x: [tokens, width]: the result of a projection.
        norm_weight: [width].
        residual: [tokens, width].
    """

    x: F32
    norm_weight: F32
    residual: F32


class RoundTilesArguments(NamedTuple):
    """x = residual, rounded to float16.

    Attributes:
        residual: [tokens, width].
        x: tiled activations.
    """

    residual: F32
    x: U32


class GegluTilesArguments(NamedTuple):
    """intermediate = gelu(gate) * up.

    Attributes:
        gate_up: [tokens, 2 * units], in the order of the prepacked rows: 8 of gate, then the same 8 of up.
        intermediate: tiled activations.
    """

    gate_up: F32
    intermediate: U32


class CapLogitsArguments(NamedTuple):
    """Each logit x becomes c tanh(x / c), in place.

    Attributes:
        logits: [at least `count`].
        count: how many.
    """

    logits: F32
    count: NUMBER


def make_add_norm(width: int, eps: float, *, dependent: bool = False) -> Any:
    """Kernel (`AddNormArguments`): token i is CTA i's. Launch: a CTA of `THREADS` threads for each token."""
    warps, turns = THREADS // 32, -(-width // THREADS)
    inverse_width, epsilon = f32(1.0 / width), f32(eps)

    @ptx.kernel(THREADS, 1)
    def add_norm(io):
        sums = cuda.shared.array(warps, float32)
        values = cuda.local.array(turns, float32)
        thread = cuda.threadIdx.x
        start = cuda.blockIdx.x * width
        if dependent:
            ptx.let_next_kernel_start()
            ptx.wait_for_previous_kernel()
        squares = _ZERO
        for i in range(turns):
            k = i * THREADS + thread
            values[i] = io.x[start + k] if k < width else _ZERO
            squares += values[i] * values[i]
        squares = ptx.warp_sum(squares)
        if thread & 31 == 0:
            sums[thread >> 5] = squares
        cuda.syncthreads()
        squares = _ZERO
        for warp in range(warps):
            squares += sums[warp]
        factor = ptx.rsqrt(squares * inverse_width + epsilon)
        for i in range(turns):
            k = i * THREADS + thread
            if k < width:
                io.residual[start + k] += values[i] * factor * io.norm_weight[k]

    return add_norm


def make_cap_logits(cap: float, *, dependent: bool = False) -> Any:
    """Kernel (`CapLogitsArguments`). Launch: any number of CTAs of `THREADS` threads."""
    soft_cap = make_soft_cap(cap)

    @ptx.kernel(THREADS, 1)
    def cap_logits(io):
        if dependent:
            ptx.let_next_kernel_start()
            ptx.wait_for_previous_kernel()
        i = cuda.blockIdx.x * THREADS + cuda.threadIdx.x
        while i < io.count:
            io.logits[i] = soft_cap(io.logits[i])
            i += cuda.gridDim.x * THREADS

    return cap_logits


def make_round_tiles(x: ActivationTiles, *, dependent: bool = False) -> Any:
    """Kernel (`RoundTilesArguments`): token i is CTA i's. K is even; its padding is written as zeros.

    Launch: a CTA of `THREADS` threads for each token.
    """
    width, words, word_index = x.in_features, x.blocks * BLOCK_WORDS, x.make_word_index()

    @ptx.kernel(THREADS, 1)
    def round_tiles(io):
        if dependent:
            ptx.let_next_kernel_start()
            ptx.wait_for_previous_kernel()
        token, word = cuda.blockIdx.x, cuda.threadIdx.x
        while word < words:
            low, high = _ZERO, _ZERO
            if 2 * word < width:
                low, high = ptx.load_f32x2(io.residual, token * width + 2 * word)
            io.x[word_index(token, word)] = ptx.pack_f16x2(low, high)
            word += THREADS

    return round_tiles


def make_geglu_tiles(intermediate: ActivationTiles, *, dependent: bool = False) -> Any:
    """Kernel (`GegluTilesArguments`): token i is CTA i's. The number of units is a multiple of 8; the padding of the
    tiles is written as zeros.

    Launch: a CTA of `THREADS` threads for each token.
    """
    units, words = intermediate.in_features, intermediate.blocks * BLOCK_WORDS
    word_index = intermediate.make_word_index()
    if units % 8:
        raise ValueError(f"GELU of {units} units; their number must be a multiple of 8")

    @ptx.kernel(THREADS, 1)
    def geglu_tiles(io):
        if dependent:
            ptx.let_next_kernel_start()
            ptx.wait_for_previous_kernel()
        token, word = cuda.blockIdx.x, cuda.threadIdx.x
        while word < words:
            low, high = _ZERO, _ZERO
            if 2 * word < units:
                start = token * 2 * units + word // 4 * 16 + word % 4 * 2
                gate_0, gate_1 = ptx.load_f32x2(io.gate_up, start)
                up_0, up_1 = ptx.load_f32x2(io.gate_up, start + 8)
                low, high = geglu(gate_0, up_0), geglu(gate_1, up_1)
            io.intermediate[word_index(token, word)] = ptx.pack_f16x2(low, high)
            word += THREADS

    return geglu_tiles


def round_tiles_kernel(x: ActivationTiles, tokens: int, *, dependent: bool) -> Planned:
    """The kernel of `make_round_tiles`; its grid for `tokens` tokens."""
    spec = kernel_spec("round_tiles", make_round_tiles, RoundTilesArguments, THREADS, x=x, dependent=dependent)
    return Planned(spec, tokens)


def geglu_tiles_kernel(intermediate: ActivationTiles, tokens: int, *, dependent: bool) -> Planned:
    """The kernel of `make_geglu_tiles`; its grid for `tokens` tokens."""
    spec = kernel_spec(
        "geglu_tiles", make_geglu_tiles, GegluTilesArguments, THREADS, intermediate=intermediate, dependent=dependent
    )
    return Planned(spec, tokens)


def add_norm_kernel(name: str, width: int, eps: float, tokens: int, *, dependent: bool) -> Planned:
    """The kernel of `make_add_norm`; its grid for `tokens` tokens."""
    spec = kernel_spec(name, make_add_norm, AddNormArguments, THREADS, width=width, eps=eps, dependent=dependent)
    return Planned(spec, tokens)


def cap_logits_kernel(cap: float, sms: int, *, dependent: bool) -> Planned:
    """The kernel of `make_cap_logits`."""
    spec = kernel_spec("cap_logits", make_cap_logits, CapLogitsArguments, THREADS, cap=cap, dependent=dependent)
    return Planned(spec, 2 * sms)
