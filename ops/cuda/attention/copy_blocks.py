"""Keys and values of one sequence between KV blocks and a contiguous array: prompts' kernels know no block table.

A chunk of a prompt in a paged cache: `gather_blocks` copies what earlier steps have written to a contiguous array, the
epilogue of QKV writes the chunk's keys and values behind it, attention reads the array, and `scatter_blocks` copies the
chunk's part to its KV blocks. The array is one layer's, and every layer uses it in turn.

Cost model: 2 * kv_dim * 2 bytes read and written for each position, in 16 bytes a thread.
"""

from dataclasses import replace
from typing import Any, NamedTuple

from numba import cuda

from numba_atomflow.ops import ptx
from numba_atomflow.ops.cuda.runtime.spec import I32, I64, U32, Planned, kernel_spec
from numba_atomflow.ops.cuda.scalars import i32

THREADS = 256
_VECTOR_WORDS = 4  # 16 bytes: of a thread


class CopyBlocksArguments(NamedTuple):
    """The kernels' parameter. All arrays are one-dimensional.

    Attributes:
        keys, values: pairs of float16 [slots, kv_dim]: the paged cache of a layer.
        table_row: [1], the sequence's row of the block table.
        block_table: [rows, stride], KV blocks of each sequence in the order of positions.
        position: [1], of the chunk's first token.
        count: [1], its tokens.
        own_keys, own_values: pairs of float16 [positions, kv_dim]: of this sequence alone.
    """

    keys: U32
    values: U32
    table_row: I64
    block_table: I32
    position: I64
    count: I64
    own_keys: U32
    own_values: U32


def make_gather_blocks(kv_dim: int, block_size: int, stride: int, *, dependent: bool = False) -> Any:
    """Kernel (`CopyBlocksArguments`): the positions before the chunk, from KV blocks to the sequence's own array.

    Launch: any number of CTAs of `THREADS` threads. `kv_dim`: a multiple of 8. `stride`: of the block table.
    """

    @ptx.device_function
    def copy(io, own, slot):
        a, b, c, d = ptx.load_16(io.keys, slot)
        e, f, g, h = ptx.load_16(io.values, slot)
        ptx.store_16(io.own_keys, own, a, b, c, d)
        ptx.store_16(io.own_values, own, e, f, g, h)

    @ptx.device_function
    def positions(io):
        return i32(0), i32(io.position[0])

    return _make_copy(kv_dim, block_size, stride, dependent, positions, copy)


def make_scatter_blocks(kv_dim: int, block_size: int, stride: int, *, dependent: bool = False) -> Any:
    """Kernel (`CopyBlocksArguments`): the chunk's positions, from the sequence's own array to KV blocks. Launch: as
    `make_gather_blocks`.
    """

    @ptx.device_function
    def copy(io, own, slot):
        a, b, c, d = ptx.load_16(io.own_keys, own)
        e, f, g, h = ptx.load_16(io.own_values, own)
        ptx.store_16(io.keys, slot, a, b, c, d)
        ptx.store_16(io.values, slot, e, f, g, h)

    @ptx.device_function
    def positions(io):
        return i32(io.position[0]), i32(io.position[0] + io.count[0])

    return _make_copy(kv_dim, block_size, stride, dependent, positions, copy)


def _make_copy(kv_dim: int, block_size: int, stride: int, dependent: bool, positions: Any, copy: Any) -> Any:
    """`positions`: device function (io) -> first, last + 1. `copy`: (io, own, slot): a vector, by its words."""
    words = kv_dim // 2
    vectors = words // _VECTOR_WORDS

    @ptx.kernel(THREADS, 1)
    def copy_blocks(io):
        if dependent:
            ptx.let_next_kernel_start()
            ptx.wait_for_previous_kernel()
        first, end = positions(io)
        row = i32(io.table_row[0]) * stride
        index = first * vectors + i32(cuda.blockIdx.x * THREADS + cuda.threadIdx.x)
        step = i32(cuda.gridDim.x * THREADS)
        while index < end * vectors:
            position, vector = index // vectors, index % vectors
            slot = io.block_table[row + position // block_size] * block_size + position % block_size
            copy(io, index * _VECTOR_WORDS, slot * words + vector * _VECTOR_WORDS)
            index = i32(index + step)

    return copy_blocks


def copy_blocks_kernels(kv_dim: int, block_size: int, stride: int, ctas: int, *, dependent: bool) -> list[Planned]:
    """The kernels ``gather_blocks<block_size>`` and ``scatter_blocks<block_size>``.

    Between kernels of a chunk they leave room for the CTAs of a GEMM that start beside them, as those do
    (`PrefillKernels.kernel`).
    """
    makers = {"gather": make_gather_blocks, "scatter": make_scatter_blocks}
    options = {"kv_dim": kv_dim, "block_size": block_size, "stride": stride, "dependent": dependent}
    specs = [
        kernel_spec(f"{name}_blocks{block_size}", maker, CopyBlocksArguments, THREADS, **options)
        for name, maker in makers.items()
    ]
    return [Planned(replace(spec, whole_carveout=dependent), ctas) for spec in specs]
