"""Synchronisation and data exchange within warps, and named barriers of several warps. Source: PTX ISA 9.0, 9.7.13."""

import numpy as np

from numba_atomflow.ops.ptx import simulator
from numba_atomflow.ops.ptx.arithmetic import max_f32
from numba_atomflow.ops.ptx.core import device_function, f32, instruction, u32


@instruction("bar.warp.sync 0xffffffff;", (), (), memory=True)
def sync_warp():
    """Wait for all lanes; their writes to shared memory become visible to each other."""
    simulator.exchange(None)


@instruction("bar.sync $0, $1;", (), (u32, u32), memory=True)
def named_barrier_sync(number, threads):
    """`syncthreads` for `threads` threads (whole warps) of the CTA, at the named barrier `number` (1 to 15)."""
    simulator.named_barrier(number).arrive(int(threads), wait=True)


@instruction("bar.arrive $0, $1;", (), (u32, u32), memory=True)
def named_barrier_arrive(number, threads):
    """Be one of the `threads` threads that `named_barrier_sync` waits for, without waiting."""
    simulator.named_barrier(number).arrive(int(threads), wait=False)


@instruction(
    "{ .reg .pred p; setp.ne.u32 p, $1, 0; vote.sync.ballot.b32 $0, p, 0xffffffff; popc.b32 $0, $0; }",
    (u32,),
    (u32,),
    effect=True,
)
def count_lanes(flag):
    """Number of lanes whose argument is not 0. Every lane of the warp must call it."""
    return simulator.exchange(int(flag), lambda flags: sum(flag != 0 for flag in flags))


@instruction("shfl.sync.bfly.b32 $0, $1, $2, 0x1f, 0xffffffff;", (f32,), (f32, u32), effect=True)
def shuffle_xor_f32(value, lanes):
    """The value of the lane whose index is this lane's XOR `lanes`."""
    return simulator.exchange(np.float32(value))[simulator.lane_index() ^ int(lanes)]


@instruction("shfl.sync.bfly.b32 $0, $1, $2, 0x1f, 0xffffffff;", (u32,), (u32, u32), effect=True)
def shuffle_xor_u32(value, lanes):
    """The value of the lane whose index is this lane's XOR `lanes`."""
    return simulator.exchange(int(value))[simulator.lane_index() ^ int(lanes)]


@device_function
def warp_max(value):
    """Maximum of a float32 over the warp, in every lane: a butterfly of five shuffles."""
    for step in range(5):
        value = max_f32(value, shuffle_xor_f32(value, 16 >> step))
    return value


@device_function
def warp_sum(value):
    """Sum of a float32 over the warp, in every lane: a butterfly of five shuffles."""
    for step in range(5):
        value += shuffle_xor_f32(value, 16 >> step)
    return value


@device_function
def warp_sum_u32(value):
    """The same of a uint32, modulo 2^32."""
    for step in range(5):
        value = np.uint32(value + shuffle_xor_u32(value, 16 >> step))
    return value
