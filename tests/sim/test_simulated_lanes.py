"""The order in which the simulator's CUDA threads run, and what becomes of one that waits in vain."""

from threading import BrokenBarrierError

import numpy as np
import pytest
from numba import cuda, uint32

from numba_atomflow.ops import ptx


@ptx.kernel(64, 1)
def one_thread_misses_the_barrier(out):
    if cuda.threadIdx.x != 40:
        cuda.syncthreads()
    out[cuda.threadIdx.x] = 1


@ptx.kernel(64, 1)
def one_lane_misses_the_exchange(out):
    if cuda.threadIdx.x != 40:
        ptx.sync_warp()
    out[cuda.threadIdx.x] = 1


@pytest.mark.parametrize("kernel", [one_thread_misses_the_barrier, one_lane_misses_the_exchange])
def test_who_waits_for_a_thread_that_has_ended_fails(kernel: object) -> None:
    with pytest.raises(BrokenBarrierError):
        kernel[1, 64](np.zeros(64, np.uint32))  # type: ignore[index]


@ptx.kernel(64, 1)
def one_thread_fails(out):
    if cuda.threadIdx.x == 40:
        out[64] = 1
    cuda.syncthreads()


def test_an_error_is_shown_and_not_its_consequences() -> None:
    with pytest.raises(IndexError, match=r"tid=\[40, 0, 0\].*out of bounds"):
        one_thread_fails[1, 64](np.zeros(64, np.uint32))


@ptx.kernel(2, 1)
def first_sleeps_until_the_second_has_written(out):
    if cuda.threadIdx.x == 0:
        while out[1] == 0:
            ptx.nanosleep(uint32(1000))
        out[0] = out[1] + uint32(1)
    else:
        for i in range(5):
            out[2 + i] = i
            cuda.threadfence()
        out[1] = 7


def test_a_thread_that_sleeps_lets_the_others_run() -> None:
    out = np.zeros(8, np.uint32)
    first_sleeps_until_the_second_has_written[1, 2](out)
    assert out[:2].tolist() == [8, 7]


@ptx.kernel(64, 1)
def read_what_another_wrote(barrier, first, out):
    words = cuda.shared.array(64, uint32)
    thread = cuda.threadIdx.x
    words[thread] = first + thread
    if barrier:
        cuda.syncthreads()
    out[thread] = words[63 - thread]


def test_a_missing_barrier_is_seen() -> None:
    out = np.zeros(64, np.uint32)
    for barrier, first in ((True, 100), (False, 200)):
        read_what_another_wrote[1, 64](barrier, first, out)
        assert (out == first + np.arange(63, -1, -1)).all() == barrier
