"""`wgmma` on the hardware: what the simulator says of descriptors, swizzle and fragments is what the GPU does.

If a GEMM or attention of prompts is wrong, these say whether the instruction is understood.
"""

from typing import Any, NamedTuple

import numpy as np
import pytest
from device_launch import capability, launch_on_device
from kernel_cases import generator, poisoned
from numba import cuda, float32, uint32
from wgmma_layouts import K_STEPS, fragments, numbers, random_rows, swizzled_rows

from numba_atomflow.ops import ptx
from numba_atomflow.ops.cuda.runtime.spec import F32, U32

ALIGNMENT = 1024  # bytes, of a tile with the 128-byte swizzle
TOLERANCES = {"f16": 1e-5, "e4m3": 1e-3}  # of the largest result; FP8 sums have some 14 bits


@pytest.fixture(autouse=True, scope="module")
def _hopper() -> None:
    if capability() != (9, 0):
        pytest.skip("wgmma exists on sm_90 alone")


class Arguments(NamedTuple):
    """`b` is swizzled; `a` too, or fragments [k-step * 4, 128]."""

    a: U32
    b: U32
    out: F32


@ptx.device_function
def stage(words, start, rows, thread, threads):
    """Copy rows to shared memory from word `start` on, for instructions that read them asynchronously."""
    for i in range(thread, len(rows), threads):
        words[start + i] = rows[i]


@ptx.device_function
def first_word(words):
    """The first word of shared memory that is aligned to `ALIGNMENT` bytes."""
    return (ALIGNMENT - (ptx.shared_address(words, 0) & (ALIGNMENT - 1))) % ALIGNMENT // 4


def product_kernel(n: int, element: str, a_shared: bool) -> Any:
    """Kernel (`Arguments`): out [64, n] = A B over 128 bytes of K, by one warpgroup."""
    steps = tuple(ptx.make_wgmma(n, a_first=None if a_shared else 4 * s, element=element) for s in range(K_STEPS))
    first, second, third, fourth = steps
    fence = ptx.make_wgmma_fence(ptx.Registers(n // 2), ptx.Registers(16))
    wait = ptx.make_wgmma_wait(0, ptx.Registers(n // 2))
    b_words, registers = n * 32, n // 2

    @ptx.kernel(128, 1)
    def multiply(io):
        words = cuda.shared.array(0, uint32)
        sums, a = cuda.local.array(registers, float32), cuda.local.array(16, uint32)
        thread = cuda.threadIdx.x
        start = first_word(words)
        stage(words, start, io.b, thread, 128)
        if a_shared:
            stage(words, start + b_words, io.a, thread, 128)
        ptx.fence_async_shared()
        cuda.syncthreads()
        for i in range(registers):
            sums[i] = np.float32(0.0)
        for i in range(16):
            a[i] = np.uint32(0) if a_shared else io.a[i * 128 + thread]
        b_at = ptx.wgmma_descriptor(ptx.shared_address(words, start), 16, 1024)
        a_at = ptx.wgmma_descriptor(ptx.shared_address(words, start + b_words), 16, 1024)
        fence(sums, a)
        if a_shared:
            first(sums, words, a_at, b_at)
            second(sums, words, a_at + np.uint64(2), b_at + np.uint64(2))
            third(sums, words, a_at + np.uint64(4), b_at + np.uint64(4))
            fourth(sums, words, a_at + np.uint64(6), b_at + np.uint64(6))
        else:
            first(sums, a, words, b_at)
            second(sums, a, words, b_at + np.uint64(2))
            third(sums, a, words, b_at + np.uint64(4))
            fourth(sums, a, words, b_at + np.uint64(6))
        ptx.wgmma_commit()
        wait(sums)
        row, t = thread // 32 * 16 + thread % 32 // 4, thread % 4
        for j in range(n // 8):
            for i in range(4):
                io.out[(row + i // 2 * 8) * n + 8 * j + 2 * t + i % 2] = sums[4 * j + i]

    return multiply


@pytest.mark.parametrize("n", [8, 16, 64, 128, 256])
@pytest.mark.parametrize("element", ["f16", "e4m3"])
@pytest.mark.parametrize("a_shared", [False, True])
def test_a_product(n: int, element: str, a_shared: bool) -> None:
    rng = generator(n, int(a_shared))
    a, b = random_rows(64, element, rng), random_rows(n, element, rng)
    out = poisoned(64 * n)
    operand = swizzled_rows(a) if a_shared else fragments(a).reshape(-1)
    shared = ALIGNMENT + 4 * 32 * (n + 64)
    launch_on_device(product_kernel(n, element, a_shared), 1, 128, shared, Arguments(operand, swizzled_rows(b), out))
    expected = numbers(a, element) @ numbers(b, element).T
    assert np.abs(out.reshape(64, n) - expected).max() <= TOLERANCES[element] * np.abs(expected).max()


def transposed_kernel(columns: int) -> Any:
    """Kernel (`Arguments`): 16 rows of K, the second 16 of 32, each of `columns` columns in blocks of 64."""
    wgmma = ptx.make_wgmma(columns, transposed=True, accumulate=False)
    fence, wait = ptx.make_wgmma_fence(ptx.Registers(4)), ptx.make_wgmma_wait(0, ptx.Registers(columns // 2))
    registers = columns // 2

    @ptx.kernel(128, 1)
    def multiply(io):
        words = cuda.shared.array(0, uint32)
        sums, a = cuda.local.array(registers, float32), cuda.local.array(4, uint32)
        thread = cuda.threadIdx.x
        start = first_word(words)
        stage(words, start, io.b, thread, 128)
        ptx.fence_async_shared()
        cuda.syncthreads()
        for i in range(4):
            a[i] = io.a[i * 128 + thread]
        fence(a)
        wgmma(sums, a, words, ptx.wgmma_descriptor(ptx.shared_address(words, start + 16 * 32), 32 * 128, 1024))
        ptx.wgmma_commit()
        wait(sums)
        row, t = thread // 32 * 16 + thread % 32 // 4, thread % 4
        for j in range(columns // 8):
            for i in range(4):
                io.out[(row + i // 2 * 8) * columns + 8 * j + 2 * t + i % 2] = sums[4 * j + i]

    return multiply


@pytest.mark.parametrize("columns", [64, 128])
def test_b_with_k_from_row_to_row(columns: int) -> None:
    rng = generator(columns)
    a, b = random_rows(64, "f16", rng), rng.standard_normal((32, columns)).astype(np.float16)
    blocks = np.concatenate([swizzled_rows(b[:, i : i + 64]) for i in range(0, columns, 64)])
    out = poisoned(64 * columns)
    operands = Arguments(fragments(a)[0].reshape(-1), blocks, out)
    launch_on_device(transposed_kernel(columns), 1, 128, ALIGNMENT + 4 * blocks.size, operands)
    expected = a.view(np.float16)[:, :16].astype(np.float64) @ b[16:].astype(np.float64)
    assert np.abs(out.reshape(64, columns) - expected).max() <= 1e-5 * np.abs(expected).max()
