"""The projections of a decode step as kernels: `projection.make_runner` with the four epilogues.

Every factory takes a `ProjectionShape` and gives a kernel for `shape.blocks(...)` blocks of `shape.threads` threads
with `shape.shared_bytes` of dynamic shared memory. Activations that a later projection reads are float16, with rows
padded to the groups of that projection; the padding must be zero once and is never written. All arrays are
one-dimensional; float16 comes as uint16 where elements are written, and as uint32 where pairs are read.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from numba_atomflow.ops import ptx
from numba_atomflow.ops.cuda.gemv.mainloop import ProjectionShape, gated, make_runner, rotated
from numba_atomflow.ops.cuda.runtime.spec import F32, I64, U16, U32, Planned, kernel_spec


def make_store(shape: ProjectionShape, eps: float, *, dependent: bool = False) -> Any:
    """logits = W norm(residual).

    Kernel (weights uint32, residual uint32 view of float32 [columns, K], norm float32 [K], normed uint32 pairs of
    float16 [columns, padded K], logits float32 [columns, N]). Plain rows.
    """
    rows = shape.layout.rows

    @ptx.device_function
    def store(outputs, tile, r, column, low, high):
        row = tile * 16 + r
        if row < rows:
            outputs[0][column * rows + row] = low
        if row + 8 < rows:
            outputs[0][column * rows + row + 8] = high

    run = make_runner(shape, "norm", eps, dependent, store)

    @ptx.kernel(shape.threads, shape.resident)
    def project_store(weights, residual, norm, normed, logits):
        run(weights, residual, norm, normed, (logits,))

    return project_store


def make_add(shape: ProjectionShape, *, dependent: bool = False) -> Any:
    """residual += W x.

    Kernel (weights uint32, x uint32 pairs of float16 [columns, padded K], residual float32 [columns, N]). Plain rows.
    """
    rows = shape.layout.rows
    whole = rows % 16 == 0

    @ptx.device_function
    def add(outputs, tile, r, column, low, high):
        sums, row = outputs[0], tile * 16 + r
        at = column * rows + row
        if whole or row + 8 < rows:
            upper, lower = sums[at], sums[at + 8]  # both on their way before the first is stored
            sums[at] = upper + low
            sums[at + 8] = lower + high
        elif row < rows:
            sums[at] += low

    run = make_runner(shape, "copy", 0.0, dependent, add)

    @ptx.kernel(shape.threads, shape.resident)
    def project_add(weights, x, residual):
        run(weights, x, residual, x, (residual,))

    return project_add


def make_swiglu(shape: ProjectionShape, eps: float, y_width: int, *, dependent: bool = False) -> Any:
    """y = silu(gate) * up with (gate, up) = W norm(residual).

    Kernel (weights uint32, residual uint32 view of float32 [columns, K], norm float32 [K], normed uint32 pairs of
    float16 [columns, padded K], y uint16 bits of float16 [columns, y_width]). Rows paired with half = ffn; y_width: ffn
    padded for the down projection.
    """
    ffn = shape.layout.half

    @ptx.device_function
    def swiglu(outputs, tile, r, column, gate, up):
        unit = tile * 8 + r
        if unit < ffn:
            outputs[0][column * y_width + unit] = np.uint16(ptx.f16_bits(gated(gate, up)))

    run = make_runner(shape, "norm", eps, dependent, swiglu)

    @ptx.kernel(shape.threads, shape.resident)
    def project_swiglu(weights, residual, norm, normed, y):
        run(weights, residual, norm, normed, (y,))

    return project_swiglu


def make_qkv(shape: ProjectionShape, eps: float, heads: int, kv_heads: int, *, dependent: bool = False) -> Any:
    """q, k and v = W norm(residual); q and k rotated; k and v written to the cache.

    Kernel (weights uint32, residual uint32 view of float32 [columns, K], norm float32 [K], normed uint32 pairs of
    float16 [columns, padded K], position int64 [1], cosines and sines float32 [positions, head_dim / 2], q uint16 bits
    of float16 [columns, heads * head_dim], keys and values uint16 bits of float16 [positions, kv_heads * head_dim]).
    Rows paired with half = head_dim / 2. Column t is the token at position[0] + t.
    """
    rotate = _make_rotate(shape, heads, kv_heads, paged=False)
    run = make_runner(shape, "norm", eps, dependent, rotate, _make_angles_ahead(shape, paged=False))

    @ptx.kernel(shape.threads, shape.resident)
    def project_qkv(weights, residual, norm, normed, position, cosines, sines, q, keys, values):
        run(weights, residual, norm, normed, (position, position, cosines, sines, q, keys, values))

    return project_qkv


def make_paged_qkv(shape: ProjectionShape, eps: float, heads: int, kv_heads: int, *, dependent: bool = False) -> Any:
    """The same for tokens of any sequences: column t is at positions[t], and its k and v go to slot slots[t].

    Kernel (weights, residual, norm and normed as above, positions and slots int64 [columns], cosines and sines, q, keys
    and values uint16 bits of float16 [slots of the cache, kv_heads * head_dim]).
    """
    rotate = _make_rotate(shape, heads, kv_heads, paged=True)
    run = make_runner(shape, "norm", eps, dependent, rotate, _make_angles_ahead(shape, paged=True))

    @ptx.kernel(shape.threads, shape.resident)
    def project_paged_qkv(weights, residual, norm, normed, positions, slots, cosines, sines, q, keys, values):
        run(weights, residual, norm, normed, (positions, slots, cosines, sines, q, keys, values))

    return project_paged_qkv


def _make_angles_ahead(shape: ProjectionShape, paged: bool) -> Any:
    """Device function (outputs, thread): bring the columns' cosines and sines out of memory. No kernel of a step writes
    positions, so that they may be read while the kernel before still runs.
    """
    half, columns, threads = shape.layout.half, shape.columns, shape.threads
    lines = -(-half // 32)  # of 128 bytes, in a row of a table
    per_thread = -(-columns * lines // threads)

    @ptx.device_function
    def angles_ahead(outputs, thread):
        positions, cosines, sines = outputs[0], outputs[2], outputs[3]
        for i in range(per_thread):
            line = i * threads + thread
            if line < columns * lines:
                column = line // lines
                position = positions[column] if paged else positions[0] + column
                at = position * half + line % lines * 32
                ptx.prefetch(cosines, at)
                ptx.prefetch(sines, at)

    return angles_ahead


def _make_rotate(shape: ProjectionShape, heads: int, kv_heads: int, paged: bool) -> Any:
    """The epilogue with outputs (positions, slots, cosines, sines, q, keys, values)."""
    half, section_tiles = shape.layout.half, shape.layout.section_tiles
    q_width, kv_width = 2 * half * heads, 2 * half * kv_heads

    @ptx.device_function
    def put(target, start, low, high):
        target[start] = np.uint16(ptx.f16_bits(low))
        target[start + half] = np.uint16(ptx.f16_bits(high))

    @ptx.device_function
    def rotate(outputs, tile, r, column, low, high):
        positions, slots, cosines, sines, q, keys, values = outputs
        head, i = tile // section_tiles, tile % section_tiles * 8 + r
        position = positions[column] if paged else positions[0] + column
        slot = slots[column] if paged else position
        if head >= heads + kv_heads:
            put(values, slot * kv_width + (head - heads - kv_heads) * 2 * half + i, low, high)
        else:
            cosine, sine = cosines[position * half + i], sines[position * half + i]
            rotated_low, rotated_high = rotated(low, high, cosine, sine)
            if head < heads:
                put(q, column * q_width + head * 2 * half + i, rotated_low, rotated_high)
            else:
                put(keys, slot * kv_width + (head - heads) * 2 * half + i, rotated_low, rotated_high)

    return rotate


# Types of the kernels' arguments, by factory.
_NORMED = (U32, U32, F32, U32)  # weights, residual, norm, normed
SIGNATURES: dict[Callable[..., Any], tuple[str, ...]] = {
    make_store: (*_NORMED, F32),
    make_add: (U32, U32, F32),
    make_swiglu: (*_NORMED, U16),
    make_qkv: (*_NORMED, I64, F32, F32, U16, U16, U16),
    make_paged_qkv: (*_NORMED, I64, I64, F32, F32, U16, U16, U16),
}


def projection_kernel(
    name: str, factory: Callable[..., Any], shape: ProjectionShape, sms: int, dependent: bool, **options: Any
) -> Planned:
    """The spec of a kernel of one of the factories above, which takes `options` beside shape and `dependent`."""
    options = {"shape": shape, "dependent": dependent} | options
    spec = kernel_spec(name, factory, SIGNATURES[factory], shape.threads, shape.shared_bytes, **options)
    return Planned(spec, shape.blocks(sms))
