"""The projections of a decode step: GEMV kernels with what comes before and after the product fused in.

A kernel is a prologue (x into shared memory), the main loop (weights times x on tensor cores) and an epilogue.
`split_k` warps of a CTA share a tile of 16 rows, each taking every `split_k`-th group of 128 weights along K; CTAs loop
over the tiles with a stride of the grid. The next loads of weights are always issued before the work that waits for
something else: before the prologue (x is staged while the first weights are in flight), and before a tile's partial
sums are reduced.

Every factory takes a `GemvPlan` and makes a kernel for `plan.ctas(sms)` CTAs of `plan.threads` threads with
`plan.shared_bytes` of dynamic shared memory. Activations that a later projection reads are float16, with rows padded to
the groups of that projection; the padding must be zero once and is never written. All arrays are one-dimensional;
float16 comes as uint16 where elements are written, and as uint32 where pairs are read.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from numba import cuda, float32, uint32

from numba_atomflow.ops import ptx
from numba_atomflow.ops.cuda.gemv.epilogue import (
    Epilogue,
    make_add_epilogue,
    make_qkv_epilogue,
    make_reduce_partials,
    make_store_epilogue,
    make_swiglu_epilogue,
    make_write_partials,
)
from numba_atomflow.ops.cuda.gemv.mainloop import make_load, make_multiply
from numba_atomflow.ops.cuda.gemv.plan import GemvPlan
from numba_atomflow.ops.cuda.gemv.prologue import (
    Prologue,
    make_copy_prologue,
    make_norm_prologue,
    make_round_prologue,
)
from numba_atomflow.ops.cuda.runtime.spec import F32, I64, U16, U32, Planned, kernel_spec
from numba_atomflow.ops.cuda.scalars import f32

_ZERO = f32(0.0)


class StoreArguments(NamedTuple):
    """y = W norm(residual), plain row order.

    Attributes:
        weights: prepacked.
        residual: float32 [tokens, K] as words.
        norm_weight: [K]; not read by a kernel without a norm.
        x_norm: pairs of float16 [tokens, padded K]: what the kernel multiplied, written for validation; not by a kernel
            without a norm.
        y: [tokens, out_features].
    """

    weights: U32
    residual: U32
    norm_weight: F32
    x_norm: U32
    y: F32


class AddArguments(NamedTuple):
    """residual += W x, plain row order.

    Attributes:
        weights: prepacked.
        x: pairs of float16 [tokens, padded K].
        residual: [tokens, out_features].
    """

    weights: U32
    x: U32
    residual: F32


class ProjectArguments(NamedTuple):
    """y = W x, plain row order.

    Attributes:
        weights: prepacked.
        x: pairs of float16 [tokens, padded K].
        y: [tokens, out_features].
    """

    weights: U32
    x: U32
    y: F32


class SwigluArguments(NamedTuple):
    """intermediate = silu(gate) * up, or gelu(gate) * up, with (gate, up) = W norm(residual). Rows paired with half =
    number of units.

    Attributes:
        weights, residual, norm_weight, x_norm: as in `StoreArguments`.
        intermediate: bits of float16 [tokens, K of the down projection, padded].
    """

    weights: U32
    residual: U32
    norm_weight: F32
    x_norm: U32
    intermediate: U16


class QkvArguments(NamedTuple):
    """q, k and v = W norm(residual); q and k rotated; k and v to the KV cache. Rows paired with half = head_dim / 2.

    Attributes:
        weights, residual, norm_weight, x_norm: as in `StoreArguments`.
        position: [1], of the first token; the others follow.
        cosines, sines: [positions, head_dim / 2].
        q: bits of float16 [tokens, heads * head_dim].
        keys, values: bits of float16 [positions, kv_heads * head_dim].
    """

    weights: U32
    residual: U32
    norm_weight: F32
    x_norm: U32
    position: I64
    cosines: F32
    sines: F32
    q: U16
    keys: U16
    values: U16


class PagedQkvArguments(NamedTuple):
    """The same for tokens of any sequences.

    Attributes:
        weights, residual, norm_weight, x_norm, cosines, sines, q: as in `QkvArguments`.
        positions: [tokens], for RoPE.
        slots: [tokens]: rows of the KV cache that keys and values go to.
        keys, values: bits of float16 [slots of the cache, kv_heads * head_dim].
    """

    weights: U32
    residual: U32
    norm_weight: F32
    x_norm: U32
    positions: I64
    slots: I64
    cosines: F32
    sines: F32
    q: U16
    keys: U16
    values: U16


# --- kernels ---------------------------------------------------------------------------------------------------------


def make_store(plan: GemvPlan, eps: float, *, norm: bool = True, dependent: bool = False) -> Any:
    """Kernel (`StoreArguments`). `norm`: whether there is one; without, it multiplies the residual itself."""
    return make_gemv(plan, _prologue(plan, eps, norm=norm), make_store_epilogue(plan), dependent)


def _prologue(plan: GemvPlan, eps: float, *, norm: bool) -> Prologue:
    return make_norm_prologue(plan, eps) if norm else make_round_prologue(plan)


def make_add(plan: GemvPlan, *, dependent: bool = False) -> Any:
    """Kernel (`AddArguments`)."""
    return make_gemv(plan, make_copy_prologue(plan), make_add_epilogue(plan), dependent)


def make_project(plan: GemvPlan, *, dependent: bool = False) -> Any:
    """Kernel (`ProjectArguments`)."""
    return make_gemv(plan, make_copy_prologue(plan), make_store_epilogue(plan), dependent)


def make_swiglu(
    plan: GemvPlan, eps: float, y_pitch: int, *, norm: bool = True, gelu: bool = False, dependent: bool = False
) -> Any:
    """Kernel (`SwigluArguments`).

    Args:
        y_pitch: padded K of the down projection.
        norm: as in `make_store`.
        gelu: GELU in place of SiLU.
    """
    epilogue = make_swiglu_epilogue(plan, y_pitch, gelu=gelu)
    return make_gemv(plan, _prologue(plan, eps, norm=norm), epilogue, dependent)


def make_qkv(plan: GemvPlan, eps: float, heads: int, kv_heads: int, *, dependent: bool = False) -> Any:
    """Kernel (`QkvArguments`)."""
    epilogue = make_qkv_epilogue(plan, heads, kv_heads, paged=False)
    return make_gemv(plan, make_norm_prologue(plan, eps), epilogue, dependent)


def make_paged_qkv(plan: GemvPlan, eps: float, heads: int, kv_heads: int, *, dependent: bool = False) -> Any:
    """Kernel (`PagedQkvArguments`)."""
    epilogue = make_qkv_epilogue(plan, heads, kv_heads, paged=True)
    return make_gemv(plan, make_norm_prologue(plan, eps), epilogue, dependent)


def make_gemv(plan: GemvPlan, prologue: Prologue, epilogue: Epilogue, dependent: bool) -> Any:
    """A projection's kernel, whose parameter `io` has `weights` and what prologue and epilogue read and write.

    `dependent`: launched with programmatic dependent launch (sm_90 and later).
    """
    tiles, split_k, tiles_per_cta, batches = plan.layout.tiles, plan.split_k, plan.tiles_per_cta, plan.batches
    code_registers, scale_registers = 16 * plan.groups_in_flight, 2 * plan.groups_in_flight
    partials_start, partials_words = plan.partials_start, plan.partials_words
    load, multiply = make_load(plan), make_multiply(plan)
    prefetch_weight, stage, report = prologue.prefetch, prologue.stage, prologue.report
    prefetch_tables = epilogue.prefetch
    write_partials, reduce_partials = make_write_partials(plan), make_reduce_partials(plan, epilogue.store)

    @ptx.kernel(plan.threads, plan.ctas_per_sm)
    def gemv(io):
        words = cuda.shared.array(0, uint32)
        floats = cuda.shared.array(0, float32)
        codes = cuda.local.array(code_registers, uint32)
        scales = cuda.local.array(scale_registers, float32)
        sums = cuda.local.array(4, float32)
        thread = cuda.threadIdx.x
        lane, warp = thread & 31, thread >> 5
        slot, k_slice = warp // split_k, warp % split_k
        first_tile = cuda.blockIdx.x * tiles_per_cta
        tile = min(first_tile + slot, tiles - 1)  # a slot without a tile repeats the last one; its result is discarded

        load(io.weights, tile, 0, k_slice, lane, codes, scales)
        prefetch_weight(io, thread)
        if dependent:
            ptx.let_next_kernel_start()
            prefetch_tables(io, thread)
            ptx.wait_for_previous_kernel()
        stage(io, thread, words, floats)
        cuda.syncthreads()
        report(io, thread, words)

        parity = 0
        while first_tile < tiles:
            has_tile = first_tile + slot < tiles
            next_first = first_tile + cuda.gridDim.x * tiles_per_cta
            next_tile = min(next_first + slot, tiles - 1)
            for i in range(4):
                sums[i] = _ZERO
            for batch in range(batches):
                multiply(batch, k_slice, lane, codes, scales, words, sums)
                last = batch == batches - 1
                if not last or next_first < tiles:
                    load(
                        io.weights, next_tile if last else tile, 0 if last else batch + 1, k_slice, lane, codes, scales
                    )

            # Two buffers of partial sums take turns: one barrier per tile is enough.
            start = partials_start + parity * partials_words
            write_partials(start, warp, lane, sums, floats)
            if split_k == 1:
                ptx.sync_warp()
            else:
                cuda.syncthreads()
            reduce_partials(io, tile, has_tile, start, slot, k_slice, lane, floats)
            parity ^= 1
            tile = next_tile
            first_tile = next_first

    return gemv


# --- specs -----------------------------------------------------------------------------------------------------------

_ARGUMENTS: dict[Callable[..., Any], type[tuple[Any, ...]]] = {
    make_store: StoreArguments,
    make_add: AddArguments,
    make_project: ProjectArguments,
    make_swiglu: SwigluArguments,
    make_qkv: QkvArguments,
    make_paged_qkv: PagedQkvArguments,
}


def projection_kernel(
    name: str, factory: Callable[..., Any], plan: GemvPlan, sms: int, dependent: bool, **options: Any
) -> Planned:
    """The spec of a kernel of one of the factories above, which takes `options` beside plan and `dependent`."""
    options = {"plan": plan, "dependent": dependent} | options
    spec = kernel_spec(name, factory, _ARGUMENTS[factory], plan.threads, plan.shared_bytes, **options)
    return Planned(spec, plan.ctas(sms))
