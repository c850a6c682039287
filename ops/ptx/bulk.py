"""TMA bulk copies from global to shared memory (`cp.async.bulk`) and the mbarriers that count their bytes. Since sm_90.

Addresses in shared memory (`shared_address`) are in bytes; in the simulator they are offsets from its start.
Source: PTX ISA 9.0, sections 9.7.9.25 and 9.7.13.15.
"""

import time

from numba_atomflow.ops.ptx import simulator
from numba_atomflow.ops.ptx.core import ADDRESS, ARRAY, SHARED_ADDRESS, instruction, u32

_TEST = (  # whether a phase is complete; {}: test_wait (at once) or try_wait (suspends for a while)
    "{{ .reg .pred p; mbarrier.{}.parity.shared::cta.b64 p, [$1], $2; selp.u32 $0, 1, 0, p; }}"
)


@instruction("mov.u32 $0, $1;", (u32,), (SHARED_ADDRESS,))
def shared_address(array, index):
    """Address of an element of shared memory."""
    return int(index) * array.itemsize


@instruction("mbarrier.init.shared::cta.b64 [$0], $1;", (), (ARRAY, u32, u32), memory=True)
def barrier_init(barriers, address, arrivals):
    """Initialise an mbarrier in 8 bytes of shared memory; `fence_barriers` before other threads or copies use it."""
    with simulator.LOCK:
        barriers[int(address) // 8] = simulator.barrier_word(0, int(arrivals), int(arrivals), 0)


@instruction("fence.mbarrier_init.release.cluster; fence.proxy.async.shared::cta;", (), (), memory=True)
def fence_barriers():
    """Make initialised mbarriers visible to bulk copies; `syncthreads` then makes them visible to other threads."""


@instruction("mbarrier.arrive.expect_tx.shared::cta.b64 _, [$0], $1;", (), (ARRAY, u32, u32), memory=True)
def barrier_arrive_expect(barriers, address, nbytes):
    """Arrive, and add `nbytes` of copies to what the phase waits for."""
    simulator.advance_barrier(barriers, address, 1, int(nbytes))


@instruction("mbarrier.arrive.shared::cta.b64 _, [$0];", (), (ARRAY, u32), memory=True)
def barrier_arrive(barriers, address):
    """Arrive."""
    simulator.advance_barrier(barriers, address, 1, 0)


@instruction(
    "{ .reg .pred p; WAIT: mbarrier.try_wait.parity.shared::cta.b64 p, [$0], $1; @!p bra WAIT; }",
    (),
    (ARRAY, u32, u32),
    memory=True,
)
def barrier_wait(barriers, address, parity):
    """Wait until the phase of this parity (0, 1, 0, ...) is complete."""
    for _ in range(1_200_000):
        if simulator.phase_complete(barriers, address, parity):
            return
        time.sleep(1e-4)
    raise RuntimeError("a barrier's phase never completed")


@instruction(_TEST.format("try_wait"), (u32,), (ARRAY, u32, u32), memory=True)
def barrier_try_wait(barriers, address, parity):
    """1 if the phase of this parity is complete, perhaps after a short wait (try_wait), else 0."""
    complete = simulator.phase_complete(barriers, address, parity)
    if not complete:
        time.sleep(1e-3)
    return int(complete)


@instruction(_TEST.format("test_wait"), (u32,), (ARRAY, u32, u32), memory=True)
def barrier_test_wait(barriers, address, parity):
    """1 if the phase of this parity is complete, else 0, without waiting (test_wait)."""
    return int(simulator.phase_complete(barriers, address, parity))


@instruction(
    "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [$0], [$1], $2, [$3];",
    (),
    (ARRAY, u32, ADDRESS, u32, ARRAY, u32),
    memory=True,
)
def bulk_copy(target, destination, source, start, nbytes, barriers, address):
    """Start a copy of `nbytes` from element `start` of global memory to address `destination` of shared memory.

    The mbarrier at `address` counts the bytes when they have arrived. Size and both addresses: multiples of 16.
    """
    begin, count = int(destination) // target.itemsize, int(nbytes) // target.itemsize
    target[begin : begin + count] = source[start : start + count]
    simulator.advance_barrier(barriers, address, 0, -int(nbytes))


@instruction("cp.async.bulk.prefetch.L2.global [$0], $1;", (), (ADDRESS, u32), memory=True)
def bulk_prefetch_l2(source, start, nbytes):
    """Prefetch `nbytes` (a multiple of 16, as is the address) into L2."""
    end = int(start) + int(nbytes) // source.itemsize
    if int(nbytes) % 16 or int(start) * source.itemsize % 16 or not 0 <= start < end <= source.size:
        raise IndexError(f"words {start} to {end} of {source.size} cannot be prefetched by one instruction")


@instruction("fence.proxy.async.shared::cta;", (), (), memory=True)
def fence_async_shared():
    """What this thread stored to shared memory becomes visible to `bulk_store` and `wgmma`, after a barrier."""


@instruction("cp.async.bulk.global.shared::cta.bulk_group [$0], [$1], $2;", (), (ADDRESS, ARRAY, u32, u32), memory=True)
def bulk_store(target, start, source, address, nbytes):
    """Start a copy of `nbytes` from address `address` of shared memory to element `start` of global memory.

    Size and both addresses: multiples of 16. One thread, after `fence_async_shared` by all that wrote and a barrier.
    """
    first, count = int(address) // source.itemsize, int(nbytes) // source.itemsize

    def copy():
        target[start : start + count] = source[first : first + count]

    simulator.bulk_stores().append(copy)


@instruction("cp.async.bulk.commit_group;", (), (), memory=True)
def bulk_store_commit():
    """End a group: the bulk stores of this thread since the last one."""
    simulator.bulk_stores().append(None)


@instruction("cp.async.bulk.wait_group.read 0;", (), (), memory=True)
def bulk_store_wait_read():
    """Wait until this thread's groups of bulk stores have read shared memory: it may be written again."""
    simulator.finish_bulk_stores()


@instruction("cp.async.bulk.wait_group 0;", (), (), memory=True)
def bulk_store_wait():
    """Wait until this thread's groups of bulk stores are complete. A CTA may not end before: it owns what they read."""
    simulator.finish_bulk_stores()
