"""The instruction `wgmma` and its order of work in the simulator: layouts, what its twin refuses, bulk stores."""

import numpy as np
import pytest
from kernel_cases import generator, launch, poisoned
from numba import cuda, float32, uint32
from wgmma_layouts import K_STEPS, fragments, numbers, random_rows, swizzled_rows

from numba_atomflow.ops import ptx

N = 16  # columns of B


@pytest.mark.parametrize("element", ["f16", "e4m3"])
@pytest.mark.parametrize("a_shared", [False, True])
def test_a_product_with_a_from_registers_or_shared_memory(element: str, a_shared: bool) -> None:
    """D += A B over 128 bytes of K in two batches; a second warpgroup has other rows of A and the same B."""
    rng = generator(int(a_shared))
    a, b = random_rows(128, element, rng), random_rows(N, element, rng)
    initial = rng.standard_normal((128, N)).astype(np.float32)
    steps = tuple(ptx.make_wgmma(N, a_first=None if a_shared else 4 * s, element=element) for s in range(K_STEPS))
    first, second, third, fourth = steps
    fence = ptx.make_wgmma_fence(ptx.Registers(N // 2), ptx.Registers(16))
    wait = ptx.make_wgmma_wait(0, ptx.Registers(N // 2))
    b_words = N * 32

    @ptx.kernel(256, 1)
    def multiply(b_rows, a_rows, a_fragments, c, out):
        words = cuda.shared.array(0, uint32)
        sums, a_regs = cuda.local.array(N // 2, float32), cuda.local.array(16, uint32)
        thread = cuda.threadIdx.x
        if thread == 0:
            for i in range(b_words):
                words[i] = b_rows[i]
            for i in range(128 * 32):
                words[b_words + i] = a_rows[i]
        cuda.syncthreads()
        row, t = thread // 32 * 16 + thread % 32 // 4, thread % 4
        for j in range(N // 8):
            for i in range(4):
                sums[4 * j + i] = c[(row + i // 2 * 8) * N + 8 * j + 2 * t + i % 2]
        for i in range(16):
            a_regs[i] = a_fragments[(thread // 128 * 16 + i) * 128 + thread % 128]
        descriptor = ptx.wgmma_descriptor(ptx.shared_address(words, 0), 16, 1024)
        a_at = ptx.wgmma_descriptor(ptx.shared_address(words, b_words + thread // 128 * 2048), 16, 1024)
        fence(sums, a_regs)
        if a_shared:
            first(sums, words, a_at, descriptor)
            second(sums, words, a_at + np.uint64(2), descriptor + np.uint64(2))
        else:
            first(sums, a_regs, words, descriptor)
            second(sums, a_regs, words, descriptor + np.uint64(2))
        ptx.wgmma_commit()
        if a_shared:
            third(sums, words, a_at + np.uint64(4), descriptor + np.uint64(4))
            fourth(sums, words, a_at + np.uint64(6), descriptor + np.uint64(6))
        else:
            third(sums, a_regs, words, descriptor + np.uint64(4))
            fourth(sums, a_regs, words, descriptor + np.uint64(6))
        ptx.wgmma_commit()
        wait(sums)
        for j in range(N // 8):
            for i in range(4):
                out[(row + i // 2 * 8) * N + 8 * j + 2 * t + i % 2] = sums[4 * j + i]

    out = poisoned(128 * N)
    registers = np.concatenate([fragments(half).reshape(-1) for half in (a[:64], a[64:])])
    shared = 4 * (b_words + 128 * 32)
    launch(multiply, 1, 256, shared, swizzled_rows(b), swizzled_rows(a), registers, initial.reshape(-1), out)
    expected = initial + numbers(a, element) @ numbers(b, element).T
    assert np.abs(out.reshape(128, N) - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("columns", [64, 128])
def test_b_with_k_from_row_to_row(columns: int) -> None:
    """16 rows of K, as attention has V: blocks of 64 columns, 32 rows each, of which the second 16 are multiplied."""
    rng = generator(columns)
    a, b = random_rows(64, "f16", rng), rng.standard_normal((32, columns)).astype(np.float16)
    blocks = np.concatenate([swizzled_rows(b[:, i : i + 64]) for i in range(0, columns, 64)])
    wgmma = ptx.make_wgmma(columns, transposed=True, accumulate=False)
    fence, wait = ptx.make_wgmma_fence(ptx.Registers(4)), ptx.make_wgmma_wait(0, ptx.Registers(columns // 2))

    @ptx.kernel(128, 1)
    def multiply(rows, a_fragments, out):
        words = cuda.shared.array(0, uint32)
        sums, a_regs = cuda.local.array(columns // 2, float32), cuda.local.array(4, uint32)
        thread = cuda.threadIdx.x
        if thread == 0:
            for i in range(len(rows)):
                words[i] = rows[i]
        cuda.syncthreads()
        for i in range(4):
            a_regs[i] = a_fragments[i * 128 + thread]
        fence(a_regs)
        wgmma(sums, a_regs, words, ptx.wgmma_descriptor(ptx.shared_address(words, 16 * 32), 32 * 128, 1024))
        ptx.wgmma_commit()
        wait(sums)
        for i in range(columns // 2):
            out[i * 128 + thread] = sums[i]

    out = poisoned(columns // 2 * 128)
    launch(multiply, 1, 128, 4 * blocks.size, blocks, fragments(a)[0].reshape(-1), out)
    expected = a.view(np.float16)[:, :16].astype(np.float64) @ b[16:].astype(np.float64)
    for thread in range(128):
        row, column = thread // 32 * 16 + thread % 32 // 4, thread % 4 * 2
        got = out.reshape(-1, 128)[:, thread].reshape(columns // 8, 2, 2)  # columns / 8, rows g and g + 8, a pair
        want = expected[row : row + 9 : 8].reshape(2, columns // 8, 8)[:, :, column : column + 2].transpose(1, 0, 2)
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


MISTAKES = {
    "none": "",
    "no fence of A": "never fenced",
    "A after the fence": "after the last fence",
    "A before the wait": "a register of A was written before the wait",
    "sums after the fence": "after the last fence",
    "sums before the wait": "an accumulator was written before the wait",
    "B before the wait": "shared memory was written before the wait",
    "half of 8 rows": "in the middle of 8 swizzled rows",
    "another descriptor": "different instructions",
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_what_the_hardware_would_compute_wrongly_is_refused(mistake: str) -> None:
    wgmma, fence = ptx.make_wgmma(8), ptx.make_wgmma_fence(ptx.Registers(4), ptx.Registers(4))
    fence_sums = ptx.make_wgmma_fence(ptx.Registers(4))
    wait = ptx.make_wgmma_wait(0, ptx.Registers(4), ptx.Registers(4))

    @ptx.kernel(128, 1)
    def multiply(out):
        words = cuda.shared.array(0, uint32)
        sums, a = cuda.local.array(4, float32), cuda.local.array(4, uint32)
        thread = cuda.threadIdx.x
        for i in range(4):
            words[thread * 4 + i] = np.uint32(0x3C003C00)  # 1.0, 1.0
            sums[i], a[i] = np.float32(0.0), np.uint32(0x3C003C00)
        cuda.syncthreads()
        if mistake == "no fence of A":
            fence_sums(sums)
        else:
            fence(sums, a)
        if mistake == "A after the fence" and thread == 77:
            a[1] = np.uint32(0)
        if mistake == "sums after the fence" and thread == 77:
            sums[1] = np.float32(1.0)
        row = 4 if mistake == "half of 8 rows" else thread // 127 * 8 if mistake == "another descriptor" else 0
        wgmma(sums, a, words, ptx.wgmma_descriptor(ptx.shared_address(words, 32 * row), 16, 1024))
        ptx.wgmma_commit()
        if mistake == "A before the wait" and thread == 77:
            a[1] = np.uint32(0)
        if mistake == "sums before the wait" and thread == 77:
            sums[1] = np.float32(1.0)
        if mistake == "B before the wait" and thread == 77:
            words[5] = np.uint32(0)
        cuda.syncthreads()
        wait(sums, a)
        for i in range(4):
            out[4 * thread + i] = sums[i]

    out = poisoned(512)
    if mistake == "none":
        launch(multiply, 1, 128, 2048, out)
        assert (out == 16.0).all()
    else:
        with pytest.raises(RuntimeError, match=MISTAKES[mistake]):
            launch(multiply, 1, 128, 2048, out)


def test_sums_are_not_there_before_the_wait() -> None:
    """A wait that leaves the last batch under way leaves its accumulators."""
    wgmma, fence = ptx.make_wgmma(8), ptx.make_wgmma_fence(ptx.Registers(4), ptx.Registers(4))
    wait_all_but_one, wait_all = ptx.make_wgmma_wait(1), ptx.make_wgmma_wait(0, ptx.Registers(4))

    @ptx.kernel(128, 1)
    def multiply(early, late):
        words = cuda.shared.array(0, uint32)
        sums, a = cuda.local.array(4, float32), cuda.local.array(4, uint32)
        thread = cuda.threadIdx.x
        words[thread * 2], words[thread * 2 + 1] = np.uint32(0x3C003C00), np.uint32(0x3C003C00)
        for i in range(4):
            sums[i], a[i] = np.float32(0.0), np.uint32(0x3C003C00)
        cuda.syncthreads()
        descriptor = ptx.wgmma_descriptor(ptx.shared_address(words, 0), 16, 1024)
        fence(sums, a)
        for _ in range(2):
            wgmma(sums, a, words, descriptor)
            ptx.wgmma_commit()
        wait_all_but_one()
        early[thread] = sums[0]
        wait_all(sums)
        late[thread] = sums[0]

    early, late = np.zeros(128, np.float32), poisoned(128)
    launch(multiply, 1, 128, 1024, early, late)
    assert np.isnan(early).all()
    assert (late == 32.0).all()


@pytest.mark.parametrize("waits", [False, True])
def test_a_bulk_store_is_done_when_it_was_waited_for(waits: bool) -> None:
    @ptx.kernel(32, 1)
    def store(out):
        words = cuda.shared.array(0, uint32)
        thread = cuda.threadIdx.x
        words[thread] = thread
        ptx.fence_async_shared()
        ptx.sync_warp()
        if thread == 0:
            ptx.bulk_store(out, 4, words, ptx.shared_address(words, 8), 32)
            ptx.bulk_store_commit()
            if waits:
                ptx.bulk_store_wait()

    out = poisoned(16, dtype=np.uint32)
    launch(store, 1, 32, 128, out)
    assert out[4:12].tolist() == (list(range(8, 16)) if waits else [0xFFFFFFFF] * 8)
    assert (out[:4] == 0xFFFFFFFF).all()
    assert (out[12:] == 0xFFFFFFFF).all()
