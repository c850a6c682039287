"""Kernels of their own for what some families have: a norm of what is added to the stream, and a soft cap of logits.

Gemma 2 and 3 and OLMo 2 norm what attention and the MLP add. That norm is of a projection's whole result, of which a
CTA of the projection has a part: so it is a kernel, with a CTA for each token. Cost model: a launch (2-3 us); 12 bytes
per element of a token. The cap of logits (Gemma 2): a launch, and 8 bytes per logit.
"""

from typing import Any, NamedTuple

from numba import cuda, float32

from numba_atomflow.ops import ptx
from numba_atomflow.ops.cuda.elementwise import make_soft_cap
from numba_atomflow.ops.cuda.runtime.spec import F32, NUMBER, Planned, kernel_spec
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


def add_norm_kernel(name: str, width: int, eps: float, tokens: int, *, dependent: bool) -> Planned:
    """The kernel of `make_add_norm`; its grid for `tokens` tokens."""
    spec = kernel_spec(name, make_add_norm, AddNormArguments, THREADS, width=width, eps=eps, dependent=dependent)
    return Planned(spec, tokens)


def cap_logits_kernel(cap: float, sms: int, *, dependent: bool) -> Planned:
    """The kernel of `make_cap_logits`."""
    spec = kernel_spec("cap_logits", make_cap_logits, CapLogitsArguments, THREADS, cap=cap, dependent=dependent)
    return Planned(spec, 2 * sms)
