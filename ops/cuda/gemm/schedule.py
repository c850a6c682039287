"""Which CTA computes what of a GEMM: whole tiles first, then the rest of the tiles in equal shares (stream-K).

T tiles of `TILE_ROWS` weight rows and `tile_tokens` tokens, `units` long along K, over C persistent CTAs. As long as
there are C tiles, each CTA takes one: floor(T / C) waves. The R tiles that are left over would keep R CTAs busy and the
others idle. If that costs more than the fix-up, their R * units units are laid end to end and cut into equal shares,
one for each CTA: it takes the end of a tile and the beginning of the next. A tile's parts are float32 partial sums in
scratch memory, which they add in order of K when all have written (`fixup.py`).

Tiles are numbered with tokens inside: the CTAs of a wave read the same rows of weights, each of which comes from device
memory once. The number of tiles follows from `token_tiles`, an argument of the launch: one kernel serves chunks of any
length.

Source: Osama et al., "Stream-K: Work-centric Parallel Decomposition for Dense Matrix-Matrix Multiplication" (2023).
"""

from typing import Any, NamedTuple

from numba import cuda

from numba_atomflow.ops import ptx
from numba_atomflow.ops.cuda.gemm.plan import GemmPlan
from numba_atomflow.ops.cuda.scalars import i32, u32


class Schedule(NamedTuple):
    """Device functions; `token_tiles`: of the launch.

    Attributes:
        work: (number, token_tiles) -> (tile, first, last): work number 0, 1, 2, ... of this CTA: units first to
            last - 1 of a tile; tile -1: there is no more.
        sharers: (tile, token_tiles) -> (slot, count): of a tile that is shared: the first slot of its partial sums, and
            the number of CTAs, which have the slots from there on in the order of K.
        slot: (tile, token_tiles) -> this CTA's slot of a shared tile.
    """

    work: Any
    sharers: Any
    slot: Any


def make_schedule(plan: GemmPlan) -> Schedule:
    """The schedule of a plan."""
    ctas, row_tiles, units = plan.ctas, plan.row_tiles, plan.units
    fixup_units, min_units = plan.fixup_units, plan.min_units

    @ptx.device_function
    def split(token_tiles):
        """Whole waves; tiles that are shared, and the CTAs that share them (0, 0: none is)."""
        tiles = i32(row_tiles * token_tiles)
        waves = i32(u32(tiles) // u32(ctas))
        rest = i32(tiles - waves * ctas)
        shared = rest > 0 and (ctas - rest) * units > fixup_units * ctas
        sharing = i32(u32(rest * units) // u32(min_units))
        sharing = rest if sharing < rest else i32(ctas) if sharing > ctas else sharing
        if not shared:
            waves, rest, sharing = i32(waves + 1), i32(0), i32(0)
        return waves, rest, sharing

    @ptx.device_function
    def share_of(unit, shared_units, sharing):
        """Which CTA's share a unit is in: shares begin at cta * shared_units // sharing."""
        return i32(u32(u32(unit + 1) * u32(sharing) - u32(1)) // u32(shared_units))  # all of 32 bits: no call

    @ptx.large_device_function
    def work(number, token_tiles):
        waves, rest, sharing = split(token_tiles)
        cta = i32(cuda.blockIdx.x)
        tile, first, last = i32(number * ctas + cta), i32(0), i32(units)
        if number >= waves:
            shared_units = i32(rest * units)
            start, end = i32(0), i32(0)
            if cta < sharing:
                start = i32(u32(cta * shared_units) // u32(sharing))
                end = i32(u32((cta + 1) * shared_units) // u32(sharing))
            tile = i32(i32(u32(start) // u32(units)) + number - waves)
            first, last = i32(start - tile * units), i32(end - tile * units)
            first, last = first if first > 0 else i32(0), last if last < units else i32(units)
            tile = i32(tile + waves * ctas) if first < last else i32(-1)
        elif tile >= row_tiles * token_tiles:
            tile = i32(-1)
        return tile, first, last

    @ptx.large_device_function
    def sharers(tile, token_tiles):
        waves, rest, sharing = split(token_tiles)
        number = i32(tile - waves * ctas)  # among the shared ones
        first = share_of(number * units, rest * units, sharing)
        last = share_of(number * units + units - 1, rest * units, sharing)
        return i32(first + number), i32(last - first + 1)

    @ptx.large_device_function
    def slot(tile, token_tiles):
        waves, _, _ = split(token_tiles)
        return i32(i32(cuda.blockIdx.x) + tile - waves * ctas)

    return Schedule(work, sharers, slot)
