"""Clocks, pauses, and programmatic dependent launch. Source: PTX ISA 9.0, sections 9.7.13.13, 9.7.19 and 10."""

import time

from numba_atomflow.ops.ptx.core import instruction, u32, u64

_START = time.perf_counter_ns()


@instruction("nanosleep.u32 $0;", (), (u32,), effect=True)
def nanosleep(nanoseconds):
    """Suspend the thread for about this long."""
    time.sleep(int(nanoseconds) * 1e-9)


@instruction("mov.u64 $0, %globaltimer;", (u64,), (), effect=True)
def nanoseconds():
    """The clock that all SMs share; slow to read."""
    return time.perf_counter_ns()


@instruction("mov.u64 $0, %clock64;", (u64,), (), effect=True)
def cycles():
    """The cycle counter of this SM."""
    return time.perf_counter_ns()


@instruction("mov.u32 $0, %clock;", (u32,), (), effect=True)
def cycles_32():
    """The lower 32 bits of the cycle counter of this SM."""
    return (time.perf_counter_ns() - _START) >> 8 & 0x7FFFFFFF


@instruction("griddepcontrol.wait;", (), (), memory=True)
def wait_for_previous_kernel():
    """Programmatic dependent launch: wait until the previous kernel has ended. Since sm_90."""


@instruction("griddepcontrol.launch_dependents;", (), (), memory=True)
def let_next_kernel_start():
    """Programmatic dependent launch: CTAs of the next kernel may start as CTAs of this one end. Since sm_90."""
