"""Instructions of ops/ptx in the simulator, where no kernel's own test covers them; and LL words of the mailbox."""

import numpy as np
import pytest
from kernel_cases import generator, launch
from numba import cuda, uint32, uint64
from numpy.typing import NDArray

from numba_atomflow.ops import ptx
from numba_atomflow.ops.cuda.comm.flagged import has_pair_flag, ll_store_pair, round_to_24_bits, unpack_pair

WORD = 0xFFFFFFFF


def test_ll_words_are_stored_and_loaded_whole() -> None:
    @ptx.kernel(32, 1)
    def store_and_load(words, out):
        thread = cuda.threadIdx.x
        if thread < 2:
            ptx.ll_store(words, 2 + thread, np.uint32(WORD - thread), np.uint32(7 + thread))
        ptx.sync_warp()
        if thread == 31:
            out[0], out[1], out[2], out[3] = ptx.ll_load(words, 2)

    words, out = np.arange(6, dtype=np.uint64), np.zeros(4, np.uint32)
    launch(store_and_load, 1, 32, 0, words, out)
    assert words.tolist() == [0, 1, 7 << 32 | WORD, 8 << 32 | WORD - 1, 4, 5]
    assert out.tolist() == [WORD, 7, WORD - 1, 8]


def test_polling_lets_the_writer_run() -> None:
    @ptx.kernel(256, 1)
    def wait(words, out):
        thread = cuda.threadIdx.x
        if thread == 255:
            ptx.ll_store(words, 0, np.uint32(5), np.uint32(1))
            ptx.ll_store(words, 1, np.uint32(6), np.uint32(1))
        else:
            _, e0, _, e1 = ptx.ll_load(words, 0)
            while e0 == 0 or e1 == 0:
                _, e0, _, e1 = ptx.ll_load(words, 0)
            out[thread] = 1

    out = np.zeros(256, np.uint32)
    launch(wait, 1, 256, 0, np.zeros(2, np.uint64), out)
    assert out.sum() == 255


def test_a_named_barrier_of_some_warps() -> None:
    """Twice over, so that the barrier serves again; a third warp never comes."""

    @ptx.kernel(96, 1)
    def exchange(out):
        values = cuda.shared.array(0, uint32)
        thread = cuda.threadIdx.x
        if thread < 64:
            values[thread] = thread
            ptx.named_barrier_sync(np.uint32(3), np.uint32(64))
            other = values[63 - thread]
            ptx.named_barrier_sync(np.uint32(3), np.uint32(64))
            values[thread] = other
            ptx.named_barrier_sync(np.uint32(3), np.uint32(64))
            out[thread] = values[thread ^ 1]

    out = np.zeros(64, np.uint32)
    launch(exchange, 1, 96, 96 * 4, out)
    assert out.tolist() == [63 - (thread ^ 1) for thread in range(64)]


def test_lanes_are_counted_per_warp() -> None:
    @ptx.kernel(64, 1)
    def count(out):
        thread = cuda.threadIdx.x
        out[thread] = ptx.count_lanes(np.uint32(thread if thread % 3 == 0 else 0))

    out = np.zeros(64, np.uint32)
    launch(count, 1, 64, 0, out)
    assert out.tolist() == [10] * 32 + [11] * 32  # 3, 6 ... 30; 33 ... 63


def test_an_mbarrier_counts_arrivals_and_bytes_in_phases() -> None:
    """A wait succeeds if the phase of that parity is complete: initially the one "before" phase 0, of parity 1."""

    @ptx.kernel(32, 1)
    def phases(source, out):
        words = cuda.shared.array(0, uint32)
        barriers = cuda.shared.array(0, uint64)
        if cuda.threadIdx.x == 0:
            first, second = ptx.shared_address(barriers, 8), ptx.shared_address(barriers, 9)
            ptx.barrier_init(barriers, first, 2)
            ptx.barrier_init(barriers, second, 1)
            ptx.fence_barriers()
            out[0], out[1] = ptx.barrier_try_wait(barriers, first, 0), ptx.barrier_try_wait(barriers, first, 1)
            ptx.barrier_arrive(barriers, first)
            out[2] = ptx.barrier_try_wait(barriers, first, 0)  # one of two has come
            out[18] = ptx.barrier_test_wait(barriers, first, 0)
            ptx.barrier_arrive(barriers, first)
            out[3], out[4] = ptx.barrier_try_wait(barriers, first, 0), ptx.barrier_try_wait(barriers, first, 1)
            out[19], out[20] = ptx.barrier_test_wait(barriers, first, 0), ptx.barrier_test_wait(barriers, first, 1)
            ptx.barrier_arrive(barriers, first)
            ptx.barrier_arrive(barriers, first)
            out[5], out[6] = ptx.barrier_try_wait(barriers, first, 0), ptx.barrier_try_wait(barriers, first, 1)
            ptx.barrier_arrive_expect(barriers, second, 32)
            out[7] = ptx.barrier_try_wait(barriers, second, 0)  # it has arrived, the bytes have not
            ptx.bulk_copy(words, ptx.shared_address(words, 0), source, 4, 16, barriers, second)
            out[8] = ptx.barrier_try_wait(barriers, second, 0)
            ptx.bulk_copy(words, ptx.shared_address(words, 4), source, 0, 16, barriers, second)
            out[9] = ptx.barrier_try_wait(barriers, second, 0)
            ptx.barrier_wait(barriers, second, 0)
            for i in range(8):
                out[10 + i] = words[i]

    out = np.full(21, 9, np.uint32)
    launch(phases, 1, 32, 80, np.arange(8, dtype=np.uint32), out)
    assert out[:10].tolist() == [0, 1, 0, 1, 0, 0, 1, 0, 0, 1]
    assert out[10:18].tolist() == [4, 5, 6, 7, 0, 1, 2, 3]
    assert out[18:].tolist() == [0, 1, 0]


# --- LL words of the mailbox -----------------------------------------------------------------------------------------

SPECIAL = np.array([0.0, -0.0, np.inf, -np.inf, 1.0, -1.0, 3.4028235e38, -3.4028235e38, 1e-45, 65504.0], np.float32)
NANS = np.array([0x7FC00000, 0xFFC00000, 0xFFFFFFFF, 0x7FFFFFFF], np.uint32).view(np.float32)  # those of arithmetic


def round_trip(values: NDArray[np.float32], epoch: int) -> tuple[NDArray[np.float32], NDArray[np.uint64]]:
    """Pairs of values after a round trip through the mailbox, and its words."""

    @ptx.kernel(32, 1)
    def store_and_load(values, words, out, known):
        epoch = np.uint32(uint64(known))
        pair = cuda.threadIdx.x
        while 2 * pair < len(values):
            ll_store_pair(words, pair, values[2 * pair], values[2 * pair + 1], epoch)
            pair += 32
        ptx.sync_warp()
        pair = cuda.threadIdx.x
        while 2 * pair < len(values):
            first, second, _, _ = ptx.ll_load(words, pair)
            if has_pair_flag(np.uint32(second), epoch):
                out[2 * pair], out[2 * pair + 1] = unpack_pair(np.uint32(first), np.uint32(second))
            pair += 32

    words, out = np.zeros(len(values) // 2 + 1, np.uint64), np.full(len(values), -7.0, np.float32)
    launch(store_and_load, 1, 32, 0, values, words, out, epoch)
    return out, words


@pytest.mark.parametrize("epoch", [1, 0xFFFF, 0x10000, 0x12345678])
def test_a_pair_keeps_24_bits_of_each(epoch: int) -> None:
    rng = generator(epoch)
    values = (rng.standard_normal(200) * np.exp2(rng.integers(-120, 120, 200))).astype(np.float32)
    back, words = round_trip(values, epoch)
    normal = np.maximum(np.abs(values), np.finfo(np.float32).tiny)  # subnormal values lose as many bits, of fewer
    assert (np.abs(back - values) <= normal * 2.0**-16).all()
    assert not (back.view(np.uint32) & 0xFF).any()
    assert (words[:-1] >> np.uint64(48) == epoch & 0xFFFF).all()


def test_values_of_24_bits_are_exact() -> None:
    """Zeros with their signs and infinities among them; the largest numbers round to infinity."""
    rng = generator(24)
    exact = (rng.integers(0, 1 << 32, 100, np.uint32) & np.uint32(0xFFFFFF00)).view(np.float32)
    exact = np.concatenate([exact[np.isfinite(exact)][:80], SPECIAL[:6]])
    back, _ = round_trip(exact, 3)
    np.testing.assert_array_equal(back.view(np.uint32), exact.view(np.uint32))
    back, _ = round_trip(SPECIAL[6:], 3)
    np.testing.assert_array_equal(back, np.array([np.inf, -np.inf, 0.0, 65504.0], np.float32))


def test_nan_stays_nan() -> None:
    back, _ = round_trip(np.repeat(NANS, 2), 3)
    assert np.isnan(back).all()


def test_another_epoch_is_rejected() -> None:
    for other in (4, 0x20003, 3):
        assert bool(has_pair_flag(np.uint32(0x0003ABCD), np.uint32(other))) == (other & 0xFFFF == 3)


def test_ties_round_away_from_zero() -> None:
    """Half a unit in the last place, for both signs."""
    for sign in (0, 1 << 31):
        bits = np.uint32(0x3F800080 | sign)
        assert int(round_to_24_bits(bits.view(np.float32))) == (0x3F8001 | sign >> 8)
