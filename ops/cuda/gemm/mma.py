"""The GEMM with `mma.sync`, for GPUs without `wgmma`; it runs on every one since sm_80.

A CTA of 8 warps computes tiles of 128 weight rows by `tile_tokens`; a warp has one prepacked tile of 16 rows and all
tokens. Tiles and their units of 128 of K come from the schedule (`schedule.py`).

- W: a lane loads 16 bytes at a time from the order in which weights are prepacked, one unit ahead, and converts them to
  the A fragments of four instructions.
- X: units of the tile lie in shared memory, brought by `cp.async` in the swizzled order that tiled activations have;
  `ldmatrix` reads B fragments of 16 tokens without bank conflicts. A slot of the pipeline is two of the plan's stages
  (K blocks): a unit. One barrier for each unit.
- sums: the tensor core adds the 64 products of a K block, from zero on; their sum times the scale is added to the
  float32 sum of the tile. So scales are exact, and a group with scale 0 contributes 0. The order of the additions of an
  output element depends on neither `tile_tokens` nor the number of tokens, unless CTAs share the tile.

Cost model: a unit reads 16 KB of weights and 256 bytes for each token from L2, and takes 128 x 128 x `tile_tokens`
multiplications. Every warp reads all B fragments: 256 bytes of shared memory (2 cycles) for an instruction that an SM
of sm_80 executes in 2 cycles too, and one of sm_89 or sm_120 in 8.
"""

from typing import Any

from numba import cuda, float32, int32, uint32

from numba_atomflow.ops import ptx
from numba_atomflow.ops.cuda.gemm.consumer import make_tile_writer, make_weights_start
from numba_atomflow.ops.cuda.gemm.epilogue import CONSUMERS, GemmEpilogue
from numba_atomflow.ops.cuda.gemm.plan import GemmPlan, mma_ctas_per_sm
from numba_atomflow.ops.cuda.gemm.schedule import Schedule, make_schedule
from numba_atomflow.ops.cuda.gemm.weights import A_REGISTERS, make_weight_loads
from numba_atomflow.ops.cuda.layout.activations import BLOCK_BYTES, BLOCK_WORDS
from numba_atomflow.ops.cuda.scalars import f32, i32, u32

_BLOCKS = 2  # K blocks of a unit
_TILE, _UNIT, _LAST, _NUMBER = range(4)  # of the unit that is copied next: its tile, the end of its work, the next work
_ZERO = f32(0.0)


def mma_shared_bytes(plan: GemmPlan, epilogue: GemmEpilogue) -> int:
    """Dynamic shared memory of a CTA: the slots of X, what the epilogue stages."""
    return 4 * (_slots(plan) * _BLOCKS * plan.stage_words + epilogue.stage_words)


def _slots(plan: GemmPlan) -> int:
    """Units of X in shared memory."""
    return plan.stages // _BLOCKS


def make_gemm_mma(plan: GemmPlan, epilogue: GemmEpilogue, *, dependent: bool = False) -> Any:
    """A projection's kernel of `CONSUMERS` threads. Its parameter `io` has `weights`, `x`, `partials`,
    `token_tiles` and what the epilogue reads and writes.

    `tile_tokens` is a multiple of 16, `stages` at least 4; x is float16.
    """
    tile_tokens, slots = plan.tile_tokens, _slots(plan)
    if tile_tokens % 16 or slots < 2 or plan.x.bits != 16:
        raise ValueError(f"no GEMM with mma.sync has tiles of {tile_tokens} tokens in {plan.stages} stages")
    loads, schedule, sum_count = make_weight_loads(plan.layout), make_schedule(plan), tile_tokens // 2
    load, load_scales, convert, code_count = loads.load, loads.load_scales, loads.convert, loads.code_registers
    slot_bytes, stage_at = 4 * _BLOCKS * plan.stage_words, slots * _BLOCKS * plan.stage_words
    work, weights_start = schedule.work, make_weights_start(plan)
    write, finish_tiles = make_tile_writer(plan, schedule, epilogue, stage_at)
    (fetch, advance), set_rows, multiply = _make_fetch(plan, schedule), _make_rows(), _make_multiply(plan)
    wait_copies = ptx.make_wait_copies(slots - 2)

    @ptx.kernel(CONSUMERS, mma_ctas_per_sm(plan.layout, tile_tokens))
    def gemm(io):
        words = cuda.shared.array(0, uint32)
        codes = cuda.local.array(code_count, uint32)
        a = cuda.local.array(A_REGISTERS, uint32)
        next_scales, scales = cuda.local.array(2, float32), cuda.local.array(2, float32)
        sums = cuda.local.array(sum_count, float32)
        rows = cuda.local.array(4, uint32)
        copied = cuda.local.array(4, int32)
        thread = i32(cuda.threadIdx.x)
        lane, warp = i32(thread & 31), i32(thread >> 5)
        number, shared_from = i32(0), i32(-1)
        tile, first, last = work(number, io.token_tiles)
        if tile < 0:
            return

        set_rows(words, lane, rows)
        start = weights_start(tile, warp, io.token_tiles)
        load_scales(io.weights, start, first, lane, next_scales)
        for block in range(_BLOCKS):
            load(io.weights, start, first, block, lane, codes)
        if dependent:
            ptx.let_next_kernel_start()
            ptx.wait_for_previous_kernel()
        copied[_TILE], copied[_UNIT], copied[_LAST], copied[_NUMBER] = tile, first, last, i32(1)
        for i in range(slots - 1):
            fetch(io, words, u32(i * slot_bytes), copied, thread)
            advance(io, copied)

        slot, free = u32(0), u32((slots - 1) * slot_bytes)  # bytes of shared memory
        while tile >= 0:
            number = i32(number + 1)
            for i in range(sum_count):
                sums[i] = _ZERO
            for unit in range(first, last):
                ahead = i32(unit + 1)  # whose weights are loaded; after the last tile those of any unit
                if ahead == last:
                    next_tile, ahead, _ = work(number, io.token_tiles)
                    start = weights_start(next_tile if next_tile >= 0 else i32(0), warp, io.token_tiles)
                scales[0], scales[1] = next_scales[0], next_scales[1]
                # Ahead of the barrier: otherwise the compiler puts the loads where they are used, in the next unit.
                load_scales(io.weights, start, ahead, lane, next_scales)
                convert(codes, 0, a, True, True)
                load(io.weights, start, ahead, 0, lane, codes)
                wait_copies()
                cuda.syncthreads()  # the slot's copies of all threads have arrived, and all have read the free slot
                fetch(io, words, free, copied, thread)
                multiply(words, slot, 0, rows, a, scales, sums)
                convert(codes, 1, a, True, True)
                load(io.weights, start, ahead, 1, lane, codes)
                multiply(words, slot, 1, rows, a, scales, sums)
                advance(io, copied)
                free = slot
                slot = u32(slot + u32(slot_bytes)) if slot < (slots - 1) * slot_bytes else u32(0)
            shared_from = write(io, words, 0, i32(number - 1), shared_from, tile, first, last, sums, thread)
            cuda.syncthreads()  # or the compiler checks before each shuffle of the epilogue that all lanes are there
            tile, first, last = work(number, io.token_tiles)  # again, and not kept in registers meanwhile
        finish_tiles(io, words, 0, shared_from, thread)

    return gemm


def _make_fetch(plan: GemmPlan, schedule: Schedule) -> tuple[Any, Any]:
    """Device functions: fetch (io, words, slot, copied, thread): start the copies of the next unit of X, `copied`, into
    the slot at this byte of shared memory, as one group; it is empty after the last unit. advance (io, copied): to the
    unit behind.
    """
    work, block_words, stage_words = schedule.work, plan.x.block_words, plan.stage_words
    block_vectors = plan.tile_tokens * BLOCK_BYTES // ptx.COPY_BYTES
    vectors = _BLOCKS * block_vectors // CONSUMERS  # of a thread
    whole = block_vectors % CONSUMERS == 0

    @ptx.device_function
    def fetch(io, words, slot, copied, thread):
        if copied[_TILE] >= 0:
            token_tile = u32(copied[_TILE]) % u32(io.token_tiles)
            start = copied[_UNIT] * (_BLOCKS * block_words) + i32(token_tile) * stage_words
            address = ptx.shared_address(words, 0) + slot
            for i in range(vectors):
                vector = i * CONSUMERS + thread
                if whole:  # `thread` changes neither quotient nor sum of the remainder
                    source = i * CONSUMERS // block_vectors * block_words + (i * CONSUMERS % block_vectors + thread) * 4
                else:
                    source = vector // block_vectors * block_words + vector % block_vectors * 4
                ptx.copy_async_16(words, address + u32(vector * 16), io.x, start + source, u32(16))
        ptx.commit_copies()

    @ptx.device_function
    def advance(io, copied):
        if copied[_TILE] >= 0:
            copied[_UNIT] = i32(copied[_UNIT] + 1)
            if copied[_UNIT] == copied[_LAST]:
                copied[_TILE], copied[_UNIT], copied[_LAST] = work(copied[_NUMBER], io.token_tiles)
                copied[_NUMBER] = i32(copied[_NUMBER] + 1)

    return fetch, advance


def _make_rows() -> Any:
    """Device function (words, lane, rows): the addresses that a lane gives to `ldmatrix`: for the four k-steps of a K
    block, of the first slot and the first 16 tokens.
    """

    @ptx.device_function
    def set_rows(words, lane, rows):
        # Lanes 0-7 and 8-15 have the rows of both chunks of tokens 0-7, the others those of tokens 8-15.
        token, chunk = (lane >> 4) * 8 + (lane & 7), lane >> 3 & 1
        for k in range(4):
            rows[k] = ptx.shared_address(words, token * BLOCK_WORDS + ((k * 2 + chunk) ^ (lane & 7)) * 4)

    return set_rows


def _make_multiply(plan: GemmPlan) -> Any:
    """Device function (words, slot, block, rows, a, scales, sums): sums += a K block of W X."""
    tile_tokens, scaled = plan.tile_tokens, plan.layout.format.scaled

    @ptx.device_function
    def multiply(words, slot, block, rows, a, scales, sums):
        c = cuda.local.array(8, float32)
        for pair in range(tile_tokens // 16):
            for i in range(8):
                c[i] = _ZERO
            for k in range(4):
                address = rows[k] + slot + u32((block * tile_tokens + pair * 16) * BLOCK_BYTES)
                b0, b1, b2, b3 = ptx.load_matrix(words, u32(address))
                a0, a1, a2, a3 = a[4 * k], a[4 * k + 1], a[4 * k + 2], a[4 * k + 3]
                c[0], c[1], c[2], c[3] = ptx.mma(a0, a1, a2, a3, b0, b1, c[0], c[1], c[2], c[3])
                c[4], c[5], c[6], c[7] = ptx.mma(a0, a1, a2, a3, b2, b3, c[4], c[5], c[6], c[7])
            for i in range(8):
                sums[8 * pair + i] += c[i] * scales[i // 2 % 2] if scaled else c[i]

    return multiply
