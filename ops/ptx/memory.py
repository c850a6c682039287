"""Loads, stores and L2 prefetches.

An ``array, index`` pair becomes an address; index counts elements, and is not negative: indexing an array with a signed
number would take two more instructions, for Python's negative indices. 16-byte accesses need 16-byte aligned addresses.
Source: PTX ISA 9.0, section 9.7.9.
"""

import numpy as np

from numba_atomflow.ops.ptx.core import ADDRESS, VECTOR_LOAD, VECTOR_STORE, f32, i64, instruction, u32
from numba_atomflow.ops.ptx.simulator import back_off


@instruction("ld.global.nc.L1::no_allocate.v4.u32 {$0, $1, $2, $3}, [$4];", (u32,) * 4, (ADDRESS,), effect=True)
def load_stream_16(array, index):
    """16 bytes that no kernel writes and that are read once (weights), without allocating in L1."""
    return tuple(int(array[index + i]) for i in range(4))


@instruction("ld.global.nc.f32 $0, [$1];", (f32,), (ADDRESS,), effect=True)
def load_constant_f32(array, index):
    """A float32 that no kernel writes, from a float32 array or a uint32 array of its bits."""
    return np.asarray(array[index]).view(np.float32)[()]


@instruction("ld.global.nc.v2.f32 {$0, $1}, [$2];", (f32, f32), (ADDRESS,), effect=True)
def load_constant_f32x2(array, index):
    """Two float32 from a uint32 array that no kernel writes."""
    return tuple(np.uint32(array[index + i]).view(np.float32) for i in range(2))


@instruction("ld.global.nc.v4.f32 {$0, $1, $2, $3}, [$4];", (f32,) * 4, (ADDRESS,), effect=True)
def load_constant_f32x4(array, index):
    """Four float32 that no kernel writes."""
    return tuple(np.float32(array[index + i]) for i in range(4))


@instruction(VECTOR_LOAD, (u32,) * 4, (ADDRESS,))
def load_16(array, index):
    """16 bytes that an earlier kernel wrote."""
    return tuple(int(array[index + i]) for i in range(4))


@instruction(VECTOR_LOAD, (u32,) * 2, (ADDRESS,))
def load_8(array, index):
    """8 bytes that an earlier kernel wrote."""
    return tuple(int(array[index + i]) for i in range(2))


@instruction(VECTOR_LOAD, (f32,) * 4, (ADDRESS,))
def load_f32x4(array, index):
    """Four float32 that an earlier kernel wrote, from a float32 array or a uint32 array of their bits."""
    return tuple(np.asarray(array[index + i]).view(np.float32)[()] for i in range(4))


@instruction(VECTOR_LOAD, (f32,) * 2, (ADDRESS,))
def load_f32x2(array, index):
    """Two float32 that an earlier kernel wrote, from a float32 array or a uint32 array of their bits."""
    return tuple(np.asarray(array[index + i]).view(np.float32)[()] for i in range(2))


@instruction(VECTOR_LOAD, (u32,) * 4, (ADDRESS,))
def load_shared_16(array, index):
    """16 bytes of shared memory."""
    return tuple(int(array[index + i]) for i in range(4))


@instruction(VECTOR_STORE, (), (ADDRESS,) + (u32,) * 4)
def store_shared_16(array, index, a, b, c, d):
    """16 bytes into shared memory."""
    for i, word in enumerate((a, b, c, d)):
        array[index + i] = word


@instruction(VECTOR_STORE, (), (ADDRESS,) + (f32,) * 4)
def store_f32x4(array, index, a, b, c, d):
    """Four float32."""
    for i, value in enumerate((a, b, c, d)):
        array[index + i] = value


@instruction(VECTOR_STORE, (), (ADDRESS, u32, u32))
def store_shared_8(array, index, a, b):
    """8 bytes into shared memory."""
    array[index], array[index + 1] = a, b


@instruction(VECTOR_STORE, (), (ADDRESS,) + (u32,) * 4)
def store_16(array, index, a, b, c, d):
    """16 bytes."""
    for i, word in enumerate((a, b, c, d)):
        array[index + i] = word


@instruction(VECTOR_LOAD, (f32,), (ADDRESS,))
def load_f32(array, index):
    """A float32."""
    return np.float32(array[index])


@instruction(VECTOR_STORE, (), (ADDRESS, f32))
def store_f32(array, index, value):
    """A float32."""
    array[index] = value


@instruction("red.relaxed.gpu.global.add.f32 [$0], $1;", (), (ADDRESS, f32), effect=True)
def add_f32(array, index, value):
    """Add to a float32, without waiting for the old value. No other thread of the launch may access it, so that the
    order of additions is fixed. Results below the normal range become 0.
    """
    array[index] += np.float32(value)


@instruction("red.relaxed.gpu.global.add.v4.f32 [$0], {$1, $2, $3, $4};", (), (ADDRESS,) + (f32,) * 4, effect=True)
def add_f32x4(array, index, a, b, c, d):
    """`add_f32` of four neighbours. Since sm_90."""
    for i, value in enumerate((a, b, c, d)):
        array[index + i] += np.float32(value)


@instruction("{ .reg .pred p; setp.ne.u32 p, $2, 0; @p st.global.b32 [$0], $1; }", (), (ADDRESS, u32, u32), effect=True)
def store_pair_if(array, index, word, condition):
    """Two float16 of one word into an array of their bits (uint16), unless the condition is 0; index: even.

    No branch: behind one, an instruction of the whole warp would first check that all lanes are there.
    """
    if condition:
        if index % 2:
            raise IndexError(f"a pair of float16 at odd element {index}")
        array[index], array[index + 1] = int(word) & 0xFFFF, int(word) >> 16


@instruction(
    "{ .reg .pred p; setp.ne.u32 p, $3, 0; @p st.global.v2.b32 [$0], {$1, $2}; }",
    (),
    (ADDRESS, u32, u32, u32),
    effect=True,
)
def store_pairs_if(array, index, first, second, condition):
    """`store_pair_if` of two words; index: a multiple of 4."""
    if condition:
        if index % 4:
            raise IndexError(f"two pairs of float16 at element {index}, which is no multiple of 4")
        for i, word in enumerate((int(first), int(second))):
            array[index + 2 * i], array[index + 2 * i + 1] = word & 0xFFFF, word >> 16


@instruction("ld.global.nc.b64 $0, [$1];", (i64,), (ADDRESS,), effect=True)
def load_constant_i64(array, index):
    """An int64 that no kernel writes while this one runs."""
    return int(array[index])


@instruction("fence.acq_rel.gpu;", (), (), memory=True)
def fence_gpu():
    """Order this thread's accesses, and with a barrier those of its CTA, as other CTAs see them; cheaper than
    `cuda.threadfence`, which is sequentially consistent.
    """


@instruction("ld.relaxed.gpu.global.f32 $0, [$1];", (f32,), (ADDRESS,), memory=True)
def load_relaxed_f32(array, index):
    """A float32 that another CTA of this launch wrote, read from L2."""
    return np.float32(array[index])


@instruction("ld.relaxed.gpu.global.b64 $0, [$1];", (i64,), (ADDRESS,), memory=True)
def load_relaxed_i64(array, index):
    """The same of an int64."""
    return int(array[index])


@instruction("ld.relaxed.gpu.global.v4.f32 {$0, $1, $2, $3}, [$4];", (f32,) * 4, (ADDRESS,), memory=True)
def load_relaxed_f32x4(array, index):
    """Four float32 that another CTA of this launch wrote, read from L2."""
    return tuple(np.float32(array[index + i]) for i in range(4))


@instruction("st.relaxed.gpu.global.v4.f32 [$0], {$1, $2, $3, $4};", (), (ADDRESS,) + (f32,) * 4, memory=True)
def store_relaxed_f32x4(array, index, a, b, c, d):
    """Four float32 for readers in other CTAs of this launch; each of the four is written by one access."""
    for i, value in enumerate((a, b, c, d)):
        array[index + i] = value


@instruction(
    "{ .reg .b64 a, b; ld.relaxed.gpu.global.v2.b64 {a, b}, [$4]; mov.b64 {$0, $1}, a; mov.b64 {$2, $3}, b; }",
    (u32,) * 4,
    (ADDRESS,),
    memory=True,
)
def ll_load(array, index):
    """Two 8-byte words that other CTAs of this launch may be writing, as (low, high, low, high).

    Each word is read by one access: both halves are of the same `ll_store`. index: even.
    """
    first, second = int(array[index]), int(array[index + 1])
    back_off(int(index), (first, second))
    return first & 0xFFFFFFFF, first >> 32, second & 0xFFFFFFFF, second >> 32


@instruction(
    "{ .reg .b64 a; mov.b64 a, {$1, $2}; st.relaxed.gpu.global.b64 [$0], a; }", (), (ADDRESS, u32, u32), memory=True
)
def ll_store(array, index, low, high):
    """Write an 8-byte word by one access, for readers in other CTAs of this launch."""
    array[index] = int(low) | int(high) << 32


@instruction(
    "{ .reg .b64 a, b; ld.relaxed.sys.global.v2.b64 {a, b}, [$4]; mov.b64 {$0, $1}, a; mov.b64 {$2, $3}, b; }",
    (u32,) * 4,
    (ADDRESS,),
    memory=True,
)
def ll_load_sys(array, index):
    """`ll_load` of words that other GPUs may be writing."""
    first, second = int(array[index]), int(array[index + 1])
    back_off(int(index), (first, second))
    return first & 0xFFFFFFFF, first >> 32, second & 0xFFFFFFFF, second >> 32


@instruction(
    "{ .reg .b64 a; mov.b64 a, {$1, $2}; st.relaxed.sys.global.b64 [$0], a; }", (), (ADDRESS, u32, u32), memory=True
)
def ll_store_sys(array, index, low, high):
    """`ll_store` for readers on other GPUs, too; the array may be another GPU's."""
    array[index] = int(low) | int(high) << 32


@instruction("ld.relaxed.gpu.global.v4.b32 {$0, $1, $2, $3}, [$4];", (u32,) * 4, (ADDRESS,), memory=True)
def load_relaxed_16(array, index):
    """Four 32-bit words that other CTAs of this launch may be writing, read from L2; each is read by one access."""
    words = tuple(int(array[index + i]) for i in range(4))
    back_off(int(index), words)
    return words


@instruction("st.relaxed.gpu.global.b32 [$0], $1;", (), (ADDRESS, u32), memory=True)
def store_relaxed_u32(array, index, value):
    """A 32-bit word for readers in other CTAs of this launch."""
    array[index] = value


@instruction("ld.relaxed.sys.global.v4.b32 {$0, $1, $2, $3}, [$4];", (u32,) * 4, (ADDRESS,), memory=True)
def load_relaxed_16_sys(array, index):
    """`load_relaxed_16` of words that other GPUs may be writing."""
    words = tuple(int(array[index + i]) for i in range(4))
    back_off(int(index), words)
    return words


@instruction("st.relaxed.sys.global.b32 [$0], $1;", (), (ADDRESS, u32), memory=True)
def store_relaxed_u32_sys(array, index, value):
    """`store_relaxed_u32` for readers on other GPUs, too; the array may be another GPU's."""
    array[index] = value


@instruction("prefetch.global.L2 [$0];", (), (ADDRESS,), effect=True)
def prefetch_l2(array, index):
    """Prefetch the cache line of an element into L2. A hint without a result."""
