"""cp.async, ldmatrix and the small instructions beside them: in the simulator, as the hardware documents them."""

import numpy as np
import pytest
from kernel_cases import generator, launch
from numba import cuda, uint16, uint32, uint64

from numba_atomflow.ops import ptx

u32 = np.uint32
POISON = 0xFFFFFFFF


def test_copies_arrive_when_they_are_waited_for() -> None:
    """Two groups: after the first wait only the older one has arrived; zeros follow the bytes that are read."""
    wait_1, wait_0 = ptx.make_wait_copies(1), ptx.make_wait_copies(0)

    @ptx.kernel(1, 1)
    def copy(source, out):
        words = cuda.shared.array(0, uint32)
        for i in range(8):
            words[i] = 7
        ptx.copy_async_16(words, u32(0), source, 4, u32(16))
        ptx.commit_copies()
        ptx.copy_async_16(words, u32(16), source, 12, u32(8))
        ptx.commit_copies()
        wait_1()
        for i in range(8):
            out[i] = words[i]
        wait_0()
        for i in range(8):
            out[8 + i] = words[i]

    out = np.zeros(16, np.uint32)
    launch(copy, 1, 1, 32, np.arange(100, 116, dtype=np.uint32), out)
    assert out.tolist()[:4] == [104, 105, 106, 107]
    if ptx.SIMULATED:
        assert out.tolist()[4:8] == [POISON] * 4, "the second group arrived early"
    assert out.tolist()[8:] == [104, 105, 106, 107, 112, 113, 0, 0]


def test_copies_of_4_bytes() -> None:
    wait_0 = ptx.make_wait_copies(0)

    @ptx.kernel(1, 1)
    def copy(source, out):
        words = cuda.shared.array(0, uint32)
        words[0], words[2] = 7, 7
        ptx.copy_async_4(words, u32(4), source, 3)
        ptx.commit_copies()
        wait_0()
        for i in range(3):
            out[i] = words[i]

    out = np.zeros(3, np.uint32)
    launch(copy, 1, 1, 16, np.arange(100, 116, dtype=np.uint32), out)
    assert out.tolist() == [7, 103, 7]


def test_a_barrier_completes_when_the_copies_have_arrived() -> None:
    @ptx.kernel(64, 1)
    def copy(source, out):
        words = cuda.shared.array(0, uint32)
        barriers = cuda.shared.array(0, uint64)
        thread = cuda.threadIdx.x
        if thread == 0:
            ptx.barrier_init(barriers, u32(64 * 16), u32(32))
            ptx.fence_barriers()
        cuda.syncthreads()
        if thread < 32:
            ptx.copy_async_16(words, u32(thread * 16), source, thread * 4, u32(16))
            ptx.copy_async_16(words, u32(512 + thread * 16), source, thread * 4, u32(0))
            ptx.barrier_arrive_on_copies(barriers, u32(64 * 16))
        else:
            ptx.barrier_wait(barriers, u32(64 * 16), u32(0))
            for i in range(8):
                out[(thread - 32) * 8 + i] = words[(thread - 32) * 8 + i]

    out = np.zeros(256, np.uint32)
    source = np.arange(1, 129, dtype=np.uint32)
    launch(copy, 1, 64, 1100, source, out)
    np.testing.assert_array_equal(out, np.concatenate([source, np.zeros(128, np.uint32)]))


@pytest.mark.parametrize("transposed", [False, True])
def test_load_matrix(transposed: bool) -> None:
    load = ptx.load_matrix_transposed if transposed else ptx.load_matrix

    @ptx.kernel(32, 1)
    def read(source, out):
        elements = cuda.shared.array(0, uint16)
        lane = cuda.threadIdx.x
        for i in range(8):
            elements[lane * 8 + i] = source[lane * 8 + i]
        ptx.sync_warp()
        a, b, c, d = load(elements, u32((lane ^ 5) * 16))  # rows of a matrix in any order
        out[lane * 4], out[lane * 4 + 1], out[lane * 4 + 2], out[lane * 4 + 3] = a, b, c, d

    source = generator(1).integers(0, 1 << 16, 256).astype(np.uint16)
    out = np.zeros(128, np.uint32)
    launch(read, 1, 32, 512, source, out)
    matrices = source.reshape(32, 8)[np.arange(32) ^ 5].reshape(4, 8, 8)
    if transposed:
        matrices = matrices.transpose(0, 2, 1)
    pairs = np.ascontiguousarray(matrices).view(np.uint32).reshape(4, 32)  # of lane 4 g + t: row g, columns 2t, 2t + 1
    np.testing.assert_array_equal(out.reshape(32, 4), pairs.T)


def test_small_instructions() -> None:
    @ptx.kernel(1, 1)
    def run(pairs, numbers, words, out, floats, constants):
        ptx.store_pair_if(pairs, 2, u32(0xABCD1234), u32(1))
        ptx.store_pair_if(pairs, 0, u32(0xABCD1234), u32(0))
        ptx.store_pairs_if(pairs, 4, u32(0x00020001), u32(0x00040003), u32(1))
        ptx.store_pairs_if(pairs, 0, u32(0x00020001), u32(0x00040003), u32(0))
        ptx.store_16(words, 4, u32(1), u32(2), u32(3), u32(4))
        out[0] = ptx.permute_bytes(u32(0x33221100), u32(0x77665544), u32(0x3276))
        out[1] = ptx.load_constant_i64(numbers, 1)
        floats[0] = ptx.reciprocal(np.float32(8.0))
        floats[1] = ptx.reciprocal(np.float32(np.inf))
        a, b, c, d = ptx.load_constant_f32x4(constants, 1)
        ptx.add_f32x4(floats, 2, a, b, c, d)

    pairs, words, out, floats = np.zeros(8, np.uint16), np.zeros(8, np.uint32), np.zeros(2, np.uint32), np.ones(6, "f4")
    launch(run, 1, 1, 0, pairs, np.array([0, 41], np.int64), words, out, floats, np.arange(5, dtype=np.float32))
    assert pairs.tolist() == [0, 0, 0x1234, 0xABCD, 1, 2, 3, 4]
    assert words.tolist() == [0, 0, 0, 0, 1, 2, 3, 4]
    assert out.tolist() == [0x33227766, 41]
    assert floats.tolist() == [0.125, 0.0, 2.0, 3.0, 4.0, 5.0]
