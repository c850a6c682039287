"""Asynchronous tensor core instructions of a warpgroup (four warps, 128 threads). Only on sm_90, as sm_90a.

D [64, n] += A [64, k] B [k, n] with k = 16 (float16) or 32 (FP8 E4M3). Warp w of the warpgroup has rows 16 w to
16 w + 15 of A and D. Its fragments are those of `mma` (`mma.m16n8k16`), n / 8 times over for D: lane 4 g + t holds, for
columns 8 j to 8 j + 7, D (row g, columns 8 j + 2 t and + 1) in registers 4 j and 4 j + 1, and row g + 8 in 4 j + 2 and
4 j + 3. A comes from registers or from shared memory, B from shared memory, which a descriptor says how to read.

Order of work, which the twin in the simulator checks:

1. The registers of A and D are written, then `fence` (`make_wgmma_fence`) names them.
2. Any number of `wgmma`s, then `wgmma_commit`: a batch.
3. `wait` (`make_wgmma_wait`) for all batches but the last few. Until a batch is complete, its accumulators are neither
   read nor written (but by further `wgmma`s of the same shape, which need no fence), the registers of A and what the
   descriptors name in shared memory are not written. What must not move above the wait (the accumulators, or what
   goes into registers of A next) is named in it.

Kernels that use these instructions have `KernelSpec.arch_specific`.
Source: PTX ISA 9.0, section 9.7.15 (asynchronous warpgroup level matrix instructions) and 9.7.19.5 (setmaxnreg).
"""

from typing import Any

import numpy as np

from numba_atomflow.ops.ptx import simulated_wgmma as twin
from numba_atomflow.ops.ptx.core import ARRAY, Registers, device_function, instruction
from numba_atomflow.ops.ptx.core import u64 as u64_type

SWIZZLE_BYTES = 128  # of a row: the only swizzle that is used here
SWIZZLE_ATOM_BYTES = 1024  # 8 rows: where a tile in shared memory starts must be a multiple of this
K_STEP_WORDS = 2  # added to a descriptor: 32 bytes along K, one instruction's, further on
_SWIZZLE_128 = 1 << 62
_ADDRESS_MASK = 0x3FFFF


@device_function
def wgmma_descriptor(address, leading_bytes, stride_bytes):
    """Descriptor of a matrix in shared memory whose rows of 128 bytes are swizzled: 16-byte chunk c of row r is at
    chunk c XOR (r % 8).

    K along a row ("K-major"): rows are those of A or columns of B; `stride_bytes` from 8 of them to the next 8, 1024 if
    all are in sequence; `leading_bytes` is not used (16). The next k-step is `K_STEP_WORDS` on.
    K from row to row ("MN-major", `transposed`): a row is 64 columns of B; `stride_bytes` from 8 of K to the next 8;
    `leading_bytes` from 64 columns to the next 64. The next k-step is 16 rows, 2048 bytes, on: 128 on in a descriptor.
    """
    start = np.uint64((np.uint32(address) & np.uint32(_ADDRESS_MASK)) >> np.uint32(4))
    leading = np.uint64(np.uint32(leading_bytes) >> np.uint32(4)) << np.uint64(16)
    stride = np.uint64(np.uint32(stride_bytes) >> np.uint32(4)) << np.uint64(32)
    return start | leading | stride | np.uint64(_SWIZZLE_128)


def make_wgmma(
    n: int, *, a_first: int | None = 0, element: str = "f16", transposed: bool = False, accumulate: bool = True
) -> Any:
    """Device function of one instruction; every thread of a warpgroup calls it with the same descriptors.

    With A from registers: (sums, a, words, b): float32 array of n / 2 accumulators; uint32 array, of which the four
    from `a_first` on are A's; any view of shared memory; descriptor of B.
    With A from shared memory (`a_first` None): (sums, words, a, b), with two descriptors.

    Args:
        n: columns of B: a multiple of 8, up to 256.
        element: of A and B: "f16" or "e4m3".
        transposed: B is MN-major; only float16.
        accumulate: False: D = A B, whatever the accumulators hold.
    """
    if n % 8 or not 8 <= n <= 256 or (transposed and element != "f16"):
        raise ValueError(f"no wgmma of {n} columns, {element}, transposed={transposed}")
    registers = n // 2
    form = twin.Form(n, element, transposed, accumulate, a_first)
    d = ", ".join(f"${i}" for i in range(registers))
    if a_first is None:
        sources, transposes = f"${registers}, ${registers + 1}", f", 0, {int(transposed)}"
    else:
        a = ", ".join(f"${registers + i}" for i in range(4))
        sources, transposes = f"{{{a}}}, ${registers + 4}", f", {int(transposed)}"
    k, suffix = {"f16": ("k16.f32.f16.f16", transposes), "e4m3": ("k32.f32.e4m3.e4m3", "")}[element]
    assembly = (
        f"{{ .reg .pred p; setp.ne.u32 p, {int(accumulate)}, 0;"
        f" wgmma.mma_async.sync.aligned.m64n{n}{k} {{{d}}}, {sources}, p, 1, 1{suffix}; }}"
    )
    sums = Registers(registers)
    if a_first is None:

        @instruction(assembly, (), (sums, ARRAY, u64_type, u64_type), effect=True)
        def wgmma(sums, words, a, b):
            twin.issue(form, sums, a, words, b)
    else:

        @instruction(assembly, (), (sums, Registers(4, a_first, written=False), ARRAY, u64_type), effect=True)
        def wgmma(sums, a, words, b):
            twin.issue(form, sums, a, words, b)

    return wgmma


def make_wgmma_fence(*registers: Registers) -> Any:
    """Device function (arrays, one for each of `registers`): `wgmma`s that follow see what was written to them."""

    @instruction("wgmma.fence.sync.aligned;", (), registers, memory=True)
    def fence(*arrays):
        twin.fence(registers, arrays)

    return fence


def make_wgmma_wait(batches: int, *registers: Registers) -> Any:
    """Device function (arrays, one for each of `registers`): wait until at most `batches` batches are not complete."""

    @instruction(f"wgmma.wait_group.sync.aligned {batches};", (), registers, memory=True)
    def wait(*arrays):
        del arrays
        twin.wait(batches)

    return wait


@instruction("wgmma.commit_group.sync.aligned;", (), (), memory=True)
def wgmma_commit():
    """The `wgmma`s since the last commit are a batch."""
    twin.commit()


def make_set_registers(direction: str, count: int) -> Any:
    """Device function (): all warps of a warpgroup give registers back ("dec") or wait for more ("inc"): setmaxnreg.

    `count` per thread: a multiple of 8, 24 to 256. Must be the first statement of the warpgroup's branch.
    """

    @instruction(f"setmaxnreg.{direction}.sync.aligned.u32 {count};", (), (), memory=True)
    def set_registers():
        pass

    return set_registers
